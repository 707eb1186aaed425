"""What the hooks on the data axis cost: time beside an update, bytes of a round, memory of their states."""

import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks._machinery import staged_decoder, traces
from benchmarks.timing import Case, Implementation, Options, Record, measure
from jaxlib_methods import models, parallel
from jaxlib_methods.parallel.pipelines import communication, hooks

PyTree = Any
FRACTION, TAU, COUNT = 0.05, 10, 4  # p; rounds that an average is late; updates of a call, and local steps of a round


class Exchange(NamedTuple):
    """What the replicas exchange, and what that should take."""

    hook: hooks.DataHook | None
    gradients: bool  # whether these are averaged before the update
    every: int  # updates between two rounds
    reduced: int  # numbers of a round
    kept: int  # numbers of the state


def exchanges(packed: PyTree) -> dict[str, Exchange]:
    """By name; `packed` are the parameters of one device, N numbers in all."""
    key = jax.random.key(0)
    N = parallel.replicas.averaged_per_round(packed, 1.0)
    K = parallel.replicas.averaged_per_round(packed, FRACTION)
    sparse = lambda **options: parallel.replicas.sparse_averaging(FRACTION, key=key, **options)
    fragments = [("common/.*[02468]$", 0), (".", 1)]
    return {
        "nothing": Exchange(None, False, 1, 0, 0),
        "gradients": Exchange(None, True, 1, N, 0),
        "sparse avg, tau 0": Exchange(sparse(delay=0, method="avg"), False, 1, K, 2 * K),
        "sparse avg": Exchange(sparse(delay=TAU, method="avg"), False, 1, K, 2 * TAU * K),
        "sparse ema": Exchange(sparse(delay=TAU), False, 1, K, 2 * TAU * K + N),
        "fed_avg": Exchange(parallel.replicas.fed_avg(COUNT), False, COUNT, N, 0),
        "diloco": Exchange(parallel.replicas.diloco(COUNT), False, COUNT, N, 2 * N),
        "streaming_diloco": Exchange(parallel.replicas.streaming_diloco(COUNT, fragments), False, COUNT, N, 2 * N),
    }


def mesh_pipeline(
    config: models.GPTConfig, P: int, D: int, examples: int, exchange: Exchange
) -> tuple[parallel.pipelines.Pipeline, tuple[Any, ...]]:
    """An asynchronous pipeline of P stages and D replicas, and the arguments of its step on COUNT microbatches."""
    model, params = staged_decoder.decoder(config)
    stages, mesh = parallel.split_stages(params, P), staged_decoder.mesh(P, D)
    inputs, targets = staged_decoder.tokens(config, COUNT, D * examples)
    pipe = parallel.asynchronous_pipeline(
        model,
        stages,
        optax.adamw(1e-3),
        mesh,
        batch=(inputs[0], targets[0]),
        average_gradients=exchange.gradients,
        data_hook=exchange.hook,
    )
    return pipe, (pipe.init(stages), *parallel.shard_batch(mesh, (inputs, targets)))


def packed_shapes(config: models.GPTConfig, P: int) -> PyTree:
    """The parameters of one device."""
    model, params = staged_decoder.decoder(config)
    tokens = jax.ShapeDtypeStruct((1, config.block_size), jnp.int32)
    stages = parallel.split_stages(params, P)
    mesh = staged_decoder.mesh(P)
    return parallel.asynchronous_pipeline(
        model, stages, optax.sgd(1.0), mesh, batch=(tokens, tokens)
    ).layout.params.shapes


def reduced_bytes(program: jax.stages.Compiled, P: int, D: int) -> int:
    """Bytes that a device puts into sums over its replicas in a call, without the losses at its end."""
    replicas = {tuple(range(j * D, (j + 1) * D)) for j in range(P)}
    return sum(
        c.bytes * c.count
        for c in communication.collectives(program)
        if c.kind == "all-reduce" and c.count == COUNT and (set(c.groups) == replicas or (P == 1 and not c.groups))
    )


def state_bytes(pipe: parallel.pipelines.Pipeline, state: PyTree) -> int:
    """Bytes of the floating arrays of the hook's state, on one device."""
    floating = [leaf for leaf in jax.tree.leaves(state.data_hook) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return sum(leaf.nbytes for leaf in floating) // (pipe.layout.num_stages * pipe.layout.num_replicas)


def computed_meanwhile(compiled: jax.stages.Compiled, training: staged_decoder.Training) -> tuple[float, float]:
    """Shares of a call in which a device waits for sums over the replicas, and in which it computes while it waits.

    By a trace on a CPU, where every operation of a program is an event; the means of all devices.
    """
    sums = set(re.findall(r"%([\w.-]+) = [^\n]* all-reduce(?:-start)?\(", compiled.as_text()))
    before = time.perf_counter_ns()
    events, _ = traces.record(training)
    called = time.perf_counter_ns() - before
    devices = {event.device for event in events} - {None}
    waiting = computing = 0.0
    for device in devices:
        mine = [event for event in events if event.device == device and not event.name.startswith(("end:", *_WHOLE))]
        waits = traces.union(event for event in mine if event.name in sums)
        others = traces.union(event for event in mine if event.name not in sums)
        waiting, computing = waiting + traces.length(waits), computing + traces.common(waits, others)
    return waiting / called / len(devices), computing / called / len(devices)


_WHOLE = ("while", "conditional", "call")  # operations that stand for others


def averaging_records(config: models.GPTConfig, P: int, examples: int, options: Options) -> list[Record]:
    """Times COUNT updates with each exchange, all devices on one core, and tells bytes and memory."""
    D, name = 2, f"averaging P={P}"
    slots = 1 if P == 1 else 2  # of a repetition, with all that is on the data axis
    packed = packed_shapes(config, P)
    implementations, of_all = {}, exchanges(packed)
    for what, exchange in of_all.items():
        if options.quick and what not in ("nothing", "sparse ema"):
            continue
        pipe, arguments = mesh_pipeline(config, P, D, examples, exchange)
        compiled = pipe.lower(*arguments).compile()
        per_slot, rest = divmod(reduced_bytes(compiled, P, D), COUNT * slots)
        kept = state_bytes(pipe, arguments[0])
        memory = compiled.memory_analysis()
        note = f"{per_slot}{f' and {rest} / {COUNT * slots}' if rest else ''} bytes a device and round"
        options.note(
            f"{name}: {what} reduces {note}, by the formula {4 * exchange.reduced}, and sends it {slots} times; its "
            f"state holds {kept} bytes, by the formula {4 * exchange.kept}; the program's arguments take "
            f"{memory.argument_size_in_bytes}, its temporaries {memory.temp_size_in_bytes}"
        )
        training = staged_decoder.Training(compiled, *arguments)
        implementations[what] = Implementation(training)
        if what == "sparse ema" and jax.devices()[0].platform == "cpu":
            for _ in range(2):  # the pipe fills
                jax.block_until_ready(training())
            waits, computes = computed_meanwhile(compiled, training)
            options.note(
                f"{name}: by a trace, a device is in the all-reduces of {what} for {waits:.2%} of the time, and also "
                f"computes in {computes:.2%}"
            )
    records = measure(Case("decentralised", name, implementations, seconds=30.0), options)
    alone = records[0].median_ms
    for record in records[1:]:
        rounds = COUNT // of_all[record.implementation].every
        cost = (record.median_ms - alone) / rounds
        options.note(
            f"{name}: a round of {record.implementation} takes {cost / (alone / COUNT):.3g} of the time of an update"
        )
    return records


def run_cases(options: Options) -> Iterator[Record]:
    """The cases `averaging`; with --quick a narrow one."""
    width, block = (64, 32) if options.quick else (256, 128)
    config = models.GPTConfig(256, block, 2, width, width // 64)
    for P in (2,) if options.quick else (1, 2):
        if options.selects(f"averaging P={P}"):
            yield from averaging_records(config, P, 4, options)
