r"""A GPT with RMSNorm whose stage boundaries can be transformed: matrices on the skip connections and before the norms.

With incoming activations X = X' A, an inner transform M and an outgoing one B, a block

$$H = X Q_1 + \mathrm{attn}(\mathrm{norm}(X N_1)), \qquad Y = H Q_2 + \mathrm{mlp}(\mathrm{norm}(H N_2))$$

keeps its function under $N_1 \leftarrow A^{-1} N_1$, $Q_1 \leftarrow A^{-1} Q_1 M$, $W_O \leftarrow W_O M$,
$N_2 \leftarrow M^{-1} N_2$, $Q_2 \leftarrow M^{-1} Q_2 B$, $W_\mathrm{down} \leftarrow W_\mathrm{down} B$: the norms
see the vectors that they saw. Gains w are folded into the matrices behind the norms. Four matrices per block are new;
they collect transforms and are not trained.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.models import GPT, GPTConfig, GPTStages, gpt_stages
from jaxlib_methods.typing import PyTree

__all__ = [
    "STAGE_PATTERNS",
    "gpt_transform_rules",
    "transformable_gpt_params",
    "transformable_gpt_stages",
]

PATTERNS = ("^0/", "^1/", "^2/")  # of trees (embed, blocks, head)
STAGE_PATTERNS = ("^embed/", "^blocks/", "^head/")  # of the snapshots of pipelines
_BEHIND_NORM = {"norm1": ("attention", ("query", "key", "value")), "norm2": ("mlp", ("up", "gate"))}


def transformable_gpt_params(
    config: GPTConfig, params: tuple[PyTree, Sequence[PyTree], PyTree], rotations: Sequence[jax.typing.ArrayLike]
) -> tuple[PyTree, list[PyTree], PyTree]:
    r"""The parameters of a GPT with the matrices that transforms need; the function is the same.

    norm(X) diag(w) U = norm(X O) O^T diag(w) U: N = O is orthogonal, the gain and O^T go into the matrices U behind.

    Args:
      config: of the model, with norm="rms" and an untied head.
      params: (embed, blocks, head) of `split_gpt_params`.
      rotations: 2 L + 1 orthogonal matrices O (d, d): two for each block, one for the head.

    Returns:
      (embed, blocks, head) for `transformable_gpt_stages`: a block is {"block": ..., "transforms": {"N1", "Q1", "N2",
      "Q2"}}, the head {"head": ..., "transforms": {"N"}}.

    Raises:
      ValueError: for LayerNorm, which subtracts the mean and does not commute with rotations, a tied head, which would
        have to be transformed with the embedding, a subspace network, or another number of rotations.

    Example:
      >>> import dataclasses
      >>> from jaxlib_methods.models import GPT_CONFIGS, GPT, split_gpt_params
      >>> config = dataclasses.replace(GPT_CONFIGS["llama_tiny"], layers=1, width=8, heads=2, mlp_width=16)
      >>> params = split_gpt_params(config, nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))
      >>> _, blocks, head = transformable_gpt_params(config, params, 3 * [jnp.eye(8)])
      >>> sorted(blocks[0]["transforms"])
      ['N1', 'N2', 'Q1', 'Q2']

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    _check(config)
    embed, blocks, head = params
    check_count("rotations", rotations, len(blocks))
    rotations = [jnp.asarray(O, config.param_dtype) for O in rotations]
    eye = jnp.eye(config.width, dtype=config.param_dtype)
    new = []
    for index, block in enumerate(blocks):
        block, (first, second) = as_dicts(block), rotations[2 * index : 2 * index + 2]
        for norm, O in (("norm1", first), ("norm2", second)):
            part, names = _BEHIND_NORM[norm]
            kernels = [block[part][name] for name in names if name in block[part]]
            _fold_gain(block[norm], kernels, O)
        new.append({"block": block, "transforms": {"N1": first, "Q1": eye, "N2": second, "Q2": eye}})
    head = as_dicts(head)
    _fold_gain(head["norm"], [head["logits"]], rotations[-1])
    return as_dicts(embed), new, {"head": head, "transforms": {"N": rotations[-1]}}


def _check(config: GPTConfig) -> None:
    if config.norm != "rms":
        raise ValueError(
            f"transforms need norm='rms', got {config.norm!r}: LayerNorm subtracts the mean, which does not commute "
            "with them"
        )
    if config.tied:
        raise ValueError("a tied head would have to be transformed with the embedding; set tied=False")
    if config.subspace is not None:
        raise ValueError("a subspace network is transformed in its coordinates; use coordinate_gpt_stages")


def check_count(name: str, matrices: Sequence[jax.typing.ArrayLike], blocks: int) -> None:
    if len(matrices) != 2 * blocks + 1:
        raise ValueError(f"{name} must be two for each block and one, {2 * blocks + 1}, got {len(matrices)}")


def as_dicts(params: PyTree) -> PyTree:
    """A copy of the tree, with dictionaries in place of the states of nnx."""
    is_state = lambda node: isinstance(node, nnx.State)
    return jax.tree.map(lambda node: nnx.to_pure_dict(node) if is_state(node) else node, params, is_leaf=is_state)


def _fold_gain(norm: dict[str, Any], linears: Sequence[dict[str, Any]], O: jax.Array) -> None:
    w = norm["scale"]
    for linear in linears:
        wide = compute_dtype(w.dtype)
        folded = matmul(O.T.astype(wide) * w.astype(wide)[None], linear["kernel"].astype(wide))
        linear["kernel"] = folded.astype(linear["kernel"].dtype)
    norm["scale"] = jnp.ones_like(w)


def transformable_gpt_stages(config: GPTConfig, *, train_transforms: bool = False) -> GPTStages:
    """The parts of a GPT with matrices for transforms, as pure functions like `gpt_stages`.

    Args:
      config: of the model, with norm="rms" and an untied head.
      train_transforms: whether N and Q get gradients; by default they are constants.

    Returns:
      The functions, of parameters from `transformable_gpt_params`.

    Raises:
      ValueError: as `transformable_gpt_params`.

    Example:
      >>> from jaxlib_methods.models import GPT_CONFIGS
      >>> stages = transformable_gpt_stages(GPT_CONFIGS["llama_tiny"])

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable].
    """
    _check(config)
    plain = gpt_stages(config)
    graph = nnx.graphdef(one_block(config).blocks[0])
    matrices = lambda params, x: transforms_of(params, x.dtype, trained=train_transforms)

    def block(params: PyTree, x: jax.Array) -> jax.Array:
        part, T = nnx.merge(graph, params["block"]), matrices(params, x)
        return add_sublayers(part, x, (T["N1"], T["N2"]), (T["Q1"], T["Q2"]))

    def head(params: PyTree, x: jax.Array) -> jax.Array:
        return plain.head(params["head"], x @ matrices(params, x)["N"])

    return GPTStages(plain.embed, block, head)


def one_block(config: GPTConfig) -> GPT:
    """The shapes of a model with one block, which has the functions of all."""
    one = dataclasses.replace(config, layers=1, full_rank_blocks=0)
    return nnx.eval_shape(lambda: GPT(one, rngs=nnx.Rngs(0)))


def transforms_of(params: PyTree, dtype: jnp.dtype, *, trained: bool = False) -> PyTree:
    """The matrices of a part that collect transforms, as constants unless they are trained."""
    fixed = params["transforms"] if trained else jax.lax.stop_gradient(params["transforms"])
    return jax.tree.map(lambda a: a.astype(dtype), fixed)


def add_sublayers(
    part: nnx.Module,
    x: jax.Array,
    entries: tuple[jax.Array, jax.Array],
    skips: tuple[jax.Array, jax.Array],
    seen: Callable[[jax.Array], jax.Array] = lambda n: n,
    precision: str | None = None,
) -> jax.Array:
    """x Q1 + attention(norm1(seen(x N1))) and the same with Q2, N2 and the MLP."""
    sublayers = (lambda n: part.attention(part.norm1(n)), lambda n: part.mlp(part.norm2(n)))
    for sublayer, N, Q in zip(sublayers, entries, skips, strict=True):
        both = jnp.matmul(x, jnp.concatenate([N, Q], axis=1), precision=precision)
        n, skip = jnp.split(both, [N.shape[1]], axis=-1)
        x = skip + sublayer(seen(n))
    return x


def gpt_transform_rules(
    num_layers: int,
    *,
    first: int = 0,
    patterns: tuple[str | None, str, str | None] = PATTERNS,
    entries: bool = False,
) -> list[tuple[str, tuple[Any, Any]]]:
    """Which transforms touch which parameters: the rules of `morph` for such a GPT.

    The transforms are called ("boundary", i) before block i, ("boundary", L) before the head, and ("middle", i) inside
    of block i. Leave out the boundaries inside of a stage, or the middles, and they stay as they are. With `entries`,
    ("entry", i, 1) and ("entry", i, 2) move a rotation between a norm's matrix and those behind: N <- N O,
    W <- O^T W, so that no weight of a block stays as it was. These must be orthogonal.

    Args:
      num_layers: blocks in the tree.
      first: number of the first of them.
      patterns: regular expressions of the embedding's paths, of what stands before a block's number, and of the head's
        paths; None: the tree has no embedding or no head. In a pipeline they are `STAGE_PATTERNS`.
      entries: whether to have rules for the rotations behind the norms.

    Returns:
      (regex, (left, right)) rules for trees (embed, blocks, head), or as the patterns say.

    Example:
      >>> gpt_transform_rules(1, patterns=(None, "^1/", None))[1]
      ('^1/0/transforms/Q1$', (('boundary', 0), ('middle', 0)))

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable]; `entries`: this library.
    """
    return transform_rules("N", num_layers, first, patterns, entries=entries)


def transform_rules(
    entry: str, num_layers: int, first: int, patterns: tuple[str | None, str, str | None], *, entries: bool = False
) -> list[tuple[str, tuple[Any, Any]]]:
    """The rules of `gpt_transform_rules`, for matrices before the norms of any name."""
    embed, blocks, head = patterns
    rules = [] if embed is None else [(f"{embed}.*embedding", (None, ("boundary", first)))]
    for index in range(num_layers):
        i, at = first + index, f"{blocks}{index}/"
        before, middle, after = ("boundary", i), ("middle", i), ("boundary", i + 1)
        rotations = (("entry", i, 1), ("entry", i, 2)) if entries else (None, None)
        rules += [
            (f"{at}transforms/{entry}1$", (before, rotations[0])),
            (f"{at}transforms/Q1$", (before, middle)),
            (f"{at}block/attention/out/", (None, middle)),
            (f"{at}transforms/{entry}2$", (middle, rotations[1])),
            (f"{at}transforms/Q2$", (middle, after)),
            (f"{at}block/mlp/down/", (None, after)),
        ]
        if entries:
            rules += [
                (f"{at}block/attention/(query|key|value)/kernel", (rotations[0], None)),
                (f"{at}block/mlp/(up|gate)/kernel", (rotations[1], None)),
            ]
    return rules if head is None else [*rules, (f"{head}transforms/{entry}$", (("boundary", first + num_layers), None))]
