"""Normalisation without statistics of the batch: activations and weights that keep signal norms by themselves.

| method | here | building blocks in |
|---|---|---|
| bidirectionally self-normalising networks | `init_bsn`, `apply_bsn`, `rescale_inputs`, `signal_norms` | `bsn` |
| Gaussian-Poincare normalised activations | `gpn` | `gaussian_poincare` |
| orthogonal weights, kept orthogonal in training | `orthogonal_retraction`, `bjorck` | `orthogonal` |

The building blocks are public submodules, as in `normalization.orthogonal.haar_orthogonal`.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.normalization.bsn import (
    apply_bsn as apply_bsn,
    init_bsn as init_bsn,
    rescale_inputs as rescale_inputs,
    signal_norms as signal_norms,
)
from jaxlib_methods.normalization.gaussian_poincare import gpn as gpn
from jaxlib_methods.normalization.orthogonal import (
    bjorck as bjorck,
    orthogonal_retraction as orthogonal_retraction,
)

__all__ = [
    "apply_bsn",
    "bjorck",
    "gpn",
    "init_bsn",
    "orthogonal_retraction",
    "rescale_inputs",
    "signal_norms",
]

moved_names(
    __name__,
    {
        "BSNParams": "normalization.bsn.BSNParams",
        "GPNConstants": "normalization.gaussian_poincare.GPNConstants",
        "SignalNorms": "normalization.bsn.SignalNorms",
        "gpn_constants": "normalization.gaussian_poincare.gpn_constants",
        "haar_orthogonal": "normalization.orthogonal.haar_orthogonal",
        "orthogonality_error": "normalization.orthogonal.orthogonality_error",
        "riemannian_gradient": "normalization.orthogonal.riemannian_gradient",
    },
)
