"""The sweep as a Pallas TPU kernel: labels on sublanes, 128 lines on lanes, the carry in VMEM for a whole line.

The grid is (line blocks, position blocks). Line blocks are independent; the position blocks of one line block follow
one another and hand on the carry a [L, lines] in a scratch buffer. Walking backwards is another index map, nothing
else. A ragged last block reads rubbish: on lines it stays in its lanes and is never written, on positions it comes last
when walking forward and is cut off the carry when it comes first.

What this kernel does not do (diagonal steps, float64, labels beyond the VMEM budget) `can_use` says in words.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlib_methods.kernels._dispatch import require
from jaxlib_methods.kernels.scanline import _pallas_minplus as mp
from jaxlib_methods.kernels.scanline.api import index_dtype
from jaxlib_methods.kernels.scanline.cost import backward_cost_estimate, cost_estimate
from jaxlib_methods.kernels.scanline.pairwise import Pairwise
from jaxlib_methods.kernels.scanline.reference import dense_base
from jaxlib_methods.kernels.scanline.request import Backward, Sweep

LANES = 128
# Blocks are double-buffered; half of the smallest VMEM of the supported chips (16 MiB) leaves the rest to the compiler.
VMEM_BUDGET = 8 * 2**20
# More positions per grid step only amortise its fixed cost (~0.35 us) further and lengthen the first fetch.
MAX_POSITIONS = 32


def vmem_bytes(num_labels: int, positions: int, pairwise: Pairwise, *, arrays: int, indices: bool) -> int:
    """VMEM of one program: `arrays` float32 blocks of `positions`, indices, one carry and V, all buffers included."""
    index = jnp.dtype(index_dtype(num_labels)).itemsize
    labels = _round_up(num_labels, 8)
    block = arrays * labels * 4 + 8 * 4  # messages and one row of edge weights
    if indices:
        block += (_round_up(num_labels, 32 // index) + 32 // index) * index
    table = 4 * labels * _round_up(num_labels, LANES) if mp.form(pairwise, num_labels) == "table" else 0
    window = 4 * LANES * _round_up(pairwise.profile.shape[0], 8) if pairwise.kind == "toeplitz" else 0
    return 2 * positions * LANES * block + LANES * labels * 4 + 2 * (table + window)


def block_positions(shape: tuple[int, ...], pairwise: Pairwise, *, arrays: int, indices: bool) -> int:
    """Positions per block: a power of two up to `MAX_POSITIONS` within the VMEM budget; 0 if not even one fits."""
    positions, num_labels, _ = shape
    size = MAX_POSITIONS
    while size and (
        size >= 2 * positions or vmem_bytes(num_labels, size, pairwise, arrays=arrays, indices=indices) > VMEM_BUDGET
    ):
        size //= 2
    return size


def can_use(shape: tuple[int, ...], dtype: Any, pairwise: Pairwise, *, step: tuple[int, int] = (1, 0)) -> str | None:
    """Why these arguments are not for this kernel, or None if they are. A pure function of static facts.

    Args:
      shape: (positions, L, lines) of the unary costs.
      dtype: theirs.
      pairwise: decides the VMEM that V takes; only its structure matters.
      step: of the sweep.

    Returns:
      The reason, or None.

    Example:
      >>> can_use((384, 16, 288), jnp.float32, Pairwise("truncated_linear", 20.0, truncation=2))
      >>> can_use((384, 16, 288), jnp.float64, Pairwise("potts", 20.0))
      'the TPU kernel holds messages in float32, got float64'
    """
    if jnp.dtype(dtype) != jnp.float32:
        return f"the TPU kernel holds messages in float32, got {jnp.dtype(dtype).name}"
    if step != (1, 0):
        return f"the TPU kernel walks along the lines, step (1, 0), got {step}"
    if not block_positions(shape, pairwise, arrays=3, indices=True):
        needed = vmem_bytes(shape[1], 1, pairwise, arrays=3, indices=True)
        return f"{shape[1]} labels need {needed} bytes of VMEM per position, the budget is {VMEM_BUDGET}"
    return None


def sweep(request: Sweep, *, interpret: Any = False) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """See `jaxlib_methods.kernels.scanline.sweep`. `interpret` runs the kernel body on the CPU, for tests.

    Lines never meet at step (1, 0), and XLA places the result: `num_images` and `out` do not matter here.

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    u, opposite, pairwise, edge_weight = request.u, request.opposite, request.pairwise, request.edge_weight
    with_indices = request.with_indices
    require(can_use(u.shape, u.dtype, pairwise, step=request.step))
    positions, num_labels, lines = u.shape
    arrays = 2 + (opposite is not None)
    block = block_positions(u.shape, pairwise, arrays=arrays, indices=with_indices)
    spec = functools.partial(_spec, positions, lines, block, request.reverse)

    operands, in_specs = [u], [spec(num_labels)]
    if opposite is not None:
        operands.append(opposite)
        in_specs.append(spec(num_labels))
    scale = jnp.asarray(pairwise.weight).astype(u.dtype)
    if edge_weight is None:
        operands.append(jnp.broadcast_to(scale, (1, 1, lines)))
        in_specs.append(pl.BlockSpec((1, 1, min(LANES, lines)), lambda b, j: (0, 0, b)))
    else:
        operands.append((scale * edge_weight)[:, None])
        in_specs.append(spec(1))
    how = mp.form(pairwise, num_labels)
    if how == "table":  # columns are senders: a dynamic slice of one lane
        operands.append(dense_base(pairwise, num_labels, u.dtype).T)
        in_specs.append(pl.BlockSpec((num_labels, num_labels), lambda b, j: (0, 0)))
    elif pairwise.kind == "toeplitz":
        profile = jnp.asarray(pairwise.profile).astype(u.dtype)
        operands.append(jnp.broadcast_to(profile[:, None], (profile.shape[0], min(LANES, lines))))
        in_specs.append(pl.BlockSpec((profile.shape[0], min(LANES, lines)), lambda b, j: (0, 0)))

    out_shape, out_specs = [jax.ShapeDtypeStruct(u.shape, u.dtype)], [spec(num_labels)]
    if with_indices:
        index = index_dtype(num_labels)
        out_shape += [jax.ShapeDtypeStruct(u.shape, index), jax.ShapeDtypeStruct((positions, 1, lines), index)]
        out_specs += [spec(num_labels), spec(1)]
    cost = cost_estimate(
        u.shape,
        pairwise,
        with_indices=with_indices,
        with_weights=edge_weight is not None,
        with_opposite=opposite is not None,
    )
    results = pl.pallas_call(
        functools.partial(
            _sweep_kernel,
            pairwise=mp.structure(pairwise),
            positions=positions,
            rho=request.edge_probability,
            reverse=request.reverse,
            has_opposite=opposite is not None,
            weighted=edge_weight is not None,
            with_indices=with_indices,
        ),
        grid=(pl.cdiv(lines, LANES), pl.cdiv(positions, block)),
        in_specs=in_specs,
        out_specs=out_specs,
        out_shape=out_shape,
        scratch_shapes=[pltpu.VMEM((num_labels, min(LANES, lines)), u.dtype)],
        compiler_params=_compiler_params(),
        cost_estimate=cost.pallas(),
        interpret=interpret,
        name="scanline_sweep",
    )(*operands)
    return (results[0], results[1], results[2][:, 0]) if with_indices else results[0]


def _sweep_kernel(
    *operands: Any,
    pairwise: Pairwise,
    positions: int,
    rho: float,
    reverse: bool,
    has_opposite: bool,
    weighted: bool,
    with_indices: bool,
) -> None:
    """One block of positions: read u, opposite and the row of scales, write m, P and Q, keep a in `carry`."""
    refs = list(operands)
    u = refs.pop(0)
    opposite = refs.pop(0) if has_opposite else None
    scales = refs.pop(0)
    costs = refs.pop(0) if pairwise.kind == "toeplitz" or pairwise.kind == "table" else None
    m, *indices, carry = refs
    block, num_labels, lanes = u.shape
    label = jax.lax.broadcasted_iota(jnp.int32, (num_labels, lanes), 0)

    position = _positions(block, positions, reverse)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        carry[...] = jnp.zeros_like(carry)

    def visit(n: jax.Array, _: None) -> None:
        k, i = position(n)
        scale = scales[k] if weighted else scales[0]
        m_i, p, q = mp.minplus(
            carry[...],
            label,
            scale,
            profile=lambda d: costs[pl.ds(d, 1), :],
            table=lambda a: _table(a, carry, costs, scale, with_indices),
            pairwise=pairwise,
            lanes=_LANES,
            with_indices=with_indices,
        )
        if not pairwise.semimetric:  # a semimetric V turns the zero carry into a zero message by itself
            m_i = jnp.where(jnp.full_like(label, i) == (positions - 1 if reverse else 0), jnp.zeros_like(m_i), m_i)
        m[k] = m_i
        if with_indices:
            indices[0][k] = p.astype(indices[0].dtype)
            indices[1][k] = q.astype(indices[1].dtype)
        rho_ = jnp.float32(rho)
        a = rho_ * (u[k] + m_i) if opposite is None else rho_ * (u[k] + opposite[k] + m_i) - opposite[k]
        carry[...] = _cut(a, i, positions, label)

    jax.lax.fori_loop(0, block, visit, None)


def sweep_backward(request: Backward, *, interpret: Any = False) -> tuple[jax.Array, jax.Array | None, Pairwise]:
    """See `jaxlib_methods.kernels.scanline.sweep_backward`. `interpret` runs the kernel body on the CPU, for tests.

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    dm, opposite_ds, p, q, pairwise = request.dm, request.opposite, request.p, request.q, request.pairwise
    require(can_use(dm.shape, dm.dtype, pairwise, step=request.step))
    positions, num_labels, lines = dm.shape
    arrays = 2 + (opposite_ds is not None)
    block = block_positions(dm.shape, pairwise, arrays=arrays, indices=True)
    spec = functools.partial(_spec, positions, lines, block, not request.reverse)
    operands, in_specs = [dm], [spec(num_labels)]
    if opposite_ds is not None:
        operands.append(opposite_ds)
        in_specs.append(spec(num_labels))
    operands += [p, q[:, None]]
    in_specs += [spec(num_labels), spec(1)]
    cost = backward_cost_estimate(dm.shape, pairwise, with_opposite=opposite_ds is not None)
    ds = pl.pallas_call(
        functools.partial(
            _backward_kernel,
            pairwise=mp.structure(pairwise),
            positions=positions,
            rho=request.edge_probability,
            reverse=request.reverse,
            has_opposite=opposite_ds is not None,
        ),
        grid=(pl.cdiv(lines, LANES), pl.cdiv(positions, block)),
        in_specs=in_specs,
        out_specs=spec(num_labels),
        out_shape=jax.ShapeDtypeStruct(dm.shape, dm.dtype),
        scratch_shapes=[pltpu.VMEM((num_labels, min(LANES, lines)), dm.dtype)],
        compiler_params=_compiler_params(),
        cost_estimate=cost.pallas(),
        interpret=interpret,
        name="scanline_sweep_backward",
    )(*operands)
    return ds, *mp.pairwise_gradients(request, ds)


def _backward_kernel(
    *operands: Any, pairwise: Pairwise, positions: int, rho: float, reverse: bool, has_opposite: bool
) -> None:
    """One block of positions, walked against the sweep: `carry` holds dS of the pixel at hand."""
    refs = list(operands)
    dm = refs.pop(0)
    opposite = refs.pop(0) if has_opposite else None
    p, q, ds, carry = refs
    block, num_labels, lanes = dm.shape
    label = jax.lax.broadcasted_iota(jnp.int32, (num_labels, lanes), 0)
    radius = mp.route_radius(pairwise, num_labels)

    position = _positions(block, positions, not reverse)

    @pl.when(pl.program_id(1) == 0)
    def _() -> None:
        carry[...] = jnp.zeros_like(carry)

    def visit(n: jax.Array, _: None) -> None:
        k, i = position(n)
        received = _cut(carry[...], i, positions, label)
        ds[k] = received
        v = dm[k] + jnp.float32(rho) * received
        if opposite is not None:
            v += jnp.float32(rho - 1.0) * opposite[k]
        p_i, q_i = p[k].astype(jnp.int32), q[k].astype(jnp.int32)
        v = v - jnp.where(label == q_i, v.sum(0, keepdims=True), jnp.zeros_like(v))
        if radius is not None:
            routed = mp.route(v, p_i, q_i, label, radius, pairwise.semimetric, _LANES)
            carry[...] = _cut(routed, i, positions, label)
            return
        v = _cut(v, i, positions, label)

        def send(mu: jax.Array, _: None) -> None:
            carry[pl.ds(mu, 1), :] = jnp.where(p_i == mu, v, jnp.zeros_like(v)).sum(0, keepdims=True)

        jax.lax.fori_loop(0, num_labels, send, None)

    jax.lax.fori_loop(0, block, visit, None)


def _table(
    a: jax.Array, a_ref: Any, columns: Any, scale: jax.Array, with_indices: bool
) -> tuple[jax.Array, jax.Array | None]:
    """Loop over the sending label, ascending with <: the lowest index wins. `columns[:, mu]` is V(mu, .)."""

    def visit(mu: jax.Array, found: tuple) -> tuple:
        candidate = a_ref[pl.ds(mu, 1), :] + scale * columns[:, pl.ds(mu, 1)]
        t = jnp.minimum(found[0], candidate)
        return (t, jnp.where(candidate < found[0], jnp.full_like(found[1], mu), found[1])) if with_indices else (t,)

    start = (jnp.full(a.shape, jnp.inf, a.dtype),)
    found = jax.lax.fori_loop(0, a.shape[0], visit, (*start, jnp.zeros(a.shape, jnp.int32)) if with_indices else start)
    return found if with_indices else (found[0], None)


def _shifts(x: jax.Array) -> Any:
    label = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
    size = x.shape[0]

    def shifted(offset: int, fill: Any) -> jax.Array:
        outside = jnp.full(x.shape, fill, x.dtype)
        if abs(offset) >= size:
            return outside
        inside = label >= offset if offset > 0 else label < size + offset
        return jnp.where(inside, pltpu.roll(x, offset % size, 0), outside)

    return shifted


_LANES = mp.Lanes(
    spread=lambda row: row,
    least=lambda x: jnp.min(x, axis=0, keepdims=True),
    total=lambda x: jnp.sum(x, axis=0, keepdims=True),
    shifts=_shifts,
)


def _positions(block: int, positions: int, down: bool) -> Any:
    """n -> index in the block and in the line of the n-th position that this program visits."""
    j = pl.program_id(1)
    start = block * (pl.cdiv(positions, block) - 1 - j if down else j)

    def position(n: jax.Array) -> tuple[jax.Array, jax.Array]:
        k = block - 1 - n if down else n
        return k, start + k

    return position


def _cut(a: jax.Array, i: jax.Array, positions: int, label: jax.Array) -> jax.Array:
    """Zero beyond the end of the line, where the blocks hold rubbish."""
    return jnp.where(jnp.full_like(label, i) < positions, a, jnp.zeros_like(a))


def _spec(positions: int, lines: int, block: int, down: bool, rows: int) -> pl.BlockSpec:
    last = pl.cdiv(positions, block) - 1
    index = (lambda b, j: (last - j, 0, b)) if down else (lambda b, j: (j, 0, b))
    return pl.BlockSpec((block, rows, min(LANES, lines)), index)


def _compiler_params() -> Any:
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary"))


def _round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple
