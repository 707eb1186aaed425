"""Message passing as a layer of a network: logits in, logits out, with learned label compatibilities."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods.kernels.scanline import Pairwise
from jaxlib_methods.message_passing._mean_field import mean_field
from jaxlib_methods.message_passing.grid import DIRECTIONS, GridMRF, both_directions, shift_grid
from jaxlib_methods.message_passing.solvers import isgmr, trwp
from jaxlib_methods.typing import MessagePassingMethod


class MessagePassing(nnx.Module):
    """Refines the logits of every pixel by inference in a grid MRF whose compatibilities are learned.

    Costs are the logits' distance from the best one; V(mu, lam) = softplus of a symmetric table, zero on the diagonal,
    so that it is a semimetric whatever the optimizer does. It starts as a Potts cost of weight `init_weight`.

    Args:
      num_labels: L.
      method: "trwp", "isgmr" or "mean_field".
      num_iterations, num_directions, edge_probability, checkpoint_every: of the solver; `edge_probability` is rho of
        TRWP.
      init_weight: positive initial cost of two neighbours of different labels, in units of the logits.
      dtype: of the table.

    Attributes:
      table: (L, L) parameter; only its symmetric part off the diagonal matters.

    Raises:
      ValueError: for an unknown method or an initial weight that is not positive.

    Example:
      >>> layer = MessagePassing(3, num_iterations=2)
      >>> logits = jnp.zeros((1, 4, 5, 3)).at[..., 1].set(4.0).at[0, 2, 2, 0].set(4.5)  # one pixel says otherwise
      >>> refined = layer(logits)
      >>> int(refined[0, 2, 2].argmax()), refined.shape
      (1, (1, 4, 5, 3))

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """

    def __init__(
        self,
        num_labels: int,
        *,
        method: MessagePassingMethod = "trwp",
        num_iterations: int = 5,
        num_directions: int = 4,
        edge_probability: float | int = 0.5,
        checkpoint_every: int | None = None,
        init_weight: float | int = 1.0,
        dtype: jax.typing.DTypeLike = jnp.float32,
    ) -> None:
        checks.one_of(MessagePassingMethod, method=method)
        checks.positive(init_weight=init_weight)
        raw = jnp.log(jnp.expm1(jnp.asarray(init_weight, dtype)))
        self.table = nnx.Param(jnp.broadcast_to(raw, (num_labels, num_labels)))
        self.num_labels = num_labels
        options: dict[str, Any] = {"num_iterations": num_iterations, "num_directions": num_directions}
        if method != "mean_field":
            options["checkpoint_every"] = checkpoint_every
        if method == "trwp":
            options["edge_probability"] = edge_probability
        self.solve = functools.partial({"trwp": trwp, "isgmr": isgmr, "mean_field": mean_field}[method], **options)

    def compatibility(self) -> jax.Array:
        """The (L, L) table of V."""
        raw = self.table[...]
        half = jnp.asarray(0.5, raw.dtype)
        costs = jax.nn.softplus(half * (raw + raw.T))
        return costs * (1 - jnp.eye(self.num_labels, dtype=raw.dtype))

    def __call__(self, logits: jax.Array, edge_weights: jax.Array | None = None) -> jax.Array:
        """Refined logits (B, H, W, L) from logits (B, H, W, L) and edge weights (D, B, H, W) or None.

        Inference runs in float32 for logits of less, and its result has the dtype of the logits.
        """
        dtype = compute_dtype(logits.dtype)
        x = logits.astype(dtype)
        table = self.compatibility().astype(dtype)
        pairwise = Pairwise("table", jnp.ones((), dtype), table=table, semimetric=True)
        weights = None if edge_weights is None else edge_weights.astype(dtype)
        beliefs = self.solve(GridMRF(x.max(-1, keepdims=True) - x, pairwise, weights)).beliefs
        return -beliefs.astype(logits.dtype)


def boundary_weights(boundaries: jax.Array, *, num_directions: int = 4) -> jax.Array:
    """Edge weights that cut the grid at boundaries: w_ij = (1 - e_i)(1 - e_j).

    With a binary edge map this is the paper's rule for segmentation (an edge counts where neither pixel lies on a
    boundary).

    Args:
      boundaries: e, (B, H, W) or (H, W), in [0, 1]; may be the output of a network.
      num_directions: 4, 8 or 16.

    Returns:
      (D, B, H, W) or (D, H, W).

    Raises:
      ValueError: for another number of directions.

    Example:
      >>> boundary_weights(jnp.array([[0.0, 1.0, 0.0, 0.0]]))[0]
      Array([[0., 0., 0., 1.]], dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    checks.one_of((4, 8, 16), num_directions=num_directions)
    free = 1 - boundaries
    return both_directions([free * shift_grid(free, DIRECTIONS[d]) for d in range(0, num_directions, 2)])
