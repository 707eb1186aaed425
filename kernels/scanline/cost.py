"""What a sweep costs in arithmetic and in memory traffic, for rooflines and Pallas cost estimates."""

import math

from jaxlib_methods.kernels._cost import Cost
from jaxlib_methods.kernels.scanline.pairwise import Pairwise

# Above this many shifts the window loses against the loop over all labels (and unrolls into too large a program).
MAX_WINDOW = 32


def window_radius(pairwise: Pairwise, num_labels: int) -> int | None:
    """Largest |d| a Toeplitz window visits by shifts, or None where the loop over all labels is to be used.

    Where R < L - 1 it is R - 1: beyond, the floor min a + w profile[R] stands for every label. Otherwise it is L - 1,
    without a floor.
    """
    if pairwise.kind != "toeplitz":
        return None
    radius = pairwise.profile.shape[0] - 1
    visited = radius - 1 if radius < num_labels - 1 else num_labels - 1
    return visited if 2 * visited + 1 <= MAX_WINDOW else None


def minplus_flops(pairwise: Pairwise, num_labels: int) -> int:
    """Additions and minima of min_mu [a(mu) + w V(mu, .)] for one pixel."""
    L = num_labels
    if pairwise.kind == "potts":
        return 3 * L
    if pairwise.kind == "truncated_linear":
        return 4 * L * math.ceil(math.log2(pairwise.truncation)) + 2 * L
    radius = window_radius(pairwise, L)
    return 2 * L * L if radius is None else 2 * L * (2 * radius + 1) + 2 * L


def cost_estimate(
    shape: tuple[int, int, int],
    pairwise: Pairwise,
    *,
    with_indices: bool = False,
    with_weights: bool = False,
    with_opposite: bool = True,
    itemsize: int = 4,
) -> Cost:
    """Cost of one sweep whose label vector stays on chip: u and the opposite message are read, m (P and Q) written.

    A forward and reverse pair therefore moves 24 bytes per pixel and label in float32.

    Args:
      shape: that of u, (positions, L, lines).
      pairwise: decides the min-plus arithmetic; only its structure matters.
      with_indices: whether P and Q are stored.
      with_weights: whether edge weights are read.
      with_opposite: whether an opposite message is read.
      itemsize: bytes of a message entry.

    Returns:
      A `Cost` for the whole sweep.

    Example:
      >>> cost_estimate((384, 16, 288), Pairwise("potts", 1.0))
      Cost(flops=14155776, bytes_accessed=21233664)
    """
    positions, num_labels, lines = shape
    pixels = positions * lines
    entries = pixels * num_labels
    index_size = 1 if num_labels <= 256 else 2
    # 4 for the carry rho (u + m + q) - q, 1 for subtracting the minimum
    flops = pixels * minplus_flops(pairwise, num_labels) + 5 * entries
    traffic = (2 + with_opposite) * itemsize * entries + (itemsize * pixels if with_weights else 0)
    traffic += index_size * (entries + pixels) if with_indices else 0
    return Cost(flops, traffic)


def backward_cost_estimate(
    shape: tuple[int, int, int], pairwise: Pairwise, *, with_opposite: bool = True, itemsize: int = 4
) -> Cost:
    """Cost of the backward of one sweep without dw and dV: dm, opposite_ds, P and Q are read, dS is written.

    Routing by shifts compares, selects and adds once per label and shift; a table's loop over the senders once per pair
    of labels.

    Args:
      shape: that of dm, (positions, L, lines).
      pairwise: decides the routing; only its structure matters.
      with_opposite: whether opposite_ds is read.
      itemsize: bytes of a gradient entry.

    Returns:
      A `Cost` for the whole sweep.

    Example:
      >>> backward_cost_estimate((384, 16, 288), Pairwise("potts", 1.0))
      Cost(flops=21233664, bytes_accessed=23113728)
    """
    positions, num_labels, lines = shape
    pixels = positions * lines
    entries = pixels * num_labels
    if pairwise.kind == "potts":
        radius = 0
    else:
        radius = pairwise.truncation - 1 if pairwise.kind == "truncated_linear" else window_radius(pairwise, num_labels)
    shifts = num_labels if radius is None else min(num_labels, 2 * radius + 1)
    # v = dm + rho g [+ (rho - 1) opposite_ds] and its sum at Q; per shift a compare and an add; the floor
    flops = entries * (5 + 2 * with_opposite + 2 * shifts + (0 if radius is None else 3))
    index_size = 1 if num_labels <= 256 else 2
    traffic = (2 + with_opposite) * itemsize * entries + index_size * (entries + pixels)
    return Cost(flops, traffic)


# Bytes per entry of theta that one TRWP iteration on a four-connected grid must move in float32, by schedule. A sweep
# of the pair form reads u and the opposite message and writes its own (12); rebuilding u' = theta + m^d + m^q takes 16.
ITERATION_BYTES = {
    "running belief": 4 * 20,  # every sweep reads b, m^d, m^q and writes m^d, b
    "pair form": 4 * 12 + 2 * 16,
    "pair form, u' by the reverse sweep": 4 * 12 + 2 * 8,  # which reads theta besides and writes u'
    "line on chip": 2 * 24,  # a pair of sweeps at once: reads and writes b, m^d, m^q
}
