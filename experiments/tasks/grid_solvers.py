"""Solvers of pairwise MRFs on grids by name, and what their energies do over the iterations."""

import functools
import pathlib
import time
from typing import Any, NamedTuple

import numpy as np

from experiments._machinery.records import Outcome

BASES = ("sgm", "sgm_path_costs", "isgmr", "trwp", "mean_field")
SOLVERS = (*(f"{base}-{directions}" for base in BASES for directions in (4, 8, 16)), "trws")
REPORTED = (1, 10, 50)  # iterations whose energies are metrics
MEAN_FIELD_SERIES = (1, 2, 3, 5, 10, 20, 50)  # it starts afresh for each


class Instance(NamedTuple):
    """One problem on a grid, V = profile[min(|x_i - x_j|, R)]."""

    unaries: np.ndarray  # (H, W, L) float32
    pairwise: Any  # a jaxlib_methods.message_passing.potentials.Pairwise
    profile: np.ndarray  # (R + 1,) float64, the same costs for energies in float64


def energy(instance: Instance, labels: np.ndarray) -> float:
    """The 4-connected energy, in float64 on the host: float32 cannot hold those of the denoising problems."""
    unaries = np.take_along_axis(instance.unaries, labels[..., None], -1).sum(dtype=np.float64)
    reach = len(instance.profile) - 1
    pairs = [np.abs(np.diff(labels.astype(np.int64), axis=axis)) for axis in (0, 1)]
    return float(unaries + sum(instance.profile[np.minimum(d, reach)].sum() for d in pairs))


def solve(
    instance: Instance, solver: str, iterations: int, folder: pathlib.Path, *, evaluate_every: int = 1
) -> Outcome:
    """Runs one solver and leaves its labels in the folder, see `labels_of`.

    Returns:
      Metrics "energy@50", "sequential@50" (the energy after sequential rounding), "bound@50" (the best so far), the
      same at 10 and 1, and "ms_per_iteration"; as curve the same by "iteration".
    """
    base, _, directions = solver.partition("-")
    if base == "trws":
        curve, labels, rounded = _trws(instance, iterations)
    elif base in ("trwp", "isgmr"):
        curve, labels, rounded = _message_passing(instance, base, int(directions), iterations, evaluate_every)
    else:
        curve, labels, rounded = _from_scratch(instance, base, int(directions), iterations)
    save_labels(folder, labels, rounded)
    metrics = {
        f"{kind}@{point['iteration']}": value
        for kind in ("energy", "sequential", "bound")
        for point in curve
        if point["iteration"] in REPORTED and (value := point.get(kind)) is not None
    }
    metrics["ms_per_iteration"] = _milliseconds(instance, base, int(directions or 4))
    return Outcome(metrics, curve)


def save_labels(folder: pathlib.Path, labels: np.ndarray, rounded: np.ndarray | None = None) -> None:
    """Leaves the labels of a case in its folder; `rounded` in sequence, where that exists."""
    folder.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(folder / "labels.npz", labels=labels, rounded=labels if rounded is None else rounded)


def labels_of(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the last iteration: by argmin of the beliefs, and by sequential rounding where that exists."""
    with np.load(folder / "labels.npz") as arrays:
        return arrays["labels"], arrays["rounded"]


def _evaluations(iterations: int, every: int) -> list[int]:
    wanted = {1, *range(every, iterations + 1, every), *REPORTED, iterations}
    return sorted(k for k in wanted if k <= iterations)


def _message_passing(instance: Instance, base: str, directions: int, iterations: int, every: int) -> tuple[Any, ...]:
    """TRWP or ISGMR, one iteration at a time so that every one can be looked at."""
    import jax.numpy as jnp

    from jaxlib_methods import message_passing as mp

    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    solver = getattr(mp, base)
    curve: list[dict[str, float]] = []
    messages, best_bound, done, rounded = None, -np.inf, 0, None
    for k in _evaluations(iterations, every):
        for _ in range(k - done):
            solution = solver(mrf, num_iterations=1, num_directions=directions, messages=messages)
            messages = solution.messages
        done = k
        labels = np.asarray(solution.labels)
        curve.append({"iteration": k, "energy": energy(instance, labels)})
        if directions == 4:
            rounded = np.asarray(mp.bounds.sequential_rounding(mrf, messages))
            best_bound = max(best_bound, float(mp.bounds.chain_lower_bound(mrf, messages)))
            curve[-1] |= {"sequential": energy(instance, rounded), "bound": best_bound}
    return curve, labels, rounded


def _from_scratch(instance: Instance, base: str, directions: int, iterations: int) -> tuple[Any, ...]:
    """SGM and mean field, whose state is not handed out: a run of its own for every number of iterations."""
    import jax.numpy as jnp

    from jaxlib_methods import message_passing as mp

    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    series = {"sgm": (1,), "sgm_path_costs": REPORTED, "mean_field": MEAN_FIELD_SERIES}[base]
    series = [k for k in series if k <= iterations]
    if base == "mean_field":
        run = lambda k: mp.mean_field(mrf, num_iterations=k, num_directions=directions)
    else:
        variant = "messages" if base == "sgm" else "path_costs"
        run = lambda k: mp.sgm(mrf, num_iterations=k, num_directions=directions, variant=variant)
    curve = []
    for k in series:
        labels = np.asarray(run(k).labels)
        curve.append({"iteration": k, "energy": energy(instance, labels)})
    return curve, labels, None


def _trws(instance: Instance, iterations: int) -> tuple[Any, ...]:
    """The C++ peer of the benchmarks, single-threaded; its labels are always rounded in sequence."""
    result = _trws_passes(instance, iterations)
    energies = [*result.energies[:-1].tolist(), energy(instance, result.labels)]
    bounds = np.maximum.accumulate(result.bounds).tolist()
    points = zip(range(1, iterations + 1), energies, bounds, strict=True)
    return [dict(zip(("iteration", "energy", "bound"), point, strict=True)) for point in points], *[result.labels] * 2


def _trws_passes(instance: Instance, iterations: int) -> Any:
    from peers.trws import trws

    return trws(instance.unaries, instance.profile, iterations=iterations)


def _milliseconds(instance: Instance, base: str, directions: int, iterations: int = 5) -> float:
    """Wall clock per iteration, nothing evaluated meanwhile: the fastest of three calls after one that compiles."""
    import jax
    import jax.numpy as jnp

    from jaxlib_methods import message_passing as mp

    if base == "trws":
        return 1e3 / iterations * min(_trws_passes(instance, iterations).pass_seconds[-1] for _ in range(3))
    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    if base == "sgm":
        iterations, solver = 1, mp.sgm
    elif base == "sgm_path_costs":
        solver = functools.partial(mp.sgm, variant="path_costs")
    else:
        solver = getattr(mp, base)
    run = lambda: jax.block_until_ready(solver(mrf, num_iterations=iterations, num_directions=directions).beliefs)
    run()
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return 1e3 * min(samples) / iterations
