"""Restoring a noisy image with missing pixels as MAP inference in a grid MRF with one label per grey value.

Paper: Xu, Ajanthan, Hartley, "Fast and Differentiable Message Passing on Pairwise Markov Random Fields", ACCV 2020

    python -m experiments run denoise                              # a bundled photograph, under a minute on 2 cores
    python -m experiments run denoise --data-dir ../shared/data    # Penguin and House, 256 labels: tens of minutes

Costs are (I - l)^2 on observed pixels and 0 on missing ones; smoothness is that of the paper (`PROBLEMS`), energies are
those of the 4-connected grid. Penguin and House have no clean original: what is compared are energies and bounds.

Without `--data-dir` the picture is scikit-learn's china.jpg in grey, with noise, random missing pixels and scratches of
our own making (all from `--seed`), so that the restored image can be held against the original; a median filter of the
observed pixels is the baseline.

Written to the workdir: `restored/*.png`, one panel per picture, and energy against iterations and time, as the excess
over the best lower bound. Restored images are the labels by sequential rounding, where a solver has messages for it.

TRWP-4 reaches after 50 iterations 15,358,393 on Penguin and 37,595,583 on House (the specification's: 15,358,342 and
37,595,813), sequential rounding 15,354,298 and 37,583,195; after 20 on the photograph 24.9 dB, where the median filter
has 22.7. The photograph takes half a minute, the real ones with five solvers twenty minutes, on 2 busy CPU cores.
"""

import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from experiments.tasks import grid_mrf


class Problem(NamedTuple):
    kind: str  # of V: min(d, T) or min(d^2, T)
    truncation: float | None
    weight: float


# Penguin and House: MPLayers/run_all.sh. The photograph: the best PSNR of a coarse grid, on this very picture.
PROBLEMS = {
    "penguin": Problem("quadratic", 200, 25),
    "house": Problem("quadratic", None, 5),
    "photograph": Problem("linear", 128, 20),
}
NUM_LABELS = 256

# None is published. An independent float32 implementation of the specification (mrf_message_passing.md, table of
# targets): SGM, ISGMR and TRWP at 1, 10, 50 iterations, TRWP's bound and sequential rounding, TRW-S with its bound,
# mean field. House's bound is the best one, met at 10 iterations.
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
class Config:
    """Every picture and solver is one case; finished cases are read back."""

    data_dir: str | None = None  # folder that holds denoise/; None: the bundled photograph
    instances: tuple[str, ...] | None = None  # None: penguin and house, or the photograph without data_dir
    solvers: tuple[str, ...] = ("sgm-4", "isgmr-4", "trwp-4", "mean_field-4")  # name-directions; "trws" needs g++
    iterations: int | None = None  # None: 50, and 20 for the photograph
    evaluate_every: int = 5  # iterations between energies
    noise: float = 25.0  # standard deviation of the photograph's noise, in grey values
    missing: float = 0.2  # share of the photograph's pixels that are missing at random; scratches come on top
    shrink: int = 4  # the photograph is this many times smaller than the bundled one
    seed: int = 0  # of noise, missing pixels and scratches

    def __post_init__(self):
        grid_mrf.check_config(self, PROBLEMS, embedded="photograph", needs="denoise/{}-input.png")
        if not 0 <= self.missing < 1:
            raise ValueError(f"missing must lie in [0, 1), got {self.missing}")


SMOKE = {"iterations": 3, "shrink": 16, "solvers": ("sgm-4", "trwp-4")}


def PAPER(config: Config) -> dict[str, float]:
    """The specification's own energies; none is published. Of the solvers that are run."""
    return grid_mrf.of_solvers(grid_mrf.reference_numbers(REFERENCE), config.solvers)


class Picture(NamedTuple):
    observed: np.ndarray  # (H, W) uint8
    mask: np.ndarray  # (H, W) bool: observed at all
    clean: np.ndarray | None  # (H, W) uint8, where it is known


def load_picture(folder: pathlib.Path, name: str) -> Picture:
    """A Middlebury denoising problem; mask 0 means unobserved."""
    observed, mask = (grid_mrf.read_image(folder / f"{name}-{part}.png") for part in ("input", "mask"))
    return Picture(observed, mask > 0, None)


def damaged_photograph(shrink: int, noise: float, missing: float, seed: int) -> Picture:
    """scikit-learn's china.jpg in grey, with Gaussian noise, pixels missing at random and three scratches."""
    rgb = grid_mrf.shrink(grid_mrf.bundled_photograph("china.jpg"), shrink)
    clean = np.rint(rgb @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)
    rng = np.random.default_rng(seed)
    observed = np.clip(np.rint(clean + rng.normal(0, noise, clean.shape)), 0, 255).astype(np.uint8)
    mask = rng.random(clean.shape) >= missing
    height, width = clean.shape
    y, x = np.mgrid[:height, :width]
    for _ in range(3):
        slope, offset = rng.uniform(-0.7, 0.7), rng.uniform(0.2, 0.8)
        mask &= np.abs(y / height - offset - slope * (x / width - 0.5)) > 1.2 / height
    return Picture(np.where(mask, observed, 0).astype(np.uint8), mask, clean)


def psnr(image: np.ndarray, clean: np.ndarray) -> float:
    """Peak signal-to-noise ratio in decibels."""
    return float(10 * np.log10(255**2 / np.mean((image.astype(np.float64) - clean) ** 2)))


def median_filter(picture: Picture, radius: int = 1) -> np.ndarray:
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


def train(config: Config, workdir: pathlib.Path) -> dict[str, float]:
    """Restores every picture with every solver; returns energies, bounds, times and, for the photograph, PSNR."""
    from jaxlib_methods import message_passing as mp

    default = ("photograph",) if config.data_dir is None else ("penguin", "house")
    metrics: dict[str, float] = {}
    for name in config.instances or default:
        if name == "photograph":
            picture = damaged_photograph(config.shrink, config.noise, config.missing, config.seed)
        else:
            picture = load_picture(pathlib.Path(config.data_dir) / "denoise", name)
        iterations = config.iterations or (20 if name == "photograph" else 50)
        unaries = mp.denoising_unaries(picture.observed, picture.mask, NUM_LABELS)
        problem = PROBLEMS[name]
        instance = grid_mrf.make_instance(name, unaries, problem.kind, problem.weight, problem.truncation)

        panels: list[tuple[str, Any]] = [("observed", picture.observed)]
        if picture.clean is not None:
            filtered = median_filter(picture)
            metrics[f"{name}/observed/psnr"] = psnr(picture.observed[picture.mask], picture.clean[picture.mask])
            metrics[f"{name}/median_filter/psnr"] = psnr(filtered, picture.clean)
            panels[0] = (f"observed: {metrics[f'{name}/observed/psnr']:.1f} dB where observed", picture.observed)
            panels.append(("original", picture.clean))
            panels.append((f"median filter: {metrics[f'{name}/median_filter/psnr']:.1f} dB", filtered))
        traces = {}
        for solver in config.solvers:
            case = workdir / "cases" / name / solver
            traces[solver] = trace = grid_mrf.solve(instance, solver, iterations, config.evaluate_every, case)
            metrics |= grid_mrf.trace_metrics(name, solver, trace)
            _, rounded = grid_mrf.labels_of(case)
            restored = rounded.astype(np.uint8)
            grid_mrf.save_image(workdir / "restored" / f"{name}-{solver}.png", restored)
            reached = (trace["sequential"] or trace["energy"])[-1]
            title, line = f"{solver}: E = {reached:,.0f}", f"{name:10} {solver:18} energy {reached:>12,.0f}"
            if picture.clean is not None:
                value = metrics[f"{name}/{solver}/psnr"] = psnr(restored, picture.clean)
                title, line = f"{title}, {value:.1f} dB", f"{line}  PSNR {value:.2f} dB"
            panels.append((title, restored))
            print(line, flush=True)
        grid_mrf.save_overview(workdir, instance, panels, traces, top=255)
    return metrics
