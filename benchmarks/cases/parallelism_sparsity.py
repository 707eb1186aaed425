"""Trainings of the study of batch size and sparsity: all trials vmapped in one program, against one after the other.

Cases `MODEL B=b trials=n`: n pruned networks with their own weights, masks, learning rates and order of examples are
trained for 20 steps and checked on the validation set, by `experiments.tasks.trials`. "vmapped" is one call;
"sequential" is one call for each trial of the same program compiled for a single trial, a scan over the steps as well.
Configurations per hour are n divided by the time a training takes: their ratio is the inverse ratio of the times. On
several devices the vmapped trials are spread over them.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, measure
from experiments._machinery import device_data
from experiments.data import images as data
from experiments.tasks import metaparameters, trials
from jaxlib_methods import models

HEADLINES = (
    ("lenet300 B=8 trials=16", "vmapped", ("sequential",)),
    ("lenet300 B=64 trials=16", "vmapped", ("sequential",)),
    ("simple_cnn B=16 trials=8", "vmapped", ("sequential",)),
)
STEPS = 20
EXAMPLES, VALIDATION = 1293, 144  # of the digits
CASES = (("lenet300", (8, 8, 1), 8, 16), ("lenet300", (8, 8, 1), 64, 16), ("simple_cnn", (28, 28, 1), 16, 8))


def run(options: Options) -> Iterator[Record]:
    """Yields every case; with --quick no convolutions."""
    for model, shape, batch_size, count in CASES:
        name = f"{model} B={batch_size} trials={count}"
        if options.selects(name) and not (options.quick and model == "simple_cnn"):
            yield from measure(make_case(name, model, shape, batch_size, count), options)


def make_case(name: str, model: str, shape: tuple[int, ...], batch_size: int, count: int, steps: int = STEPS) -> Case:
    """Both ways to train, from the same start; their results are the trained weights."""
    build = lambda key: models.create(model, num_classes=10, input_shape=shape, rngs=nnx.Rngs(params=key))
    graph, _ = nnx.split(nnx.eval_shape(lambda: build(jax.random.key(0))))
    logits = lambda params, images: nnx.merge(graph, params)(data.standardise(images, 8.0, 8.0))

    def loss(params: nnx.State, batch: data.Split) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, batch.images), batch.labels).mean()

    rng = np.random.default_rng(0)
    splits = [
        data.Split(rng.integers(0, 17, (n, *shape), np.uint8), rng.integers(0, 10, n, np.int32))
        for n in (EXAMPLES, VALIDATION)
    ]
    keys = jax.random.split(jax.random.key(0), count)
    params = jax.jit(jax.vmap(lambda key: nnx.split(build(key))[1]))(keys)
    masks = jax.jit(jax.vmap(lambda params: jax.tree.map(lambda w: jnp.abs(w) > jnp.median(jnp.abs(w)), params)))(
        params
    )
    optimizer_of = metaparameters.make_optimizer("momentum", "constant")
    values = metaparameters.search(("learning_rate", "momentum"), count)
    values["learning_rate"] = values["learning_rate"] * 0.01  # none of them diverges

    def program(size: int) -> trials.Program:
        mesh = trials.trials_mesh(size)
        on_mesh = [device_data.replicate(split, mesh) for split in splits]
        optimizer = optimizer_of(learning_rate=1.0, momentum=0.9)
        return trials.Program(loss, logits, optimizer, *on_mesh, batch_size=batch_size, interval=steps, mesh=mesh)

    def start(chosen: slice) -> trials.Trials:
        of = lambda tree: jax.tree.map(lambda x: x[chosen], tree)
        return trials.start(of(params), of(masks), of(values), keys[chosen], optimizer_of)

    together, alone = program(count), program(1)
    singles = [start(slice(i, i + 1)) for i in range(count)]

    def sequential() -> list[nnx.State]:
        return [alone.advance(state, goal_error=-1.0).params for state in singles]

    stacked = lambda trained: jax.tree.map(lambda *x: np.concatenate(x), *trained)
    return Case(
        benchmark="parallelism_sparsity",
        name=name,
        implementations={
            "vmapped": Implementation(
                lambda state: together.advance(state, goal_error=-1.0).params, (start(slice(None)),)
            ),
            "sequential": Implementation(sequential, canonical=stacked),
        },
        reference="sequential",
        seconds=30.0,
    )
