"""TRWP and its relatives on real stereo and denoising problems, beside what else solves them.

Cases (`INSTANCE` is tsukuba, teddy, venus, map, penguin or house; the pictures are read from ../shared/data):

* `INSTANCE energies METHOD@ITERATIONS`: solves; the error is the relative distance from the energy in the literature
  or, where that was never published, of an independent implementation. `bound` is the chain lower bound, `sequential`
  the energy after sequential rounding.
* `INSTANCE iteration`: five TRWP-4 iterations of the public solver beside the scan a user would write in JAX, its
  PyTorch form, PGMax (max-product, five iterations) and five iterations of TRW-S in C++, one thread.
* `INSTANCE to the energy of TRW-S`: until the energy that TRW-S has after 50 iterations, against those 50 iterations;
  TRWP as in the paper, with early stopping, and from coarse grids (`coarse_to_fine`, its time included) with rho 0.6.
* `INSTANCE backward`: the forward pass without and with argmins, and the backward pass alone; ten iterations.
* `growth AXIS=SIZE`: one TRWP iteration of a Tsukuba-like problem with one size changed.
  `python -m benchmarks.cases.message_passing RECORDS.json FIGURE.png` draws these.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._machinery import grids
from benchmarks.timing import Case, Implementation, Options, Record, Skip, measure, peer
from jaxlib_methods import message_passing as mp
from jaxlib_methods.message_passing import _sweeps
from jaxlib_methods.message_passing._problem import Problem, Schedule
from peers import trwp

HEADLINES = (
    ("tsukuba iteration", "trwp", ("scan a user would write", "torch", "pgmax", "trws C++")),
    ("teddy iteration", "trwp", ("scan a user would write", "torch", "trws C++")),
    ("tsukuba to the energy of TRW-S", "trwp", ("trws C++",), 5),
    ("tsukuba to the energy of TRW-S", "trwp from coarse grids", ("trws C++",), 5),
    ("teddy to the energy of TRW-S", "trwp", ("trws C++",), 5),
    ("teddy to the energy of TRW-S", "trwp from coarse grids", ("trws C++",), 5),
    ("teddy backward", "backward", ("forward",)),
)
ITERATIONS = 5  # of the cases `iteration`
BYTES_PER_COST = 80  # of one TRWP-4 iteration in pair form whose u is rebuilt


# Energies of an independent implementation: ISGMR-4 and TRWP-4 at 1, 10 and 50 iterations, then the best bound and the
# sequentially rounded energy of TRWP at 50, and the energy of TRW-S at 50.
TARGETS = {
    "tsukuba": ((824694, 621409, 637996), (869363, 339460, 314037), 313315.57, 313699, 314393),
    "map": ((215875, 148969, 148049), (192200, 144356, 143364), 143042.31, 143192, 143197),
    "teddy": ((2626648, 1917899, 1898641), (2234163, 1825141, 1806990), 1799680.4, 1804857, 1807444),
    "venus": ((4595032, 1957955, 1964032), (32898199, 2290073, 1292619), 1247913.1, 1258222, 1261215),
    "penguin": ((38808892, 16997011, 16513774), (30997033, 15509062, 15358342), 15342566.0, 15354311, 15360534),
    "house": ((74525618, 37721295, 37648543), (51810226, 37864804, 37595813), 37553022.0, 37583253, 37581533),
}
TIMED = ("tsukuba", "teddy")
GROWTH = {
    "height": (72, 144, 288, 576),
    "width": (96, 192, 384, 768),
    "labels": (8, 16, 32, 64, 128),
    "directions": (4, 8, 16),
    "batch": (1, 2, 4, 8),
}


def run(options: Options) -> Iterator[Record]:
    """Yields the cases above; with --quick only Tsukuba's, a few energies and the small sizes."""
    names = ("tsukuba",) if options.quick else tuple(grids.PROBLEMS)
    if not grids.DATA.is_dir():
        options.note(f"message_passing: no pictures at {grids.DATA}; only the growth of the cost is measured")
        names = ()
    for name in names:
        yield from _energies(name, options)
    for name in names:
        if name in TIMED:
            for make in (_iteration, _to_trws, _backward):
                yield from make(name, options)
    yield from _growth(options)


def _energies(name: str, options: Options) -> Iterator[Record]:
    """Each number of iterations is a run of its own, as a user would ask for it."""
    isgmr, of_trwp, bound, sequential, trws = TARGETS[name]
    reported = {1: 0, 10: 1, 50: 2}
    wanted: list[tuple[str, float, Callable[[], float]]] = []
    for method, target in (("isgmr", isgmr), ("trwp", of_trwp)):
        for n, at in reported.items():
            solve = lambda method=method, n=n: grids.energy(
                name, getattr(mp, method)(grids.mrf(name), num_iterations=n).labels
            )
            wanted.append((f"{method}@{n}", target[at], solve))
    wanted += [
        ("bound@50", bound, lambda: float(mp.trwp(grids.mrf(name), evaluate_every=10).bounds[-1])),
        (
            "sequential@50",
            sequential,
            lambda: grids.energy(name, mp.trwp(grids.mrf(name), rounding="sequential").labels),
        ),
        ("trws@50", trws, lambda: grids.energy(name, _trws(name, 50).labels)),
    ]
    for kind, target, solve in wanted:
        case = f"{name} energies {kind}"
        if not options.selects(case):
            continue
        implementations: dict[str, Implementation | Skip] = {
            "jaxlib_methods": Implementation(_keep(solve, options, case)),
            "specification": Implementation(functools.partial(np.float64, target)),
        }
        if kind.startswith("trws"):
            implementations["C++"] = implementations.pop("jaxlib_methods")
        yield from measure(
            Case(
                "message_passing",
                case,
                implementations,
                reference="specification",
                min_rounds=1,
                seconds=0.0,
                warm_up=1,
            ),
            options,
        )


def _keep(solve: Callable[[], float], options: Options, case: str) -> Callable[[], np.ndarray]:
    """Tells the number itself once: a record has only its distance from the target."""
    told: list[float] = []

    def call() -> np.ndarray:
        value = solve()
        if not told:
            told.append(value)
            options.note(f"{case}: {value:.2f}")
        return np.float64(value)

    return call


def _trws(name: str, iterations: int) -> Any:
    from peers.trws import trws

    problem = grids.PROBLEMS[name]
    return trws(grids.unaries(name), problem.profile, weight=problem.weight, iterations=iterations)


def _trws_or_skip(name: str, iterations: int) -> Implementation | Skip:
    try:
        _trws(name, 1)
    except RuntimeError as error:
        return Skip(str(error))
    return Implementation(lambda: _trws(name, iterations).labels)


def _iteration(name: str, options: Options) -> Iterator[Record]:
    case = f"{name} iteration"
    if not options.selects(case):
        return
    mrf, problem = grids.mrf(name), grids.PROBLEMS[name]
    height, width, labels = mrf.unaries.shape
    v = np.asarray(problem.weight * problem.profile, np.float32)
    distance = np.abs(np.subtract.outer(np.arange(labels), np.arange(labels)))
    table = v[np.minimum(distance, len(v) - 1)]
    naive = jax.jit(functools.partial(trwp.naive, iterations=ITERATIONS))
    implementations = {
        "trwp": Implementation(lambda: mp.trwp(mrf, num_iterations=ITERATIONS).beliefs),
        "scan a user would write": Implementation(naive, (mrf.unaries, jnp.asarray(table))),
        "torch": peer(
            "torch", lambda torch: Implementation(trwp.in_torch(grids.unaries(name), table, iterations=ITERATIONS))
        ),
        "pgmax": _pgmax_or_skip(grids.unaries(name), table, options),
        "trws C++": _trws_or_skip(name, ITERATIONS),
    }
    entries = height * width * labels * ITERATIONS
    yield from measure(
        Case("message_passing", case, implementations, bytes=BYTES_PER_COST * entries, min_rounds=5, warm_up=1), options
    )


def _to_trws(name: str, options: Options) -> Iterator[Record]:
    """The numbers of iterations are looked up beforehand, on traces of rounded energies.

    From coarse grids with rho 0.6 the energy falls fastest; its bound is loose, so what certifies is plain TRWP. Its
    two calls are under one `jax.jit` that returns labels alone: messages and beliefs are then not handed over.
    """
    case = f"{name} to the energy of TRW-S"
    if not options.selects(case):
        return
    mrf, target = grids.mrf(name), TARGETS[name][-1]
    implementations: dict[str, Implementation | Skip] = {}
    plain: dict[str, Any] = {"rounding": "sequential"}
    fast = plain | {"edge_probability": 0.6}
    needed = _first_below(target, functools.partial(mp.trwp, mrf, **fast), mp.coarse_to_fine(mrf))
    options.note(f"{case}: {target} reached after {needed} iterations from coarse grids, rho 0.6")
    if needed is not None:
        solve = lambda m: mp.trwp(m, messages=mp.coarse_to_fine(m), num_iterations=needed, **fast).labels
        implementations["trwp from coarse grids"] = Implementation(jax.jit(solve), (mrf,))
    needed_plain = _first_below(target, functools.partial(mp.trwp, mrf, **plain), None)
    options.note(f"{case}: {target} reached after {needed_plain} iterations of TRWP-4 with sequential rounding")
    if needed_plain is not None:
        implementations["trwp"] = Implementation(lambda: mp.trwp(mrf, num_iterations=needed_plain, **plain).labels)
        # Looking at the energy costs: early stopping looks every fifth iteration, at a gap that the target's is known
        # to have.
        bound = mp.trwp(mrf, evaluate_every=needed_plain, num_iterations=needed_plain).bounds[-1]
        gap = 1.0001 * (target - float(bound)) / target
        early = lambda: mp.trwp(mrf, evaluate_every=5, tolerance=gap, **plain).labels
        implementations["trwp, stopping early"] = Implementation(early)
    implementations["trws C++"] = _trws_or_skip(name, 50)
    yield from measure(Case("message_passing", case, implementations, min_rounds=5, warm_up=1), options)


def _first_below(target: float, solve: Callable[..., mp.solvers.Solution], messages: Any) -> int | None:
    """Iterations until the rounded energy is at most the target, at most 50."""
    for done in range(0, 50, 10):
        solution = solve(num_iterations=10, evaluate_every=1, messages=messages)
        reached = np.flatnonzero(np.asarray(solution.energies) <= target)
        if len(reached):
            return done + int(reached[0]) + 1
        messages = solution.messages
    return None


def _backward(name: str, options: Options) -> Iterator[Record]:
    case = f"{name} backward"
    if not options.selects(case):
        return
    mrf, iterations = grids.mrf(name), 10
    problem = Problem.of(mrf, Schedule(4, 0.5, False, num_iterations=iterations))
    forward = jax.jit(lambda problem: _sweeps.solve(None, problem)[0])
    residual = jax.jit(lambda problem: _sweeps._solve_forward(None, problem))
    backward = jax.jit(lambda r, g: _sweeps._solve_backward(None, r, (g, None))[0].unaries)
    kept = residual(problem)[1]
    stored = sum(x.nbytes for x in jax.tree.leaves(kept) if x.size > 1)
    expected = iterations * 4 * mrf.unaries.size + iterations * 4 * mrf.unaries[..., 0].size
    options.note(f"{case}: residuals {stored} bytes, iterations x D x H x W x (L + 1) = {expected}")
    implementations = {
        "backward": Implementation(backward, (kept, jnp.ones_like(problem.unaries))),
        "forward": Implementation(forward, (problem,)),
        "forward, argmins stored": Implementation(residual, (problem,)),
    }
    yield from measure(Case("message_passing", case, implementations, min_rounds=5, warm_up=1), options)


def _growth(options: Options) -> Iterator[Record]:
    base = {"height": 288, "width": 384, "labels": 16, "directions": 4, "batch": 1}
    for axis, sizes in GROWTH.items():
        for size in sizes[:2] if options.quick else sizes:
            case = f"growth {axis}={size}"
            if not options.selects(case):
                continue
            s = base | {axis: size}
            shape = (s["batch"], s["height"], s["width"], s["labels"])
            mrf = mp.GridMRF(
                jax.random.uniform(jax.random.key(0), shape, maxval=100.0), grids.PROBLEMS["tsukuba"].pairwise
            )
            solve = lambda mrf=mrf, s=s: mp.trwp(mrf, num_iterations=ITERATIONS, num_directions=s["directions"]).beliefs
            yield from measure(
                Case("message_passing", case, {"trwp": Implementation(solve)}, min_rounds=5, seconds=3.0, warm_up=1),
                options,
            )


def _pgmax_or_skip(unaries: np.ndarray, table: np.ndarray, options: Options) -> Implementation | Skip:
    gib = 2 * unaries[..., 0].size * table.nbytes / 2**30
    if gib > 2:
        return Skip(f"its log potentials, one table per edge, would take {gib:.1f} GiB and several times that to build")
    solve = lambda: trwp.pgmax_max_product(unaries, table, iterations=ITERATIONS, tell=options.note)
    return peer("pgmax", lambda _: Implementation(solve()))


def draw_growth(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Milliseconds per TRWP iteration against each size, one panel per axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(GROWTH), figsize=(3.2 * len(GROWTH), 3.2), layout="constrained")
    for ax, axis in zip(axes, GROWTH, strict=True):
        points = {
            int(record["case"].partition("=")[2]): record["median_ms"] / ITERATIONS
            for record in records
            if record["case"].startswith(f"growth {axis}=")
        }
        sizes = sorted(points)
        ax.loglog(sizes, [points[s] for s in sizes], "o-")
        if sizes:
            ax.loglog(sizes, [points[sizes[0]] * s / sizes[0] for s in sizes], ":", color="gray", label="proportional")
        ax.set(xlabel=axis, ylabel="ms per TRWP iteration")
        ax.set_xticks(sizes, [str(s) for s in sizes], minor=False)
        ax.minorticks_off()
        ax.legend(frameon=False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    draw_growth(json.loads(pathlib.Path(sys.argv[1]).read_text()), pathlib.Path(sys.argv[2]))
