"""Approximate and exact inference in pairwise MRFs on image grids, as differentiable layers.

BibTeX:
@inproceedings{xu2020fast,
  author = {Zhiwei Xu and Thalaiyasingam Ajanthan and Richard Hartley},
  title = {Fast and Differentiable Message Passing on Pairwise {M}arkov Random Fields},
  booktitle = {Asian Conference on Computer Vision (ACCV)},
  year = {2020},
}
"""

from jaxlib_methods.kernels.scanline import Pairwise as Pairwise
from jaxlib_methods.message_passing._grid import DIRECTIONS as DIRECTIONS
from jaxlib_methods.message_passing._grid import GridMRF as GridMRF
from jaxlib_methods.message_passing._grid import both_directions as both_directions
from jaxlib_methods.message_passing._grid import energy as energy
from jaxlib_methods.message_passing._potentials import cauchy as cauchy
from jaxlib_methods.message_passing._potentials import huber as huber
from jaxlib_methods.message_passing._potentials import linear as linear
from jaxlib_methods.message_passing._potentials import negative_potts as negative_potts
from jaxlib_methods.message_passing._potentials import potts as potts
from jaxlib_methods.message_passing._potentials import quadratic as quadratic
from jaxlib_methods.message_passing._potentials import table as table
from jaxlib_methods.message_passing._potentials import toeplitz as toeplitz
from jaxlib_methods.message_passing._potentials import truncated_linear as truncated_linear
from jaxlib_methods.message_passing._potentials import truncated_quadratic as truncated_quadratic

__all__ = [
    "DIRECTIONS",
    "GridMRF",
    "Pairwise",
    "both_directions",
    "cauchy",
    "energy",
    "huber",
    "linear",
    "negative_potts",
    "potts",
    "quadratic",
    "table",
    "toeplitz",
    "truncated_linear",
    "truncated_quadratic",
]
