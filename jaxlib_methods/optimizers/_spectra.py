"""The two ends of the spectrum of a symmetric operator: whole where it is small, by Lanczos where it is not."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Operator = Callable[[np.ndarray], np.ndarray]


class Metric:
    """R, and R^{-1} by Cholesky where the dimension allows it, by conjugate gradients where not."""

    def __init__(self, R: Operator, n1: int, eps: float, max_dense: int):
        import scipy.linalg  # with JAX, but not loaded by it: only the diagnostics need it
        import scipy.sparse.linalg

        self.apply = R
        if n1 <= max_dense:
            factor = scipy.linalg.cho_factor(_dense(R, n1))
            self.solve = lambda b: scipy.linalg.cho_solve(factor, b)
        else:
            on = _linear_operator(R, n1)
            self.solve = lambda b: scipy.sparse.linalg.cg(on, b, rtol=10 * eps)[0]


class Spectrum(NamedTuple):
    """The two ends of a spectrum, its zeros left out."""

    scale: float  # largest absolute value
    top: float
    gap_top: float
    top_vectors: np.ndarray  # (n, multiplicity)
    bottom: float  # smallest one that is not zero
    gap_bottom: float
    bottom_vectors: np.ndarray
    null_vectors: np.ndarray

    @classmethod
    def of(cls, name: str, values: np.ndarray, V: np.ndarray, rtol: float, num_eigenvalues: int) -> "Spectrum":
        scale = float(np.abs(values).max())
        if scale == 0:
            raise ValueError(f"{name} is zero at x1; there is no curvature to measure")
        zero = np.abs(values) <= rtol * scale
        kept = values[~zero]
        top, bottom = kept[-1], kept[0]
        below, above = values[values < top - rtol * scale], kept[kept > bottom + rtol * scale]
        if len(values) < len(V):  # from Lanczos: each end must show what it is asked for and what comes next
            low, high = values[:num_eigenvalues], values[num_eigenvalues:]
            if high[0] >= top - rtol * scale or not np.any(low > bottom + rtol * scale):
                raise ValueError(
                    f"the {num_eigenvalues} eigenvalues of {name} at one end are zero or all the same; raise "
                    "num_eigenvalues above their multiplicity, or max_dense to the dimension"
                )
        return cls(
            scale,
            float(top),
            float(top - below[-1]) if below.size else 0.0,
            V[:, values >= top - rtol * scale],
            float(bottom),
            float(above[0] - bottom) if above.size else 0.0,
            V[:, ~zero & (values <= bottom + rtol * scale)],
            V[:, zero],
        )


def _linear_operator(matvec: Operator, size: int) -> Any:
    """SciPy's, whose constructor returns a subclass with other arguments than its own."""
    from scipy.sparse.linalg import LinearOperator

    make: Any = LinearOperator
    return make((size, size), matvec=matvec, dtype=np.float64)


def spectrum_ends(
    operator: Operator, size: int, metric: Metric | None, num_eigenvalues: int, max_dense: int
) -> tuple[np.ndarray, np.ndarray]:
    """Eigenvalues in ascending order and eigenvectors (columns): all, or `num_eigenvalues` from each end."""
    import scipy.linalg
    import scipy.sparse.linalg

    if size <= max(max_dense, 2 * num_eigenvalues):
        A = _dense(operator, size)
        values, V = scipy.linalg.eigh(A, None if metric is None else _dense(metric.apply, size))
        return np.asarray(values), np.asarray(V)
    on = lambda matvec: _linear_operator(matvec, size)
    generalised = {} if metric is None else {"M": on(metric.apply), "Minv": on(metric.solve)}
    start = np.random.default_rng(0).standard_normal(size)
    values, V = scipy.sparse.linalg.eigsh(on(operator), 2 * num_eigenvalues, which="BE", v0=start, **generalised)
    order = np.argsort(values)
    return values[order], V[:, order]


def _dense(operator: Operator, size: int) -> np.ndarray:
    A = np.stack([operator(e) for e in np.eye(size)], axis=1)
    return (A + A.T) / 2
