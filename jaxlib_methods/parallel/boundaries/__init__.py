"""What crosses a boundary between stages in fewer bytes: lossy codecs, and subspace networks that lose nothing.

A `Codec` encodes at the sender and decodes at the receiver; `codec_hook` makes it a hook of a pipeline.

| method | names | paper |
|---|---|---|
| subspace networks | `subspace_model`, `subspace_codec`, `subspace_gradient_codec` | [ramasinghe2025protocol] |
| moving their subspace | `grassmann` | [ramasinghe2025protocol] |
| eight bits in blocks | `int8_codec` | [dettmers2022eight] |
| top-k with error feedback | `top_k_codec` | [stich2018sparsified] |
| deltas in few bits (AQ-SGD) | `delta_codec` | [wang2022fine] |
| rounding, nothing | `cast_codec`, `identity_codec` | |
"""

from jaxlib_methods.parallel.boundaries import grassmann as grassmann
from jaxlib_methods.parallel.boundaries.codecs import (
    Codec as Codec,
    cast_codec as cast_codec,
    codec_hook as codec_hook,
    identity_codec as identity_codec,
    payload_bytes as payload_bytes,
)
from jaxlib_methods.parallel.boundaries.lossy import (
    delta_codec as delta_codec,
    int8_codec as int8_codec,
    top_k_codec as top_k_codec,
)
from jaxlib_methods.parallel.boundaries.subspace_codecs import (
    subspace_codec as subspace_codec,
    subspace_gradient_codec as subspace_gradient_codec,
)
from jaxlib_methods.parallel.boundaries.subspaces import (
    Subspace as Subspace,
    fixed_embedding as fixed_embedding,
    random_subspace as random_subspace,
    subspace_model as subspace_model,
)

__all__ = [
    "Codec",
    "Subspace",
    "cast_codec",
    "codec_hook",
    "delta_codec",
    "fixed_embedding",
    "grassmann",
    "identity_codec",
    "int8_codec",
    "payload_bytes",
    "random_subspace",
    "subspace_codec",
    "subspace_gradient_codec",
    "subspace_model",
    "top_k_codec",
]
