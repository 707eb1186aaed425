"""The link model against a queue simulation by events, closed forms, and the arithmetic of the published records."""

import heapq
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.parallel.pipelines import links, step_time


def simulated(forward, backward, sent, latency, order):
    """Events in the order of time: stages take the next pass of their list when its input has come; links are queues.

    `order[j]` lists ("F" | "B", chunk, microbatch); chunk c of device j is the c P + j-th part of the model. Returns
    the time at which every pass ends.
    """
    P, chunks = len(order), 1 + max(c for passes in order for _, c, _ in passes)
    parts = P * chunks
    free, queue, ends = [True] * P, [list(passes) for passes in order], {}
    here = {("F", 0, m) for kind, c, m in order[0] if (kind, c) == ("F", 0)}
    queues, sending = {}, {}
    events, tie = [(0.0, -1, ("wake", j)) for j in range(P)], itertools.count()

    def start(j, now):
        if free[j] and queue[j]:
            kind, c, m = queue[j][0]
            if (kind, c * P + j, m) in here:
                queue[j].pop(0)
                free[j] = False
                seconds = (forward if kind == "F" else backward)[j] / chunks
                heapq.heappush(events, (now + seconds, next(tie), ("done", j, kind, c * P + j, m)))

    def transmit(link, now):
        if queues[link] and not sending.get(link):
            sending[link] = True
            message = queues[link].pop(0)
            leaves = now + sent[message[0]]
            heapq.heappush(events, (leaves, next(tie), ("left", link)))
            heapq.heappush(events, (leaves + latency, next(tie), ("arrived", message)))

    while events:
        now, _, (what, *about) = heapq.heappop(events)
        if what == "wake":
            start(about[0], now)
        elif what == "left":
            sending[about[0]] = False
            transmit(about[0], now)
        elif what == "arrived":
            here.add(about[0])
            start(about[0][1] % P, now)
        else:
            j, kind, part, m = about
            ends[kind, part, m] = now
            free[j] = True
            target = part + (1 if kind == "F" else -1)
            message = ("B", part, m) if target == parts else (kind, target, m)
            if target == parts or (P == 1 and target >= 0):
                here.add(message)
            elif target >= 0:
                queues.setdefault((kind, j), []).append(message)
                transmit((kind, j), now)
            start(j, now)
    assert not any(queue)
    return ends


def lists(schedule, P, M, repeats=1):
    """What every stage does, written down apart from the library."""
    if schedule == "1f1b":
        result = []
        for j in range(P):
            F, B, passes = 0, 0, []
            while B < M:
                if F < M and P - j > F - B:
                    passes, F = [*passes, ("F", 0, F)], F + 1
                else:
                    passes, B = [*passes, ("B", 0, B)], B + 1
            result.append(passes)
        return result
    group = P if repeats > 1 else M
    rounds = [(c, m + g) for g in range(0, M, group) for c in range(repeats) for m in range(group)]
    return [[("F", *at) for at in rounds] + [("B", *at) for at in rounds[::-1]] for _ in range(P)]


def costs_of(rng, P, *, comm=1.0):
    f, b, u = (list(rng.uniform(0.5, 2.0, P)) for _ in range(3))
    return links.StageCosts(f, b, comm * rng.uniform(0, 2e6), comm * rng.uniform(0, 2e6), u)


@pytest.mark.contract
@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "circular"])
@pytest.mark.parametrize("seed", range(6))
def test_synchronous_steps_equal_the_simulated_queues(schedule, seed):
    rng = np.random.default_rng(seed)
    P, M = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    repeats = int(rng.integers(1, 4)) if schedule == "circular" else 1
    M = M * P if repeats > 1 else M
    costs, link = costs_of(rng, P), links.Link(1e7, rng.uniform(0, 0.5))
    sent = {"F": link.seconds(costs.forward_bytes), "B": link.seconds(costs.backward_bytes)}
    ends = simulated(costs.forward, costs.backward, sent, link.latency, lists(schedule, P, M, repeats))
    last = [max(t for (_, part, _), t in ends.items() if part % P == j) + costs.update[j] for j in range(P)]
    found = step_time.predict_step(costs, link, num_stages=P, schedule=schedule, num_microbatches=M, num_rounds=repeats)
    assert found.step == pytest.approx(max(last), rel=1e-12)
    assert found.utilisation == found.compute / found.step <= 1


@pytest.mark.parametrize("seed", range(6))
def test_the_asynchronous_period_is_what_the_simulated_queues_settle_to(seed):
    rng = np.random.default_rng(seed)
    P, M = int(rng.integers(1, 6)), 400
    costs, link = costs_of(rng, P), links.Link(1e7, rng.uniform(0, 1.0))
    sent = {"F": link.seconds(costs.forward_bytes), "B": link.seconds(costs.backward_bytes)}
    backward = [b + u for b, u in zip(costs.backward, costs.update, strict=True)]
    ends = simulated(costs.forward, backward, sent, link.latency, lists("1f1b", P, M))
    n = math.lcm(*range(1, P + 1))  # the period repeats after at most so many updates
    settled = (ends["B", 0, 299] - ends["B", 0, 299 - 2 * n]) / (2 * n)
    assert step_time.predict_step(costs, link, num_stages=P, schedule="async").step == pytest.approx(settled, rel=1e-9)


def meetings(programs, latency):
    """Devices that run their actions one after the other: ("work", seconds) or ("meet", tag, to, from, seconds).

    A message leaves when its sender is there and has been told that the receiver is. Returns when each device is done.
    """
    P = len(programs)
    at, done, told, waiting = [0] * P, [0.0] * P, {}, {}
    events, tie = [(0.0, j, j) for j in range(P)], itertools.count(P)

    def leave(tag, source, target, seconds):
        legs = waiting.get((tag, source)), waiting.get((tag, target))
        if None in legs or (tag, source) not in told:
            return
        start = max(legs[0]["since"], told[tag, source])
        for leg, when in zip(legs, (start + seconds, start + seconds + latency), strict=True):
            leg["legs"] -= 1
            leg["until"] = max(leg["until"], when)
        for j, leg in zip((source, target), legs, strict=True):
            if leg["legs"] == 0:
                heapq.heappush(events, (leg["until"], next(tie), j))

    while events:
        now, _, j = heapq.heappop(events)
        if at[j] == len(programs[j]):
            done[j] = now
            continue
        kind, *what = programs[j][at[j]]
        at[j] += 1
        if kind == "work":
            heapq.heappush(events, (now + what[0], next(tie), j))
            continue
        tag, target, source, seconds = what
        waiting[tag, j] = {"since": now, "until": now, "legs": (target is not None) + (source is not None)}
        if not waiting[tag, j]["legs"]:
            heapq.heappush(events, (now, next(tie), j))
        if source is not None:
            told[tag, source] = now + latency
            leave(tag, source, j, seconds)
        if target is not None:
            leave(tag, j, target, seconds)
    assert at == [len(program) for program in programs]
    return done


def blocking_programs(schedule, P, M, costs, sent):
    """F and B in their slots, then what the slot sends: the slots are written down apart from the library."""
    last = 2 * (M + P - 1)
    programs = [[] for _ in range(P)]
    for s in range(last):
        if schedule == "gpipe":
            ahead = [s < last // 2] * P
            m = [s - j if ahead[j] else last - 1 - s - j for j in range(P)]
        else:
            ahead = [(s - j) % 2 == 0 for j in range(P)]
            m = [(s - j) // 2 if ahead[j] else (s - 2 * P + 1 + j) // 2 for j in range(P)]
        for j in range(P):
            if 0 <= m[j] < M:
                programs[j].append(("work", (costs.forward if ahead[j] else costs.backward)[j]))
            for way, step, seconds in (("F", 1, sent[0]), ("B", -1, sent[1])):
                sends = lambda i, way=way: 0 <= i < P and ahead[i] == (way == "F")
                to = j + step if sends(j) and 0 <= j + step < P else None
                programs[j].append(("meet", (s, way), to, j - step if sends(j - step) else None, seconds))
    return programs


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "async"])
@pytest.mark.parametrize("seed", range(4))
def test_blocking_programs_equal_the_simulated_meetings(schedule, seed):
    rng = np.random.default_rng(seed)
    P, M = int(rng.integers(1, 6)), int(rng.integers(1, 9))
    costs, link = costs_of(rng, P)._replace(update=0.0), links.Link(1e7, rng.uniform(0, 0.5))
    sent = link.seconds(costs.forward_bytes), link.seconds(costs.backward_bytes)
    times = lambda M: meetings(blocking_programs(schedule, P, M, costs, sent), link.latency)
    if schedule == "async":
        expected, M = (times(480)[0] - times(240)[0]) / 240, 1
    else:
        expected = max(times(M))
    found = step_time.predict_step(costs, link, num_stages=P, schedule=schedule, num_microbatches=M, blocking=True)
    assert found.step == pytest.approx(expected, rel=1e-9)


def test_blocking_without_transfers_costs_nothing_where_stages_are_equal():
    costs = links.StageCosts(1.0, 2.0, 0, 0)
    for P in (1, 2, 4, 7):
        step = lambda schedule, M: (
            step_time.predict_step(
                costs,
                links.Link(1e9),
                num_stages=P,
                schedule=schedule,
                num_microbatches=M,
                blocking=True,
            ).step
        )
        assert step("gpipe", 6) == pytest.approx((6 + P - 1) * 3)
        assert step("async", 1) == pytest.approx(3)  # not 2 max(f, b): neighbours drift apart by a slot


def test_equal_stages_have_closed_forms():
    f, b, P, M = 1.0, 2.0, 4, 6
    slow = links.Link(8e6, 0.25)  # a byte a microsecond
    costs = links.StageCosts(f, b, 0.5e6, 0.75e6)
    step = lambda costs, link, schedule, **options: step_time.predict_step(
        costs, link, num_stages=P, schedule=schedule, **options
    )
    free = costs._replace(forward_bytes=0, backward_bytes=0)
    fast = links.Link(1.0)
    for schedule in ("gpipe", "1f1b"):
        assert step(free, fast, schedule, num_microbatches=M).step == pytest.approx((M + P - 1) * (f + b))
    for repeats in (1, 2, 3):
        expected = (2 * P * repeats + P - 1) * (f + b) / repeats
        assert step(free, fast, "circular", num_microbatches=2 * P, num_rounds=repeats).step == pytest.approx(expected)
    expected = (P - 1) * (f + 0.75 + b + 1.0) + (M - 1) * (f + b) + f + b
    assert step(costs, slow, "gpipe", num_microbatches=M).step == pytest.approx(expected)
    assert step(costs, slow, "async").step == pytest.approx(f + b + (0.75 + 1.0) * (P - 1) / P)
    # Where the link is the bottleneck, the period is its transmission.
    bound = step(costs._replace(forward_bytes=20e6), slow, "async")
    assert bound.step == bound.link == 20.0 and bound.utilisation == 3 / 20


def test_one_stage_and_replicas():
    costs = links.StageCosts(1.0, 2.0, 1e9, 1e9, 0.5, gradient_bytes=1e6)
    link = links.Link(1e6, 0.1)
    for schedule in ("gpipe", "1f1b", "circular", "async"):
        assert step_time.predict_step(costs, link, num_stages=1, schedule=schedule).step == 3.5
    reduced = 2 * (3 / 4 * 8.0 + 3 * 0.1)  # a ring of four: each sends 2 x 3/4 of 8 Mbit in six messages
    assert links.all_reduce_time(1e6, 4, link) == pytest.approx(reduced)
    for schedule in ("gpipe", "async"):
        found = step_time.predict_step(costs, link, num_stages=1, schedule=schedule, num_replicas=4)
        assert found.step == pytest.approx(3.5 + reduced) and found.compute == 3.5


def test_the_published_records():
    link = links.LINKS["200 Mbit/s + 50 ms"]
    dense = links.blocking_floor(
        link, num_tokens=524_288, forward_bytes=2 * 1024, backward_bytes=2 * 1024, num_microbatches=64
    )
    assert dense == pytest.approx(85.9 + 6.4, abs=0.01) and dense < 100.475  # measured
    subspace = links.blocking_floor(
        link, num_tokens=524_288, forward_bytes=2 * 161, backward_bytes=2 * 161, num_microbatches=32
    )
    assert subspace == pytest.approx(13.5 + 3.2, abs=0.01) and subspace < 19.889
    assert pytest.approx(6.36, abs=0.005) == 2048 / (2 * 161)
    assert pytest.approx(1.62, abs=0.005) == (2925 * 100.475) / (9125 * 19.889)
    # Filling and draining eight stages comes on top of it, and is within what was measured, computation included.
    for bytes_a_token, microbatches, measured in ((2048, 64, 100.475), (322, 32, 19.889)):
        size = 524_288 / microbatches * bytes_a_token
        found = step_time.predict_step(
            links.StageCosts(0, 0, size, size), link, num_stages=8, num_microbatches=microbatches
        )
        fill = 2 * 7 * (link.seconds(size) + link.latency)
        assert found.step == pytest.approx(fill + 2 * (microbatches - 1) * link.seconds(size))
        assert 0.8 * measured < found.step < measured


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "async"])
def test_the_largest_pipeline_is_the_last_that_a_walk_over_all_keeps(schedule):
    M = 1 if schedule == "async" else 16
    for size in (0, 4e5):
        costs = links.StageCosts(0.2, 0.4, size, size, 0.01)
        link = links.Link(8e7, 0.002)
        enough = [
            step_time.predict_step(costs, link, num_stages=P, schedule=schedule, num_microbatches=M).utilisation >= 0.9
            for P in range(1, 17)
        ]
        walked = enough.index(False) if False in enough else 16
        assert not any(enough[walked:])
        found = step_time.largest_pipeline(costs, link, schedule=schedule, num_microbatches=M, max_stages=16)
        assert found == walked
    assert step_time.largest_pipeline(costs._replace(update=1e3), links.Link(1.0), num_replicas=2) == 1
    slow = costs._replace(gradient_bytes=1e9)
    assert step_time.largest_pipeline(slow, links.Link(1e6), num_replicas=2) == 0


def test_wider_stages_need_less_of_a_link():
    """Operations grow with the square of the width and messages with the width: wide models keep slow links busy."""
    least = {}
    for name, link in links.LINKS.items():
        for width in (256, 1024, 4096):
            params = {name: jax.ShapeDtypeStruct((width, width), jnp.float32) for name in "ab"}
            x = jax.ShapeDtypeStruct((8, 128, width), jnp.bfloat16)
            block = lambda p, x: x + jnp.dot(jnp.dot(x, p["a"].astype(x.dtype)), p["b"].astype(x.dtype))
            costs = links.stage_costs(block, params, x, flops_per_second=1e12, num_blocks=6)
            assert costs.forward_bytes == 2 * 8 * 128 * width and costs.gradient_bytes == 6 * 2 * 4 * width**2
            assert costs.forward == pytest.approx(6 * 4 * 1024 * width**2 / 1e12, rel=0.02)
            assert costs.backward == pytest.approx(3 * costs.forward, rel=0.02)
            least[name, width] = step_time.predict_step(costs, link, num_stages=8, schedule="async").utilisation
    for name in links.LINKS:
        assert least[name, 256] < least[name, 1024] < least[name, 4096]
    for slow, fast in itertools.pairwise(("80 Mbit/s", "1 Gbit/s", "100 Gbit/s")):
        assert least[slow, 1024] < least[fast, 1024]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "zb"}, "schedule must be one of 'gpipe', '1f1b', 'circular', 'async', got 'zb'"),
        ({"num_stages": 0}, "num_stages must be at least 1, got 0"),
        ({"num_rounds": 2}, "only the circular schedule has several rounds"),
        ({"schedule": "async", "num_microbatches": 4}, "updates after every microbatch, got num_microbatches=4"),
        ({"num_stages": 3}, "forward must be one number or one for each of the 3 stages, got 2"),
    ],
)
def test_bad_options_are_named(options, message):
    costs = links.StageCosts([1.0, 1.0], 1.0, 0, 0)
    with pytest.raises(ValueError, match=message):
        step_time.predict_step(costs, links.Link(1e9), **{"num_stages": 2, **options})
    with pytest.raises(ValueError, match="utilisation must lie in"):
        step_time.largest_pipeline(costs, links.Link(1e9), utilisation=90)
