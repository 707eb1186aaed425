"""What the stereo and denoising experiments share: solvers by name, their traces over the iterations, and figures."""

import functools
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from experiments._machinery.cases import run_or_load
from experiments._machinery.errors import DataError

SOLVERS = ("sgm", "sgm_path_costs", "isgmr", "trwp", "mean_field", "trws")
REPORTED = (1, 10, 50)  # iterations whose energies are metrics
MEAN_FIELD_SERIES = (1, 2, 3, 5, 10, 20, 50)  # it starts afresh for each


class Instance(NamedTuple):
    """One problem on a grid, V = weight * profile[min(|x_i - x_j|, R)]."""

    name: str
    unaries: np.ndarray  # (H, W, L) float32
    pairwise: Any  # a jaxlib_methods.message_passing.Pairwise
    profile: np.ndarray  # (R + 1,) float64, weight included, the same costs for energies in float64


def pairwise_cost(kind: str, weight: float, truncation: float | None, num_labels: int) -> tuple[Any, np.ndarray]:
    """V by name, with its profile in float64: the last two fields of an `Instance`.

    Args:
      kind: "linear" or "quadratic".
      weight: of all pairs.
      truncation: of the *cost*: min(d, T) or min(d^2, T); None does not truncate.
      num_labels: L.
    """
    from jaxlib_methods import message_passing as mp

    power = {"linear": 1, "quadratic": 2}[kind]
    costs = np.arange(num_labels, dtype=np.float64) ** power
    if truncation is not None:
        reach = min(int(np.ceil(truncation ** (1 / power))), num_labels - 1)
        costs = np.minimum(costs[: reach + 1], truncation)
    if kind == "linear" and truncation is not None:
        pairwise = mp.truncated_linear(weight, truncation=truncation)
    elif truncation is not None:
        pairwise = mp.truncated_quadratic(weight, truncation=truncation, truncate="cost")
    else:
        pairwise = getattr(mp, kind)(weight, num_labels=num_labels)
    return pairwise, weight * costs


def make_instance(name: str, unaries: Any, kind: str, weight: float, truncation: float | None) -> Instance:
    """An instance from its unaries and V by name; see `pairwise_cost`."""
    unaries = np.asarray(unaries)
    return Instance(name, unaries, *pairwise_cost(kind, weight, truncation, unaries.shape[-1]))


def check_config(config: Any, problems: Mapping[str, Any], *, embedded: str, needs: str) -> None:
    """What both experiments demand of their config: known solvers and instances, data where needed, positive sizes.

    Args:
      config: with `data_dir`, `instances`, `solvers`, `iterations`, `evaluate_every` and `shrink`.
      problems: the known instances.
      embedded: the one that needs no data.
      needs: what `data_dir` must hold, `{}` standing for the instance.
    """
    for solver in config.solvers:
        parse_solver(solver)
    for name in config.instances or ():
        if name not in problems:
            raise ValueError(f"unknown instance {name!r}; known are {', '.join(problems)}")
        if name != embedded and config.data_dir is None:
            raise ValueError(f"instance {name!r} needs --data-dir, the folder that holds {needs.format(name)}")
    for name in ("iterations", "evaluate_every", "shrink"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


Target = tuple[int, Sequence[int], Sequence[int], float, int, tuple[int, float], int]


def reference_numbers(targets: Mapping[str, Target]) -> dict[str, float]:
    """The specification's table of targets under the names of the metrics.

    Args:
      targets: instance -> SGM at 1 iteration, ISGMR and TRWP at `REPORTED`, TRWP's bound and sequential rounding at
        50, TRW-S at 50 with its bound, mean field at 50.
    """
    numbers: dict[str, float] = {}
    for name, (sgm, isgmr, trwp, bound, sequential, (trws, trws_bound), mean_field) in targets.items():
        numbers |= {f"{name}/sgm-4/energy@1": sgm, f"{name}/mean_field-4/energy@50": mean_field}
        numbers |= {f"{name}/isgmr-4/energy@{k}": e for k, e in zip(REPORTED, isgmr, strict=True)}
        numbers |= {f"{name}/trwp-4/energy@{k}": e for k, e in zip(REPORTED, trwp, strict=True)}
        numbers |= {f"{name}/trwp-4/bound@50": bound, f"{name}/trwp-4/sequential@50": sequential}
        numbers |= {f"{name}/trws/energy@50": trws, f"{name}/trws/bound@50": trws_bound}
    return numbers


def of_solvers(numbers: Mapping[str, float], solvers: Sequence[str]) -> dict[str, float]:
    """The numbers of the solvers that are run."""
    return {name: number for name, number in numbers.items() if name.split("/")[1] in solvers}


def energy(instance: Instance, labels: np.ndarray) -> float:
    """The 4-connected energy, in float64 on the host: float32 cannot hold those of the denoising problems."""
    unaries = np.take_along_axis(instance.unaries, labels[..., None], -1).sum(dtype=np.float64)
    reach = len(instance.profile) - 1
    pairs = [np.abs(np.diff(labels.astype(np.int64), axis=axis)) for axis in (0, 1)]
    return float(unaries + sum(instance.profile[np.minimum(d, reach)].sum() for d in pairs))


def parse_solver(name: str) -> tuple[str, int]:
    """ "trwp-4" -> ("trwp", 4); TRW-S has no number of directions."""
    base, _, directions = name.partition("-")
    if base not in SOLVERS or (base == "trws") != (directions == "") or directions not in ("", "4", "8", "16"):
        raise ValueError(
            f"unknown solver {name!r}; give {', '.join(SOLVERS[:-1])} followed by -4, -8 or -16 directions, or trws"
        )
    return base, int(directions or 4)


def solve(
    instance: Instance, solver: str, iterations: int, evaluate_every: int, case_dir: pathlib.Path
) -> dict[str, Any]:
    """Runs one solver, or reads back a finished run.

    Returns:
      iterations, energy, sequential (energy after sequential rounding) and bound (best so far) as lists over the
      evaluations, empty where there is no such thing; ms_per_iteration. For the last labels see `labels_of`. To measure
      the time again, on a quieter machine, delete the folder `time` in that of the case.
    """
    base, directions = parse_solver(solver)

    def fresh(folder: pathlib.Path) -> dict[str, Any]:
        if base == "trws":
            trace, labels, rounded = _trws(instance, iterations)
        elif base in ("trwp", "isgmr"):
            trace, labels, rounded = _message_passing(instance, base, directions, iterations, evaluate_every)
        else:
            trace, labels, rounded = _from_scratch(instance, base, directions, iterations)
        folder.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(folder / "labels.npz", labels=labels, rounded=labels if rounded is None else rounded)
        return trace

    trace = run_or_load(case_dir, fresh)
    timed = run_or_load(case_dir / "time", lambda _: {"ms_per_iteration": _milliseconds(instance, base, directions)})
    return trace | timed


def labels_of(case_dir: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Labels of the last iteration: by argmin of the beliefs, and by sequential rounding where that exists."""
    with np.load(case_dir / "labels.npz") as arrays:
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
    trace: dict[str, Any] = {"iterations": [], "energy": [], "sequential": [], "bound": []}
    messages, best_bound, done, rounded = None, -np.inf, 0, None
    for k in _evaluations(iterations, every):
        for _ in range(k - done):
            solution = solver(mrf, iterations=1, directions=directions, messages=messages)
            messages = solution.messages
        done = k
        labels = np.asarray(solution.labels)
        trace["iterations"].append(k)
        trace["energy"].append(energy(instance, labels))
        if directions == 4:
            rounded = np.asarray(mp.sequential_rounding(mrf, messages))
            trace["sequential"].append(energy(instance, rounded))
            best_bound = max(best_bound, float(mp.chain_lower_bound(mrf, messages)))
            trace["bound"].append(best_bound)
    return trace, labels, rounded


def _from_scratch(instance: Instance, base: str, directions: int, iterations: int) -> tuple[Any, ...]:
    """SGM and mean field, whose state is not handed out: a run of its own for every number of iterations."""
    import jax.numpy as jnp

    from jaxlib_methods import message_passing as mp

    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    series = {"sgm": (1,), "sgm_path_costs": REPORTED, "mean_field": MEAN_FIELD_SERIES}[base]
    series = [k for k in series if k <= iterations]
    if base == "mean_field":
        run = lambda k: mp.mean_field(mrf, iterations=k, directions=directions)
    else:
        variant = "messages" if base == "sgm" else "path_costs"
        run = lambda k: mp.sgm(mrf, iterations=k, directions=directions, variant=variant)
    trace: dict[str, Any] = {"iterations": series, "energy": [], "sequential": [], "bound": []}
    for k in series:
        labels = np.asarray(run(k).labels)
        trace["energy"].append(energy(instance, labels))
    return trace, labels, None


def _trws(instance: Instance, iterations: int) -> tuple[Any, ...]:
    """The C++ peer of the benchmarks, single-threaded; its labels are always rounded in sequence."""
    result = _trws_passes(instance, iterations)
    trace = {
        "iterations": list(range(1, iterations + 1)),
        "energy": [*result.energies[:-1].tolist(), energy(instance, result.labels)],
        "sequential": [],
        "bound": np.maximum.accumulate(result.bounds).tolist(),
    }
    return trace, result.labels, result.labels


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
    run = lambda: jax.block_until_ready(solver(mrf, iterations=iterations, directions=directions).beliefs)
    run()
    samples = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return 1e3 * min(samples) / iterations


def trace_metrics(instance: str, solver: str, trace: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of one run, named like "tsukuba/trwp-4/energy@50"."""
    metrics = {}
    for k, iteration in enumerate(trace["iterations"]):
        if iteration in REPORTED:
            for kind in ("energy", "sequential", "bound"):
                if trace[kind]:
                    metrics[f"{instance}/{solver}/{kind}@{iteration}"] = trace[kind][k]
    metrics[f"{instance}/{solver}/ms_per_iteration"] = trace["ms_per_iteration"]
    return metrics


def read_image(path: pathlib.Path) -> np.ndarray:
    """An image file as uint8, (H, W) or (H, W, 3)."""
    from PIL import Image

    if not path.is_file():
        raise DataError(f"there is no {path}; --data-dir must be the folder that holds stereo/ and denoise/")
    return np.asarray(Image.open(path))


def bundled_photograph(name: str) -> np.ndarray:
    """scikit-learn's china.jpg or flower.jpg, (427, 640, 3) uint8: a real picture without any download."""
    from sklearn.datasets import load_sample_image

    return np.asarray(load_sample_image(name))


def shrink(image: np.ndarray, factor: int) -> np.ndarray:
    """Means of factor x factor pixels, rounded to uint8."""
    height, width = (n // factor * factor for n in image.shape[:2])
    blocks = image[:height, :width].reshape(height // factor, factor, width // factor, factor, -1).mean((1, 3))
    return np.rint(blocks).astype(np.uint8).reshape(height // factor, width // factor, *image.shape[2:])


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_image(path: pathlib.Path, image: np.ndarray) -> None:
    """A uint8 image as PNG, pixel by pixel."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def save_panels(path: pathlib.Path, panels: Sequence[tuple[str, np.ndarray]], columns: int = 4, **imshow: Any) -> None:
    """Images side by side with titles; grey ones share the given colour scale."""
    rows = -(-len(panels) // columns)
    height, width = panels[0][1].shape[:2]
    figure = _figure(3.2 * columns, rows * (3.2 * height / width + 0.35))
    for k, (title, image) in enumerate(panels):
        axes = figure.add_subplot(rows, columns, k + 1)
        axes.imshow(image, interpolation="nearest", **(imshow if image.ndim == 2 else {}))
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def save_overview(
    workdir: pathlib.Path, instance: Instance, panels: Sequence[tuple[str, np.ndarray]], traces: Any, top: int
) -> None:
    """`NAME.png`, the images side by side with grey values from 0 to `top`, and `NAME-energy.png`, the curves."""
    save_panels(workdir / f"{instance.name}.png", panels, cmap="gray", vmin=0, vmax=top)
    size = " x ".join(map(str, instance.unaries.shape))
    save_curves(workdir / f"{instance.name}-energy.png", f"{instance.name}, {size} labels", traces)


def save_curves(path: pathlib.Path, title: str, traces: Mapping[str, Mapping[str, Any]]) -> None:
    """Energy against iterations and against time; bounds dashed; as the excess over the best bound, on a log scale."""
    best = max((max(t["bound"]) for t in traces.values() if t["bound"]), default=0.0)
    figure = _figure(12, 4)
    left, right = figure.subplots(1, 2, sharey=True)
    for number, (solver, trace) in enumerate(traces.items()):
        iterations, colour = np.asarray(trace["iterations"]), f"C{number}"
        seconds = iterations * trace["ms_per_iteration"] * 1e-3
        for kind, style, label in (("energy", "-", solver), ("sequential", ":", f"{solver}, sequential rounding")):
            if trace[kind]:
                excess = 100 * (np.asarray(trace[kind]) - best) / abs(best or 1.0)
                marker = "o" if len(iterations) < 8 else None
                left.plot(iterations, excess, style, color=colour, marker=marker, ms=3, label=label)
                right.plot(seconds, excess, style, color=colour, marker=marker, ms=3)
    for axes, label in ((left, "iteration"), (right, "seconds of message passing")):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
    left.set_ylabel(f"energy above the best bound {best:,.0f}, per cent", fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
