"""The experiments' training loop against a bare jitted scan of the same steps, on LeNet-300-100.

The bare scan is one dispatch of all steps; which examples each step takes was drawn before. `fit` besides shuffles,
checks every loss, keeps a history and dispatches a hundred steps at a time; `fit, kept` also writes its log and its
checkpoints to a folder. All three end with the same parameters (`error`). Steps per second are the number of steps
over the median; the aim is that `fit` reaches 85 % of the bare scan's, that is `ratios["bare scan"]` >= 0.85.
"""

import functools
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, measure
from experiments._machinery import device_data, loop as train
from experiments.data import images as data
from jaxlib_methods import models

HEADLINES = (
    ("lenet300 steps=2000", "fit", ("bare scan",), 0.85),
    ("lenet300 steps=2000", "fit, kept", ("bare scan",)),
)
BATCH_SIZE = 100
EXAMPLES = 60_000  # as many as MNIST has, and as large; the values make no difference to the time
LAYERS = (784, 300, 100, 10)


def run(options: Options) -> Iterator[Record]:
    """Yields one case, or with --quick a shorter one."""
    steps = 300 if options.quick else 2000
    if not options.selects(f"lenet300 steps={steps}"):
        return
    network, loss_fn = _lenet()
    optimizer = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    state = train.init_state(network, optimizer, key=jax.random.key(1))
    mesh = device_data.data_mesh(BATCH_SIZE)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (EXAMPLES, 28, 28, 1), dtype=np.uint8)
    split = device_data.put(data.Split(images, rng.integers(0, 10, EXAMPLES, dtype=np.int32)), mesh)
    fit = functools.partial(
        train.fit, loss_fn, optimizer, split=split, batch_size=BATCH_SIZE, steps=steps, mesh=mesh, progress=False
    )
    params = lambda output: output[0].params

    with tempfile.TemporaryDirectory() as folder:

        def fresh_folder() -> tuple[Any, ...]:
            shutil.rmtree(f"{folder}/run", ignore_errors=True)
            return state, f"{folder}/run"

        rows = _rows(state, steps, mesh)
        bare = _bare_scan(loss_fn, optimizer)
        case = Case(
            benchmark="training_loop",
            name=f"lenet300 steps={steps}",
            implementations={
                "fit": Implementation(lambda state: fit(state=state), (state,), params),
                "fit, kept": Implementation(
                    lambda state, workdir: fit(state=state, workdir=workdir), fresh_folder, params
                ),
                "bare scan": Implementation(bare, (device_data.replicate(state, mesh), split, rows), params),
            },
            reference="bare scan",
            flops=steps * _flops_per_step(),
            seconds=60.0,
        )
        yield from measure(case, options)


def _lenet() -> tuple[Any, train.LossFn]:
    """LeNet-300-100's parameters and the mean cross entropy of a batch."""
    graph, params = nnx.split(models.LeNet300(10, rngs=nnx.Rngs(0)))

    def loss_fn(params: Any, model_state: Any, batch: data.Split, key: jax.Array) -> Any:
        logits = nnx.merge(graph, params)(data.standardise(batch.images, 33.3, 78.6))
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()
        return loss, (model_state, {})

    return params, loss_fn


def _rows(state: train.TrainState, steps: int, mesh: jax.sharding.Mesh) -> jax.Array:
    """The examples of all steps, in the order in which `fit` draws them, int32 [steps, batch]."""
    order_key = jax.random.fold_in(state.key, 0x7FFFFFFF)  # what `fit` folds in; another one shows as a large `error`
    rows = jax.jit(device_data.batch_indices, static_argnums=(2, 3))
    return device_data.replicate(rows(order_key, jnp.arange(steps, dtype=jnp.int32), EXAMPLES, BATCH_SIZE), mesh)


def _bare_scan(loss_fn: train.LossFn, optimizer: optax.GradientTransformation) -> Any:
    def one_step(split: device_data.OnDevice, carry: Any, rows: jax.Array) -> tuple[Any, jax.Array]:
        params, opt_state, key = carry
        batch = device_data.gather(split, rows)
        (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, (), batch, key)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state, key), loss

    @functools.partial(jax.jit, donate_argnums=0)
    def scan(state: train.TrainState, split: device_data.OnDevice, rows: jax.Array) -> Any:
        carry = state.params, state.opt_state, state.key
        (params, opt_state, key), losses = jax.lax.scan(functools.partial(one_step, split), carry, rows)
        return train.TrainState(state.step + jnp.int32(len(rows)), params, opt_state, (), key), losses

    return scan


def _flops_per_step() -> float:
    """Multiplications and additions of the products: forward, for the weights, and for all inputs but the first."""
    products = [a * b for a, b in itertools.pairwise(LAYERS)]
    return 2.0 * BATCH_SIZE * (3 * sum(products) - products[0])
