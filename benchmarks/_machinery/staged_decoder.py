"""What benchmarks of pipelines share: a decoder in stages, fake devices on one core, training from call to call."""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from jaxlib_methods import models, parallel
from jaxlib_methods.parallel import boundaries
from jaxlib_methods.parallel.pipelines import base

PyTree = Any


def fake_devices(count: int = 8) -> None:
    """Devices for pipelines where there is a CPU alone, all on one core; before JAX and its threads start."""
    jax.config.update("jax_num_cpu_devices", count)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})


def mesh(num_stages: int, num_replicas: int = 1) -> jax.sharding.Mesh:
    """Over JAX's devices, or over fake ones where those are too few."""
    enough = len(jax.devices()) >= num_stages * num_replicas
    return parallel.make_mesh(num_stages, num_replicas, devices=jax.devices() if enough else jax.devices("cpu"))


def decoder(
    config: models.GPTConfig, subspace: boundaries.Subspace | None = None
) -> tuple[parallel.StageModel, tuple[PyTree, list[PyTree], PyTree]]:
    """(model, parameters by part) of a decoder or a subspace network; its loss is the mean cross-entropy."""
    functions = models.gpt_stages(config)

    def head(params: PyTree, x: jax.Array, targets: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(functions.head(params, x), targets).mean()

    params = models.split_gpt_params(config, initial(config))
    if subspace is None:
        return parallel.StageModel(functions.embed, functions.block, head), params
    return boundaries.subspace_model(functions.embed, functions.block, head, subspace), params


def initial(config: models.GPTConfig) -> nnx.State:
    """Parameters of a `GPT`; in one program, because its initialisation has many small ones."""
    return jax.jit(lambda key: nnx.state(models.GPT(config, rngs=nnx.Rngs(key)), nnx.Param))(jax.random.key(0))


def tokens(config: models.GPTConfig, count: int, examples: int) -> tuple[np.ndarray, np.ndarray]:
    """Microbatches (inputs, targets) of random tokens, int32 (count, examples, T)."""
    ids = np.random.default_rng(0).integers(config.vocab_size, size=(2, count, examples, config.block_size))
    return tuple(ids.astype(np.int32))


class Training:
    """Goes on from call to call: an asynchronous pipeline does its full work only when it has been filled."""

    def __init__(self, step: Callable[..., Any], state: Any, *batches: Any):
        self.step, self.state, self.batches = step, state, batches

    def __call__(self) -> Any:
        new = self.step(self.state, *self.batches)
        self.state = new[0] if isinstance(new[1], base.Losses) else new
        return jax.tree.leaves(self.state)[0]
