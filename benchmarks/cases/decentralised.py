"""What the plug-ins of a decentralised pipeline cost beside the work of a stage, and what they send.

Cases `coordinates d=D k=K`: encoding 512 tokens of a subspace network with a vocabulary of 50,304. `bytes` is the model
of the form without intermediates, X read and C written.
  projected  X U - (T_fixed U)[ids], as the codec does it
  direct     (X - T_fixed[ids]) U, as it is defined

Cases `share d=D`: one block of a decoder of width D on 512 tokens, forward and backward, and each codec's encoding and
decoding of what crosses one boundary in both directions. ratios[codec] of "block" is the codec's share of the stage's
time, with one block a stage. Cases `monitor d=D` likewise: SENTINEL's verifiers of one boundary in both directions on
one of eight replicas: the summary of its own message, the distances of all summaries, the fences.

Cases `bytes d=D k=K`: eight updates of an asynchronous pipeline with each codec, all stages on one core; notes tell
what the compiled program sends beside the formula. Cases `averaging P=P`: four updates of P stages and two replicas
with each exchange on the data axis; notes tell bytes of a round and of the state. Cases `transforms d=D`: drawing and
folding the transforms of four blocks, and what the matrices cost in every pass. Cases `links d=D`: the times of a stage
of one block; notes tell the predicted wall-clock over slow links, from those and for the papers' sizes.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._machinery import staged_decoder
from benchmarks.cases import (
    _link_traffic as link_traffic,
    _replica_averaging as replica_averaging,
    _weight_transforms as weight_transforms,
)
from benchmarks.timing import Case, Implementation, Options, Record, measure
from jaxlib_methods import models, parallel
from jaxlib_methods.parallel import boundaries

HEADLINES = (  # case, ours, peers, aim: the first peer's time over ours at least
    ("coordinates d=1024 k=160", "projected", ("direct",)),
    ("share d=1024", "subspace", ("block",)),
    ("share d=1024", "top_k", ("block",)),
    ("monitor d=1024", "four distances", ("block",)),
    ("averaging P=2", "sparse avg", ("nothing", "gradients", "diloco")),
    ("transforms d=1024", "step", ("step, plain",)),
    ("transforms d=1024", "morph", ("forward",)),
)
TOKENS, VOCABULARY, REPLICAS = (4, 128), 50_304, 8


def run(options: Options) -> Iterator[Record]:
    """Yields every case; with --quick the narrow ones."""
    staged_decoder.fake_devices()
    for d, k in [(256, 16)] if options.quick else [(1024, 160), (1024, 16)]:
        if options.selects(f"coordinates d={d} k={k}"):
            yield from measure(coordinates_case(d, k), options)
    for d in (256,) if options.quick else (512, 1024):
        if options.selects(f"share d={d}"):
            yield from measure(share_case(d), options)
        if options.selects(f"monitor d={d}"):
            yield from measure(monitor_case(d), options)
    for cases in (link_traffic, replica_averaging, weight_transforms):
        yield from cases.run_cases(options)


def activations(d: int, k: int) -> tuple[boundaries.Subspace, dict[str, jax.Array]]:
    """A subspace and what would cross a boundary."""
    subspace = boundaries.random_subspace(key=jax.random.key(0), vocab_size=VOCABULARY, width=d, rank=k)
    ids = jnp.asarray(np.random.default_rng(0).integers(0, VOCABULARY, TOKENS), jnp.int32)
    C = jax.random.normal(jax.random.key(1), (*TOKENS, k))
    return subspace, {"x": boundaries.subspaces.subspace_reconstruct(C, ids, subspace), "ids": ids}


def coordinates_case(d: int, k: int) -> Case:
    """The two ways to encode."""
    subspace, x = activations(d, k)
    codec = boundaries.subspace_codec(subspace)
    tokens = TOKENS[0] * TOKENS[1]
    return Case(
        "decentralised",
        f"coordinates d={d} k={k}",
        {
            "projected": Implementation(jax.jit(lambda x: codec.encode(x, ())[0]["x"].arrays["C"]), (x,)),
            "direct": Implementation(
                jax.jit(lambda x: boundaries.subspaces.subspace_coordinates(x["x"], x["ids"], subspace)), (x,)
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

    def both_ways(forward: boundaries.Codec, backward: boundaries.Codec, x) -> Implementation:
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
            "block": _block(d, x["x"]),
            "subspace": both_ways(boundaries.subspace_codec(subspace), boundaries.subspace_gradient_codec(subspace), x),
            "bf16": same(boundaries.cast_codec()),
            "int8": same(boundaries.int8_codec()),
            "top_k": same(boundaries.top_k_codec(d // 8, error_feedback=False)),
        },
        seconds=8.0,
    )


def monitor_case(d: int) -> Case:
    """The same block, and verifiers with all distances, without the one that sorts, and with one point a message."""
    message = jax.random.normal(jax.random.key(2), (*TOKENS, d))
    others = jax.random.normal(jax.random.key(3), (REPLICAS, *TOKENS, d))
    three = tuple(name for name in parallel.integrity.distances.DISTANCES if name != "wasserstein")
    return Case(
        "decentralised",
        f"monitor d={d}",
        {
            "block": _block(d, message),
            "four distances": _verifiers(message, others),
            "without Wasserstein": _verifiers(message, others, distances=three),
            "means over tokens": _verifiers(message, others, reduce_axes=(0, 1)),
        },
        seconds=8.0,
    )


def _block(d: int, x: jax.Array) -> Implementation:
    """A block's forward and backward pass."""
    config = models.GPTConfig(vocab_size=8, block_size=TOKENS[1], layers=1, width=d, heads=d // 64, norm="rms")
    block = models.gpt_stages(config).block
    params = staged_decoder.initial(config)["blocks"][0]

    def stage(params, X):
        out, pullback = jax.vjp(block, params, X)
        return pullback(out)

    return Implementation(jax.jit(stage), (params, x))


def _verifiers(message: jax.Array, others: jax.Array, **options) -> Implementation:
    """What a replica does at a boundary, forward and backward, with the summaries of all; after the warm-up."""
    integrity = parallel.integrity
    verifiers = [integrity.VerifierConfig(decay=decay, warmup_steps=1, **options) for decay in (0.9, 0.8)]
    axes, taint = verifiers[0].reduce_axes, jnp.zeros(len(others), bool)
    summaries = jax.vmap(lambda other: integrity.distances.message_summary(other, axes))(others)
    started = {"count": jnp.int32(1), "started": jnp.bool_(True), "reference": summaries.mean(axis=0)}
    states = [
        integrity.init_verifier(v, len(others), message.shape, key=jax.random.key(4))._replace(**started)
        for v in verifiers
    ]

    def receive(verifier, state, message, summaries):
        summaries = summaries.at[0].set(integrity.distances.message_summary(message, axes))
        reference = integrity.distances.expand_reference(state.reference, message.shape, axes)
        state, accept = integrity.verification.verify_summaries(state, summaries, taint, verifier)
        return jnp.where(accept[0], message, reference), state

    def both(states, messages, summaries):
        return [receive(*of_direction, summaries) for of_direction in zip(verifiers, states, messages, strict=True)]

    return Implementation(jax.jit(both), (states, [message, -message], summaries))
