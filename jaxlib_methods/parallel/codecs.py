"""The old address of `jaxlib_methods.parallel.boundaries`, for import statements."""

from jaxlib_methods._moved import moved_names

__all__ = []

_SUBMODULE = {
    "Payload": "codecs.",
    "coded_boundary": "codecs.",
    "DeltaState": "lossy.",
    "subspace_coordinates": "subspaces.",
    "subspace_reconstruct": "subspaces.",
    "MomentState": "grassmann.",
    "change_basis": "grassmann.",
    "gradient_moment": "grassmann.",
    "grassmann_step": "grassmann.",
}
_AT_THE_FACE = (
    "Codec Subspace cast_codec codec_hook delta_codec fixed_embedding identity_codec int8_codec payload_bytes "
    "random_subspace subspace_codec subspace_gradient_codec subspace_model top_k_codec"
)

moved_names(
    __name__,
    {name: f"parallel.boundaries.{room}{name}" for name, room in _SUBMODULE.items()}
    | {name: f"parallel.boundaries.{name}" for name in _AT_THE_FACE.split()},
)
