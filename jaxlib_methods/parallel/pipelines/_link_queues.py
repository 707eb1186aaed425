"""When the stages of a pipeline are done: the dependencies of a schedule with seconds, in three forms.

`finish_queued` lets messages queue at links while stages go on; `finish_blocking` lets both ends of a link meet;
`period` is the time between updates of asynchronous 1F1B with queues.
"""

from collections.abc import Iterator

import numpy as np

from jaxlib_methods.parallel.pipelines.schedules import BACKWARD, FORWARD

Pass = tuple[bool, int, int]  # backward, round, microbatch


def finish_queued(
    table: np.ndarray, forward: list[float], backward: list[float], sent: tuple[float, float], latency: float, R: int
) -> list[float]:
    """When each stage has finished its list: the recurrence end = max(stage free, input there) + seconds."""
    P = table.shape[1]
    ends, link_free = [0.0] * P, [[0.0] * P, [0.0] * P]  # of the links that leave a stage forward and backward
    arrived: dict[tuple[int, Pass], float] = {}  # at which the output of a pass is where it is needed
    waiting = [iter(_passes(table[:, j], R)) for j in range(P)]
    upcoming = [next(passes, None) for passes in waiting]
    while any(upcoming):
        for j in range(P):
            while work := upcoming[j]:
                source = _source(j, work, P, R)
                if source is not None and source not in arrived:
                    break
                is_backward, r, _ = work
                start = max(ends[j], 0.0 if source is None else arrived[source])
                ends[j] = start + (backward if is_backward else forward)[j] / R
                if P == 1 or (j == P - 1 and not is_backward and r == R - 1):  # its own next pass needs it
                    arrived[j, work] = ends[j]
                else:
                    left = max(ends[j], link_free[is_backward][j]) + sent[is_backward]
                    link_free[is_backward][j] = left
                    arrived[j, work] = left + latency
                upcoming[j] = next(waiting[j], None)
    return ends


def _passes(column: np.ndarray, R: int) -> Iterator[Pass]:
    """The passes of a stage in the order in which it runs them, from its slots of `schedule_table`."""
    rounds: dict[tuple[int, int], int] = {}
    for work, m in column.tolist():
        if work:
            r = rounds[work, m] = rounds.get((work, m), -1) + 1
            yield (True, R - 1 - r, m) if work == BACKWARD else (False, r, m)


def _source(stage: int, work: Pass, P: int, R: int) -> tuple[int, Pass] | None:
    """The stage and the pass that a pass gets its input from; None: from the data."""
    is_backward, r, m = work
    if is_backward:
        if stage == P - 1:
            return (stage, (False, r, m)) if r == R - 1 else (0, (True, r + 1, m))
        return stage + 1, work
    if stage == 0:
        return None if r == 0 else (P - 1, (False, r - 1, m))
    return stage - 1, work


def finish_blocking(
    table: np.ndarray,
    forward: list[float],
    backward: list[float],
    sent: tuple[float, float],
    latency: float,
    R: int,
    *,
    alternating: bool,
) -> list[float]:
    """The same where every slot ends with its transfers, forward and then backward, each a rendezvous."""
    slots, P = table.shape[:2]
    ring = R > 1 and P > 1
    now = [0.0] * P
    for s, row in enumerate(table[:, :, 0].tolist()):
        for j, work in enumerate(row):
            now[j] += {FORWARD: forward[j], BACKWARD: backward[j]}.get(work, 0.0) / R
        is_forward = [(s - j) % 2 == 0 if alternating else 2 * s < slots for j in range(P)]
        for back in (False, True):
            step = -1 if back else 1
            senders = [j for j in range(P) if is_forward[j] != back and 0 <= j + step < P]
            senders += [0 if back else P - 1] if ring and is_forward[0] != back else []
            before, after = now, list(now)
            for j in senders:
                target = (j + step) % P
                start = max(before[j], before[target] + latency)
                after[j] = max(after[j], start + sent[back])
                after[target] = max(after[target], start + sent[back] + latency)
            now = after
    return now


def period(forward: list[float], backward: list[float], sent: tuple[float, float], latency: float) -> float:
    """The largest mean over the cycles of asynchronous 1F1B: down from stage j to k, and back up."""
    around = sum(sent) + 2 * latency
    step = max(sent)
    for j in range(len(forward)):
        total = -around
        for k in range(j, len(forward)):
            total += forward[k] + backward[k] + around
            step = max(step, total / (k - j + 1))
    return step
