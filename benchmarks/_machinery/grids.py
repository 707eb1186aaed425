"""The grid problems of the message-passing paper, from the pictures in ../shared/data."""

import functools
import pathlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlib_methods import message_passing as mp

DATA = pathlib.Path(__file__).resolve().parents[3] / "shared" / "data"


class Problem(NamedTuple):
    """An instance of the paper: V as a `Pairwise`, and as the profile (weight apart) that the C++ peer wants."""

    pairwise: Any
    weight: float
    profile: np.ndarray
    labels: int


PROBLEMS = {
    "tsukuba": Problem(mp.potentials.truncated_linear(20.0, truncation=2), 20.0, np.arange(3.0), 16),
    "teddy": Problem(mp.potentials.truncated_linear(10.0, truncation=1), 10.0, np.arange(2.0), 60),
    "map": Problem(mp.potentials.truncated_linear(4.0, truncation=6), 4.0, np.arange(7.0), 29),
    "venus": Problem(
        mp.potentials.truncated_quadratic(50.0, truncation=7, truncate="distance"), 50.0, np.arange(8.0) ** 2, 20
    ),
    "penguin": Problem(
        mp.potentials.truncated_quadratic(25.0, truncation=200, truncate="cost"),
        25.0,
        np.minimum(np.arange(16.0) ** 2, 200),
        256,
    ),
    "house": Problem(mp.potentials.quadratic(5.0, num_labels=256), 5.0, np.arange(256.0) ** 2, 256),
}


@functools.cache
def unaries(name: str) -> np.ndarray:
    """The costs of an instance, (H, W, L), from its pictures."""
    from PIL import Image

    read = lambda path: np.asarray(Image.open(path))
    problem = PROBLEMS[name]
    if (DATA / "denoise" / f"{name}-input.png").exists():
        flat = lambda x: x if x.ndim == 2 else x[..., 0]
        image, mask = (flat(read(DATA / "denoise" / f"{name}-{kind}.png")) for kind in ("input", "mask"))
        return np.asarray(mp.costs.denoising_unaries(image, mask=mask, num_labels=problem.labels))
    left, right = (read(next((DATA / "stereo" / name).glob(f"*{side}*"))) for side in ("left", "right"))
    return np.asarray(mp.costs.birchfield_tomasi(left, right, problem.labels))


@functools.cache
def mrf(name: str) -> mp.GridMRF:
    """The instance as the library takes it."""
    return mp.GridMRF(jnp.asarray(unaries(name)), PROBLEMS[name].pairwise)


def energy(name: str, labels: Any) -> float:
    """The 4-connected energy in float64 on the host: float32 cannot hold those of the denoising problems."""
    problem, labels = PROBLEMS[name], np.asarray(labels, np.int64)
    total = np.take_along_axis(unaries(name), labels[..., None], -1).sum(dtype=np.float64)
    for axis in (0, 1):
        distance = np.minimum(np.abs(np.diff(labels, axis=axis)), len(problem.profile) - 1)
        total += problem.weight * problem.profile[distance].sum()
    return float(total)
