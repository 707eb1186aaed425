"""What a decentralised pipeline sends: bytes read from compiled programs, and what they take on slow links."""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import optax
from flax import nnx

from benchmarks._machinery import staged_decoder
from benchmarks.timing import Case, Implementation, Options, Record, measure
from jaxlib_methods import models, parallel
from jaxlib_methods.parallel.pipelines import communication, links, step_time

PyTree = Any
DESIGN = {"position": "rotary", "norm": "rms", "mlp": "gelu", "bias": False, "head_bias": False}


# ------------------------------------------------------------------------------------- bytes of compiled programs


class Coding(NamedTuple):
    """How the boundaries of a pipeline are coded."""

    forward: parallel.boundaries.Codec
    backward: parallel.boundaries.Codec
    subspace: parallel.boundaries.Subspace | None = None


def codings(vocab_size: int, width: int, rank: int) -> dict[str, Coding]:
    """By name; top-k keeps as many entries as the subspace has coordinates."""
    codecs = parallel.boundaries
    subspace = codecs.random_subspace(key=jax.random.key(0), vocab_size=vocab_size, width=width, rank=rank)
    both = lambda codec: Coding(codec, codec)
    constrained = lambda dtype: Coding(
        codecs.subspace_codec(subspace, dtype), codecs.subspace_gradient_codec(subspace, dtype), subspace
    )
    return {
        "dense": both(codecs.identity_codec()),
        "bf16": both(codecs.cast_codec()),
        "int8": both(codecs.int8_codec()),
        "top_k": both(codecs.top_k_codec(rank, error_feedback=False)),
        "subspace": constrained(None),
        "subspace bf16": constrained("bfloat16"),
    }


def coded_pipeline(
    config: models.GPTConfig, coding: Coding, P: int, n: int, examples: int
) -> tuple[jax.stages.Compiled, tuple[Any, ...]]:
    """The compiled step of an asynchronous pipeline with coded boundaries on n microbatches, and its arguments."""
    rank = None if coding.subspace is None else coding.subspace.U.shape[1]
    config = dataclasses.replace(config, subspace=rank, full_rank_blocks=0)
    model, params = staged_decoder.decoder(config, coding.subspace)
    stages, mesh = parallel.split_stages(params, P), staged_decoder.mesh(P)
    inputs, targets = staged_decoder.tokens(config, n, examples)
    pipe = parallel.asynchronous_pipeline(
        model,
        stages,
        optax.sgd(1e-3),
        mesh,
        batch=(inputs[0], targets[0]),
        forward_hook=parallel.boundaries.codec_hook(coding.forward),
        backward_hook=parallel.boundaries.codec_hook(coding.backward),
    )
    arguments = pipe.init(stages), *parallel.shard_batch(mesh, (inputs, targets))
    return pipe.lower(*arguments).compile(), arguments


def message_bytes(coding: Coding, tokens: tuple[int, int], width: int, dtype: str = "float32") -> tuple[int, int]:
    """Bytes of a message forward and backward, from shapes alone."""
    X, ids = jax.ShapeDtypeStruct((*tokens, width), dtype), jax.ShapeDtypeStruct(tokens, "int32")
    x = X if coding.subspace is None else {"x": X, "ids": ids}
    return parallel.boundaries.payload_bytes(coding.forward, x), parallel.boundaries.payload_bytes(coding.backward, [X])


def boundary_bytes(compiled: jax.stages.Compiled, n: int) -> tuple[set[float], set[float]]:
    """Bytes that a boundary carries for one of n microbatches, forward and backward: the values of all boundaries."""
    sent = communication.link_bytes(compiled)
    of = lambda step: {size / n for (source, target), size in sent.items() if target - source == step}
    return of(1), of(-1)


def bytes_records(width: int, rank: int, P: int, options: Options) -> list[Record]:
    """Times an update of the pipeline with each codec, all stages on one core, and tells what it sends."""
    name, n, examples = f"bytes d={width} k={rank}", 8, 4
    config = models.GPTConfig(300, 64, P, width, max(1, width // 64), **DESIGN)  # ids of more than 8 bits, as usual
    tokens, implementations = examples * config.block_size, {}
    for codec, coding in codings(config.vocab_size, width, rank).items():
        if options.quick and codec not in ("dense", "subspace bf16"):
            continue
        compiled, arguments = coded_pipeline(config, coding, P, n, examples)
        formula = message_bytes(coding, (examples, config.block_size), width)
        found = boundary_bytes(compiled, n)
        shown = [" or ".join(f"{size / tokens:g}" for size in sorted(sizes)) for sizes in found]
        agrees = "as" if found == ({formula[0]}, {formula[1]}) else "NOT as"
        options.note(
            f"{name}: {codec} sends {shown[0]} bytes a token forward and {shown[1]} backward, {agrees} payload_bytes"
        )
        implementations[codec] = Implementation(staged_decoder.Training(compiled, *arguments))
    return measure(Case("decentralised", name, implementations, seconds=15.0), options)


# ------------------------------------------------------------------------------------- wall-clock on slow links


class Setting(NamedTuple):
    """A training run of which only shapes are known."""

    config: models.GPTConfig
    stages: int  # P
    rank: int  # k
    examples: int  # of a microbatch, of one replica
    microbatches: int  # of a synchronous update
    replicas: int = 1  # R


_HALF = {"dtype": "bfloat16", "attention": "xla"}
PROTOCOL_MODELS = Setting(
    models.GPTConfig(
        50_257, 1024, 8, 4096, 32, kv_heads=8, mlp_width=14_336, **DESIGN | {"mlp": "swiglu"} | _HALF
    ),
    stages=8, rank=40, examples=1, microbatches=32,
)  # fmt: skip
ASYNC_MESH = Setting(
    models.GPTConfig(50_257, 1024, 12, 768, 12, **_HALF), stages=4, rank=8, examples=8, microbatches=1, replicas=2
)
FRACTION, TAU = 0.05, 10  # of AsyncMesh
FLOPS_PER_S = 5e13  # assumed of an accelerator: nothing of these sizes is measured here


class Shapes(NamedTuple):
    """What the link model needs to know of a setting; nothing is allocated for it."""

    costs: links.StageCosts  # of dense boundaries, without averaging
    messages: dict[str, tuple[int, int]]  # bytes forward and backward
    reduced: dict[str, int]  # bytes that the replicas of the largest stage reduce in an update


def shapes_of(setting: Setting, flops_per_s: float = FLOPS_PER_S) -> Shapes:
    """Seconds of each stage at so many operations a second, and the bytes of its messages and averages."""
    config, tokens = setting.config, (setting.examples, setting.config.block_size)
    init = lambda: nnx.state(models.GPT(config, rngs=nnx.Rngs(0)), nnx.Param)
    params, functions = models.split_gpt_params(config, jax.eval_shape(init)), models.gpt_stages(config)
    X = jax.ShapeDtypeStruct((*tokens, config.width), config.dtype)
    blocks = config.layers // setting.stages
    costs = links.stage_costs(functions.block, params[1][0], X, flops_per_second=flops_per_s, num_blocks=blocks)

    def head(params: PyTree, X: jax.Array) -> Any:
        logits, pull_back = jax.vjp(functions.head, params, X)
        return pull_back(logits)

    of_head = jax.jit(head).lower(params[2], X).cost_analysis()["flops"] / flops_per_s
    before = setting.stages - 1  # the last stage computes its forward pass as a part of its backward pass
    costs = costs._replace(
        forward=before * [costs.forward] + [0.0],
        backward=before * [costs.backward] + [costs.backward + of_head],
        gradient_bytes=0,
    )
    stages = parallel.split_stages(params, setting.stages)
    largest = max(stages, key=lambda stage: parallel.replicas.averaged_per_round(stage, 1.0))
    fractions = {"all": 1.0, "5 %": FRACTION}
    reduced = {
        name: 4 * parallel.replicas.averaged_per_round(largest, fraction) for name, fraction in fractions.items()
    }
    return Shapes(costs, messages_of(setting), reduced)


def messages_of(setting: Setting) -> dict[str, tuple[int, int]]:
    """Bytes of a message forward and backward, in bfloat16, dense and as coordinates of a subspace."""
    config, tokens = setting.config, (setting.examples, setting.config.block_size)
    dense = Coding(parallel.boundaries.identity_codec(), parallel.boundaries.identity_codec())
    found = {"dense": message_bytes(dense, tokens, config.width, "bfloat16")}

    def traced(key: jax.Array) -> None:
        codecs = parallel.boundaries
        subspace = codecs.random_subspace(key=key, vocab_size=config.vocab_size, width=config.width, rank=setting.rank)
        forward = codecs.subspace_codec(subspace, "bfloat16")
        coding = Coding(forward, codecs.subspace_gradient_codec(subspace, "bfloat16"), subspace)
        found["subspace"] = message_bytes(coding, tokens, config.width)

    jax.eval_shape(traced, jax.random.key(0))  # a table for a real vocabulary is large
    return found


def update_seconds(
    setting: Setting,
    shapes: Shapes,
    link: links.Link,
    *,
    boundaries: str = "dense",
    schedule: str = "async",
    averaged: str | None = None,
    tau: int = 0,
) -> float:
    """Seconds of an update; an average that may be tau updates late shares no link with the boundaries.

    Late averages are sent one after the other beside the computation, at most tau of them under way: an update takes no
    less than their transmission, nor than the tau-th part of their all-reduce.
    """
    forward, backward = shapes.messages[boundaries]
    reduced, waits = shapes.reduced[averaged] if averaged else 0, averaged is not None and not tau
    predicted = step_time.predict_step(
        shapes.costs._replace(forward_bytes=forward, backward_bytes=backward, gradient_bytes=reduced if waits else 0),
        link,
        num_stages=setting.stages,
        schedule=schedule,
        num_microbatches=1 if schedule == "async" else setting.microbatches,
        num_replicas=setting.replicas if waits else 1,  # a sum of nothing takes its latency too
    )
    if waits or averaged is None:
        return predicted.step
    whole = links.all_reduce_time(reduced, setting.replicas, link)
    sending = links.all_reduce_time(reduced, setting.replicas, link._replace(latency=0))
    return max(predicted.step, sending, whole / tau)


def links_records(width: int, options: Options) -> list[Record]:
    """Times a stage of one block of the official small model, and predicts from it and for the papers' sizes."""
    name = f"links d={width}"
    config = models.GPTConfig(50_257, 1024 if width > 512 else 128, 8, width, max(1, width // 128), **DESIGN)
    setting = Setting(config, stages=8, rank=160 * width // 1024, examples=1, microbatches=64)
    records = measure(Case("decentralised", name, _of_block(config), seconds=15.0, min_rounds=5), options)
    seconds = {record.implementation: record.median_ms / 1e3 for record in records}
    costs = links.StageCosts(7 * [seconds["forward"]] + [0.0], seconds["backward, recomputed"], 0, 0, seconds["update"])
    timed = Shapes(costs, messages_of(setting), {})
    for title, where, shapes, count in (
        (f"8 stages of a block of width {width}, times of this device in float32, head left out", setting, timed, 64),
        ("Protocol Models, 2B, 8 stages, 5e13 operations/s", PROTOCOL_MODELS, shapes_of(PROTOCOL_MODELS), 32),
    ):
        for boundaries in shapes.messages:
            for schedule, updates in (("gpipe", 1), ("async", count)):
                found = [
                    updates * update_seconds(where, shapes, link, boundaries=boundaries, schedule=schedule)
                    for link in links.LINKS.values()
                ]
                options.note(f"{name}: {title}: {schedule}, {boundaries}: {count} microbatches in {_per_link(found)}")
    shapes = shapes_of(ASYNC_MESH)
    for boundaries in shapes.messages:
        for averaged, tau in ((None, 0), ("all", 0), ("5 %", 0), ("5 %", TAU)):
            found = [
                update_seconds(ASYNC_MESH, shapes, link, boundaries=boundaries, averaged=averaged, tau=tau)
                for link in links.LINKS.values()
            ]
            what = f"{averaged or 'nothing'} averaged{f', {tau} updates late' if tau else ''}"
            options.note(
                f"{name}: AsyncMesh, 160M, 4 stages x 2 replicas, 5e13 operations/s: async, {boundaries}, {what}: "
                f"an update in {_per_link(found)}"
            )
    return records


def _of_block(config: models.GPTConfig) -> dict[str, Implementation]:
    """The three things that a stage of one block does with a microbatch."""
    block = models.gpt_stages(config).block
    params = staged_decoder.initial(dataclasses.replace(config, vocab_size=8, layers=1))["blocks"][0]
    optimizer = optax.adamw(1e-3)
    X = jax.random.normal(jax.random.key(0), (1, config.block_size, config.width))

    def backward(params: PyTree, X: jax.Array) -> Any:
        Y, pull_back = jax.vjp(block, params, X)
        return pull_back(Y)

    def update(params: PyTree, state: PyTree) -> Any:
        updates, state = optimizer.update(params, state, params)
        return optax.apply_updates(params, updates), state

    return {
        "forward": Implementation(jax.jit(block), (params, X)),
        "backward, recomputed": Implementation(jax.jit(backward), (params, X)),
        "update": Implementation(jax.jit(update), (params, optimizer.init(params))),
    }


def _per_link(seconds: list[float]) -> str:
    return ", ".join(f"{s:.3g} s at {name}" for name, s in zip(links.LINKS, seconds, strict=True))


def run_cases(options: Options) -> Iterator[Record]:
    """The cases `bytes` and `links`; with --quick narrow ones."""
    width, rank, P = (64, 10, 2) if options.quick else (256, 40, 4)
    if options.selects(f"bytes d={width} k={rank}"):
        yield from bytes_records(width, rank, P, options)
    width = 128 if options.quick else 1024
    if options.selects(f"links d={width}"):
        yield from links_records(width, options)
