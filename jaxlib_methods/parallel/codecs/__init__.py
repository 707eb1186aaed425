"""What crosses a boundary between stages in fewer bytes: lossy codecs, and subspace networks that lose nothing."""

from jaxlib_methods.parallel.codecs._codecs import (
    Codec as Codec,
    Payload as Payload,
    cast_codec as cast_codec,
    codec_hook as codec_hook,
    coded_boundary as coded_boundary,
    identity_codec as identity_codec,
    payload_bytes as payload_bytes,
)
from jaxlib_methods.parallel.codecs._grassmann import (
    MomentState as MomentState,
    change_basis as change_basis,
    gradient_moment as gradient_moment,
    grassmann_step as grassmann_step,
)
from jaxlib_methods.parallel.codecs._lossy_codecs import (
    DeltaState as DeltaState,
    delta_codec as delta_codec,
    int8_codec as int8_codec,
    top_k_codec as top_k_codec,
)
from jaxlib_methods.parallel.codecs._subspace import (
    Subspace as Subspace,
    fixed_embedding as fixed_embedding,
    random_subspace as random_subspace,
    subspace_codec as subspace_codec,
    subspace_coordinates as subspace_coordinates,
    subspace_gradient_codec as subspace_gradient_codec,
    subspace_model as subspace_model,
    subspace_reconstruct as subspace_reconstruct,
)

__all__ = [
    "Codec",
    "DeltaState",
    "MomentState",
    "Payload",
    "Subspace",
    "cast_codec",
    "change_basis",
    "codec_hook",
    "coded_boundary",
    "delta_codec",
    "fixed_embedding",
    "gradient_moment",
    "grassmann_step",
    "identity_codec",
    "int8_codec",
    "payload_bytes",
    "random_subspace",
    "subspace_codec",
    "subspace_coordinates",
    "subspace_gradient_codec",
    "subspace_model",
    "subspace_reconstruct",
    "top_k_codec",
]
