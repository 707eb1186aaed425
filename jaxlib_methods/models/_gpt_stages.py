"""The parts of a GPT as pure functions of their parameters, for pipelines and for scans over stacked blocks."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from jaxlib_methods.models.gpt import GPT, GPTConfig
from jaxlib_methods.typing import PyTree


class GPTStages(NamedTuple):
    """The three parts of a `GPT` as pure functions; all blocks share one function.

    Args:
      embed: (parameters, tokens (B, T), U=None, fixed=None) -> residual stream (B, T, d), as `GPT` is called.
      block: (parameters, residual stream, U=None) -> residual stream.
      head: (parameters, residual stream) -> logits (B, T, V). That of a subspace network begins with the dense blocks.
    """

    embed: Callable[..., jax.Array]
    block: Callable[..., jax.Array]
    head: Callable[[PyTree, jax.Array], jax.Array]


def gpt_stages(config: GPTConfig) -> GPTStages:
    """The parts of a model as pure functions, for pipelines and for scans over stacked blocks.

    Args:
      config: of the model.

    Returns:
      The functions; `split_gpt_params` cuts the parameters of the whole model into their arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> config = GPTConfig(layers=3, width=8, heads=2)
      >>> model = GPT(config, rngs=nnx.Rngs(0))
      >>> stages, (embed, blocks, head) = gpt_stages(config), split_gpt_params(config, nnx.state(model, nnx.Param))
      >>> stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
      >>> tokens = jnp.arange(6)[None]
      >>> x, _ = jax.lax.scan(lambda x, p: (stages.block(p, x), None), stages.embed(embed, tokens), stacked)
      >>> bool(jnp.allclose(stages.head(head, x), model(tokens), atol=1e-5))
      True
    """

    def pure(module: nnx.Module) -> Callable[..., jax.Array]:
        graph = nnx.graphdef(module)
        return lambda params, *args: nnx.merge(graph, params)(*args)

    model = one_block(config)
    stages = GPTStages(pure(model.embed), pure(model.blocks[0]), pure(model.head))
    if not _dense_tail(config):
        return stages
    dense = pure(one_block(config, full_rank_blocks=1).blocks[0])

    def head(params: PyTree, x: jax.Array) -> jax.Array:
        for block in params["blocks"]:
            x = dense(block, x)
        return stages.head(params["head"], x)

    return stages._replace(head=head)


def one_block(config: GPTConfig, full_rank_blocks: int = 0) -> GPT:
    """The shapes of a model with one block, which has the functions of all."""
    one = dataclasses.replace(config, layers=1, full_rank_blocks=full_rank_blocks)
    return nnx.eval_shape(lambda: GPT(one, rngs=nnx.Rngs(0)))


def _dense_tail(config: GPTConfig) -> int:
    """Blocks at the end that differ from those before."""
    return 0 if config.subspace is None else config.full_rank_blocks


def split_gpt_params(config: GPTConfig, params: PyTree) -> tuple[PyTree, list[PyTree], PyTree]:
    """Cuts the parameters of a `GPT` into those of its stages.

    Args:
      config: of the model.
      params: `nnx.state(model, nnx.Param)`, or gradients or updates of that structure.

    Returns:
      (embed, one per block, head). The parts of a tied model both hold the token embedding; its gradient is the sum of
      the two. The last `full_rank_blocks` blocks of a subspace network belong to its head, {"blocks": [...], "head"}.

    Example:
      >>> config = GPTConfig(layers=3, width=8, heads=2)
      >>> embed, blocks, head = split_gpt_params(config, nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))
      >>> len(blocks), head["logits"]["kernel"].shape
      (3, (8, 256))
    """
    head = params["head"]
    if config.tied:
        head = nnx.State({**head, "tokens": params["embed"]["tokens"]})
    blocks, tail = [params["blocks"][i] for i in range(config.layers)], _dense_tail(config)
    if tail:
        blocks, head = blocks[:-tail], {"blocks": blocks[-tail:], "head": head}
    return params["embed"], blocks, head
