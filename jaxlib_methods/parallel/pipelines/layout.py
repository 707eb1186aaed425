"""Training state between the host and a mesh: arrays with the leading axes [P, D], and snapshots without stages.

Every leaf of a pipeline's state has the axes (stage, replica, ...) and is sharded over them, so a device holds its own
stage only. A snapshot is the same state without stages: the parameters of the embedding, of each block and of the head,
what the optimizer keeps for each of them, and its counters. A pipeline of any number of stages takes it back.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlib_methods.parallel.pipelines._engine import kinds_of
from jaxlib_methods.parallel.pipelines.mesh import mesh_sizes
from jaxlib_methods.parallel.pipelines.packing import Packed, Packing, words
from jaxlib_methods.parallel.pipelines.stages import StageTree, layers_of
from jaxlib_methods.typing import PyTree

__all__ = [
    "Snapshot",
]

SPEC = PartitionSpec("stage", "data")
Optimizer = optax.GradientTransformation | Callable[[jax.Array], optax.GradientTransformation]


class Snapshot(NamedTuple):
    """The state of training without stages: what a checkpoint holds that any pipeline can continue from.

    All keys are strings and all leaves NumPy arrays.
    """

    params: dict[str, np.ndarray]  # by path: "embed/...", "blocks/<layer>/...", "head/..."
    moments: dict[str, dict[str, np.ndarray]]  # by path in the optimizer's state, then by that of the parameter
    counters: dict[str, np.ndarray]  # the optimizer's other leaves, equal for all stages
    updates: np.ndarray  # int32 []: optimizer steps done


class Layout:
    """Where the parameters and the optimizer's state of each stage lie on a mesh.

    Args:
      mesh: with the axes "stage" and "data".
      stages: trees of the stages, of arrays or `jax.ShapeDtypeStruct`s.
      optimizer: one for all stages, or a function of a stage's delay.
      num_rounds: rounds of the schedule.
    """

    def __init__(self, mesh: Mesh, stages: Sequence[StageTree], optimizer: Optimizer, num_rounds: int):
        self.mesh = mesh
        self.num_stages, self.num_replicas = mesh_sizes(mesh)
        if len(stages) != self.num_stages:
            raise ValueError(
                f"the mesh has {self.num_stages} stages and the parameters {len(stages)}; "
                f"cut them with split_stages(params, {self.num_stages})"
            )
        self.num_rounds = num_rounds
        self.kind_of = kinds_of(self.num_stages)
        self.shapes = [jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), stage) for stage in stages]
        self._optimizer = optimizer
        self.opt_shapes = [jax.eval_shape(self.optimizer(j).init, stage) for j, stage in enumerate(self.shapes)]
        of_kinds = [self.kind_of.index(kind) for kind in sorted(set(self.kind_of))]
        self.params = Packing([self.shapes[j] for j in of_kinds])
        self.opt_state = Packing([self.opt_shapes[j] for j in of_kinds])

    def optimizer(self, stage: Any) -> optax.GradientTransformation:
        """The optimizer of a stage; its number may be traced."""
        if isinstance(self._optimizer, optax.GradientTransformation):
            return self._optimizer
        return self._optimizer(jnp.asarray(self.num_stages - 1 - stage, jnp.int32))

    def put(self, packing: Packing, *replicas: Sequence[PyTree]) -> Packed:
        """The trees of all stages on the mesh, [P, D, ...]: those of each replica, or one for all."""
        pack = lambda trees: [packing.pack(kind, tree) for kind, tree in zip(self.kind_of, trees, strict=True)]
        packed = [row for trees in replicas for row in pack(trees)]
        sharding = NamedSharding(self.mesh, SPEC)

        def place(*rows: jax.Array) -> jax.Array:
            shape = (self.num_stages, self.num_replicas, *rows[0].shape)

            def piece(index: tuple[slice, ...]) -> np.ndarray:
                stage, replica = index[0].start or 0, index[1].start or 0
                return np.asarray(rows[replica % len(replicas) * self.num_stages + stage])[None, None]

            return jax.make_array_from_callback(shape, sharding, piece)

        return jax.tree.map(place, *packed)

    def rows(self, packing: Packing, packed: Packed, replica: int = 0) -> list[PyTree]:
        """The tree of each stage, of one replica, as NumPy arrays."""
        host = jax.tree.map(lambda leaf: to_host(leaf)[:, replica], packed)
        trees = []
        for j, kind in enumerate(self.kind_of):
            tree = packing.unpack(kind, jax.tree.map(lambda leaf: leaf[j], host))
            trees.append(jax.tree.map(lambda leaf: np.asarray(words(leaf)), tree))
        return trees

    def named(self, packed: Packed, replica: int = 0) -> dict[str, np.ndarray]:
        """What is packed like the parameters, of one replica, by the names of the parameters in the model."""
        named = {}
        for j, tree in enumerate(self.rows(self.params, packed, replica)):
            names = self._names(j)
            named |= {names[path]: leaf for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        return named

    def put_named(self, *replicas: dict[str, np.ndarray]) -> Packed:
        """The inverse of `named`, [P, D, ...], in the types of the parameters."""

        def tree(j: int, named: dict[str, np.ndarray]) -> StageTree:
            names, shapes = self._names(j), self.shapes[j]
            found = _fill(shapes, lambda path: _lookup(named, names[path], "a parameter"))
            return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), found, shapes)

        return self.put(self.params, *[[tree(j, named) for j in range(self.num_stages)] for named in replicas])

    def snapshot(self, params: Packed, opt_state: Packed, updates: int, replica: int = 0) -> Snapshot:
        """The packed state of all stages of a replica without stages."""
        moments, counters = {}, {}
        for j, of_optimizer in enumerate(self.rows(self.opt_state, opt_state, replica)):
            names = self._names(j)
            for path, leaf in jax.tree_util.tree_flatten_with_path(of_optimizer)[0]:
                prefix, name = _split(path, names)
                if name is not None:
                    moments.setdefault(prefix, {})[name] = leaf
                elif prefix not in counters:
                    counters[prefix] = leaf
                elif not np.array_equal(counters[prefix], leaf):
                    raise ValueError(
                        f"the optimizer's {prefix} differs between stages, {counters[prefix]} and {leaf} in stage {j}: "
                        "it belongs neither to a parameter nor to all stages; a snapshot cannot hold it"
                    )
        return Snapshot(self.named(params, replica), moments, counters, np.asarray(updates, np.int32))

    def restored(self, snapshot: Snapshot) -> tuple[list[StageTree], list[PyTree]]:
        """The trees of this layout's stages, parameters and optimizer states, from a snapshot of any other."""
        trees, opt_states = [], []
        for j in range(self.num_stages):
            names = self._names(j)
            trees.append(_fill(self.shapes[j], lambda path: _lookup(snapshot.params, names[path], "a parameter")))

            def of_optimizer(path: tuple[Any, ...]) -> Any:
                prefix, name = _split(path, names)
                if name is None:
                    return _lookup(snapshot.counters, prefix, "a counter of the optimizer")
                return _lookup(_lookup(snapshot.moments, prefix, "a moment of the optimizer"), name, f"{prefix} of")

            opt_states.append(_fill(self.opt_shapes[j], of_optimizer))
        layers = {name.split("/")[1] for name in snapshot.params if name.startswith("blocks/")}
        have = sum(len(tree["blocks"]) for tree in trees)
        if len(layers) != have:
            raise ValueError(
                f"the snapshot has {len(layers)} blocks and this pipeline {have}; they must be one model's"
            )
        return trees, opt_states

    def _names(self, stage: int) -> dict[tuple[Any, ...], str]:
        """Path in the tree of a stage -> path in the model, with the blocks numbered through."""
        layers = layers_of(stage, sum(len(tree["blocks"]) for tree in self.shapes), self.num_stages, self.num_rounds)
        names = {}
        for path, _ in jax.tree_util.tree_flatten_with_path(self.shapes[stage])[0]:
            keys = [_text(key) for key in path]
            if keys[0] == "blocks":
                keys[1] = str(layers[int(keys[1])])
            names[path] = "/".join(keys)
        return names


def to_host(leaf: jax.Array) -> np.ndarray:
    """An array of the mesh as a NumPy array, on every process."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils  # only where there are several processes

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))


def _split(path: tuple[Any, ...], names: dict[tuple[Any, ...], str]) -> tuple[str, str | None]:
    """A path in the optimizer's state as (prefix, name of the parameter that it ends in, or None)."""
    for i in range(len(path)):
        if path[i:] in names:
            return "/".join(map(_text, path[:i])), names[path[i:]]
    return "/".join(map(_text, path)), None


def _text(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _fill(shapes: PyTree, value: Callable[[tuple[Any, ...]], Any]) -> PyTree:
    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> Any:
        found = value(path)
        if not jnp.issubdtype(shape.dtype, jax.dtypes.prng_key) and found.shape != shape.shape:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ValueError(f"the snapshot's {name} has the shape {found.shape}, this pipeline's {shape.shape}")
        return found

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def _lookup(table: dict[str, Any], name: str, what: str) -> Any:
    if name not in table:
        known = ", ".join(sorted(table)[:5])
        raise ValueError(
            f"the snapshot lacks {what}, {name!r}; it holds {known}, ...: is it of this model and optimizer?"
        )
    return table[name]
