"""The wiring of a network: its layers, which of their channels stand or fall together, and what each of them costs."""

import math
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxlib_methods import trees
from jaxlib_methods.pruning._channels import Channels, Product
from jaxlib_methods.pruning._tracing import follow

__all__ = [
    "Cost",
    "Layer",
    "Wiring",
    "network_costs",
    "trace_wiring",
]

_NORMS = (nnx.BatchNorm, nnx.GroupNorm, nnx.InstanceNorm, nnx.LayerNorm, nnx.RMSNorm)


class Cost(NamedTuple):
    """One row of `network_costs`, as the profiler of RANP counts: the units are given there.

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """

    name: str  # path of the module; the kind's name for functions; "total" in the last row
    kind: str  # "convolution", "linear", "norm", "activation", "pool", "mean pool", "softmax", "other" or "total"
    flops: int  # a multiply-accumulate is one
    parameters: int
    memory: int  # elements of the output


class Layer(NamedTuple):
    """A convolution, transposed convolution or linear layer, whose output channels are its neurons.

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """

    name: str  # path of the module that owns the kernel
    kernel: str  # path of the kernel
    bias: str | None  # path of the bias
    axis: int  # of the kernel's output channels
    channels: np.ndarray  # int [width]: the channel that each neuron feeds; -1: stays whatever happens
    groups: int  # of a grouped convolution
    flops: int
    memory: int  # elements of the output

    @property
    def width(self) -> int:
        """Number of neurons."""
        return len(self.channels)

    @property
    def fixed(self) -> np.ndarray:
        """Bool [width]: neurons that stay, because the network's output (or input) has them."""
        return self.channels < 0


class Wiring(NamedTuple):
    """What `trace_wiring` found out about a network."""

    layers: tuple[Layer, ...]  # in the order of execution
    axes: dict[str, tuple[np.ndarray, ...]]  # path of a leaf of the model's state -> channel along each axis, or -1
    num_channels: int  # that can be removed; those that are tied count as one
    costs: tuple[Cost, ...]
    inputs: tuple[Any, ...]  # shapes and dtypes
    outputs: Any

    def layer(self, name: str) -> Layer:
        """The layer of this name."""
        return next(layer for layer in self.layers if layer.name == name)


def trace_wiring(model: nnx.Module, *inputs: Any, whole: tuple[str, ...] = ()) -> Wiring:
    """Derives from the network itself which channels stand or fall together.

    The model is traced in evaluation mode and every axis of every parameter is followed through its operations:
    additions and products tie channels, concatenations string them together, flattening repeats them, normalisation by
    running statistics and biases follow, and a grouped convolution ties a group's inputs and outputs, so that groups
    are removed whole. Channels of the network's input and output are kept. Nothing is computed: an abstract model
    (`nnx.eval_shape`) will do.

    Args:
      model: any nnx module that maps `inputs` to arrays by its `__call__`.
      *inputs: arrays or `jax.ShapeDtypeStruct`s. The costs are those of this batch: take 1 example for the paper's.
      whole: names of layers to keep whole, such as a layer that this function has refused.

    Returns:
      The `Wiring`.

    Raises:
      ValueError: names the layer whose channels cannot be removed consistently, and the operation that prevents it:
        one that mixes, cuts or pads channels (layer norm, softmax, pixel shuffle), or one without a rule.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> net = nnx.eval_shape(lambda: nnx.Sequential(nnx.Linear(3, 5, rngs=nnx.Rngs(0)), nnx.relu,
      ...                                             nnx.Linear(5, 2, rngs=nnx.Rngs(1))))
      >>> wiring = trace_wiring(net, jax.ShapeDtypeStruct((1, 3), float))
      >>> [(layer.name, layer.width, bool(layer.fixed.all())) for layer in wiring.layers]
      [('layers/0', 5, False), ('layers/2', 2, True)]

    Source: the ties: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp].
    """
    names, channels, axes, shape = _follow(model, inputs)
    modules = {name: _module(name) for name in names}
    roots = [tuple(channels.roots(axis) for axis in of_leaf) for of_leaf in axes]
    fixed = {int(i) for axis in channels.fixed for i in channels.roots(axis)}

    found: dict[str, dict[str, Any]] = {}
    for product in channels.products:
        out = None if product.outputs is None else channels.roots(product.outputs)
        at = _output_axis(product.leaves, out, roots, names)
        if at is None:
            continue
        leaf, axis = at
        entry = found.setdefault(
            modules[names[leaf]], {"leaf": leaf, "axis": axis, "out": out, "groups": product.groups, "memory": 0}
        )
        entry["memory"] += product.elements
    for name, entry in found.items():
        if name in whole or len(entry["out"]) == 1:
            fixed.update(entry["out"].tolist())
    unknown = set(whole) - set(found)
    if unknown:
        raise ValueError(f"whole names {sorted(unknown)}, which are no layers; these are {sorted(found)}")
    _check(found, channels, fixed, roots, modules, names)

    removable = np.array(sorted({int(i) for entry in found.values() for i in entry["out"]} - fixed), np.int64)
    number = np.full(max((int(r.max()) for rs in roots for r in rs if r.size), default=0) + 1, -1)
    number[removable] = np.arange(len(removable))
    costs = _costs(model, names, channels)
    flops = {row.name: row.flops for row in costs}
    layers = []
    for name, entry in found.items():
        out, leaf = entry["out"], entry["leaf"]
        vectors = [i for i, n in enumerate(names) if modules[n] == name and len(roots[i]) == 1]
        bias = next((names[i] for i in vectors if np.array_equal(roots[i][0], out)), None)
        sizes = entry["groups"], flops[name], entry["memory"]
        layers.append(Layer(name, names[leaf], bias, entry["axis"], number[out], *sizes))
    of_leaves = {name: tuple(number[r] for r in rs) for name, rs in zip(names, roots, strict=True)}
    return Wiring(tuple(layers), of_leaves, len(removable), costs, _shapes(inputs), shape)


def network_costs(model: nnx.Module, *inputs: Any) -> tuple[Cost, ...]:
    """Floating-point operations, parameters and activations of a network, counted in the network itself.

    The conventions are those of the paper's profiler. A convolution costs (inputs per group x window + 1 with a bias)
    for each output element, a linear layer 2 x inputs - 1 (+ 1), normalisation 4, mean pooling window + 1, and the
    rest nothing. Memory is the number of output elements of all convolutions, linear layers, normalisations,
    activations, poolings and softmaxes; concatenation and upsampling are not counted.

    Args:
      model: any nnx module, abstract (`nnx.eval_shape`) or not; it is traced in evaluation mode.
      *inputs: arrays or `jax.ShapeDtypeStruct`s; the paper takes 1 example.

    Returns:
      A row for each module or function in the order of execution, and the total.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> conv = nnx.eval_shape(lambda: nnx.Conv(2, 4, (3, 3, 3), rngs=nnx.Rngs(0)))
      >>> network_costs(nnx.Sequential(conv, nnx.relu), jax.ShapeDtypeStruct((1, 5, 5, 5, 2), float))[-1]
      Cost(name='total', kind='total', flops=27500, parameters=220, memory=1000)

    Source: Xu, Ajanthan, Vineet, Hartley (3DV 2020), arXiv:2010.02488 [xu2020ranp], and the profiler of their code.
    """
    names, channels, _, _ = _follow(model, inputs)
    return _costs(model, names, channels)


def _follow(model: nnx.Module, inputs: tuple[Any, ...]) -> tuple[list[str], Channels, list, Any]:
    graph, state = nnx.split(model)
    leaves, structure = jax.tree.flatten(state)
    names = jax.tree.leaves(trees.path_names(state))

    def forward(leaves: list[Any], *inputs: Any) -> Any:
        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        model.eval()
        return model(*inputs)

    channels, axes, shape = follow(forward, _shapes(leaves), _shapes(inputs))
    return names, channels, axes, shape


def _shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def _module(leaf: str) -> str:
    return leaf.rpartition("/")[0]


def _output_axis(leaves: frozenset[int], out: np.ndarray | None, roots: list, names: list[str]) -> tuple | None:
    """The leaf that is a product's kernel, and the axis of its output channels."""
    if out is None:
        return None
    for leaf in sorted(leaves, key=lambda i: (not names[i].endswith("kernel"), names[i])):
        for axis, identities in enumerate(roots[leaf]):
            if len(roots[leaf]) > 1 and np.array_equal(identities, out):
                return leaf, axis
    return None


def _check(
    found: dict[str, dict[str, Any]],
    channels: Channels,
    fixed: set[int],
    roots: list,
    modules: dict[str, str],
    names: list[str],
) -> None:
    """Refuses what cannot be reduced consistently, by the name of the layer."""
    owners: dict[int, str] = {}
    for name, entry in found.items():
        for i in entry["out"].tolist():
            owners.setdefault(i, name)
    remedy = "change the network there, or name the layer in `whole` to keep its channels"
    for axis, reason in channels.blocked:
        for i in channels.roots(axis).tolist():
            if i in owners and i not in fixed:
                others = {modules[names[leaf]] for leaf, rs in enumerate(roots) if any(i in r for r in rs)}
                readers = others - {owners[i]} - {""}
                shared = f", which {', '.join(sorted(readers))} share" if readers else ""
                raise ValueError(f"layer {owners[i]!r} cannot lose channels{shared}: {reason}; {remedy}")
    inputs = [product.inputs for product in channels.products if isinstance(product.inputs, np.ndarray)]
    read = {int(i) for axis in inputs for i in channels.roots(axis)}
    for i, name in owners.items():
        if i not in read and i not in fixed:
            raise ValueError(f"layer {name!r} cannot lose channels: no layer reads them; {remedy}")


def _costs(model: nnx.Module, names: list[str], channels: Channels) -> tuple[Cost, ...]:
    state = nnx.split(model, nnx.Param, ...)[1]
    sizes = {n: math.prod(leaf.shape) for n, leaf in zip(_paths(state), jax.tree.leaves(state), strict=True)}
    norms = {"/".join(map(str, path)) for path, module in nnx.iter_modules(model) if isinstance(module, _NORMS)}
    rows: dict[str | int, Cost] = {}  # by the name of a module; functions by number
    uses: dict[str, dict[int, int]] = {}  # elements that each leaf of a normalisation has met
    for event in channels.events:
        owners = sorted({_module(names[leaf]) for leaf in event.leaves})
        if isinstance(event, Product):
            name, kind = owners[0], "linear" if event.linear else "convolution"
            bias = int((f"{name}/bias" if name else "bias") in sizes)
            each = 2 * event.kernel_macs - 1 + bias if event.linear else event.kernel_macs + bias
            row = rows.get(name, Cost(name, kind, 0, 0, 0))
            rows[name] = row._replace(flops=row.flops + event.elements * each, memory=row.memory + event.elements)
        elif event.kind == "norm":
            for name in sorted(set(owners) & norms):
                use = uses.setdefault(name, {})
                for leaf in event.leaves:
                    if _module(names[leaf]) == name:
                        use[leaf] = use.get(leaf, 0) + event.elements
                elements = max(use.values())
                rows[name] = Cost(name, "norm", 4 * elements, 0, elements)
        else:
            flops = event.elements * (event.window + 1) if event.kind == "mean pool" else 0
            rows[len(rows)] = Cost(event.kind, event.kind, flops, 0, event.elements)
    table = []
    for key, row in rows.items():
        own = [n for n in sizes if _module(n) == key]
        table.append(row._replace(parameters=sum(sizes.pop(n) for n in own)))
    table += [Cost(name, "other", 0, size, 0) for name, size in sizes.items()]
    total = (sum(row[i] for row in table) for i in (2, 3, 4))
    return (*table, Cost("total", "total", *total))


def _paths(state: Any) -> list[str]:
    return jax.tree.leaves(trees.path_names(state))
