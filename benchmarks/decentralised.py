"""What the plug-ins of a decentralised pipeline cost beside the work of a stage.

Cases `coordinates d=D k=K`: encoding 512 tokens of a subspace network with a vocabulary of 50,304. `bytes` is the model
of the form without intermediates, X read and C written.
  projected  X U - (T_fixed U)[ids], as the codec does it
  direct     (X - T_fixed[ids]) U, as it is defined

Cases `share d=D`: one block of a decoder of width D on 512 tokens, forward and backward, and each codec's encoding and
decoding of what crosses one boundary in both directions. ratios[codec] of "block" is the codec's share of the stage's
time, with one block a stage.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, measure
from jaxlib_methods import models, parallel

TOKENS, VOCABULARY = (4, 128), 50_304


def run(options: Options) -> Iterator[Record]:
    """Yields every case; with --quick the narrow ones."""
    for d, k in [(256, 16)] if options.quick else [(1024, 160), (1024, 16)]:
        if options.selects(f"coordinates d={d} k={k}"):
            yield from measure(coordinates_case(d, k), options)
    for d in (256,) if options.quick else (512, 1024):
        if options.selects(f"share d={d}"):
            yield from measure(share_case(d), options)


def activations(d: int, k: int) -> tuple[parallel.codecs.Subspace, dict[str, jax.Array]]:
    """A subspace and what would cross a boundary."""
    subspace = parallel.codecs.random_subspace(jax.random.key(0), vocab_size=VOCABULARY, width=d, rank=k)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, TOKENS), jnp.int32)
    C = jax.random.normal(jax.random.key(1), (*TOKENS, k))
    return subspace, {"x": parallel.codecs.subspace_reconstruct(C, ids, subspace), "ids": ids}


def coordinates_case(d: int, k: int) -> Case:
    """The two ways to encode."""
    subspace, x = activations(d, k)
    codec = parallel.codecs.subspace_codec(subspace)
    tokens = TOKENS[0] * TOKENS[1]
    return Case(
        "decentralised",
        f"coordinates d={d} k={k}",
        {
            "projected": Implementation(jax.jit(lambda x: codec.encode(x, ())[0]["x"].arrays["C"]), (x,)),
            "direct": Implementation(
                jax.jit(lambda x: parallel.codecs.subspace_coordinates(x["x"], x["ids"], subspace)), (x,)
            ),
        },
        reference="direct",
        flops=2 * tokens * d * k,
        bytes=4 * tokens * (d + k),
        seconds=3.0,
    )


def share_case(d: int) -> Case:
    """A block's forward and backward pass, and the codecs of one boundary."""
    subspace, x = activations(d, d // 8)
    config = models.GPTConfig(vocab_size=8, block_size=TOKENS[1], layers=1, width=d, heads=d // 64, norm="rms")
    block = models.gpt_stages(config).block
    params = nnx.state(models.GPT(config, rngs=nnx.Rngs(0)), nnx.Param)["blocks"][0]

    def stage(params, X):
        out, pullback = jax.vjp(block, params, X)
        return pullback(out)

    def both_ways(forward: parallel.codecs.Codec, backward: parallel.codecs.Codec, x) -> Implementation:
        def cross(x, G):
            received, _ = forward.decode(forward.encode(x, forward.init(x))[0], forward.init(x))
            gradient, _ = backward.decode(backward.encode([G], backward.init([G]))[0], backward.init([G]))
            return received, gradient

        return Implementation(jax.jit(cross), (x, jnp.ones((*TOKENS, d))))

    same = lambda codec: both_ways(codec, codec, x["x"])
    return Case(
        "decentralised",
        f"share d={d}",
        {
            "block": Implementation(jax.jit(stage), (params, x["x"])),
            "subspace": both_ways(
                parallel.codecs.subspace_codec(subspace), parallel.codecs.subspace_gradient_codec(subspace), x
            ),
            "bf16": same(parallel.codecs.cast_codec()),
            "int8": same(parallel.codecs.int8_codec()),
            "top_k": same(parallel.codecs.top_k_codec(d // 8, error_feedback=False)),
        },
        seconds=8.0,
    )
