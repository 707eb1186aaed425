"""Normalisation without statistics of the batch: activations and weights that keep signal norms by themselves.

BibTeX:

@article{lu2020bidirectionally,
  title = {Bidirectionally Self-Normalizing Neural Networks},
  author = {Lu, Yao and Gould, Stephen and Ajanthan, Thalaiyasingam},
  journal = {Neural Networks},
  volume = {167},
  pages = {283--291},
  year = {2023},
  eprint = {2006.12169},
  archivePrefix = {arXiv},
}
"""

from jaxlib_methods.normalization._bsn import BSNParams as BSNParams
from jaxlib_methods.normalization._bsn import SignalNorms as SignalNorms
from jaxlib_methods.normalization._bsn import apply_bsn as apply_bsn
from jaxlib_methods.normalization._bsn import init_bsn as init_bsn
from jaxlib_methods.normalization._bsn import rescale_inputs as rescale_inputs
from jaxlib_methods.normalization._bsn import signal_norms as signal_norms
from jaxlib_methods.normalization._gpn import GPNConstants as GPNConstants
from jaxlib_methods.normalization._gpn import gpn as gpn
from jaxlib_methods.normalization._gpn import gpn_constants as gpn_constants
from jaxlib_methods.normalization._orthogonal import bjorck as bjorck
from jaxlib_methods.normalization._orthogonal import haar_orthogonal as haar_orthogonal
from jaxlib_methods.normalization._orthogonal import orthogonal_retraction as orthogonal_retraction
from jaxlib_methods.normalization._orthogonal import orthogonality_error as orthogonality_error
from jaxlib_methods.normalization._orthogonal import riemannian_gradient as riemannian_gradient

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
