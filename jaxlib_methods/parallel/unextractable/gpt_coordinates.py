r"""A subspace GPT whose residual stream stays in its k coordinates, so that its boundaries can be transformed.

Symbols: d width, k rank, rows are vectors; c (B, T, k) coordinates, D (k, d) an entry matrix, Q (k, k) a skip matrix,
Z (f, k) a projection that adds to the stream. The residual stream of a subspace network is X = c U^T + T_fixed[ids].
Only norms need X, and it never leaves a block:

$$c' = c\,Q_1 + \mathrm{attn}(\mathrm{norm}_1(c\,D_1 + T_\mathrm{fixed}))\,Z_O, \qquad
  c'' = c' Q_2 + \mathrm{mlp}(\mathrm{norm}_2(c' D_2 + T_\mathrm{fixed}))\,Z_\mathrm{down}.$$

With D = U^T and Q = I this is the subspace network. The frame of c is arbitrary: with incoming c = c_0 A, an inner M
and an outgoing B, $D_1 \leftarrow A^{-1} D_1$, $Q_1 \leftarrow A^{-1} Q_1 M$, $Z_O \leftarrow Z_O M$,
$D_2 \leftarrow M^{-1} D_2$, $Q_2 \leftarrow M^{-1} Q_2 B$, $Z_\mathrm{down} \leftarrow Z_\mathrm{down} B$ leave the
function as it is. No norm sees a transform: it may be any invertible matrix, the norm may be LayerNorm, and T_fixed
stays. The matrices cost 4 k (d + k) operations a token and block forwards; those of `transformable_gpt_stages` 8 d^2.
Z, its bias and the embedding have rows of k numbers: Adam with one second moment a row commutes with orthogonal
transforms, where elementwise Adam does not.

What hides the frames: an attacker who holds D(t) = T^{-1} D(0), with T the product of that boundary's transforms, and
knows D(0), has T = D(0) D(t)^+ and undoes all of them. With one U for the whole network, drawn from a seed that all
know, a single look at a stage is enough. Private bases, one for each entry and kept by nobody, leave it with D(t)
alone. Two limits remain. Who held a stage at two times has the bridge between them, D(t) D(t')^+, as with N of
`transformable_gpt_stages`. And initial weights from a known seed give frames away while training has moved them little.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxlib_methods import trees
from jaxlib_methods.models import GPTConfig, GPTStages, gpt_stages
from jaxlib_methods.parallel.unextractable.gpt import (
    PATTERNS,
    add_sublayers,
    as_dicts,
    check_count,
    one_block,
    transform_rules,
    transforms_of,
)
from jaxlib_methods.typing import PyTree

__all__ = [
    "coordinate_gpt_mask",
    "coordinate_gpt_params",
    "coordinate_gpt_rules",
    "coordinate_gpt_stages",
]

_TRANSFORMED = r"embedding$|(^|/)block/(attention/out|mlp/down)/|(^|/)transforms/"


def coordinate_gpt_params(
    config: GPTConfig, params: tuple[PyTree, Sequence[PyTree], PyTree], bases: Sequence[jax.typing.ArrayLike]
) -> tuple[PyTree, list[PyTree], PyTree]:
    """The parameters of a subspace GPT with matrices that take its coordinates into the residual stream, D = basis^T.

    One basis for all makes the subspace network with that U. Bases that differ make another network of the same size:
    each norm reads the coordinates in a frame of its own.

    Args:
      config: of the model, with `subspace`.
      params: (embed, blocks, head) of `split_gpt_params`, with `full_rank_blocks` of the blocks in the head.
      bases: 2 L + 1 matrices (d, k) with orthonormal columns: two for each of the L blocks outside of the head, one
        for the head.

    Returns:
      (embed, blocks, head) for `coordinate_gpt_stages`: a block is {"block": ..., "transforms": {"D1", "Q1", "D2",
      "Q2"}}, the head {"head": ..., "transforms": {"D"}}. The matrices below "transforms" get no gradient and must not
      decay; see `coordinate_gpt_mask`.

    Raises:
      ValueError: for a model without subspace, and for bases of another number or another shape.

    Example:
      >>> from jaxlib_methods.models import GPT, split_gpt_params
      >>> config = GPTConfig(layers=2, width=8, heads=2, subspace=3)  # the second block is dense
      >>> params = split_gpt_params(config, nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))
      >>> _, blocks, head = coordinate_gpt_params(config, params, 3 * [jnp.eye(8, 3)])
      >>> {name: matrix.shape for name, matrix in blocks[0]["transforms"].items()}
      {'D1': (3, 8), 'Q1': (3, 3), 'D2': (3, 8), 'Q2': (3, 3)}

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol]; the transforms: Long et al.
    (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable]; their union and the private bases: this library.
    """
    _check(config)
    embed, blocks, head = params
    check_count("bases", bases, len(blocks))
    for index, basis in enumerate(bases):
        if np.shape(basis) != (config.width, config.subspace):
            raise ValueError(
                f"bases must have the shape {(config.width, config.subspace)} of width and subspace, got "
                f"{np.shape(basis)} as number {index}"
            )
    D = [jnp.asarray(basis, config.param_dtype).T for basis in bases]
    eye = jnp.eye(config.subspace, dtype=config.param_dtype)
    new = [
        {"block": as_dicts(block), "transforms": {"D1": D[2 * i], "Q1": eye, "D2": D[2 * i + 1], "Q2": eye}}
        for i, block in enumerate(blocks)
    ]
    return as_dicts(embed), new, {"head": as_dicts(head), "transforms": {"D": D[-1]}}


def _check(config: GPTConfig) -> None:
    if config.subspace is None:
        raise ValueError("a model in coordinates needs their number; set config.subspace to the rank k")


def coordinate_gpt_stages(
    config: GPTConfig, fixed_embedding: Callable[[jax.Array], jax.Array | None] | None = None
) -> GPTStages:
    """The parts of a subspace GPT that keeps its residual stream in coordinates, as pure functions.

    Their activations are {"x": c (B, T, k), "ids": token ids (B, T)}, the ids in the smallest unsigned type that holds
    them: what crosses a boundary needs no codec of subspaces, and is the model of `pipelines.StageModel` as it is.

    Args:
      config: of the model, with `subspace`; either norm.
      fixed_embedding: ids -> (B, T, d), the part of the residual stream that is never trained, which every stage
        makes: `lambda ids: boundaries.fixed_embedding(ids, subspace)`, whose U it does not use. None: zero.

    Returns:
      embed (parameters, tokens) -> activations, block (parameters, activations) -> activations and head (parameters,
      activations) -> logits, of parameters from `coordinate_gpt_params`.

    Raises:
      ValueError: for a model without subspace.

    Example:
      >>> from jaxlib_methods.models import GPT, split_gpt_params
      >>> config, U = GPTConfig(layers=2, width=8, heads=2, subspace=3), jnp.eye(8, 3)
      >>> model = GPT(config, rngs=nnx.Rngs(0))
      >>> params = split_gpt_params(config, nnx.state(model, nnx.Param))
      >>> stages = coordinate_gpt_stages(config)
      >>> embed, (block,), head = coordinate_gpt_params(config, params, 3 * [U])
      >>> tokens = jnp.arange(6)[None]
      >>> x = stages.block(block, stages.embed(embed, tokens))
      >>> x["x"].shape, x["ids"].dtype.name, bool(jnp.allclose(stages.head(head, x), model(tokens, U), atol=1e-5))
      ((1, 6, 3), 'uint8', True)

    Source: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol]; Long et al. (NeurIPS 2025),
    arXiv:2605.23464 [long2025unextractable]; their union: this library.
    """
    _check(config)
    model = one_block(config)
    embed_graph, block_graph = nnx.graphdef(model.embed), nnx.graphdef(model.blocks[0])
    plain_head = gpt_stages(config).head
    ids_dtype = np.min_scalar_type(config.vocab_size - 1)

    def above(x: PyTree) -> Callable[[jax.Array], jax.Array]:
        """Adds T_fixed[ids]."""
        fixed = None if fixed_embedding is None else fixed_embedding(x["ids"])
        return lambda X: X if fixed is None else X + jax.lax.stop_gradient(fixed).astype(X.dtype)

    def embed(params: PyTree, tokens: jax.Array) -> PyTree:
        return {"x": nnx.merge(embed_graph, params).coordinates(tokens), "ids": tokens.astype(ids_dtype)}

    def block(params: PyTree, x: PyTree) -> PyTree:
        part, T = nnx.merge(block_graph, params["block"]), transforms_of(params, x["x"].dtype)
        c = add_sublayers(part, x["x"], (T["D1"], T["D2"]), (T["Q1"], T["Q2"]), above(x), precision="highest")
        return {**x, "x": c}

    def head(params: PyTree, x: PyTree) -> jax.Array:
        X = jnp.matmul(x["x"], transforms_of(params, x["x"].dtype)["D"], precision="highest")
        return plain_head(params["head"], above(x)(X))

    return GPTStages(embed, block, head)


def coordinate_gpt_rules(
    num_layers: int, *, first: int = 0, patterns: tuple[str | None, str, str | None] = PATTERNS
) -> list[tuple[str, tuple[Any, Any]]]:
    """Which transforms (k, k) touch which parameters: the rules of `morph` for such a GPT.

    The transforms are called as in `gpt_transform_rules`: ("boundary", i) before block i, ("boundary", L) before the
    head, and ("middle", i) inside of block i.

    Args:
      num_layers: blocks in the tree, without those of the head.
      first: number of the first of them.
      patterns: as for `gpt.gpt_transform_rules`.

    Returns:
      (regex, (left, right)) rules for trees (embed, blocks, head) of `coordinate_gpt_params`.

    Example:
      >>> coordinate_gpt_rules(1, patterns=(None, "^1/", "^2/"))[0]
      ('^1/0/transforms/D1$', (('boundary', 0), None))

    Source: Long et al. (NeurIPS 2025), arXiv:2605.23464 [long2025unextractable]; in coordinates: this library.
    """
    return transform_rules("D", num_layers, first, patterns)


def coordinate_gpt_mask(params: PyTree) -> PyTree:
    """The parameters that transforms touch, which must share one second moment a row for Adam to go on after one.

        mask = lambda params: trees.mask_tree(params, r"^(?!.*transforms/)")  # D and Q do not decay
        optimizers.row_shared_adamw(1e-3, shared=coordinate_gpt_mask, mask=mask)

    Args:
      params: of `coordinate_gpt_params`, or of stages that `pipelines.split_stages` cut from them.

    Returns:
      A tree of bools: embeddings, the kernels and biases of out and down outside of the head, D and Q.

    Raises:
      ValueError: for other parameters, where it finds none.

    Example:
      >>> coordinate_gpt_mask({"block": {"mlp": {"up": {"bias": 0}, "down": {"bias": 0}}}})
      {'block': {'mlp': {'down': {'bias': True}, 'up': {'bias': False}}}}
    """
    return trees.mask_tree(params, _TRANSFORMED)
