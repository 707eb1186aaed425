"""TRW-S in C++ (`trws.cpp`), compiled on first use with the machine's own g++ and called through ctypes."""

import ctypes
import functools
import hashlib
import os
import pathlib
import subprocess
import tempfile
from typing import NamedTuple

import numpy as np

SOURCE = pathlib.Path(__file__).with_suffix(".cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fPIC", "-std=c++17")
KINDS = {"window": 0, "linear": 1, "quadratic": 2}
MAX_WINDOW_PROFILE = 32  # vectorised shifts: fifteen of them take half the time of the lower envelope


class TRWSResult(NamedTuple):
    """What TRW-S reached after every iteration."""

    labels: np.ndarray  # (H, W) int32, of the last iteration
    energies: np.ndarray  # (iterations,) of the labels rounded in raster order
    bounds: np.ndarray  # (iterations,) lower bounds
    pass_seconds: np.ndarray  # (iterations,) seconds so far in the two message passes
    seconds: np.ndarray  # (iterations,) seconds so far, rounding included


@functools.cache
def _library() -> ctypes.CDLL:
    """The compiled source, kept by its content in the user's cache folder."""
    digest = hashlib.sha256(SOURCE.read_bytes() + " ".join(FLAGS).encode()).hexdigest()[:16]
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "jaxlib_methods"
    target = cache / f"trws-{digest}.so"
    if not target.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            built = pathlib.Path(folder) / "trws.so"
            try:
                # Linked apart: with -ffast-math g++ links start-up code that flushes the whole process's subnormals.
                compiled = built.with_suffix(".o")
                for step in (
                    [*FLAGS, "-c", str(SOURCE), "-o", str(compiled)],
                    ["-shared", str(compiled), "-o", str(built)],
                ):
                    subprocess.run(["g++", *step], check=True, capture_output=True, text=True)
            except FileNotFoundError as error:
                raise RuntimeError("the TRW-S peer needs g++ on this machine") from error
            except subprocess.CalledProcessError as error:
                raise RuntimeError(f"g++ refused {SOURCE}:\n{error.stderr}") from error
            built.replace(target)
    return ctypes.CDLL(str(target))


def _can_do(method: str, g: np.ndarray) -> bool:
    """Whether the profile has the form that the distance transform is for."""
    if method == "window":
        return True
    power = {"linear": 1, "quadratic": 2}[method]
    return bool(np.allclose(g, np.minimum(g[1] * np.arange(len(g), dtype=np.float32) ** power, g[-1])))


def trws(
    unaries: np.ndarray,
    profile: np.ndarray,
    *,
    weight: float = 1.0,
    horizontal: np.ndarray | None = None,
    vertical: np.ndarray | None = None,
    iterations: int = 50,
    method: str | None = None,
) -> TRWSResult:
    """Minimises sum theta + sum w g(|x_i - x_j|) on the 4-connected grid.

    Args:
      unaries: (H, W, L).
      profile: g(0..R), constant from R on (or R = L - 1: not truncated), g(0) = 0, never decreasing.
      weight: factor of all pairwise costs.
      horizontal: (H, W - 1) edge weights, None = 1.
      vertical: (H - 1, W) edge weights, None = 1.
      iterations: forward and backward passes.
      method: the distance transform. "window": any profile, 2 R - 1 vectorised shifts; "linear" and "quadratic":
        the O(L) transforms for min(s d, K) and min(s d^2, K). None takes the fastest that can do the profile: windows
        win up to R of about thirty.

    Returns:
      A `TRWSResult`.
    """
    theta = np.ascontiguousarray(unaries, np.float32)
    height, width, num_labels = theta.shape
    g = np.ascontiguousarray(np.asarray(profile, np.float64) * weight, np.float32)
    if g[0] != 0 or (np.diff(g) < 0).any() or len(g) < 2:
        raise ValueError(f"profile must start at 0 and never decrease, got {profile}")
    able = [name for name in KINDS if _can_do(name, g)]
    if method is None:
        method = "window" if len(g) <= MAX_WINDOW_PROFILE else able[-1]
    if method not in able:
        raise ValueError(f"method {method!r} cannot do the profile {profile}; use 'window'")
    truncated = len(g) < num_labels
    reach = len(g) - 1 if truncated else len(g)
    ceiling = float(g[-1])
    weights = []
    for value, shape in ((horizontal, (height, width - 1)), (vertical, (height - 1, width))):
        value = None if value is None else np.ascontiguousarray(value, np.float32)
        if value is not None and value.shape != shape:
            raise ValueError(f"edge weights must have shape {shape}, got {value.shape}")
        weights.append(value)
    bounds, energies, passes, seconds = (np.zeros(iterations) for _ in range(4))
    labels = np.zeros((height, width), np.int32)
    pointer = lambda x: None if x is None else x.ctypes.data_as(ctypes.c_void_p)
    _library().trws(
        pointer(theta),
        *map(pointer, weights),
        *map(ctypes.c_int32, (height, width, num_labels, KINDS[method])),
        pointer(g),
        ctypes.c_int32(reach),
        *map(ctypes.c_float, (float(g[1]), ceiling)),
        ctypes.c_int32(iterations),
        *map(pointer, (bounds, energies, passes, seconds, labels)),
    )
    return TRWSResult(labels, energies, bounds, passes, seconds)
