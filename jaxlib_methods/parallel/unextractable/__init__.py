"""Weights that nobody can put together: random invertible transforms at the boundaries, changed while training."""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.parallel.unextractable import gpt as gpt, gpt_coordinates as gpt_coordinates
from jaxlib_methods.parallel.unextractable.extraction import (
    estimate_bridge as estimate_bridge,
    estimate_entry_bridge as estimate_entry_bridge,
    extraction_probability as extraction_probability,
)
from jaxlib_methods.parallel.unextractable.momentum import transform_momentum as transform_momentum
from jaxlib_methods.parallel.unextractable.morphing import Sides as Sides, morph as morph
from jaxlib_methods.parallel.unextractable.pipelines import (
    morph_pipeline as morph_pipeline,
    morph_snapshot as morph_snapshot,
)
from jaxlib_methods.parallel.unextractable.rounding import rounding_bound as rounding_bound
from jaxlib_methods.parallel.unextractable.transforms import (
    Transform as Transform,
    draw_transform as draw_transform,
    draw_transforms as draw_transforms,
)

__all__ = [
    "Sides",
    "Transform",
    "draw_transform",
    "draw_transforms",
    "estimate_bridge",
    "estimate_entry_bridge",
    "extraction_probability",
    "gpt",
    "gpt_coordinates",
    "morph",
    "morph_pipeline",
    "morph_snapshot",
    "rounding_bound",
    "transform_momentum",
]

moved_names(
    __name__,
    {
        "cast_like": "parallel.unextractable.morphing.cast_like",
        "master_copy": "parallel.unextractable.morphing.master_copy",
    },
)
