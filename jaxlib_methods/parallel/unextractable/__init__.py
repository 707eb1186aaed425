"""Weights that nobody can put together: random invertible transforms at the boundaries, changed while training."""

from jaxlib_methods.parallel.unextractable._boundary_transforms import (
    Sides as Sides,
    cast_like as cast_like,
    master_copy as master_copy,
    morph as morph,
    morph_pipeline as morph_pipeline,
    morph_snapshot as morph_snapshot,
    transform_momentum as transform_momentum,
)
from jaxlib_methods.parallel.unextractable._extraction import (
    estimate_bridge as estimate_bridge,
    estimate_entry_bridge as estimate_entry_bridge,
    extraction_probability as extraction_probability,
)
from jaxlib_methods.parallel.unextractable._random_transforms import (
    Transform as Transform,
    draw_transform as draw_transform,
    draw_transforms as draw_transforms,
)
from jaxlib_methods.parallel.unextractable._rounding import rounding_bound as rounding_bound

__all__ = [
    "Sides",
    "Transform",
    "cast_like",
    "draw_transform",
    "draw_transforms",
    "estimate_bridge",
    "estimate_entry_bridge",
    "extraction_probability",
    "master_copy",
    "morph",
    "morph_pipeline",
    "morph_snapshot",
    "rounding_bound",
    "transform_momentum",
]
