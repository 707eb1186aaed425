"""How the GPU kernel lays a label vector out over threads, and the shared memory that takes.

A block of 128 / k lines is held by the 128 threads of a warpgroup, k to a line. The constants are estimates until they
are measured on a GPU.
"""

import dataclasses
import math
from typing import Any

from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlib_methods.kernels.scanline import _pallas_minplus as mp
from jaxlib_methods.kernels.scanline.cost import window_radius
from jaxlib_methods.kernels.scanline.pairwise import Pairwise

THREADS = 128  # one warpgroup
# Shared memory of a Hopper block, less what the compiler takes for barriers and reductions across warps.
SMEM_BUDGET = 232448 - 8192
# Threads that may share the labels of one line; with 16 a row of uint8 indices is narrower than the TMA's 16 bytes.
LANES_PER_LINE = (1, 2, 4, 8)
# Registers hold several label vectors at once; beyond this many labels a thread they spill. An estimate.
LABELS_PER_LANE = 32
MAX_LABELS_PER_LANE = 64
# Positions in flight: enough to hide a fetch from memory behind as many steps. An estimate.
MAX_SLOTS = 4
MIN_SLOTS = 2
STAGES = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """How a label vector is laid out and how far the loads run ahead.

    Attributes:
      lanes: threads that share the label vector of one line, k.
      slots: positions in the ring of loads.
    """

    lanes: int
    slots: int

    @property
    def lines(self) -> int:
        """Lines of a block."""
        return THREADS // self.lanes

    @property
    def layout(self) -> Any:
        """Registers of a label vector block [L, lines]."""
        if self.lanes == 1:
            tiling = plgpu.Tiling(((1, 128), (32,), (1,)))
            return plgpu.Layout.TILED(tiling, warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
        k = self.lanes
        tiling = plgpu.Tiling(((k, 128 // k), (k, 32 // k), (1,)))
        return plgpu.Layout.TILED(tiling, warp_dims=(-4,), lane_dims=(-3, -2), vector_dim=-1)


def smem_bytes(num_labels: int, config: Config, pairwise: Pairwise, *, backward: bool = False) -> int:
    """Shared memory of one block, for the widest case: both inputs, edge weights and indices."""
    rows, index = num_labels * config.lines, num_labels * config.lines + config.lines
    if backward:
        slot, stage = 2 * 4 * rows + index, 4 * rows
    else:
        slot, stage = 2 * 4 * rows + 4 * config.lines, 4 * rows + index
    shifted = 4 * config.lines * sum(shift_rows(num_labels, config, pairwise, backward=backward))
    return config.slots * slot + STAGES * stage + shifted


def choose(num_labels: int, pairwise: Pairwise, lines: int | None = None) -> Config | str:
    """The layout for a label count, or the reason why there is none.

    The fewest lanes a line with which a thread holds at most `LABELS_PER_LANE` labels, since a reduction over more
    lanes takes more shuffles. More lanes make smaller blocks: the fewest whose blocks divide `lines` come first, since
    padding copies every array. Then the longest ring that fits.
    """
    fitting = [k for k in LANES_PER_LINE if num_labels % k == 0 and num_labels // k <= MAX_LABELS_PER_LANE]
    comfortable = [k for k in fitting if num_labels // k <= LABELS_PER_LANE] or fitting[-1:]
    dividing = [k for k in comfortable if lines is not None and lines % Config(k, 1).lines == 0]
    for k in (*dividing, *comfortable):
        for slots in range(MAX_SLOTS, MIN_SLOTS - 1, -1):
            config = Config(k, slots)
            if all(smem_bytes(num_labels, config, pairwise, backward=b) <= SMEM_BUDGET for b in (False, True)):
                return config
    return (
        f"{num_labels} labels fit no register layout: of {LANES_PER_LINE} lanes per line "
        f"one must divide the labels, leave at most {MAX_LABELS_PER_LANE} a "
        f"lane, and {MIN_SLOTS} positions within {SMEM_BUDGET} bytes of shared memory"
    )


def shift_rows(num_labels: int, config: Config, pairwise: Pairwise, *, backward: bool) -> tuple[int, ...]:
    """Rows of the shared-memory blocks that shifts (float32, then int32) and loops over the senders go through."""
    radius = mp.route_radius(pairwise, num_labels) if backward else None
    how = mp.form(pairwise, num_labels)
    if radius is None if backward else how == "table":
        return (num_labels,)
    if config.lanes == 1:
        return ()
    if backward:
        return (num_labels + 2 * radius,) * 2 if radius else ()
    if how == "potts":
        return ()
    if how == "doubling":
        farthest = 2 ** (math.ceil(math.log2(min(pairwise.truncation, num_labels))) - 1)
        return (num_labels + 2 * farthest,) * 2
    radius = pairwise.truncation - 1 if pairwise.kind == "truncated_linear" else window_radius(pairwise, num_labels)
    return (num_labels + 2 * radius,)
