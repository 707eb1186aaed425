"""Normalisation without statistics of the batch: activations and weights that keep signal norms by themselves."""

from jaxlib_methods.normalization._bsn import (
    BSNParams as BSNParams,
    SignalNorms as SignalNorms,
    apply_bsn as apply_bsn,
    init_bsn as init_bsn,
    rescale_inputs as rescale_inputs,
    signal_norms as signal_norms,
)
from jaxlib_methods.normalization._gpn import GPNConstants as GPNConstants, gpn as gpn, gpn_constants as gpn_constants
from jaxlib_methods.normalization._orthogonal import (
    bjorck as bjorck,
    haar_orthogonal as haar_orthogonal,
    orthogonal_retraction as orthogonal_retraction,
    orthogonality_error as orthogonality_error,
    riemannian_gradient as riemannian_gradient,
)

__all__ = [
    "BSNParams",
    "GPNConstants",
    "SignalNorms",
    "apply_bsn",
    "bjorck",
    "gpn",
    "gpn_constants",
    "haar_orthogonal",
    "init_bsn",
    "orthogonal_retraction",
    "orthogonality_error",
    "rescale_inputs",
    "riemannian_gradient",
    "signal_norms",
]
