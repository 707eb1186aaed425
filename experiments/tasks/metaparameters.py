"""Quasi-random search of metaparameters: points of Sobol's sequence, mapped to the ranges of the study.

The authors' generator uses the direction numbers of Bratley and Fox, SciPy's those of Joe and Kuo. Both give the same
first two coordinates and differ from the third on (their second point is 0.75, 0.25, 0.75, 0.25 and 0.75, 0.25, 0.25,
0.25), so that their trials are reproduced exactly with up to two searched metaparameters.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax


@dataclasses.dataclass(frozen=True)
class Range:
    """A map from u in [0, 1] to a metaparameter.

    log: 10^u between the logarithms; reverse_log: 1 - x with log10 x between those of 1 - maximum (u = 0) and
    1 - minimum; linear: between the two. `integer` cuts off the fraction.
    """

    minimum: float
    maximum: float
    scale: str = "linear"
    integer: bool = False

    def __post_init__(self):
        if self.scale not in ("log", "reverse_log", "linear"):
            raise ValueError(f"scale must be log, reverse_log or linear, got {self.scale!r}")
        positive = {"log": self.minimum, "reverse_log": 1 - self.maximum, "linear": 1}[self.scale]
        if not self.minimum <= self.maximum or positive <= 0:
            raise ValueError(f"a {self.scale} range cannot go from {self.minimum} to {self.maximum}")

    def __call__(self, u: np.ndarray) -> np.ndarray:
        low, high = self.minimum, self.maximum
        if self.scale == "log":
            value = 10 ** (u * (math.log10(high) - math.log10(low)) + math.log10(low))
        elif self.scale == "reverse_log":
            value = 1 - 10 ** (u * (math.log10(1 - low) - math.log10(1 - high)) + math.log10(1 - high))
        else:
            value = u * (high - low) + low
        return np.trunc(value) if self.integer else value


RANGES = {  # the authors'
    "learning_rate": Range(1e-4, 1.0, "log"),
    "momentum": Range(0.9, 0.9999, "reverse_log"),
    "decay_steps": Range(30_000, 60_000, integer=True),
    "end_learning_rate_factor": Range(1e-4, 0.1, "log"),
}


def sobol_points(count: int, dimensions: int) -> np.ndarray:
    """The first points of Sobol's sequence after the origin, float64 [count, dimensions]."""
    from scipy.stats import qmc

    whole = qmc.Sobol(dimensions, scramble=False).random_base2(math.ceil(math.log2(count + 1)))
    return whole[1 : count + 1]


def search(names: Sequence[str], trials: int, ranges: dict[str, Range] = RANGES) -> dict[str, np.ndarray]:
    """One value of each named metaparameter for every trial; the same for all batch sizes and sparsities."""
    points = sobol_points(trials, len(names))
    return {name: ranges[name](u) for name, u in zip(names, points.T, strict=True)}


def make_optimizer(kind: str, decay: str) -> Callable[..., optax.GradientTransformation]:
    """`(learning_rate, ...) -> optimizer` whose metaparameters are arrays in its state, one set for each trial.

    SGD, momentum v <- mu v + g, w <- w - lr v, or Nesterov's w <- w - lr (g + mu v); with the linear decay the rate
    goes to end_learning_rate_factor times its start over decay_steps and stays there.
    """

    def factory(
        learning_rate: float, momentum: float = 0.0, decay_steps: float = 1.0, end_learning_rate_factor: float = 1.0
    ) -> optax.GradientTransformation:
        def linear(count: jax.Array) -> jax.Array:
            progress = jnp.minimum(count.astype(jnp.float32) / decay_steps, 1.0)
            return learning_rate * (1 - (1 - end_learning_rate_factor) * progress)

        schedule = linear if decay == "linear" else learning_rate
        return optax.sgd(schedule, None if kind == "sgd" else momentum, nesterov=kind == "nesterov")

    return optax.inject_hyperparams(factory)


def searched(kind: str, decay: str) -> tuple[str, ...]:
    """The metaparameters of an optimizer, in the order of the search's coordinates."""
    names = ("learning_rate",) if kind == "sgd" else ("learning_rate", "momentum")
    return (*names, "decay_steps", "end_learning_rate_factor") if decay == "linear" else names
