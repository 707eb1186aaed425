"""Compression of a trained network: what its linear layers see, and its parameters with low-rank kernels.

    statistics = collect_inputs(lambda tokens: linear_inputs(model, tokens), batches)      # calibration
    params = compress_kernels(params, "attention|mlp", removal=0.2, method="svd_llm", statistics=statistics)

The kernels of the result are the products of their factors, of the old shapes, so that the same network evaluates them;
`factorize_kernels` gives the factors, which are what is smaller.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlib_methods import trees
from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import widen
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.low_rank.decompositions import LowRank, asvd, rank_for_keep, svd_llm, truncated_svd
from jaxlib_methods.typing import LowRankMethod, PyTree

__all__ = [
    "InputStatistics",
    "collect_inputs",
    "compress_kernels",
    "factorize_kernels",
    "linear_inputs",
]


class InputStatistics(NamedTuple):
    """What one linear layer has seen, summed over calibration tokens in float64 on the host."""

    gram: np.ndarray  # float64 [fan_in, fan_in]: X^T X
    sum_abs: np.ndarray  # float64 [fan_in]: sum of |X_j|
    tokens: int

    @property
    def mean_abs(self) -> np.ndarray:
        """Mean |X_j| over the tokens, [fan_in]."""
        return self.sum_abs / self.tokens


class _Recorder(nnx.Linear):
    """A linear layer that keeps its inputs."""

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        self.seen = nnx.Intermediate(jnp.concatenate([*self._so_far(), inputs.reshape(-1, inputs.shape[-1])]))
        return super().__call__(inputs, *args, **kwargs)

    def _so_far(self) -> list[jax.Array]:
        return [self.seen[...]] if hasattr(self, "seen") else []


def linear_inputs(model: nnx.Module, *args: Any, **kwargs: Any) -> dict[str, jax.Array]:
    """Calls a model and returns what each of its linear layers was given.

    Args:
      model: any flax.nnx module; it is not changed.
      *args: of the call.
      **kwargs: of the call.

    Returns:
      By the path of the kernel, as `trees.path_names` gives it ("blocks/0/mlp/up/kernel"): the inputs (tokens, fan_in),
      all leading axes and calls in one. Layers that are not called are left out.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> model = nnx.Sequential(nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(4, 2, rngs=nnx.Rngs(1)))
      >>> {path: x.shape for path, x in linear_inputs(model, jnp.ones((5, 3))).items()}
      {'layers/0/kernel': (5, 3), 'layers/2/kernel': (5, 4)}
    """
    model = nnx.clone(model)
    layers = {path: module for path, module in nnx.iter_modules(model) if type(module) is nnx.Linear}
    for module in layers.values():
        module.__class__ = _Recorder
    model(*args, **kwargs)
    return {
        "/".join(map(str, (*path, "kernel"))): module.seen[...]
        for path, module in sorted(layers.items(), key=lambda item: str(item[0]))
        if hasattr(module, "seen")
    }


def collect_inputs(
    inputs_fn: Callable[[Any], Mapping[str, jax.Array]], batches: Iterable[Any]
) -> dict[str, InputStatistics]:
    """Sums the Gram matrices of every layer's inputs over calibration batches.

    The products of one batch are computed on the device, in float32 at highest precision (float64 for float64); the
    sums over batches are kept in float64 on the host, so that many batches do not wash out small directions. Memory:
    the activations of one batch, and fan_in^2 for each layer.

    Args:
      inputs_fn: batch -> {path of the kernel: inputs (..., fan_in)}, such as
        `lambda tokens: linear_inputs(model, tokens)` or a function of your own for another framework's
        model. It is jitted, and compiled once if the same function is given again: let the parameters be a part of the
        batch then.
      batches: calibration batches of one shape (others are compiled again).

    Returns:
      The statistics by path.

    Raises:
      ValueError: no batches.

    Example:
      >>> import jax.numpy as jnp
      >>> statistics = collect_inputs(lambda x: {"kernel": x}, [jnp.eye(2), -jnp.eye(2)])
      >>> statistics["kernel"].gram.tolist(), statistics["kernel"].mean_abs.tolist(), statistics["kernel"].tokens
      ([[2.0, 0.0], [0.0, 2.0]], [0.5, 0.5], 4)

    Source: Wang, Zheng, Wan, Zhang (ICLR 2025), arXiv:2403.07378, official code [wang2025svdllm].
    """

    total: dict[str, InputStatistics] = {}
    for batch in batches:
        for path, (gram, sum_abs, tokens) in _products(inputs_fn, batch).items():
            now = InputStatistics(np.asarray(gram, np.float64), np.asarray(sum_abs, np.float64), int(tokens))
            total[path] = InputStatistics(*map(operator.add, total[path], now)) if path in total else now
    if not total:
        raise ValueError("batches must hold at least one calibration batch, with at least one layer's inputs")
    return total


@functools.partial(jax.jit, static_argnums=0)
def _products(
    inputs_fn: Callable[[Any], Mapping[str, jax.Array]], batch: Any
) -> dict[str, tuple[jax.Array, jax.Array, jax.Array]]:
    """X^T X, sum |X_j| and the number of tokens of every layer."""
    found = {}
    for path, x in inputs_fn(batch).items():
        X = widen(x.reshape(-1, x.shape[-1]))
        gram = matmul(X.T, X)
        found[path] = gram, jnp.sum(jnp.abs(X), axis=0), jnp.int32(X.shape[0])
    return found


def factorize_kernels(
    params: PyTree,
    *patterns: str,
    removal: float | Mapping[str, float],
    method: LowRankMethod = "svd_llm",
    statistics: Mapping[str, InputStatistics] | None = None,
    exponent: float = 0.5,
) -> dict[str, LowRank]:
    """Low-rank factors of the kernels whose paths match, in place of which the network would store them.

    Args:
      params: any pytree of parameters; kernels are (fan_in, fan_out).
      *patterns: regular expressions (`re.search`) on the paths of the kernels to compress. Matching leaves that do not
        have two axes (biases) are left alone.
      removal: share of each kernel's parameters to remove, in [0, 1), as on SVD-LLM's command line; or the share by
        path, as `sensitivity_search` finds it. A kernel with 0 stays as it is and is left out of the result.
      method: "svd", "asvd" or "svd_llm".
      statistics: of `collect_inputs`, by path; the plain SVD needs none.
      exponent: of ASVD's scaling.

    Returns:
      The factors by path, of rank floor(m n (1 - removal) / (m + n)).

    Raises:
      ValueError: an unknown method, a share out of range, patterns without a kernel, a kernel without statistics or
        without a share.

    Example:
      >>> import jax.numpy as jnp
      >>> factors = factorize_kernels({"up": {"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}}, "up", removal=0.5,
      ...                             method="svd")
      >>> {path: (pair.A.shape, pair.B.shape) for path, pair in factors.items()}
      {'up/kernel': ((8, 2), (2, 8))}

    Source: Wang, Zheng, Wan, Zhang (ICLR 2025), arXiv:2403.07378 [wang2025svdllm]; Yuan et al. (2023), arXiv:2312.05821
    [yuan2023asvd].
    """
    kernels = matching_kernels(params, patterns, method, statistics)
    shares = {path: checked_share(path, removal) for path in kernels}
    return {
        path: factorize(path, W, shares[path], method, statistics, exponent)
        for path, W in kernels.items()
        if shares[path]
    }


def matching_kernels(params: PyTree, patterns: tuple[str, ...], method: str, statistics: Any) -> dict[str, jax.Array]:
    """The kernels to compress by path, after checking that all that the method needs is there."""
    checks.one_of(LowRankMethod, method=method)
    names, leaves = jax.tree.leaves(trees.path_names(params)), jax.tree.leaves(params)
    chosen = jax.tree.leaves(trees.mask_tree(params, *patterns))
    kernels = {n: leaf for n, leaf, mine in zip(names, leaves, chosen, strict=True) if mine and leaf.ndim == 2}
    if not kernels:
        raise ValueError(f"patterns {patterns} match no leaf with two axes; see trees.path_names(params)")
    if method != "svd":
        missing = [path for path in kernels if path not in (statistics or {})]
        if missing:
            raise ValueError(
                f"method {method!r} needs the inputs of {missing[0]!r} and {len(missing) - 1} more; pass statistics="
                f"collect_inputs(...), which has {sorted(statistics or {})[:3]}, or patterns that leave them out"
            )
    return kernels


def checked_share(path: str, removal: float | Mapping[str, float]) -> float:
    """The share of a kernel's parameters to remove; ValueError outside of [0, 1)."""
    share = removal.get(path) if isinstance(removal, Mapping) else removal
    if share is None or not 0 <= share < 1:
        raise ValueError(f"removal must be in [0, 1), the share of parameters to remove, got {share} for {path!r}")
    return share


def factorize(path: str, W: jax.Array, share: float, method: str, statistics: Any, exponent: float) -> LowRank:
    """The factors of one kernel."""
    rank = rank_for_keep(*W.shape, 1 - share)
    if method == "svd":
        return truncated_svd(W, rank)
    if method == "asvd":
        return asvd(W, statistics[path].mean_abs, rank, exponent=exponent)
    return svd_llm(W, statistics[path].gram, rank)


def compress_kernels(
    params: PyTree,
    *patterns: str,
    removal: float | Mapping[str, float],
    method: LowRankMethod = "svd_llm",
    statistics: Mapping[str, InputStatistics] | None = None,
    exponent: float = 0.5,
) -> PyTree:
    """The parameters with each matching kernel W replaced by its low-rank product A B, for evaluation.

    Args:
      params: as in `factorize_kernels`, as all that follows.
      *patterns: regular expressions on the paths of the kernels.
      removal: share of each kernel's parameters to remove.
      method: "svd", "asvd" or "svd_llm".
      statistics: of `collect_inputs`.
      exponent: of ASVD's scaling.

    Returns:
      A tree like `params`, of the same shapes and types: it shows what compression does to the outputs, and saves
      nothing by itself.

    Raises:
      ValueError: as `factorize_kernels`.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"up": {"kernel": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0])), "bias": jnp.ones(4)}}
      >>> small = compress_kernels(params, "up", removal=0.5, method="svd")  # rank 1
      >>> [round(float(d), 3) for d in jnp.diagonal(small["up"]["kernel"])]
      [4.0, 0.0, 0.0, 0.0]

    Source: Wang, Zheng, Wan, Zhang (ICLR 2025), arXiv:2403.07378 [wang2025svdllm]; Yuan et al. (2023), arXiv:2312.05821
    [yuan2023asvd].
    """
    factors = factorize_kernels(
        params, *patterns, removal=removal, method=method, statistics=statistics, exponent=exponent
    )
    replaced = lambda path, leaf: factors[path].kernel if path in factors else leaf
    return jax.tree.map(replaced, trees.path_names(params), params)
