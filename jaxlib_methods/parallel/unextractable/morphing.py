r"""Unextractable models: random invertible transforms, folded into both sides of the boundaries between stages.

Row vectors, y = x W. The function $g(X) = \Phi(X U) V$ of a stage has entry matrices U and exit matrices V. At a
boundary, the sender draws T, and both sides forget it after

$$V_i \leftarrow V_i T, \qquad U_{i+1} \leftarrow T^{-1} U_{i+1}.$$

The network computes what it did, while stages that were seen at different times no longer fit together. What a model
needs besides (skip matrices, norms without gain) is in `gpt` and `gpt_coordinates`; here are the transforms, the map of
any tree of parameters and of the optimizer's first moments, and what an attacker can do. All runs on the host,
between steps, in float64.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods.parallel.pipelines.base import Pipeline
from jaxlib_methods.parallel.pipelines.layout import Snapshot
from jaxlib_methods.parallel.pipelines.packing import Packed
from jaxlib_methods.parallel.unextractable.transforms import Transform, transpose
from jaxlib_methods.typing import MorphPrecision, PyTree, SecondMoments

__all__ = [
    "Sides",
    "cast_like",
    "master_copy",
    "morph",
    "morph_pipeline",
    "morph_snapshot",
    "transform_momentum",
]

Rules = Sequence[tuple[str, tuple[Hashable, Hashable]]]  # (regex, Sides)
FIRST_MOMENTS = ("mu", "m", "trace", "momentum", "moment")  # fields of optax's and this library's optimizer states


class Sides(NamedTuple):
    """Which boundaries a parameter touches: W <- T_left^-1 W T_right.

    Args:
      left: name of the transform at the boundary that its rows (axis -2) come from; None: none.
      right: name of that which its columns (axis -1) go to; a vector, such as a bias, has this side alone.

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """

    left: Hashable | None = None
    right: Hashable | None = None


def morph(
    params: PyTree, transforms: Mapping[Hashable, Transform], rules: Rules, *, precision: MorphPrecision = "float64"
) -> PyTree:
    r"""Folds transforms into parameters, $W \leftarrow T_\mathrm{left}^{-1} W T_\mathrm{right}$.

    Axis -2 is the left side and axis -1 the right one, so that the kernel of a convolution (..., in, out) is
    transformed at every tap. A transform (*batch, d, d) belongs to stacked layers (*batch, ...).

    Rounding: the errors of a chain of transforms add up, by `rounding_bound` at most. For parameters in half precision
    keep a `master_copy`, fold into that, and serve `cast_like(master, params)`: what is rounded after each fold is lost
    after some.

    Args:
      params: any tree of arrays, on the host or on devices. On devices each process folds what it holds; the last two
        axes of a parameter with a rule must not be split.
      transforms: by name; a name that the rules have and this has not is an identity, which drops a boundary.
      rules: (regex, `Sides`) by parameter path, as in `trees.label_tree`; a parameter without a rule stays as it is.
      precision: "float64" folds in it and rounds once, to the parameter's dtype; "parameter" rounds the transforms to
        that dtype first and accumulates in float32, as accelerators do.

    Returns:
      A tree like `params`: dtypes, shardings, and NumPy where it was NumPy.

    Raises:
      ValueError: for a rule that matches nothing, a transform that no rule names, and sizes that do not fit.

    Example:
      >>> from jaxlib_methods.parallel.unextractable import draw_transform
      >>> T = draw_transform(3, key=jax.random.key(0))
      >>> params = {"V": np.ones((2, 3)), "U": np.ones((3, 4))}
      >>> new = morph(params, {"b": T}, [("V", Sides(right="b")), ("U", Sides(left="b"))])
      >>> bool(np.allclose(new["V"] @ new["U"], params["V"] @ params["U"]))
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    checks.one_of(MorphPrecision, precision=precision)
    weight = lambda T: (T.inverse, T.matrix)
    leaves, structure = jax.tree.flatten(params)
    sides, names = _sides(params, transforms, rules), jax.tree.leaves(trees.path_names(params))
    new = [
        _folded(name, leaf, _factors(side, transforms, weight), precision)
        for name, leaf, side in zip(names, leaves, sides, strict=True)
    ]
    return jax.tree.unflatten(structure, new)


def transform_momentum(
    opt_state: PyTree,
    params: PyTree,
    transforms: Mapping[Hashable, Transform],
    rules: Rules,
    *,
    first_moments: Sequence[str] = FIRST_MOMENTS,
    second_moments: SecondMoments = "error",
) -> PyTree:
    r"""Maps what an optimizer remembers of gradients, $G \leftarrow T_\mathrm{left}^\top G\, T_\mathrm{right}^{-\top}$.

    SGD, momentum and Muon then go on as if nothing had happened, if the transforms are orthogonal; for others, the step
    is a valid one of another network. Squared gradients cannot be mapped, because their signs are lost; sums over a row
    that is transformed on the right, as in `optimizers.row_shared_adamw`, need not be, and stay.

    Args:
      opt_state: of optax or of this library. A tree in it that has the paths and shapes of the parameters, below a
        field called as one of `first_moments`, is mapped.
      params: the parameters; only their structure and shapes matter.
      transforms: as for `morph`.
      rules: as for `morph`.
      first_moments: names of fields.
      second_moments: what to do with other such trees where a rule applies: "error", "keep" or "reset" to zero.

    Returns:
      A tree like `opt_state`.

    Raises:
      ValueError: as `morph`, and for squared gradients of a parameter with a rule.

    Example:
      >>> import optax, jax.numpy as jnp
      >>> from jaxlib_methods.parallel.unextractable import draw_transform
      >>> params, T = {"V": jnp.ones((2, 3))}, draw_transform(3, key=jax.random.key(0))
      >>> tx = optax.trace(0.9)
      >>> _, state = tx.update(params, tx.init(params))
      >>> state = transform_momentum(state, params, {"b": T}, [("V", Sides(right="b"))])
      >>> bool(np.allclose(state.trace["V"], np.ones((2, 3)) @ T.matrix, atol=1e-6))
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    checks.one_of(SecondMoments, second_moments=second_moments)
    gradient = lambda T: (transpose(T.matrix), transpose(T.inverse))
    by_path = {
        tuple(path): (np.shape(leaf), side)
        for (path, leaf), side in zip(
            jax.tree.flatten_with_path(params)[0], _sides(params, transforms, rules), strict=True
        )
    }
    new, (leaves, structure) = [], jax.tree.flatten_with_path(opt_state)
    for path, leaf in leaves:
        split = _of_parameter(tuple(path), np.shape(leaf), by_path)
        factors = _factors(by_path[tuple(path[split:])][1], transforms, gradient) if split else (None, None)
        if all(factor is None for factor in factors):
            new.append(leaf)
        elif not set(first_moments).isdisjoint(name for entry in path[:split] for name in _names(entry)):
            new.append(_folded(jax.tree_util.keystr(path), leaf, factors, "float64"))
        elif second_moments == "error":
            raise ValueError(
                f"{jax.tree_util.keystr(path)} of the optimizer state is no first moment, and a transform applies to "
                "its parameter; use SGD, momentum or Muon there, second_moments='keep' or 'reset', or name its field "
                "in first_moments if it is one"
            )
        else:
            new.append(leaf if second_moments == "keep" else leaf * 0)
    return jax.tree.unflatten(structure, new)


def _of_parameter(path: tuple, shape: tuple[int, ...], by_path: dict) -> int | None:
    """Where the path of a parameter begins within a path of the optimizer state, if it ends in one."""
    for start in range(1, len(path) + 1):
        if path[start:] in by_path and by_path[path[start:]][0] == shape:
            return start
    return None


def _names(entry: Any) -> list[str]:
    """What an entry of a path is called; the keys of a snapshot are whole paths."""
    return str(getattr(entry, "name", getattr(entry, "key", ""))).split("/")


def _sides(params: PyTree, transforms: Mapping[Hashable, Transform], rules: Rules) -> list[Sides]:
    named = {name for _, side in rules for name in side}
    if unknown := [name for name in transforms if name not in named]:
        raise ValueError(f"no rule names the transforms {unknown}; the rules name {sorted(map(str, named - {None}))}")
    labels = trees.label_tree(params, rules, default=Sides())
    return [Sides(*side) for side in jax.tree.structure(params).flatten_up_to(labels)]


def _factors(side: Sides, transforms: Mapping[Hashable, Transform], pair: Callable) -> tuple:
    left, right = (transforms.get(name) for name in side)
    return None if left is None else pair(left)[0], None if right is None else pair(right)[1]


def _folded(name: str, leaf: Any, factors: tuple, precision: str) -> Any:
    """L W R of one parameter; on devices, part by part."""
    if all(factor is None for factor in factors):
        return leaf
    _check_sizes(name, np.shape(leaf), factors)
    if not isinstance(leaf, jax.Array):
        return _product(np.asarray(leaf), factors, precision, ())
    parts, arrays = {}, []
    for shard in leaf.addressable_shards:
        if shard.data.shape[-2:] != leaf.shape[-2:]:
            raise ValueError(
                f"{name!r} is split along its last two axes, {leaf.sharding}; gather it before the transform"
            )
        where = str(shard.index)
        if where not in parts:
            parts[where] = _product(np.asarray(shard.data), factors, precision, shard.index)
        arrays.append(jax.device_put(parts[where], shard.device))
    return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)


def _check_sizes(name: str, shape: tuple[int, ...], factors: tuple) -> None:
    for factor, axis in zip(factors, (-2, -1), strict=True):
        if factor is None:
            continue
        vector = len(shape) == factor.ndim - 1 and axis == -1
        batch = factor.shape[:-2]
        if len(shape) < factor.ndim - vector or shape[axis] != factor.shape[-1] or shape[: len(batch)] != batch:
            raise ValueError(f"a transform {factor.shape} does not fit axis {axis} of {name!r} with shape {shape}")


def _product(W: np.ndarray, factors: tuple, precision: str, index: tuple) -> np.ndarray:
    def factor(T: np.ndarray) -> np.ndarray:
        T = T[tuple(index[: T.ndim - 2])]
        T = T if precision == "float64" else T.astype(W.dtype).astype(compute)
        return T.reshape(*T.shape[:-2], *(1,) * (len(shape) - T.ndim), *T.shape[-2:])

    compute = np.float64 if precision == "float64" or W.dtype == np.float64 else np.float32
    left, right = factors
    vector = right is not None and W.ndim == right.ndim - 1
    X = (W[..., None, :] if vector else W).astype(compute)
    shape = X.shape
    X = X if left is None else factor(left) @ X
    X = X if right is None else X @ factor(right)
    return (X[..., 0, :] if vector else X).astype(W.dtype)


def morph_snapshot(
    snapshot: Snapshot,
    transforms: Mapping[Hashable, Transform],
    rules: Rules,
    *,
    first_moments: Sequence[str] = FIRST_MOMENTS,
    second_moments: SecondMoments = "error",
) -> Snapshot:
    """Folds transforms into the snapshot of a pipeline: its parameters and its optimizer's first moments.

    `morph_pipeline` does it for all replicas of a running one.

    Args:
      snapshot: of a pipeline; an asynchronous one is drained before.
      transforms: as for `morph`.
      rules: as for `morph`, by the paths "embed/...", "blocks/<number>/..." and "head/...".
      first_moments: as for `transform_momentum`.
      second_moments: as for `transform_momentum`.

    Returns:
      The snapshot from which the pipeline goes on.

    Raises:
      ValueError: as `transform_momentum`.

    Example:
      >>> from jaxlib_methods.parallel.unextractable import draw_transform
      >>> T = {"b": draw_transform(2, key=jax.random.key(0))}
      >>> one = Snapshot({"embed/V": np.eye(2)}, {"0/trace": {"embed/V": np.eye(2)}}, {}, np.int32(1))
      >>> new = morph_snapshot(one, T, [("^embed/V$", Sides(right="b"))])
      >>> bool(np.allclose(new.params["embed/V"], new.moments["0/trace"]["embed/V"]))  # orthogonal
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    moments = transform_momentum(
        snapshot.moments,
        snapshot.params,
        transforms,
        rules,
        first_moments=first_moments,
        second_moments=second_moments,
    )
    return snapshot._replace(params=morph(snapshot.params, transforms, rules), moments=moments)


def morph_pipeline(
    pipe: Pipeline,
    state: PyTree,
    transforms: Mapping[Hashable, Transform],
    rules: Rules,
    *,
    boundaries: Sequence[Hashable],
    first_moments: Sequence[str] = FIRST_MOMENTS,
    second_moments: SecondMoments = "error",
) -> PyTree:
    r"""Folds transforms into all replicas of a pipeline and into what its hooks remember of messages.

    Activations that were x become x T, and their cotangents $g\, T^{-\top}$: references of verifiers follow them.
    On the data axis, the average drift of the parameters is transformed as they are; averages that are still to come
    are of the old ones and are dropped.

    Args:
      pipe: of the state.
      state: without micro-batches in flight: `drain` an asynchronous pipeline before.
      transforms: as for `morph`; the same for all replicas.
      rules: as for `morph_snapshot`.
      boundaries: the name of the transform at each of the P - 1 boundaries between stages.
      first_moments: as for `transform_momentum`.
      second_moments: as for `transform_momentum`.

    Returns:
      The state to go on with.

    Raises:
      ValueError: as `transform_momentum` and `Pipeline.replace`, and for another number of boundaries.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jaxlib_methods.parallel import StageModel, make_mesh, synchronous_pipeline
      >>> from jaxlib_methods.parallel.unextractable import draw_transform
      >>> model = StageModel(lambda E, i: E[i], lambda w, x: x @ w, lambda w, x, y: jnp.mean((x @ w - y) ** 2))
      >>> stages = ({"embed": jnp.ones((5, 2)), "blocks": (jnp.eye(2),), "head": jnp.ones(2)},)
      >>> batch = np.zeros((6, 4), np.int32), np.zeros((6, 4), np.float32)
      >>> pipe = synchronous_pipeline(model, stages, optax.sgd(0.1), make_mesh(1), batch=batch, num_microbatches=1)
      >>> rules = [("^embed$", Sides(right="b")), ("^blocks/0$", Sides(left="b"))]
      >>> state, T = pipe.init(stages), draw_transform(2, key=jax.random.key(0))
      >>> (stage,) = pipe.stages(morph_pipeline(pipe, state, {"b": T}, rules, boundaries=[]))
      >>> bool(np.allclose(stage["embed"] @ stage["blocks"][0], np.ones((5, 2)), atol=1e-6))
      True

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    count = pipe.layout.num_stages - 1
    if len(boundaries) != count:
        raise ValueError(f"boundaries must name the transforms at {count} boundaries of stages, got {len(boundaries)}")
    snapshots = [
        morph_snapshot(
            pipe.snapshot(state, replica),
            transforms,
            rules,
            first_moments=first_moments,
            second_moments=second_moments,
        )
        for replica in range(pipe.layout.num_replicas)
    ]
    state = _morph_hook(pipe, state, transforms, rules)
    crossed = [transforms[name] for name in boundaries if name in transforms]
    if not crossed:
        return pipe.replace(state, snapshots)
    eye = np.eye(crossed[0].matrix.shape[-1])
    at = [transforms.get(name, Transform(eye, eye)) for name in boundaries]
    matrices = np.stack([T.matrix for T in at]), np.stack([transpose(T.inverse) for T in at])
    return pipe.replace(state, snapshots, matrices)


def _morph_hook(pipe: Pipeline, state: PyTree, transforms: Mapping[Hashable, Transform], rules: Rules) -> PyTree:
    """What the hook on the data axis keeps in the shape of the parameters: averages of their drift."""
    layout = pipe.layout

    def morphed(node: Any) -> Any:
        if not isinstance(node, Packed):
            return node
        named = [layout.named(node, replica) for replica in range(layout.num_replicas)]
        new = layout.put_named(*(morph(one, transforms, rules) for one in named))
        return jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), new, node)

    hook = jax.tree.map(morphed, state.data_hook, is_leaf=lambda node: isinstance(node, Packed))
    return state._replace(data_hook=hook)


def master_copy(params: PyTree) -> PyTree:
    """The parameters in float64 on the host: what `morph` folds into when they are served in a lower precision.

    Args:
      params: any tree of floating arrays.

    Returns:
      A tree of NumPy arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> master_copy({"w": jnp.ones(2, jnp.bfloat16)})["w"].dtype
      dtype('float64')

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), params)


def cast_like(master: PyTree, params: PyTree) -> PyTree:
    """The master copy in the dtypes, and on the devices, of the parameters.

    Args:
      master: of `master_copy`, with transforms folded in.
      params: what it serves as.

    Returns:
      A tree like `params`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> cast_like(master_copy(params), params)["w"].dtype.name
      'bfloat16'

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """

    def cast(new: np.ndarray, leaf: Any) -> Any:
        new = new.astype(leaf.dtype)
        return jax.device_put(new, leaf.sharding) if isinstance(leaf, jax.Array) else new

    return jax.tree.map(cast, master, params)
