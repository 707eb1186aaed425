"""Approximate and exact inference in pairwise MRFs on image grids, as differentiable layers.

    mrf = GridMRF(birchfield_tomasi(left, right, 16), truncated_linear(20.0, truncation=2))
    solution = trwp(mrf, iterations=40, rounding="sequential")          # labels, beliefs, messages
    certified = trwp(mrf, evaluate_every=5, tolerance=1e-3)             # stops at a proven gap
    fast = trwp(mrf, iterations=6, rho=0.6, rounding="sequential", messages=coarse_to_fine(mrf))  # a low energy soon
    gradient = jax.grad(lambda m: loss(trwp(m).beliefs))(mrf)           # to unaries, edge weights and V

Which solver: `trwp` reaches the lowest energies and comes with a lower bound; `isgmr` is loopy min-sum; `sgm` is one
pass; `mean_field` is the baseline. `MessagePassing` is the layer with learned compatibilities. The exact solvers
(enumeration, chains, graph cuts) are oracles for small problems. Problems with the same static structure share one
compiled program.
"""

from jaxlib_methods.kernels.scanline import Pairwise as Pairwise
from jaxlib_methods.message_passing._bounds import (
    chain_lower_bound as chain_lower_bound,
    sequential_rounding as sequential_rounding,
)
from jaxlib_methods.message_passing._coarse import coarse_to_fine as coarse_to_fine
from jaxlib_methods.message_passing._cost_volumes import (
    birchfield_tomasi as birchfield_tomasi,
    denoising_unaries as denoising_unaries,
    gradient_cues as gradient_cues,
)
from jaxlib_methods.message_passing._exact import (
    ExactSolution as ExactSolution,
    chain_min_marginals as chain_min_marginals,
    enumerate_energies as enumerate_energies,
    solve_by_enumeration as solve_by_enumeration,
    solve_chain as solve_chain,
)
from jaxlib_methods.message_passing._graph_cuts import (
    GraphCutSolution as GraphCutSolution,
    IshikawaGraph as IshikawaGraph,
    NonConvexPrior as NonConvexPrior,
    alpha_expansion as alpha_expansion,
    ishikawa_graph as ishikawa_graph,
    iteratively_reweighted_graph_cut as iteratively_reweighted_graph_cut,
    non_convex_prior as non_convex_prior,
    solve_by_graph_cut as solve_by_graph_cut,
)
from jaxlib_methods.message_passing._grid import (
    DIRECTIONS as DIRECTIONS,
    GridMRF as GridMRF,
    both_directions as both_directions,
    energy as energy,
)
from jaxlib_methods.message_passing._layer import MessagePassing as MessagePassing, boundary_weights as boundary_weights
from jaxlib_methods.message_passing._mean_field import mean_field as mean_field
from jaxlib_methods.message_passing._potentials import (
    cauchy as cauchy,
    huber as huber,
    linear as linear,
    negative_potts as negative_potts,
    potts as potts,
    quadratic as quadratic,
    table as table,
    toeplitz as toeplitz,
    truncated_linear as truncated_linear,
    truncated_quadratic as truncated_quadratic,
)
from jaxlib_methods.message_passing._solvers import Solution as Solution, isgmr as isgmr, sgm as sgm, trwp as trwp

__all__ = [
    "DIRECTIONS",
    "ExactSolution",
    "GraphCutSolution",
    "GridMRF",
    "IshikawaGraph",
    "MessagePassing",
    "NonConvexPrior",
    "Pairwise",
    "Solution",
    "alpha_expansion",
    "birchfield_tomasi",
    "both_directions",
    "boundary_weights",
    "cauchy",
    "chain_lower_bound",
    "chain_min_marginals",
    "coarse_to_fine",
    "denoising_unaries",
    "energy",
    "enumerate_energies",
    "gradient_cues",
    "huber",
    "isgmr",
    "ishikawa_graph",
    "iteratively_reweighted_graph_cut",
    "linear",
    "mean_field",
    "negative_potts",
    "non_convex_prior",
    "potts",
    "quadratic",
    "sequential_rounding",
    "sgm",
    "solve_by_enumeration",
    "solve_by_graph_cut",
    "solve_chain",
    "table",
    "toeplitz",
    "truncated_linear",
    "truncated_quadratic",
    "trwp",
]
