"""Approximate and exact inference in pairwise MRFs on image grids, as differentiable layers.

    mrf = GridMRF(costs.birchfield_tomasi(left, right, 16), potentials.truncated_linear(20.0, truncation=2))
    solution = trwp(mrf, num_iterations=40, rounding="sequential")      # labels, beliefs, messages
    certified = trwp(mrf, evaluate_every=5, tolerance=1e-3)             # stops at a proven gap
    start = coarse_to_fine(mrf)                                         # a low energy soon, with
    fast = trwp(mrf, num_iterations=6, edge_probability=0.6, rounding="sequential", messages=start)
    gradient = jax.grad(lambda m: loss(trwp(m).beliefs))(mrf)           # to unaries, edge weights and V

| method | here | building blocks in |
|---|---|---|
| TRWP: the lowest energies, with a lower bound | `trwp`, `coarse_to_fine` | `bounds` |
| ISGMR: loopy min-sum; SGM: one pass | `isgmr`, `sgm` | `solvers` (`Solution`) |
| mean field, the baseline | `mean_field` | |
| a layer with learned compatibilities | `MessagePassing`, `boundary_weights` | |
| the problem: unaries, pairwise costs, edge weights | `GridMRF`, `energy` | `grid`, `costs`, `potentials` |
| exact solvers, oracles for small problems | | `exact`, `graph_cuts`, `reweighted_cuts` |

The building blocks are public submodules, as in `message_passing.potentials.potts`. Problems with the same static
structure share one compiled program.
"""

from jaxlib_methods._moved import moved_names
from jaxlib_methods.message_passing import (
    bounds as bounds,
    costs as costs,
    exact as exact,
    graph_cuts as graph_cuts,
    potentials as potentials,
    reweighted_cuts as reweighted_cuts,
)
from jaxlib_methods.message_passing._coarse import coarse_to_fine as coarse_to_fine
from jaxlib_methods.message_passing._layer import MessagePassing as MessagePassing, boundary_weights as boundary_weights
from jaxlib_methods.message_passing._mean_field import mean_field as mean_field
from jaxlib_methods.message_passing.grid import GridMRF as GridMRF, energy as energy
from jaxlib_methods.message_passing.solvers import isgmr as isgmr, sgm as sgm, trwp as trwp

__all__ = [
    "GridMRF",
    "MessagePassing",
    "boundary_weights",
    "bounds",
    "coarse_to_fine",
    "costs",
    "energy",
    "exact",
    "graph_cuts",
    "isgmr",
    "mean_field",
    "potentials",
    "sgm",
    "trwp",
]

moved_names(
    __name__,
    {
        "DIRECTIONS": "message_passing.grid.DIRECTIONS",
        "ExactSolution": "message_passing.exact.ExactSolution",
        "GraphCutSolution": "message_passing.graph_cuts.GraphCutSolution",
        "IshikawaGraph": "message_passing.graph_cuts.IshikawaGraph",
        "NonConvexPrior": "message_passing.reweighted_cuts.NonConvexPrior",
        "Pairwise": "message_passing.potentials.Pairwise",
        "Solution": "message_passing.solvers.Solution",
        "alpha_expansion": "message_passing.graph_cuts.alpha_expansion",
        "birchfield_tomasi": "message_passing.costs.birchfield_tomasi",
        "both_directions": "message_passing.grid.both_directions",
        "cauchy": "message_passing.potentials.cauchy",
        "chain_lower_bound": "message_passing.bounds.chain_lower_bound",
        "chain_min_marginals": "message_passing.exact.chain_min_marginals",
        "denoising_unaries": "message_passing.costs.denoising_unaries",
        "enumerate_energies": "message_passing.exact.enumerate_energies",
        "gradient_cues": "message_passing.costs.gradient_cues",
        "huber": "message_passing.potentials.huber",
        "ishikawa_graph": "message_passing.graph_cuts.ishikawa_graph",
        "iteratively_reweighted_graph_cut": "message_passing.reweighted_cuts.iteratively_reweighted_graph_cut",
        "linear": "message_passing.potentials.linear",
        "negative_potts": "message_passing.potentials.negative_potts",
        "non_convex_prior": "message_passing.reweighted_cuts.non_convex_prior",
        "potts": "message_passing.potentials.potts",
        "quadratic": "message_passing.potentials.quadratic",
        "sequential_rounding": "message_passing.bounds.sequential_rounding",
        "solve_by_enumeration": "message_passing.exact.solve_by_enumeration",
        "solve_by_graph_cut": "message_passing.graph_cuts.solve_by_graph_cut",
        "solve_chain": "message_passing.exact.solve_chain",
        "table": "message_passing.potentials.table",
        "toeplitz": "message_passing.potentials.toeplitz",
        "truncated_linear": "message_passing.potentials.truncated_linear",
        "truncated_quadratic": "message_passing.potentials.truncated_quadratic",
    },
)
