"""Fresh processes: until the first training step is done with a cold and a warm compilation cache, and imports."""

import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.timing import Case, Implementation, Options, Record, measure

ROOT = pathlib.Path(__file__).resolve().parents[2]
HEADLINES = (
    ("first step", "warm cache", ("cold cache",)),
    ("import", "jaxlib_methods, whole", ("jax, flax, optax",)),
    ("list", "experiments list", ("python",)),
)

# LeNet-300-100 on the embedded digits, in the experiments' own loop and with their choice of what to cache.
FIRST_STEP = """
import jax, optax
from flax import nnx
from experiments._machinery import loop as train
from experiments.data import images as data
from jaxlib_methods import models

jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
digits = data.load("digits")
graph, params = nnx.split(models.LeNet300(10, input_shape=digits.train.images.shape[1:], rngs=nnx.Rngs(0)))

def loss_fn(params, model_state, batch, key):
    logits = nnx.merge(graph, params)(data.standardise(batch.images, 5.0, 6.0))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean(), (model_state, {})

optimizer = optax.sgd(0.1, momentum=0.9)
state = train.init_state(params, optimizer, key=jax.random.key(0))
state, _ = train.fit(loss_fn, optimizer, state, digits.train, batch_size=100, steps=1, progress=False)
jax.block_until_ready(state)
"""

# The library and all its public packages: what the imports of its dependencies alone are compared with.
WHOLE_LIBRARY = """
import importlib, pkgutil
import jaxlib_methods
for module in pkgutil.iter_modules(jaxlib_methods.__path__, "jaxlib_methods."):
    importlib.import_module(module.name)
"""


def run(options: Options) -> Iterator[Record]:
    """Yields the cases `first step`, `import` and `list`."""
    if options.selects("first step"):
        yield from _first_step(options)
    imports = {
        "jaxlib_methods": "import jaxlib_methods",
        "jaxlib_methods, whole": WHOLE_LIBRARY,
        "jax, flax, optax": "import jax, flax.nnx, optax",
        "jax": "import jax",
        "python": "pass",
    }
    commands = {"experiments list": _python("-m", "experiments", "list"), "python": _python("-c", "pass")}
    for name, programs in (
        ("import", {title: _python("-c", program) for title, program in imports.items()}),
        ("list", commands),
    ):
        if options.selects(name):
            yield from measure(_case(name, {t: Implementation(program) for t, program in programs.items()}), options)


def _first_step(options: Options) -> list[Record]:
    with tempfile.TemporaryDirectory() as folder:

        def empty() -> tuple[Any, ...]:
            return (tempfile.mkdtemp(dir=folder),)

        first_step = _python("-c", FIRST_STEP)
        warm = f"{folder}/warm"  # the warm-up call fills it
        case = {"cold cache": Implementation(first_step, empty), "warm cache": Implementation(first_step, (warm,))}
        return measure(_case("first step", case), options)


def _case(name: str, implementations: dict[str, Implementation]) -> Case:
    return Case("start_up", name, implementations, warm_up=1, seconds=60.0)


def _python(*arguments: str) -> Callable[..., None]:
    """A fresh interpreter in the checkout, waited for; its compilation cache, where one is given, is that folder."""

    def program(cache: str | None = None) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
        if cache is not None:
            environment["JAX_COMPILATION_CACHE_DIR"] = cache
        done = subprocess.run(
            [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"python {' '.join(arguments)[:60]} failed: {done.stderr[-2000:]}")

    return program
