"""What every implementation of a sweep and of its backward is given: one typed object, checked once by `api`."""

import dataclasses

import jax

from jaxlib_methods.kernels.scanline.pairwise import Pairwise


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class _Direction:
    """What a sweep and its backward have in common; `api.sweep` says what the fields mean."""

    pairwise: Pairwise
    edge_weight: jax.Array | None = None
    edge_probability: float
    reverse: bool = False
    step: tuple[int, int] = (1, 0)
    num_images: int = 1
    out: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Sweep(_Direction):
    """Messages of one direction along every line: the arguments of `jaxlib_methods.kernels.scanline.sweep`."""

    u: jax.Array
    opposite: jax.Array | None = None
    with_indices: bool = False

    @property
    def costs(self) -> jax.Array:
        """The array whose shape and dtype all others follow, [positions, L, lines]."""
        return self.u


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Backward(_Direction):
    """The way back of a sweep: the arguments of `jaxlib_methods.kernels.scanline.sweep_backward`."""

    dm: jax.Array
    opposite_ds: jax.Array | None = None
    p: jax.Array
    q: jax.Array

    @property
    def costs(self) -> jax.Array:
        """The array whose shape and dtype all others follow, [positions, L, lines]."""
        return self.dm

    @property
    def opposite(self) -> jax.Array | None:
        """What stands in the place of the forward sweep's opposite messages; at rho = 1 it has no effect."""
        return None if self.edge_probability == 1.0 else self.opposite_ds
