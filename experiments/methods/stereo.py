"""Stereo matching as MAP inference in a grid MRF: SGM, ISGMR, TRWP and mean field on the Middlebury pairs.

Paper: Xu, Ajanthan, Hartley, "Fast and Differentiable Message Passing on Pairwise Markov Random Fields", ACCV 2020

    python -m experiments run stereo                               # a synthetic pair from a bundled photograph, seconds
    python -m experiments run stereo --data-dir ../shared/data     # Tsukuba, Teddy, Venus, Map; minutes on 2 cores
    python -m experiments run stereo --data-dir ../shared/data --instances tsukuba --solvers trwp-4 trwp-8 trws
    python -m experiments run stereo --left l.png --right r.png --num-disparities 64               # your own pair

Costs are Birchfield-Tomasi differences summed over the colours, without truncation and without gradient cues,
smoothness is that of the paper (`PROBLEMS`), energies are those of the 4-connected grid for any number of directions.

Without `--data-dir` the pair is synthetic, and says so: scikit-learn's china.jpg seen from the left, a made-up
disparity map (a slanted ground, a box and two discs), the right view rendered from it with what becomes visible filled
from another photograph, and noise on both.

A pair of your own must be rectified; its smoothness is --smoothness, --truncation and --weight. With --truth, an image
of its disparities times --truth-scale, bad pixels are counted as well.

Written to the workdir: `disparity/*.png` (grey value = disparity times the scale of the ground truth), one panel per
pair, and energy against iterations and time, as the excess over the best lower bound.

The synthetic pair takes 20 s, the four real ones about half an hour with ten solvers, on 2 busy CPU cores. Times are
wall clock, and as good as the machine is idle; `python -m benchmarks run message_passing` measures ratios.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import numpy as np

from experiments._machinery.options import OneOf, Positive, Range
from experiments._machinery.records import Case, Outcome, Target, Targets
from experiments.data import grids
from experiments.tasks import grid_mrf
from experiments.tasks.grid_mrf import OWN, Problem, Row
from experiments.tasks.grid_solvers import labels_of, save_labels

BAD_PIXEL_THRESHOLD = 1.0  # disparities, as on the Middlebury pages
PREPARED = ("tsukuba", "teddy", "venus", "map")
EMBEDDED = "synthetic"
UNARY = "no_smoothness"  # the baseline: every pixel takes its cheapest disparity

# MPLayers/run_all.sh. The authors' code truncates Venus's distance at 7, hence its square at 49.
PROBLEMS = {
    "tsukuba": Problem("linear", 2, 20),
    "teddy": Problem("linear", 1, 10),
    "venus": Problem("quadratic", 49, 50),
    "map": Problem("linear", 6, 4),
    EMBEDDED: Problem("linear", 2, 20),
}
NUM_LABELS = {"tsukuba": 16, "teddy": 60, "venus": 20, "map": 29, EMBEDDED: 16}
SCALES = {"tsukuba": 16, "teddy": 4, "venus": 8, "map": 8, EMBEDDED: 16}  # grey values of the truth per disparity

# Energies of Tsukuba and Teddy as published, from memory; an independent implementation of ours reproduces
# those of the message-passing methods to the digit, those of mean field within 200.
PUBLISHED = {
    "tsukuba/sgm_path_costs-4": {"energy@1": 873777, "energy@50": 644840},
    "tsukuba/sgm_path_costs-8": {"energy@1": 776706, "energy@50": 574758},
    "tsukuba/isgmr-4": {"energy@1": 824694, "energy@50": 637996},
    "tsukuba/isgmr-8": {"energy@1": 684185, "energy@50": 340347},
    "tsukuba/trwp-4": {"energy@1": 869363, "energy@50": 314037},
    "tsukuba/mean_field-4": {"energy@1": 3121704, "energy@50": 1620524},
    "tsukuba/mean_field-8": {"energy@1": 2322139, "energy@50": 504815},
    "tsukuba/trws": {"energy@1": 352178, "energy@50": 314393},
    "teddy/trws": {"energy@1": 1855625, "energy@50": 1807423},
}
# Not published: an independent float32 implementation of ours.
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
class Config(grid_mrf.Options):
    """Every pair and solver is one case; finished cases are read back."""

    data_dir: str | None = None  # folder that holds stereo/; None: the synthetic pair
    instances: tuple[Annotated[str, OneOf(PROBLEMS)], ...] | None = None  # None: all four, or the synthetic one
    truncation: Positive | None = 2.0  # of the cost of your own pair; None does not truncate
    noise: Annotated[float, Range(0)] = 3.0  # standard deviation of the grey values of the synthetic pair
    left: str | None = None  # your own rectified pair: the left view
    right: str | None = None  # the right view
    num_disparities: Annotated[int, Range(2)] | None = None  # of your own pair: 0 to this, less one
    truth: str | None = None  # an image of the left view's disparities; black is unknown
    truth_scale: Positive = 1.0  # grey values of that image per pixel of disparity

    def __post_init__(self):
        super().__post_init__()
        own = {"left": self.left, "right": self.right, "num_disparities": self.num_disparities}
        missing = [name for name, value in own.items() if value is None]
        if missing and (len(missing) < len(own) or self.truth):
            options = " and ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise ValueError(f"your own pair needs {options} as well")
        self.names()

    def names(self) -> tuple[str, ...]:
        """Of the pairs to match."""
        return self.chosen(PREPARED, EMBEDDED, own=self.left is not None, folder="stereo/{}")

    def num_labels(self, name: str) -> int:
        """Disparities of a pair."""
        return self.num_disparities if name == OWN else NUM_LABELS[name]

    def scale(self, name: str) -> float:
        """Grey values of a picture of disparities per pixel of disparity."""
        return max(1, 255 // self.num_disparities) if name == OWN else SCALES[name]


SMOKE: dict[str, Any] = {"iterations": 5, "shrink": 8, "solvers": ("sgm-4", "trwp-4")}


def targets(config: Config) -> Targets:
    """Published energies, and our own where none is published."""
    found = grid_mrf.reference_targets(REFERENCE, "an independent float32 implementation of ours")
    for row, metrics in PUBLISHED.items():
        published = {name: Target(value, "Xu et al. 2020, as remembered", "paper") for name, value in metrics.items()}
        found[row] = found.get(row, {}) | published
    return {row: found[row] for row in variants(config) if row in found}


def variants(config: Config) -> dict[str, Row]:
    return grid_mrf.rows(config.names(), config.solvers, [UNARY])


def load(config: Config) -> grid_mrf.Task:
    from jaxlib_methods import message_passing as mp

    def read(name: str) -> tuple[grids.Pair, grid_mrf.Instance]:
        if name == OWN:
            pair = grids.own_pair(config.left, config.right, config.num_disparities, config.truth, config.truth_scale)
            problem = Problem(config.smoothness, config.truncation, config.weight)
        elif name == EMBEDDED:
            pair = grids.synthetic_pair(config.shrink, config.noise, NUM_LABELS[name], config.seed)
            problem = PROBLEMS[name]
        else:
            pair = grids.middlebury_pair(pathlib.Path(config.data_dir) / "stereo" / name, SCALES[name])
            problem = PROBLEMS[name]
        unaries = mp.costs.birchfield_tomasi(pair.left, pair.right, config.num_labels(name))
        return pair, grid_mrf.make_instance(unaries, problem)

    return grid_mrf.load(config, read)


def run(task: grid_mrf.Task, row: Row, seed: int, workdir: pathlib.Path) -> Outcome:
    """Energies, bounds and times of a solver, and its bad pixels where the disparities are known."""
    del seed  # of the synthetic pair: the task has it
    pair, instance = task.measured(row.instance), task.instance(row.instance)
    if row.solver == UNARY:
        outcome, labels, rounded = Outcome({}), instance.unaries.argmin(-1), None
        save_labels(workdir, labels)
    else:
        outcome = task.solve(instance, row.solver, task.options.iterations, workdir)
        labels, rounded = labels_of(workdir)
    metrics = dict(outcome.metrics)
    if pair.disparity is not None:
        metrics["bad_pixels"] = bad_pixels(labels, pair)
        if any("sequential" in point for point in outcome.curve):
            metrics["bad_pixels_sequential"] = bad_pixels(rounded, pair)
    return outcome._replace(metrics=metrics)


def bad_pixels(labels: np.ndarray, pair: grids.Pair) -> float:
    """Share of the counted pixels whose disparity is off by more than one."""
    return float((np.abs(labels - pair.disparity) > BAD_PIXEL_THRESHOLD)[pair.counted].mean())


def figures(task: grid_mrf.Task, cases: list[Case]) -> dict[str, Any]:
    """Disparities side by side, each also as a picture of its own, and energies over the iterations."""
    config = task.options
    grey = lambda name, disparity: np.clip(np.rint(disparity * config.scale(name)), 0, 255).astype(np.uint8)

    def views(name: str) -> list[tuple[str, np.ndarray]]:
        pair = task.measured(name)
        if pair.disparity is None:
            return [("left image", pair.left)]
        truth = np.where(pair.counted, grey(name, pair.disparity), np.uint8(0))
        return [("left image", pair.left), ("ground truth, counted pixels", truth)]

    def caption(case: Case) -> str:
        energy = f": E = {case.curve[-1]['energy']:,.0f}" if case.curve else ""
        return energy + (f", {case.metrics['bad_pixels']:.1%} bad" if "bad_pixels" in case.metrics else "")

    return grid_mrf.figures(
        task,
        cases,
        views=views,
        picture=lambda case: grey(case.variant.instance, labels_of(case.folder)[0]),
        caption=caption,
        folder="disparity",
        top=lambda name: config.scale(name) * config.num_labels(name),
    )
