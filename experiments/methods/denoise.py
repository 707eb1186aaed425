"""Restoring a noisy image with missing pixels as MAP inference in a grid MRF with one label per grey value.

Paper: Xu, Ajanthan, Hartley, "Fast and Differentiable Message Passing on Pairwise Markov Random Fields", ACCV 2020

    python -m experiments run denoise                              # a bundled photograph, under a minute on 2 cores
    python -m experiments run denoise --data-dir ../shared/data    # Penguin and House, 256 labels: tens of minutes
    python -m experiments run denoise --image noisy.png --mask observed.png       # your own picture; black is missing

Costs are (I - l)^2 on observed pixels and 0 on missing ones; smoothness is that of the paper (`PROBLEMS`), energies are
those of the 4-connected grid. Penguin and House have no clean original: what is compared are energies and bounds.

Without `--data-dir` the picture is scikit-learn's china.jpg in grey, with noise, random missing pixels and scratches of
our own making (all from `--seed`), so that the restored image can be held against the original; a median filter of the
observed pixels is the baseline.

Written to the workdir: `restored/*.png`, one panel per picture, and energy against iterations and time, as the excess
over the best lower bound. Restored images are the labels by sequential rounding, where a solver has messages for it.
The photograph takes half a minute, the real ones with five solvers twenty minutes, on 2 busy CPU cores.
"""

import dataclasses
import pathlib
from typing import Annotated, Any

import numpy as np

from experiments._machinery.options import Count, OneOf, Positive, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.data import grids
from experiments.tasks import grid_mrf
from experiments.tasks.grid_mrf import OWN, Problem, Row
from experiments.tasks.grid_solvers import labels_of, save_labels

PREPARED = ("penguin", "house")
EMBEDDED = "photograph"
MEDIAN = "median_filter"  # the baseline
NUM_LABELS = 256

# Penguin and House: MPLayers/run_all.sh. The photograph: the best PSNR of a coarse grid, on this very picture.
PROBLEMS = {
    "penguin": Problem("quadratic", 200, 25),
    "house": Problem("quadratic", None, 5),
    EMBEDDED: Problem("linear", 128, 20),
}

# None is published. An independent float32 implementation of ours: SGM, ISGMR and TRWP at 1, 10, 50 iterations, TRWP's
# bound and sequential rounding, TRW-S with its bound, mean field. House's bound is the best one, met at 10 iterations.
REFERENCE = {
    "penguin": (
        *(53596022, (38808892, 16997011, 16513774), (30997033, 15509062, 15358342)),
        *(15342566, 15354311, (15360534, 15338608.7), 46778357),
    ),
    "house": (
        *(113412198, (74525618, 37721295, 37648543), (51810226, 37864804, 37595813)),
        *(37553022, 37583253, (37581533, 37579476.5), 50555048),
    ),
}


@dataclasses.dataclass(frozen=True)
class Config(grid_mrf.Options):
    """Every picture and solver is one case; finished cases are read back."""

    data_dir: str | None = None  # folder that holds denoise/; None: the bundled photograph
    instances: tuple[Annotated[str, OneOf(PROBLEMS)], ...] | None = None  # None: both, or the photograph
    iterations: Count | None = None  # None: 50, and 20 for the photograph
    evaluate_every: Count = 5  # iterations between energies
    truncation: Positive | None = 128.0  # of the cost of your own picture; None does not truncate
    noise: Annotated[float, Range(0)] = 25.0  # standard deviation of the photograph's noise, in grey values
    missing: Annotated[float, Range(0, 1, closed="left")] = 0.2  # share of the photograph lost at random
    shrink: Count = 4  # the photograph is this many times smaller than the bundled one
    image: str | None = None  # your own picture, turned to grey
    mask: str | None = None  # an image of what is observed of it; black is missing
    clean: str | None = None  # the original, where it is known

    def __post_init__(self):
        super().__post_init__()
        if self.image is None and (self.mask or self.clean):
            raise ValueError("--mask and --clean belong to your own picture; name it with --image")
        self.names()

    def names(self) -> tuple[str, ...]:
        """Of the pictures to restore."""
        return self.chosen(PREPARED, EMBEDDED, own=self.image is not None, folder="denoise/{}-input.png")


SMOKE: dict[str, Any] = {"iterations": 3, "shrink": 16, "solvers": ("sgm-4", "trwp-4")}


def targets(config: Config) -> Targets:
    """Our own energies; none is published."""
    found = grid_mrf.reference_targets(REFERENCE, "an independent float32 implementation of ours")
    return {row: found[row] for row in variants(config) if row in found}


def variants(config: Config) -> dict[str, Row]:
    return grid_mrf.rows(config.names(), config.solvers, [MEDIAN])


def load(config: Config) -> grid_mrf.Task:
    from jaxlib_methods import message_passing as mp

    def read(name: str) -> tuple[grids.Picture, grid_mrf.Instance]:
        problem = PROBLEMS.get(name) or Problem(config.smoothness, config.truncation, config.weight)
        if name == OWN:
            picture = grids.own_picture(config.image, config.mask, config.clean)
        elif name == EMBEDDED:
            picture = grids.damaged_photograph(config.shrink, config.noise, config.missing, config.seed)
        else:
            picture = grids.middlebury_picture(pathlib.Path(config.data_dir) / "denoise", name)
        unaries = mp.costs.denoising_unaries(picture.observed, picture.mask, NUM_LABELS)
        return picture, grid_mrf.make_instance(unaries, problem)

    return grid_mrf.load(config, read)


def run(task: grid_mrf.Task, row: Row, seed: int, workdir: pathlib.Path) -> Outcome:
    """Energies, bounds and times of a solver, and the PSNR where the original is known."""
    del seed  # of the photograph: the task has it
    picture = task.measured(row.instance)
    if row.solver == MEDIAN:
        outcome, restored = Outcome({}), median_filter(picture)
        save_labels(workdir, restored)
    else:
        iterations = task.options.iterations or (20 if row.instance == EMBEDDED else 50)
        outcome = task.solve(task.instance(row.instance), row.solver, iterations, workdir)
        _, restored = labels_of(workdir)
    if picture.clean is None:
        return outcome
    return outcome._replace(metrics=outcome.metrics | {"psnr": psnr(restored, picture.clean)})


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio in decibels."""
    return float(10 * np.log10(255**2 / np.mean((image.astype(np.float64) - clean) ** 2)))


def median_filter(picture: grids.Picture, radius: int = 1) -> np.ndarray:
    """The baseline: the median of the observed pixels around every pixel; the window grows where there are none."""
    values = np.where(picture.mask, picture.observed.astype(np.float64), np.nan)
    result = np.full(values.shape, np.nan)
    while np.isnan(result).any():
        padded = np.pad(values, radius, constant_values=np.nan)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (2 * radius + 1, 2 * radius + 1))
        rows, columns = np.nonzero(np.isnan(result) & ~np.isnan(windows).all((2, 3)))
        result[rows, columns] = np.nanmedian(windows[rows, columns], (1, 2))
        radius += 1
    return np.rint(result).astype(np.uint8)


def figures(task: grid_mrf.Task, cases: list[Case]) -> dict[str, Any]:
    """Restored pictures side by side, each also as a picture of its own, and energies over the iterations."""

    def views(name: str) -> list[tuple[str, np.ndarray]]:
        picture = task.measured(name)
        if picture.clean is None:
            return [("observed", picture.observed)]
        value = psnr(picture.observed[picture.mask], picture.clean[picture.mask])
        return [(f"observed: {value:.1f} dB where observed", picture.observed), ("original", picture.clean)]

    def caption(case: Case) -> str:
        last = case.curve[-1] if case.curve else {}
        energy = f": E = {last.get('sequential', last['energy']):,.0f}" if last else ""
        return energy + (f", {case.metrics['psnr']:.1f} dB" if "psnr" in case.metrics else "")

    return grid_mrf.figures(
        task,
        cases,
        views=views,
        picture=lambda case: labels_of(case.folder)[1].astype(np.uint8),
        caption=caption,
        folder="restored",
        top=lambda name: 255,
    )
