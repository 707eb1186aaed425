"""From a mask of neurons to a smaller dense network: what is removed costs no time and no memory any more."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlib_methods import trees
from jaxlib_methods.pruning.neurons import empty_layers
from jaxlib_methods.pruning.wiring import Layer, Wiring
from jaxlib_methods.typing import PyTree

__all__ = [
    "neuron_masks",
    "redraw_weights",
    "remove_neurons",
]


def neuron_masks(params: PyTree, kept: Mapping[str, np.ndarray], wiring: Wiring) -> PyTree:
    """Masks of parameters that switch the removed channels off in the full network, for `apply_masks` and `pruned`.

    False are all weights into and out of a removed channel, with its bias and its scale and shift. The masked network
    gives the same outputs as the smaller one of `remove_neurons`.

    Args:
      params: pytree of parameters whose paths are those of the wiring, such as `nnx.state(model, nnx.Param)`.
      kept: name of the layer -> bool [width], from `clean_up_neurons`.
      wiring: of the network.

    Returns:
      A tree like `params` of boolean masks.

    Raises:
      ValueError: if the masks do not agree on a channel.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jaxlib_methods.pruning import trace_wiring
      >>> net = nnx.Sequential(nnx.Linear(1, 2, rngs=nnx.Rngs(0)), nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
      >>> wiring = trace_wiring(net, jax.ShapeDtypeStruct((1, 1), float))
      >>> kept = {"layers/0": np.array([True, False]), "layers/1": np.array([True])}
      >>> neuron_masks(nnx.state(net, nnx.Param), kept, wiring)["layers"][1]["kernel"][...].tolist()
      [[True], [False]]

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    alive = _alive(kept, wiring)

    def mask(name: str, leaf: Any) -> jax.Array:
        whole = np.ones(leaf.shape, bool)
        for axis, channels in enumerate(wiring.axes[name]):
            shape = [1] * len(leaf.shape)
            shape[axis] = -1
            whole &= ((channels < 0) | alive[channels]).reshape(shape)
        return jnp.asarray(whole)

    return jax.tree.map(mask, trees.path_names(params), params)


def remove_neurons(model: nnx.Module, kept: Mapping[str, np.ndarray], wiring: Wiring) -> nnx.Module:
    """A smaller dense network with the surviving channels, in which nothing is masked.

    Every parameter and statistic is cut along each of its axes, through additions, concatenations, normalisation,
    flattening and groups, and copied: the outputs are those of the network masked by `neuron_masks`. To train from
    scratch as in the paper, pass the result to `redraw_weights`.

    Args:
      model: the network that was traced; it stays as it is. An abstract one gives an abstract one.
      kept: name of the layer -> bool [width], from `clean_up_neurons`.
      wiring: of the network.

    Returns:
      A module of the same classes; the numbers of features and groups that flax's layers keep follow their arrays.

    Raises:
      ValueError: names a layer of which nothing is left, masks that do not agree on a channel, and a module whose own
        code needs the old width.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from jaxlib_methods.pruning import trace_wiring
      >>> net = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
      >>> wiring = trace_wiring(net, jax.ShapeDtypeStruct((1, 3), float))
      >>> kept = {"layers/0": np.array([True, False, True, False]), "layers/2": np.array([True, True])}
      >>> remove_neurons(net, kept, wiring).layers[2].kernel.shape
      (2, 2)

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    if empty := empty_layers(kept):
        raise ValueError(f"nothing is left of layer {empty[0]!r}; take a lower sparsity, see max_sparsity")
    alive = _alive(kept, wiring)
    graph, state = nnx.split(model)

    def cut(name: str, leaf: Any) -> Any:
        for axis, channels in enumerate(wiring.axes[name]):
            keep = np.flatnonzero((channels < 0) | alive[channels])
            if len(keep) == len(channels):
                continue
            if isinstance(leaf, jax.ShapeDtypeStruct):
                leaf = jax.ShapeDtypeStruct((*leaf.shape[:axis], len(keep), *leaf.shape[axis + 1 :]), leaf.dtype)
            else:
                leaf = np.take(np.asarray(leaf), keep, axis=axis)  # by NumPy: every shape would be compiled otherwise
        return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf

    small = nnx.merge(graph, jax.tree.map(cut, trees.path_names(state), state))
    groups = {layer.name: (layer.groups, int(np.sum(kept[layer.name])), layer.width) for layer in wiring.layers}
    resized = []
    for path, module in nnx.iter_modules(small):
        name = "/".join(map(str, path))
        _resize(module, *groups.get(name, (1, 1, 1)))
        if name in groups and not isinstance(module, _RESIZED):
            resized.append(name)
    _check_runs(small, wiring, resized)
    return small


_RESIZED = (nnx.Conv, nnx.ConvTranspose, nnx.Linear, nnx.BatchNorm)


def _resize(module: nnx.Module, groups: int, kept: int, width: int) -> None:
    """Brings the sizes that flax's layers keep as numbers in line with their arrays."""
    if isinstance(module, nnx.Conv | nnx.ConvTranspose):
        groups = max(1, groups * kept // width)
        module.kernel_shape = module.kernel.shape  # pyrefly: ignore[bad-assignment] - flax names two sizes too many
        module.in_features, module.out_features = groups * module.kernel.shape[-2], module.kernel.shape[-1]
        if isinstance(module, nnx.Conv):
            module.feature_group_count = groups
        elif module.transpose_kernel:
            module.in_features, module.out_features = module.out_features, module.in_features
    elif isinstance(module, nnx.Linear):
        module.in_features, module.out_features = module.kernel.shape
    elif isinstance(module, nnx.BatchNorm):
        (module.num_features,) = module.mean.shape


def _check_runs(small: nnx.Module, wiring: Wiring, others: list[str]) -> None:
    graph, state = nnx.split(small)

    def forward(state: Any, *inputs: Any) -> Any:
        model = nnx.merge(graph, state)
        model.eval()
        return model(*inputs)

    where = f"; look at the sizes kept by {others}" if others else ""
    try:
        outputs = jax.eval_shape(forward, state, *wiring.inputs)
    except Exception as error:
        raise ValueError(
            f"the smaller network does not run ({error}): its own code needs an old width{where}; take widths from the "
            "shapes of arrays there, or keep the layer whole by `whole` of trace_wiring"
        ) from error
    shapes = lambda tree: [x.shape for x in jax.tree.leaves(tree)]
    if shapes(outputs) != shapes(wiring.outputs):
        found, expected = shapes(outputs), shapes(wiring.outputs)
        raise ValueError(f"the smaller network's outputs have the shapes {found} instead of {expected}{where}")


def redraw_weights(
    model: nnx.Module, *, key: jax.Array, bias_std: float | int = 1.0, scale_std: float | int = 0.02
) -> nnx.Module:
    """Draws all weights anew as the paper does before it trains the smaller network.

    Kernels: Xavier normal; biases of layers: N(0, 1); scales of normalisation: N(1, 0.02), shifts 0; running
    statistics: mean 0 and variance 1. Other parameters stay.

    Args:
      model: any nnx module; it stays as it is.
      key: typed key.
      bias_std: standard deviation of the biases.
      scale_std: standard deviation of the scales.

    Returns:
      The module with new weights.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> drawn = redraw_weights(nnx.Linear(100, 300, rngs=nnx.Rngs(0)), key=jax.random.key(0))
      >>> abs(float(drawn.kernel[...].std()) - (2 / 400) ** 0.5) < 1e-3
      True

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp], and the authors' code.
    """
    xavier = jax.nn.initializers.variance_scaling(1.0, "fan_avg", "normal")
    graph, state = nnx.split(model)
    names = jax.tree.leaves(trees.path_names(state))
    layers = {name.removesuffix("kernel") for name in names if name.endswith("kernel")}

    def draw(name: str, leaf: Any, key: jax.Array) -> Any:
        module, _, kind = name.rpartition("/")
        if kind == "kernel":
            return xavier(key, leaf.shape, leaf.dtype)
        if kind == "bias":
            in_layer = (f"{module}/" if module else "") in layers
            return bias_std * jax.random.normal(key, leaf.shape, leaf.dtype) if in_layer else jnp.zeros_like(leaf)
        if kind == "scale":
            return 1 + scale_std * jax.random.normal(key, leaf.shape, leaf.dtype)
        return {"mean": jnp.zeros_like, "var": jnp.ones_like}.get(kind, lambda leaf: leaf)(leaf)

    leaves, structure = jax.tree.flatten(state)
    keys = jax.random.split(key, max(len(leaves), 1))
    drawn = [draw(name, leaf, k) for name, leaf, k in zip(names, leaves, keys, strict=False)]
    return nnx.merge(graph, jax.tree.unflatten(structure, drawn))


def _alive(kept: Mapping[str, np.ndarray], wiring: Wiring) -> np.ndarray:
    """Bool [num_channels]; every channel must have one fate."""
    alive, dead = np.zeros(wiring.num_channels, bool), np.zeros(wiring.num_channels, bool)
    owner: dict[int, Layer] = {}
    for layer in wiring.layers:
        mask = np.asarray(kept[layer.name], bool)
        if mask.shape != (layer.width,) or not mask[layer.fixed].all():
            raise ValueError(f"kept must be bool [{layer.width}] for layer {layer.name!r}, and True where it is fixed")
        alive[layer.channels[mask & ~layer.fixed]] = True
        dead[layer.channels[~mask & ~layer.fixed]] = True
        for channel in layer.channels[~layer.fixed].tolist():
            owner.setdefault(channel, layer)
    if (alive & dead).any():
        layer = owner[int(np.flatnonzero(alive & dead)[0])]
        raise ValueError(f"kept disagrees about a channel of layer {layer.name!r}; pass it through clean_up_neurons")
    return alive
