"""Pipelines: overhead over the model without one, compile time, two real processes, slow links; PyTorch's as a peer.

Cases: `update P=...` (one core runs all stages, so that the ratio is overhead, not speed-up), `compile P=... n=...`,
`two processes` (stages on a core each, over gloo) and `link ...` (the same over a slow link between two namespaces,
whose prediction is told in a note). Memory against its formulas is told in notes of `update`.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks._machinery import slow_link, staged_decoder, two_processes
from benchmarks.timing import Case, Implementation, Options, Record, Skip, measure, peer
from jaxlib_methods import models, parallel
from jaxlib_methods.parallel.pipelines import links, step_time

HEADLINES = (  # an overhead of at most a quarter over the model without a pipeline; 1.3 times GPipe's throughput
    ("update P=4", "async", ("one device, as async",), 0.8),
    ("update P=4", "gpipe", ("one device, as gpipe",), 0.8),
    ("update P=4", "1f1b", ("one device, as gpipe",), 0.8),
    ("two processes", "async", ("gpipe", "1f1b", "torch gpipe"), 1.3),
    ("two processes", "gpipe", ("torch gpipe",)),
    ("link 80 Mbit/s", "async", ("gpipe", "1f1b")),
    ("link 200 Mbit/s + 50 ms", "async", ("gpipe", "1f1b")),
    ("link 1 Gbit/s", "async", ("gpipe", "1f1b")),
)
LAYERS, WIDTH, HEADS, BLOCK, BATCH, VOCABULARY = 8, 64, 2, 64, 4, 256
MICROBATCHES = 8  # of a synchronous update
COUNT = 16  # microbatches of a sample with two processes
LINKS = {
    "80 Mbit/s": links.LINKS["80 Mbit/s"],
    "200 Mbit/s + 50 ms": links.LINKS["200 Mbit/s + 50 ms"],
    "1 Gbit/s": links.LINKS["1 Gbit/s"],
}


def run(options: Options) -> Iterator[Record]:
    """Yields the cases of the docstring; with --quick only the smallest of each."""
    staged_decoder.fake_devices()
    for P in (4,) if options.quick else (2, 4, 8):
        if options.selects(f"update P={P}"):
            yield from _update(P, options)
    yield from _compile(options)
    if options.selects("two processes"):
        yield from _two_processes(options)
    for name, link in LINKS.items():
        if options.selects(f"link {name}") and not (options.quick and name != "1 Gbit/s"):
            yield from _over(name, link, options)


# ------------------------------------------------------------------------------------- fake devices on one core


@functools.cache
def _model() -> tuple[parallel.StageModel, Any]:
    return staged_decoder.decoder(_config())


def _config() -> models.GPTConfig:
    return models.GPTConfig(VOCABULARY, BLOCK, LAYERS, WIDTH, HEADS)


def make_pipeline(schedule: str, P: int, n: int) -> tuple[parallel.pipelines.Pipeline, tuple[Any, ...]]:
    """A pipeline and the arguments of its `step` on n microbatches; without "async", n are one update's."""
    model, params = _model()
    stages, mesh = parallel.split_stages(params, P), parallel.make_mesh(P)
    inputs, targets = staged_decoder.tokens(_config(), n, BATCH)
    common, batch = (model, stages, optax.adamw(1e-3), mesh), {"batch": (inputs[0], targets[0])}
    if schedule == "async":
        pipe = parallel.asynchronous_pipeline(*common, **batch)
    else:
        pipe = parallel.synchronous_pipeline(*common, **batch, num_microbatches=n, schedule=schedule)
    return pipe, (pipe.init(stages), *parallel.shard_batch(mesh, (inputs, targets)))


def without_pipeline(P: int, n: int, *, every: bool, keep: bool = False) -> tuple[Any, ...]:
    """A step on one device and its arguments: the same work, recomputation of each stage included.

    `every`: an update after each microbatch; `keep`: no recomputation.
    """
    model, params = _model()
    stages, optimizer = parallel.split_stages(params, P), optax.adamw(1e-3)

    def loss(stages: Any, inputs: jax.Array, targets: jax.Array) -> jax.Array:
        x = model.embed(stages[0]["embed"], inputs)
        for stage in stages[:-1]:
            run = lambda blocks, x: functools.reduce(lambda x, block: model.block(block, x), blocks, x)
            x = (run if keep else jax.checkpoint(run))(stage["blocks"], x)
        for block in stages[-1]["blocks"]:  # the last stage of a pipeline computes nothing twice either
            x = model.block(block, x)
        return model.head(stages[-1]["head"], x, targets)

    def update(carry: Any, grads: Any) -> Any:
        stages, state = carry
        updates, state = optimizer.update(grads, state, stages)
        return optax.apply_updates(stages, updates), state

    @functools.partial(jax.jit, donate_argnums=0)
    def step(carry: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        if every:
            one = lambda carry, batch: (update(carry, jax.grad(loss)(carry[0], *batch)), None)
            return jax.lax.scan(one, carry, (inputs, targets))[0]
        zeros = jax.tree.map(jnp.zeros_like, carry[0])
        add = lambda total, batch: (jax.tree.map(jnp.add, total, jax.grad(loss)(carry[0], *batch)), None)
        total, _ = jax.lax.scan(add, zeros, (inputs, targets))
        return update(carry, jax.tree.map(lambda g: g / n, total))

    carry = jax.tree.map(jnp.copy, (stages, optimizer.init(stages)))  # `_model` keeps what is donated here
    return step, carry, *map(jnp.asarray, staged_decoder.tokens(_config(), n, BATCH))


def _update(P: int, options: Options) -> list[Record]:
    implementations = {}
    for schedule in ("async", "gpipe", "1f1b"):
        pipe, arguments = make_pipeline(schedule, P, MICROBATCHES)
        implementations[schedule] = Implementation(staged_decoder.Training(pipe.step, *arguments))
        if schedule != "async":
            share = parallel.pipelines.schedules.bubble_fraction(schedule, P, MICROBATCHES)
            options.note(f"update P={P}: {schedule} leaves {share:.3f} of the slots idle by its schedule")
    for name, every, keep in (
        ("one device, as async", True, False),
        ("one device, as gpipe", False, False),
        ("one device, as gpipe, nothing twice", False, True),
    ):
        implementations[name] = Implementation(
            staged_decoder.Training(*without_pipeline(P, MICROBATCHES, every=every, keep=keep))
        )
    records = measure(Case("pipeline", f"update P={P}", implementations, seconds=20.0, min_rounds=7), options)
    _memory(*make_pipeline("async", P, MICROBATCHES), P, options)
    return records


def _memory(pipe: parallel.pipelines.Pipeline, arguments: tuple[Any, ...], P: int, options: Options) -> None:
    """Bytes of a stage by the compiled program, against P versions, two moments and P inputs in flight."""
    compiled = pipe.lower(*arguments).compile()
    state = arguments[0]
    of_device = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) // P
    weights = of_device(state.versions) // P
    activation = BATCH * BLOCK * WIDTH * 4
    formula = P * weights + 2 * weights + P * activation + 2 * activation + 2 * P * BATCH * BLOCK * 4
    batch = sum(leaf.nbytes for leaf in arguments[1:])
    found = compiled.memory_analysis()
    options.note(
        f"update P={P}: a stage's state has {found.argument_size_in_bytes - batch} bytes, by the formula (stash ring "
        f"{P * weights}, moments {2 * weights}, inputs in flight {P * activation}, arriving {2 * activation}, tokens) "
        f"{formula}; temporaries {found.temp_size_in_bytes}, donated {found.alias_size_in_bytes}"
    )


def _compile(options: Options) -> Iterator[Record]:
    """Only `lower_ms` and `compile_ms` matter here: against the stages, and against the microbatches of a call."""
    for schedule in ("async", "gpipe"):
        sizes = [(P, 8) for P in (2, 4, 8)] + [(4, 32), (4, 128)]
        for P, n in sizes[:1] if options.quick else sizes:
            name = f"compile {schedule} P={P} n={n}"
            if options.selects(name):
                pipe, arguments = make_pipeline(schedule, P, n)
                case = Case(
                    "pipeline", name, {schedule: Implementation(pipe.step, arguments)}, seconds=0.1, min_rounds=1
                )
                yield from measure(case, options)


# ------------------------------------------------------------------------------------------- two processes


def _two_processes(options: Options) -> list[Record]:
    with contextlib.ExitStack() as at_end:
        ours = at_end.enter_context(two_processes.pair("benchmarks._machinery.two_processes"))
        implementations: dict[str, Implementation | Skip] = {
            name: Implementation(functools.partial(_request, ours, name)) for name in two_processes.SCHEDULES
        }

        def of_torch(torch: Any) -> Implementation:
            del torch
            theirs = at_end.enter_context(two_processes.pair("peers.torch_pipeline"))
            return Implementation(functools.partial(_request, theirs, "gpipe"))

        implementations["torch gpipe"] = peer("torch", of_torch)
        case = Case("pipeline", "two processes", implementations, seconds=40.0, min_rounds=9)
        records = measure(case, options)
        for schedule in ("async", "gpipe", "1f1b"):
            waiting = [worker["waiting"] for worker in ours(trace=schedule, count=COUNT)]
            idle = (
                0.0
                if schedule == "async"
                else parallel.pipelines.schedules.bubble_fraction(schedule, two_processes.P, two_processes.M)
            )
            shown = " and ".join(f"{share:.2f}" for share in waiting)
            options.note(
                f"two processes: {schedule} waits {shown} of the time by the trace; "
                f"{idle:.2f} of the slots are idle by the schedule"
            )
    tokens = COUNT * two_processes.BATCH * two_processes.BLOCK
    for record in records:
        options.note(f"two processes: {record.implementation} {tokens / record.median_ms * 1e3:.0f} tokens/s")
    return records


def _request(workers: two_processes.Pair, schedule: str) -> float:
    return workers(schedule=schedule, count=COUNT)[-1]["loss"]


def _over(name: str, link: links.Link, options: Options) -> Iterator[Record]:
    if reason := slow_link.unavailable():
        options.note(f"link {name} skipped: {reason}")
        return
    with slow_link.slow_link(link) as prefix:
        ends = {"host": slow_link.ADDRESSES[0], "prefixes": [prefix(0), prefix(1)]}
        with two_processes.pair("benchmarks._machinery.two_processes", **ends) as workers:
            schedules = ("async", "gpipe", "1f1b")
            implementations = {s: Implementation(functools.partial(_request, workers, s)) for s in schedules}
            case = Case("pipeline", f"link {name}", implementations, seconds=20.0, min_rounds=5, warm_up=2)
            records = measure(case, options)
            stages = workers(costs=15)
            sent = {s: workers(schedule=s, count=COUNT)[0] for s in schedules}
    asked = link._replace(latency=2 * link.latency)  # of a sum's messages: gloo's receiver asks for each
    for record in records:
        s = record.implementation
        costs = links.StageCosts(
            *([stage[kind] for stage in stages] for kind in ("forward", "backward")),
            sent[s]["bytes"]["forward"],
            sent[s]["bytes"]["backward"],
            [stage["update"] for stage in stages],
        )
        of_update = 1 if s == "async" else two_processes.M
        predicted = step_time.predict_step(
            costs, link, num_stages=two_processes.P, schedule=s, num_microbatches=of_update, blocking=True
        )
        sums = sum(links.all_reduce_time(size, two_processes.P, asked) for size in sent[s]["summed"])
        total = predicted.step + (sums / COUNT if s == "async" else sums)
        step_ms = record.median_ms * of_update / COUNT
        options.note(
            f"link {name}: {s} {step_ms:.1f} ms an update, predicted {total * 1e3:.1f}, of which the sum of the losses "
            f"{(total - predicted.step) * 1e3:.1f}; utilisation {predicted.compute / total:.2f}"
        )
    yield from records
