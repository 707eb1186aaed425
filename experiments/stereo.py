"""Stereo matching as MAP inference in a grid MRF: SGM, ISGMR, TRWP and mean field on the Middlebury pairs.

Paper: Xu, Ajanthan, Hartley, "Fast and Differentiable Message Passing on Pairwise Markov Random Fields", ACCV 2020

    python -m experiments run stereo                               # a synthetic pair from a bundled photograph, seconds
    python -m experiments run stereo --data-dir ../shared/data     # Tsukuba, Teddy, Venus, Map; minutes on 2 cores
    python -m experiments run stereo --data-dir ../shared/data --instances tsukuba --solvers trwp-4 trwp-8 trws

Costs are Birchfield-Tomasi differences summed over the colours, without truncation and without gradient cues,
smoothness is that of the paper (`PROBLEMS`), energies are those of the 4-connected grid for any number of directions.

Without `--data-dir` the pair is synthetic, and says so: scikit-learn's china.jpg seen from the left, a made-up
disparity map (a slanted ground, a box and two discs), the right view rendered from it with what becomes visible filled
from another photograph, and noise on both.

Written to the workdir: `disparity/*.png` (grey value = disparity times the scale of the ground truth), one panel per
pair with the ground truth, and energy against iterations and time, as the excess over the best lower bound.

TRWP-4 reaches after 50 iterations 314,007 on Tsukuba (published: 314,037), 1,806,918 on Teddy, 1,292,180 on Venus and
143,249 on Map, with 2.1, 13.4, 8.8 and 0.8 % bad pixels; sequential rounding 313,699, 1,804,857, 1,258,221 and 143,193.
The synthetic pair takes 20 s, the four real ones about half an hour with ten solvers, on 2 busy CPU cores. Times are
wall clock, and as good as the machine is idle; `python -m benchmarks run message_passing` measures ratios.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks import grid_mrf

BAD_PIXEL_THRESHOLD = 1.0  # disparities, as on the Middlebury pages


class Problem(NamedTuple):
    num_labels: int
    kind: str  # of V: min(d, T) or min(d^2, T)
    truncation: float
    weight: float
    scale: int  # grey values of the ground truth per pixel of disparity


# MPLayers/run_all.sh. The authors' code truncates Venus's distance at 7, hence its square at 49.
PROBLEMS = {
    "tsukuba": Problem(16, "linear", 2, 20, 16),
    "teddy": Problem(60, "linear", 1, 10, 4),
    "venus": Problem(20, "quadratic", 49, 50, 8),
    "map": Problem(29, "linear", 6, 4, 8),
    "synthetic": Problem(16, "linear", 2, 20, 16),
}

# Energies of Tsukuba and Teddy as published, from memory; an independent implementation of the specification reproduces
# those of the message-passing methods to the digit, those of mean field within 200.
PUBLISHED = {
    "tsukuba/sgm_path_costs-4/energy@1": 873777,
    "tsukuba/sgm_path_costs-4/energy@50": 644840,
    "tsukuba/sgm_path_costs-8/energy@1": 776706,
    "tsukuba/sgm_path_costs-8/energy@50": 574758,
    "tsukuba/isgmr-4/energy@1": 824694,
    "tsukuba/isgmr-4/energy@50": 637996,
    "tsukuba/isgmr-8/energy@1": 684185,
    "tsukuba/isgmr-8/energy@50": 340347,
    "tsukuba/trwp-4/energy@1": 869363,
    "tsukuba/trwp-4/energy@50": 314037,
    "tsukuba/mean_field-4/energy@1": 3121704,
    "tsukuba/mean_field-4/energy@50": 1620524,
    "tsukuba/mean_field-8/energy@1": 2322139,
    "tsukuba/mean_field-8/energy@50": 504815,
    "tsukuba/trws/energy@1": 352178,
    "tsukuba/trws/energy@50": 314393,
    "teddy/trws/energy@1": 1855625,
    "teddy/trws/energy@50": 1807423,
}
# Not published: an independent float32 implementation of the specification (mrf_message_passing.md, table of targets).
REFERENCE = {
    "tsukuba": (
        894033,
        (824694, 621409, 637996),
        (869363, 339460, 314037),
        313315.57,
        313699,
        (314393, 313139.6),
        1620684,
    ),
    "map": (255597, (215875, 148969, 148049), (192200, 144356, 143364), 143042.31, 143192, (143197, 143035.9), 363221),
    "teddy": (
        *(2824382, (2626648, 1917899, 1898641), (2234163, 1825141, 1806990)),
        *(1799680.4, 1804857, (1807444, 1799336.5), 2583758),
    ),
    "venus": (
        *(5214666, (4595032, 1957955, 1964032), (32898199, 2290073, 1292619)),
        *(1247913.1, 1258222, (1261215, 1249036.6), 14621519),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every pair and solver is one case; finished cases are read back."""

    data_dir: str | None = None  # folder that holds stereo/; None: the synthetic pair
    instances: tuple[str, ...] | None = None  # None: all four pairs, or the synthetic one without data_dir
    solvers: tuple[str, ...] = ("sgm-4", "isgmr-4", "trwp-4", "mean_field-4")  # name-directions; "trws" needs g++
    iterations: int = 50
    evaluate_every: int = 1  # iterations between energies
    noise: float = 3.0  # standard deviation of the grey values of the synthetic pair
    shrink: int = 2  # the synthetic pair's photograph is this many times smaller than the bundled one
    seed: int = 0  # of that noise

    def __post_init__(self):
        grid_mrf.check_config(self, PROBLEMS, embedded="synthetic", needs="stereo/{}")


SMOKE = {"iterations": 5, "shrink": 8, "solvers": ("sgm-4", "trwp-4")}


def PAPER(config: Config) -> dict[str, float]:
    """Published energies, and the specification's own where none is published; of the solvers that are run."""
    return grid_mrf.of_solvers(grid_mrf.reference_numbers(REFERENCE) | PUBLISHED, config.solvers)


class Pair(NamedTuple):
    left: np.ndarray  # (H, W) or (H, W, 3) uint8
    right: np.ndarray
    disparity: np.ndarray  # (H, W) float, of the left view
    counted: np.ndarray  # (H, W) bool: seen by both cameras and with known ground truth


def load_pair(folder: pathlib.Path, scale: int) -> Pair:
    """A Middlebury pair; where no mask of visible pixels comes with it, it is computed from the ground truth."""
    extension = "ppm" if (folder / "left.ppm").exists() else "pgm"
    left, right = (grid_mrf.read_image(folder / f"{side}.{extension}") for side in ("left", "right"))
    disparity = grid_mrf.read_image(folder / "disparity.pgm") / scale
    mask = folder / "nonocc.png"
    visible = grid_mrf.read_image(mask) == 255 if mask.exists() else visible_in_both(np.rint(disparity))
    return Pair(left, right, disparity, visible & (disparity > 0))


def visible_in_both(disparity: np.ndarray) -> np.ndarray:
    """Pixels of the left view whose partner lies inside the right one and is not hidden by something nearer.

    Nearer by more than one disparity: rounding makes neighbours on a slanted surface meet in one pixel.
    """
    height, width = disparity.shape
    disparity = disparity.astype(int)
    column = np.arange(width)[None] - disparity
    nearest = np.full((height, width), -1)
    row = np.broadcast_to(np.arange(height)[:, None], column.shape)
    inside = column >= 0
    np.maximum.at(nearest, (row[inside], column[inside]), disparity[inside])
    return inside & (nearest[row, np.maximum(column, 0)] <= disparity + 1)


def synthetic_pair(shrink: int, noise: float, num_disparities: int, seed: int) -> Pair:
    """A pair with known disparities from one photograph; what only the right camera sees comes from another."""
    left = grid_mrf.shrink(grid_mrf.bundled_photograph("china.jpg"), shrink)
    behind = grid_mrf.shrink(grid_mrf.bundled_photograph("flower.jpg"), shrink)
    height, width = left.shape[:2]
    y, x = np.mgrid[:height, :width] / np.array([height, width])[:, None, None]
    top = num_disparities - 1
    disparity = np.rint((0.15 + 0.3 * y) * top)  # ground that comes nearer towards the bottom
    disparity[(np.abs(x - 0.25) < 0.11) & (np.abs(y - 0.55) < 0.25)] = np.rint(0.65 * top)
    aspect = width / height
    disparity[((x - 0.55) * aspect) ** 2 + (y - 0.35) ** 2 < 0.15**2] = np.rint(0.8 * top)
    disparity[((x - 0.8) * aspect) ** 2 + (y - 0.65) ** 2 < 0.2**2] = top
    right = behind.copy()
    for d in range(num_disparities):  # from far to near: what is nearer covers
        rows, columns = np.nonzero(disparity == d)
        inside = columns >= d
        right[rows[inside], columns[inside] - d] = left[rows[inside], columns[inside]]
    rng = np.random.default_rng(seed)
    noisy = lambda image: np.clip(np.rint(image + rng.normal(0, noise, image.shape)), 0, 255).astype(np.uint8)
    return Pair(noisy(left), noisy(right), disparity, visible_in_both(disparity))


def bad_pixels(labels: np.ndarray, pair: Pair) -> float:
    """Share of the counted pixels whose disparity is off by more than one."""
    return float((np.abs(labels - pair.disparity) > BAD_PIXEL_THRESHOLD)[pair.counted].mean())


def train(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Solves every instance with every solver; returns energies, bounds, times and bad-pixel rates."""
    from jaxlib_methods import message_passing as mp

    default = ("synthetic",) if config.data_dir is None else ("tsukuba", "teddy", "venus", "map")
    metrics: dict[str, float] = {}
    for name in config.instances or default:
        problem = PROBLEMS[name]
        if name == "synthetic":
            pair = synthetic_pair(config.shrink, config.noise, problem.num_labels, config.seed)
        else:
            pair = load_pair(pathlib.Path(config.data_dir) / "stereo" / name, problem.scale)
        unaries = mp.birchfield_tomasi(pair.left, pair.right, problem.num_labels)
        instance = grid_mrf.make_instance(name, unaries, problem.kind, problem.weight, problem.truncation)

        scaled = lambda disparity: np.clip(np.rint(disparity * problem.scale), 0, 255).astype(np.uint8)
        truth = np.where(pair.counted, scaled(pair.disparity), 0).astype(np.uint8)
        panels: list[tuple[str, Any]] = [("left image", pair.left), ("ground truth, counted pixels", truth)]
        traces = {}
        unary_only = instance.unaries.argmin(-1)
        metrics[f"{name}/no_smoothness/bad_pixels"] = bad_pixels(unary_only, pair)
        panels.append((f"no smoothness: {metrics[f'{name}/no_smoothness/bad_pixels']:.1%} bad", scaled(unary_only)))
        for solver in config.solvers:
            case = workdir / "cases" / name / solver
            traces[solver] = trace = grid_mrf.solve(instance, solver, config.iterations, config.evaluate_every, case)
            metrics |= grid_mrf.trace_metrics(name, solver, trace)
            labels, rounded = grid_mrf.labels_of(case)
            share = metrics[f"{name}/{solver}/bad_pixels"] = bad_pixels(labels, pair)
            grid_mrf.save_image(workdir / "disparity" / f"{name}-{solver}.png", scaled(labels))
            if trace["sequential"]:
                metrics[f"{name}/{solver}/bad_pixels_sequential"] = bad_pixels(rounded, pair)
            panels.append((f"{solver}: {share:.1%} bad, E = {trace['energy'][-1]:,.0f}", scaled(labels)))
            print(f"{name:10} {solver:18} energy {trace['energy'][-1]:>12,.0f}  bad pixels {share:6.2%}", flush=True)
        grid_mrf.save_image(workdir / "disparity" / f"{name}-truth.png", scaled(pair.disparity))
        grid_mrf.save_overview(workdir, instance, panels, traces, top=problem.scale * problem.num_labels)
    return metrics
