"""One scanline sweep in the "lines last" layout, and its backward: validation and the choice of an implementation.

Arrays are [positions, L, lines]: a sweep runs over `positions` of a line, all `lines` in parallel. Recursion, with u
the unary cost plus every message that is not of this direction d or its opposite q, and a the carry (zero before the
first position):

    m_i(lam) = min_mu [a(mu) + w_i V(mu, lam)] - min_nu(same),   m = 0 at the first position
    a        = rho (u_i + m_i + opposite_i) - opposite_i

P_i(lam) and Q_i are the two argmins.
Index ties go to the lowest label. Where V is a `semimetric`, Q is the argmin of a: the lowest argmin of the outgoing
message too, except at w_i = 0, where every label is one. P and Q at the first position are unspecified; no gradient
passes there.

An implementation is a module with `sweep(request)` and `sweep_backward(request)`, called with a validated
`request.Sweep` or `request.Backward`; it raises `NotImplementedError` with the reason where it does not support it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods._core import checks
from jaxlib_methods.kernels._dispatch import Kernel
from jaxlib_methods.kernels.scanline.pairwise import Pairwise
from jaxlib_methods.kernels.scanline.request import Backward, Sweep
from jaxlib_methods.typing import Implementation

# No kernel has been timed on its device yet, so None means "xla" everywhere: whoever measures one ahead of it
# (`python -m benchmarks run scanline`) adds a preference here and changes nothing else.
KERNEL = Kernel("scanline", ("xla", "pallas_gpu", "pallas_tpu"))
MAX_LABELS = 65535


def index_dtype(num_labels: int) -> Any:
    """The dtype of P and Q: uint8 up to 256 labels, uint16 above."""
    return jnp.uint8 if num_labels <= 256 else jnp.uint16


def sweep(
    u: jax.Array,
    opposite: jax.Array | None,
    pairwise: Pairwise,
    *,
    edge_weight: jax.Array | None = None,
    edge_probability: float,
    reverse: bool = False,
    with_indices: bool = False,
    step: tuple[int, int] = (1, 0),
    num_images: int = 1,
    out: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """Messages of one direction along every line.

    Args:
      u: [positions, L, lines] float32 or float64; unary costs plus all messages but this direction's and its
        opposite's.
      opposite: [positions, L, lines], messages of the opposite direction; None means zeros, which is also exact where
        edge_probability is 1.
      pairwise: V(mu, lam), mu at the sending pixel. For an asymmetric table the caller transposes it for the way back.
      edge_weight: [positions, lines], factor of V on the edge into each position (the receiving pixel); None means 1.
      edge_probability: rho, the edge's appearance probability, in (0, 1]; static.
      reverse: walk from the last position to the first; static.
      with_indices: also return the argmins; static.
      step: (positions, lines) from the sending to the receiving pixel when walking forward, (1, 0) along the lines; a
        diagonal has a second entry, and with `reverse` both are negated. A pixel whose sender lies outside the image
        gets a zero message. Static.
      num_images: number of images side by side in `lines` (image-major), which a diagonal must not connect; static.
      out: an array like `u` that is no longer needed: its storage may take the result, its values are never read.
      implementation: None for the best known one that supports the arguments ("xla" until a kernel has been measured to
        be faster), or a name, which then never falls back.

    Returns:
      m [positions, L, lines]; with indices (m, P [positions, L, lines], Q [positions, lines]), uint8 up to 256 labels,
      else uint16.

    Raises:
      ValueError: on shapes, dtypes or static arguments that do not fit.
      NotImplementedError: if the named implementation does not support the arguments.
      ExceptionGroup: if none is named and none works; it holds every reason.

    Example:
      >>> u = jnp.array([[[0.0], [2.0]], [[1.0], [0.0]], [[3.0], [0.0]]])  # a chain of three pixels, two labels
      >>> sweep(u, None, Pairwise("potts", jnp.float32(1.0), semimetric=True), edge_probability=1.0)[..., 0]
      Array([[0., 0.],
             [0., 1.],
             [0., 0.]], dtype=float32)

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    request = Sweep(
        u=u,
        opposite=opposite,
        pairwise=pairwise,
        edge_weight=edge_weight,
        edge_probability=edge_probability,
        reverse=reverse,
        with_indices=with_indices,
        step=step,
        num_images=num_images,
        out=out,
    )
    _check("u", request, opposite)
    return KERNEL.run("sweep", implementation, request)


def sweep_backward(
    dm: jax.Array,
    opposite_ds: jax.Array | None,
    p: jax.Array,
    q: jax.Array,
    pairwise: Pairwise,
    *,
    edge_weight: jax.Array | None = None,
    edge_probability: float,
    reverse: bool = False,
    step: tuple[int, int] = (1, 0),
    num_images: int = 1,
    out: jax.Array | None = None,
    implementation: Implementation | None = None,
) -> tuple[jax.Array, jax.Array | None, Pairwise]:
    """Routes the gradient of a sweep's messages back along the stored argmins.

    Walking against the sweep, with g the carry from the pixel that i sent to (zero at the last one):

        v = dm_i + (rho - 1) opposite_ds_i + g;   v[Q_i] -= sum v
        dS_p(mu) = sum over lam with P_i(lam) = mu of v(lam), p the sender of i;   g = rho dS_p
        dw_i = sum_lam V(P_i(lam), lam) v(lam);   dV(mu, lam) += w_i v(lam)

    In pair form the messages m^d of a forward sweep are used by the sweeps of other pairs (whose gradients make up dm)
    and as the `opposite` of the reverse sweep q, so `opposite_ds` is the dS of that sweep: backward sweeps pass it as
    forward ones pass messages.

    Args:
      dm: [positions, L, lines] gradient of the loss in the messages, but for what `opposite_ds` brings.
      opposite_ds: [positions, L, lines] dS of the sweep that had these messages as its `opposite`; None for none.
      p: [positions, L, lines] indices of the sweep.
      q: [positions, lines] indices of the sweep.
      pairwise, edge_weight, edge_probability (rho), reverse, step, num_images: those of the sweep.
      out: an array like `dm` that is no longer needed: its storage may take dS.
      implementation: as in `sweep`.

    Returns:
      (dS, dw, dpairwise). dS [positions, L, lines]: du = rho dS and dopposite = (rho - 1) dS. dw [positions, lines], or
      None without edge weights. dpairwise: a `Pairwise` whose arrays are the gradients in `weight`, `profile` and
      `table`.

    Raises:
      ValueError, NotImplementedError, ExceptionGroup: as `sweep`.

    Example:
      >>> dm = jnp.zeros((3, 2, 1)).at[1:, 1].set(1.0)
      >>> p = jnp.array([[[0], [1]], [[0], [0]], [[0], [1]]], jnp.uint8)
      >>> q = jnp.array([[0], [0], [0]], jnp.uint8)
      >>> potts = Pairwise("potts", jnp.float32(1.0), semimetric=True)
      >>> ds, _, dpairwise = sweep_backward(dm, None, p, q, potts, edge_probability=1.0)
      >>> ds[..., 0]
      Array([[ 0.,  0.],
             [-1.,  1.],
             [ 0.,  0.]], dtype=float32)
      >>> float(dpairwise.weight)
      2.0

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    request = Backward(
        dm=dm,
        opposite_ds=opposite_ds,
        p=p,
        q=q,
        pairwise=pairwise,
        edge_weight=edge_weight,
        edge_probability=edge_probability,
        reverse=reverse,
        step=step,
        num_images=num_images,
        out=out,
    )
    _check("dm", request, opposite_ds)
    expected = index_dtype(dm.shape[1])
    if p.shape != dm.shape or q.shape != (dm.shape[0], dm.shape[2]) or p.dtype != expected or q.dtype != expected:
        raise ValueError(
            f"p and q must be {dm.shape} and {(dm.shape[0], dm.shape[2])} of {jnp.dtype(expected)}, "
            f"got {p.shape} of {p.dtype} and {q.shape} of {q.dtype}"
        )
    return KERNEL.run("sweep_backward", implementation, request)


def _check(name: str, request: Sweep | Backward, opposite: jax.Array | None) -> None:
    """Static facts only: shapes, dtypes and Python values. `name` is that of the array that the others follow."""
    costs, pairwise, edge_weight = request.costs, request.pairwise, request.edge_weight
    step, num_images = request.step, request.num_images
    if costs.ndim != 3 or costs.dtype not in (jnp.float32, jnp.float64):
        raise ValueError(
            f"{name} must be [positions, L, lines] of float32 or float64, got {costs.shape} of {costs.dtype}"
        )
    positions, num_labels, lines = costs.shape
    if num_labels > MAX_LABELS:
        raise ValueError(f"at most {MAX_LABELS} labels fit the uint16 indices, got {num_labels}")
    if opposite is not None and (opposite.shape != costs.shape or opposite.dtype != costs.dtype):
        raise ValueError(
            f"the opposite's array must be like {name}, {costs.shape} of {costs.dtype}, "
            f"got {opposite.shape} of {opposite.dtype}"
        )
    if edge_weight is not None and (edge_weight.shape != (positions, lines) or edge_weight.dtype != costs.dtype):
        raise ValueError(
            f"edge_weight must be [positions, lines] = {(positions, lines)} of {costs.dtype}, "
            f"got {edge_weight.shape} of {edge_weight.dtype}"
        )
    if (pairwise.kind == "toeplitz") == (pairwise.profile is None) or (pairwise.kind == "table") == (
        pairwise.table is None
    ):
        raise ValueError(f"only a 'toeplitz' has a profile and only a 'table' a table, got {pairwise}")
    if pairwise.kind == "table" and pairwise.table.shape != (num_labels, num_labels):
        raise ValueError(
            f"table must be {(num_labels, num_labels)} for {num_labels} labels, got {pairwise.table.shape}"
        )
    checks.within("(0, 1]", edge_probability=request.edge_probability)
    if step[0] < 1 or num_images < 1 or lines % num_images:
        raise ValueError(
            f"step[0] must be positive and num_images divide the {lines} lines, got {step} and {num_images}"
        )
