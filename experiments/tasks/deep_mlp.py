"""Very deep dense networks whose hidden layers are one scan: what XLA compiles does not grow with the depth.

    params = init(key, depth=100, width=64, inputs=64, outputs=10, kind="orthogonal")
    logits = apply(params, x, jnp.tanh)

Depth counts the layers with weights. `unstack` gives the layers one by one, as pruning reads them; `stack` undoes it.
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods import pruning

PyTree = Any
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "linear": lambda x: x,
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
}


@functools.partial(jax.jit, static_argnames=("depth", "width", "inputs", "outputs", "kind"))
def init(
    key: jax.Array, *, depth: int, width: int, inputs: int, outputs: int, kind: str, gain: float | jax.Array = 1.0
) -> PyTree:
    """Weights by `pruning.reinitialize`, biases zero; `gain` multiplies all weights but the last layer's."""
    sizes = [inputs, *[width] * (depth - 1), outputs]
    shaped = [{"bias": jnp.zeros(k), "kernel": jnp.zeros((n, k))} for n, k in itertools.pairwise(sizes)]
    first, *hidden, last = pruning.reinitialize(shaped, key=key, kind=kind)
    return rescale(stack([first, *hidden, last]), gain)


def stack(layers: list[PyTree]) -> PyTree:
    """The parameters {"first", "hidden" with a leading axis of layers, "last"} from a list of at least three layers."""
    first, *hidden, last = layers
    return {"first": first, "hidden": jax.tree.map(lambda *x: jnp.stack(x), *hidden), "last": last}


def unstack(params: PyTree) -> list[PyTree]:
    """The layers {"bias" [k], "kernel" [n, k]} in order, of parameters, scores or masks."""
    count = len(params["hidden"]["bias"])
    hidden = [jax.tree.map(lambda x: x[i], params["hidden"]) for i in range(count)]
    return [params["first"], *hidden, params["last"]]


def rescale(params: PyTree, gain: float | jax.Array) -> PyTree:
    """Weights times `gain` in front of every activation."""
    scaled = {name: {**params[name], "kernel": gain * params[name]["kernel"]} for name in ("first", "hidden")}
    return {**params, **scaled}


def apply(params: PyTree, x: jax.Array, activation: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Logits [batch, outputs] of inputs [batch, ...], which are flattened."""
    affine = lambda x, layer: x @ layer["kernel"] + layer["bias"][None]
    x = activation(affine(x.reshape(len(x), -1), params["first"]))
    x, _ = jax.lax.scan(lambda x, layer: (activation(affine(x, layer)), None), x, params["hidden"])
    return affine(x, params["last"])
