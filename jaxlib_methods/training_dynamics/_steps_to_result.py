r"""Steps to a result against the batch size: the law $K^\star(B) = c_1/B + c_2$, fitted, and as SGD's theory gives it.

Numbers of a study, not of a network: everything is float64 on the host.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class BatchSizeLaw(NamedTuple):
    """K*(B) = c1 / B + c2: linear scaling for B well below c1 / c2, no further gain well above it.

    Example:
      >>> law = BatchSizeLaw(c1=409600.0, c2=500.0)
      >>> law.critical_batch_size, float(law.steps(819.2))
      (819.2, 1000.0)

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316 [lee2021understanding].
    """

    c1: float  # examples that have to be seen while batches are small
    c2: float  # steps that no batch size saves

    @property
    def critical_batch_size(self) -> float:
        """c1 / c2, where K* is twice its least value c2; infinite for c2 = 0."""
        return self.c1 / self.c2 if self.c2 else float("inf")

    def steps(self, batch_size: float | int | np.ndarray) -> np.ndarray:
        """K* at one batch size or an array of them."""
        return np.asarray(self.c1 / np.asarray(batch_size, np.float64) + self.c2)


def fit_steps_to_result(
    batch_sizes: Sequence[float | int] | np.ndarray, steps: Sequence[float | int] | np.ndarray
) -> BatchSizeLaw:
    r"""Fits $K^\star = c_1/B + c_2$ with $c_1, c_2 \ge 0$ by least squares of the relative errors.

    Minimises $\sum_i \left((c_1/B_i + c_2 - K_i)/K_i\right)^2$: to first order the error of $\log K^\star$, since
    $K^\star$ spans decades. Exact: the problem is convex, and its solution is the free one or lies on an axis.

    Args:
      batch_sizes: B of each measurement, positive; at least two different ones.
      steps: K* of each measurement, positive and finite.

    Returns:
      `BatchSizeLaw`.

    Raises:
      ValueError: for lengths that differ, numbers that are not positive and finite, or a single batch size.

    Example:
      >>> law = fit_steps_to_result([2, 8, 32, 128], [5100, 1350, 412.5, 178.125])
      >>> round(law.c1, 6), round(law.c2, 6)
      (10000.0, 100.0)

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316; the weights are this library's choice
    [lee2021understanding].
    """
    B, K = np.asarray(batch_sizes, np.float64), np.asarray(steps, np.float64)
    if B.ndim != 1 or B.shape != K.shape:
        raise ValueError(f"batch_sizes and steps must be two lists of one length, got the shapes {B.shape}, {K.shape}")
    if not (np.isfinite(B) & np.isfinite(K) & (B > 0) & (K > 0)).all():
        raise ValueError(
            f"batch_sizes and steps must be positive and finite, got {B.tolist()} and {K.tolist()}; "
            "leave out batch sizes whose trials were all incomplete"
        )
    if len(np.unique(B)) < 2:
        raise ValueError(f"two different batch sizes are needed for two constants, got {B.tolist()}")
    A = np.stack([1 / (B * K), 1 / K], axis=1)  # A c should be 1
    scale = np.linalg.norm(A, axis=0)
    free = np.linalg.lstsq(A / scale, np.ones(len(K)), rcond=None)[0] / scale
    if (free >= 0).all():
        return BatchSizeLaw(*map(float, free))
    on_axes = [(A[:, 0].sum() / scale[0] ** 2, 0.0), (0.0, A[:, 1].sum() / scale[1] ** 2)]
    best = min(on_axes, key=lambda c: float(np.sum((A @ np.asarray(c) - 1) ** 2)))
    return BatchSizeLaw(*map(float, best))


def sgd_steps_to_result(
    batch_size: float | int | np.ndarray,
    *,
    loss_gap: float | int,
    smoothness: float | int,
    variance: float | int,
    alignment: float | int,
    eps: float | int,
    learning_rate: float | int,
) -> np.ndarray:
    r"""Steps after which the bound of constant-step SGD on the mean squared gradient norm is `eps`.

    From $\frac1K\sum_k \mathbb{E}\|\nabla f\|^2 \le \frac{\eta L \beta}{\mu B} + \frac{2\Delta}{K\mu\eta}$:
    $K^\star = 2\Delta / \big(\mu\eta\,(\epsilon - \eta L\beta/(\mu B))\big)$.

    Args:
      batch_size: B, a number or an array.
      loss_gap: $\Delta = f(w_1) - f_\infty$.
      smoothness: L, Lipschitz constant of the gradient.
      variance: $\beta$, of the gradient of one example.
      alignment: $\mu$ in $\nabla f^\top \mathbb{E}[g] \ge \mu \|\nabla f\|^2$; 1 for an unbiased gradient.
      eps: $\epsilon$, the target.
      learning_rate: $\eta$.

    Returns:
      $K^\star$, infinite where the noise alone exceeds the target.

    Example:
      >>> constants = dict(loss_gap=1, smoothness=2, variance=0.5, alignment=1, eps=0.1, learning_rate=0.05)
      >>> sgd_steps_to_result(np.array([4, 64, 1024]), **constants).round(3).tolist()
      [457.143, 403.15, 400.195]

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316, from Bottou, Curtis, Nocedal (2018), Theorem 4.8
    [lee2021understanding, bottou2018optimization].
    """
    noise = learning_rate * smoothness * variance / (alignment * np.asarray(batch_size, np.float64))
    return np.where(noise < eps, 2 * loss_gap / (alignment * learning_rate * np.maximum(eps - noise, 1e-300)), np.inf)


def sgd_batch_size_law(
    *,
    loss_gap: float | int,
    smoothness: float | int,
    variance: float | int,
    alignment: float | int,
    eps: float | int,
    learning_rate: float | int,
) -> BatchSizeLaw:
    r"""The law that `sgd_steps_to_result` follows where the noise is small against the target.

    $c_1 = 2\Delta L\beta/(\mu^2\epsilon^2)$ and $c_2 = 2\Delta/(\eta\mu\epsilon)$. A sparse network's larger $L$ raises
    $c_1$ and, as it asks for a smaller $\eta$, also $c_2$; the shape in B is the same.

    Args:
      loss_gap: as in `sgd_steps_to_result`, like all others.
      smoothness: L.
      variance: $\beta$.
      alignment: $\mu$.
      eps: $\epsilon$.
      learning_rate: $\eta$.

    Returns:
      `BatchSizeLaw`.

    Example:
      >>> law = sgd_batch_size_law(loss_gap=1, smoothness=2, variance=0.5, alignment=1, eps=0.1, learning_rate=0.05)
      >>> law.steps(np.array([4, 64, 1024])).round(3).tolist()
      [450.0, 403.125, 400.195]

    Source: Lee, Ajanthan, Torr, Jaggi (ICLR 2021), arXiv:2003.11316 [lee2021understanding].
    """
    return BatchSizeLaw(
        c1=2 * loss_gap * smoothness * variance / (alignment**2 * eps**2),
        c2=2 * loss_gap / (learning_rate * alignment * eps),
    )
