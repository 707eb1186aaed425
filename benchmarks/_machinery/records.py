"""What is kept of a measurement: the record, the error against the reference, versions and device."""

import dataclasses
import functools
import importlib.metadata
import os
import pathlib
import platform
import subprocess
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True)
class Record:
    """One implementation of one case; the fields are the keys of the JSON, null (None) where one does not apply."""

    benchmark: str
    case: str
    implementation: str
    lower_ms: float | None  # tracing and lowering to StableHLO; null for what is not a jitted function
    compile_ms: float | None  # XLA's compilation; null likewise
    samples_ms: list[float]  # wall clock of every timed call, result awaited, in the order they were taken
    median_ms: float
    peak_bytes: int | None  # arguments + results + temporaries of the executable, or the device's new peak
    flops: float | None  # the case's model of the necessary work, not a count of what an implementation does
    bytes: float | None  # the case's model of the necessary memory traffic
    fraction_of_ceiling: float | None  # shortest time that the ceilings allow / median; device["ceiling"] says which
    error: float | None  # largest absolute difference from the reference / largest absolute reference value
    ratios: dict[str, float]  # other implementation -> its median / this median: above 1 means this one is faster
    versions: dict[str, str]
    device: dict[str, Any]  # platform, kind, count, cores, and the ceilings where they were measured
    date: str  # UTC, ISO 8601


KEYS = tuple(field.name for field in dataclasses.fields(Record))


def error(output: Any, reference: Any) -> float:
    """max |output - reference| / max |reference|, leaf by leaf in float64; the largest of the leaves.

    Equal infinities and NaN at the same places count as equal; a leaf of zeros has scale 1.

    Raises:
      ValueError: the shapes differ, or one is finite where the other is not.
    """
    ours, theirs = jax.tree.leaves(output), jax.tree.leaves(reference)
    if [np.shape(a) for a in ours] != [np.shape(b) for b in theirs]:
        raise ValueError(
            f"shapes {[np.shape(a) for a in ours]} differ from the reference's {[np.shape(b) for b in theirs]}"
        )
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        finite = np.isfinite(b)
        if not np.array_equal(a[~finite], b[~finite], equal_nan=True) or not np.isfinite(a[finite]).all():
            raise ValueError("the result is not finite where the reference is, or the other way round")
        if finite.any():
            scale = np.abs(b[finite]).max() or 1.0
            worst = max(worst, float(np.abs(a[finite] - b[finite]).max() / scale))
    return worst


@functools.cache
def versions() -> dict[str, str]:
    """Python, the packages a time depends on, and the checkout's commit (with + where it has changes)."""
    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "numpy", "jaxlib_methods"):
        found[package] = importlib.metadata.version(package)
    root = pathlib.Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass  # not a checkout, or no git: the packages' versions are what is known
    return found


def peer_versions(modules: Iterable[str | None]) -> dict[str, str]:
    """Distribution -> version of the peers' modules; the standard library's and the checkout's own have none."""
    packages = {module.partition(".")[0] for module in modules if module}
    distributions = importlib.metadata.packages_distributions() if packages else {}
    names = {name for package in packages for name in distributions.get(package, ())}
    return {name: importlib.metadata.version(name) for name in sorted(names)}


def describe_device() -> dict[str, Any]:
    """Platform, kind and number of JAX's devices, and the host's usable cores."""
    device = jax.devices()[0]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"platform": device.platform, "kind": device.device_kind, "count": jax.device_count(), "cores": cores}
