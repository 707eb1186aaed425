"""The sweep as a Mosaic GPU kernel for Hopper: one warpgroup walks a block of lines, the label vectors in registers.

A block of 128 / k lines is held by 128 threads, k to a line, each with L / k labels. The positions of a line follow one
another in a loop that carries a; what it reads comes through a ring of shared-memory slots that the TMA unit fills
several positions ahead, what it writes leaves through two staging slots, again by TMA. With k = 1 labels are shifted
inside a thread's registers and reductions need no other thread; with k > 1 a shift goes through shared memory.

Lines are padded to whole blocks (a copy: callers who care pass a multiple). What this kernel does not do `can_use` says
in words. It has not run on a GPU yet.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlib_methods._compat import MOSAIC_GPU_MISSING, mosaic_gpu_store
from jaxlib_methods.kernels._dispatch import require
from jaxlib_methods.kernels._hopper import device_reason
from jaxlib_methods.kernels.scanline import _pallas_minplus as mp
from jaxlib_methods.kernels.scanline.api import index_dtype
from jaxlib_methods.kernels.scanline.pairwise import Pairwise
from jaxlib_methods.kernels.scanline.pallas_gpu_config import STAGES, Config, choose, shift_rows
from jaxlib_methods.kernels.scanline.reference import dense_base
from jaxlib_methods.kernels.scanline.request import Backward, Sweep


def can_use(shape: tuple[int, ...], dtype: Any, pairwise: Pairwise, *, step: tuple[int, int] = (1, 0)) -> str | None:
    """Why these arguments are not for this kernel, or None if they are. A pure function of static facts.

    Args:
      shape: (positions, L, lines) of the unary costs.
      dtype: theirs.
      pairwise: decides the shared memory that shifts take; only its structure matters.
      step: of the sweep.

    Returns:
      The reason, or None.

    Example:
      >>> can_use((384, 16, 288), jnp.float64, Pairwise("potts", 20.0)) is None
      False
    """
    if MOSAIC_GPU_MISSING is not None:
        return MOSAIC_GPU_MISSING
    if jnp.dtype(dtype) != jnp.float32:
        return f"the GPU kernel holds messages in float32, got {jnp.dtype(dtype).name}"
    if step != (1, 0):
        return f"the GPU kernel walks along the lines, step (1, 0), got {step}"
    if shape[1] > 256:
        return f"the GPU kernel stores uint8 indices, at most 256 labels, got {shape[1]}"
    config = choose(shape[1], pairwise)
    return config if isinstance(config, str) else None


def sweep(
    request: Sweep, *, config: Config | None = None, interpret: Any = None
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """See `jaxlib_methods.kernels.scanline.sweep`.

    Lines never meet at step (1, 0), and XLA places the result: `num_images` and `out` do not matter here.

    Args:
      request: the sweep.
      config: overrides the chosen layout.
      interpret: runs the kernel body on the CPU, for tests.

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    u, opposite, pairwise, edge_weight = request.u, request.opposite, request.pairwise, request.edge_weight
    with_indices, rho = request.with_indices, request.edge_probability
    require(can_use(u.shape, u.dtype, pairwise, step=request.step) or device_reason())
    _, num_labels, lines = u.shape
    config = config or _choose(num_labels, pairwise, lines)
    padded = _pad_lines(lines, config)
    scale = jnp.asarray(pairwise.weight).astype(u.dtype)
    scale = jnp.broadcast_to(scale, (1, lines)) if edge_weight is None else scale * edge_weight
    streams = {"u": u, "scale": scale} if opposite is None else {"u": u, "opposite": opposite, "scale": scale}
    if edge_weight is None:
        streams.pop("scale")
    streams = {name: padded(x) for name, x in streams.items()}
    constants = {} if edge_weight is not None else {"scale": padded(scale)}
    if mp.form(pairwise, num_labels) == "table":
        constants["table"] = dense_base(pairwise, num_labels, u.dtype)
    elif pairwise.kind == "toeplitz":
        profile = jnp.asarray(pairwise.profile).astype(u.dtype)
        constants["profile"] = jnp.broadcast_to(profile[:, None], (profile.shape[0], config.lines))
    outputs = {"m": u.dtype}
    if with_indices:
        outputs |= {"p": index_dtype(num_labels), "q": index_dtype(num_labels)}
    product = functools.partial(_product, pairwise=mp.structure(pairwise), with_indices=with_indices)

    def visit(n: jax.Array, a: jax.Array, read: Any, kept: dict[str, Any], tools: Any) -> tuple[jax.Array, dict]:
        m, p, q = product(a, kept, read("scale") if "scale" in streams else kept["scale"], tools)
        if not pairwise.semimetric:  # a semimetric V turns the zero carry into a zero message by itself
            m = m * (n > 0).astype(m.dtype)
        results = {"m": m} | ({"p": p, "q": q} if with_indices else {})
        if opposite is None:
            return jnp.float32(rho) * (read("u") + m), results
        opposite_i = read("opposite")
        return jnp.float32(rho) * (read("u") + opposite_i + m) - opposite_i, results

    found = _walk(
        visit,
        streams,
        constants,
        outputs,
        shape=u.shape,
        config=config,
        reverse=request.reverse,
        shift_rows=shift_rows(num_labels, config, pairwise, backward=False),
        name="scanline_sweep",
        interpret=interpret,
    )
    m, *indices = (x[..., :lines] for x in found)
    return (m, indices[0], indices[1]) if with_indices else m


def _product(
    a: jax.Array, kept: dict[str, Any], scale: jax.Array, tools: Any, *, pairwise: Pairwise, with_indices: bool
) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
    return mp.minplus(
        a,
        tools.label,
        scale,
        profile=kept["profile"].__getitem__ if "profile" in kept else None,
        table=lambda a: _table(a, kept["table"], scale, tools, with_indices),
        pairwise=pairwise,
        lanes=tools.lanes,
        with_indices=with_indices,
    )


def sweep_backward(
    request: Backward, *, config: Config | None = None, interpret: Any = None
) -> tuple[jax.Array, jax.Array | None, Pairwise]:
    """See `jaxlib_methods.kernels.scanline.sweep_backward`.

    Args:
      request: the way back of a sweep.
      config: overrides the chosen layout.
      interpret: runs the kernel body on the CPU, for tests.

    Source: Xu, Ajanthan, Hartley (ACCV 2020), arXiv:1910.10892 [xu2020fast].
    """
    dm, opposite_ds, p, q, pairwise = request.dm, request.opposite, request.p, request.q, request.pairwise
    rho = request.edge_probability
    require(can_use(dm.shape, dm.dtype, pairwise, step=request.step) or device_reason())
    _, num_labels, lines = dm.shape
    config = config or _choose(num_labels, pairwise, lines)
    padded = _pad_lines(lines, config)
    streams = {"dm": dm, "p": p, "q": q} | ({} if opposite_ds is None else {"opposite": opposite_ds})
    streams = {name: padded(x) for name, x in streams.items()}
    radius = mp.route_radius(pairwise, num_labels)

    def visit(n: jax.Array, ds: jax.Array, read: Any, kept: dict[str, Any], tools: Any) -> tuple[jax.Array, dict]:
        v = read("dm") + jnp.float32(rho) * ds
        if opposite_ds is not None:
            v += jnp.float32(rho - 1.0) * read("opposite")
        p_i, q_i = read("p").astype(jnp.int32), read("q").astype(jnp.int32)
        total = tools.lanes.spread(tools.lanes.total(v))
        v = v - jnp.where(tools.label == tools.lanes.spread(q_i), total, jnp.zeros_like(v))
        if radius is None:
            return _gather_senders(v, p_i, tools), {"ds": ds}
        return mp.route(v, p_i, q_i, tools.label, radius, pairwise.semimetric, tools.lanes), {"ds": ds}

    (ds,) = _walk(
        visit,
        streams,
        {},
        {"ds": dm.dtype},
        shape=dm.shape,
        config=config,
        reverse=not request.reverse,
        shift_rows=shift_rows(num_labels, config, pairwise, backward=True),
        name="scanline_sweep_backward",
        interpret=interpret,
    )
    ds = ds[..., :lines]
    return ds, *mp.pairwise_gradients(request, ds)


@dataclasses.dataclass(frozen=True)
class _Tools:
    """What a position's program needs besides its data: label numbers, reductions and shifts, a scratch block."""

    label: Any
    lanes: mp.Lanes
    scratch: Any
    layout: Any


def _walk(
    visit: Any,
    streams: dict[str, jax.Array],
    constants: dict[str, jax.Array],
    outputs: dict[str, Any],
    *,
    shape: tuple[int, int, int],
    config: Config,
    reverse: bool,
    shift_rows: tuple[int, ...],
    name: str,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Carries a [L, lines] along the positions: streams come in by TMA, outputs leave by TMA, constants are read once.

    `visit(n, carry, read, kept, tools)` returns the next carry and a dict of outputs; `read(name)` is the current block
    of a stream. A stream or output is [positions, L, lines] or a row [positions, lines].
    """
    positions, num_labels, _ = shape
    padded = next(iter(streams.values())).shape[-1]
    block, slots = config.lines, min(config.slots, positions)
    layout = config.layout
    row = layout.reduce(0)
    is_row = {"scale", "q"}
    order = list(streams)

    def extent(stream: str) -> tuple[int, ...]:
        return (block,) if stream in is_row else (num_labels, block)

    def body(*operands: Any) -> None:
        refs = list(operands)
        take = lambda names: {x: refs.pop(0) for x in names}
        sources, kept_refs, sinks, rings, stages = (
            take(order),
            take(constants),
            take(outputs),
            take(order),
            take(outputs),
        )
        barrier, *scratch = refs
        columns = pl.ds(jax.lax.axis_index("block") * block, block)
        at = lambda n: positions - 1 - n if reverse else n

        def where(ref: Any, stream: str, n: jax.Array | int) -> Any:
            return ref.at[at(n), columns] if stream in is_row else ref.at[at(n), :, columns]

        def fetch(n: jax.Array | int, slot: jax.Array | int) -> None:
            for x in order:
                plgpu.copy_gmem_to_smem(where(sources[x], x, n), rings[x].at[slot], barrier.at[slot])

        for n in range(slots):
            fetch(n, n)
        label = plgpu.layout_cast(jax.lax.broadcasted_iota(jnp.int32, (num_labels, block), 0), layout)
        tools = _Tools(label, _lanes(label, config, scratch), scratch[0] if scratch else None, layout)
        kept = {}
        if "scale" in constants:
            kept["scale"] = plgpu.load(kept_refs["scale"].at[0, columns], layout=row, optimized=False)
        if "profile" in constants:
            rows = constants["profile"].shape[0]
            kept["profile"] = [plgpu.load(kept_refs["profile"].at[d], layout=row, optimized=False) for d in range(rows)]
        if "table" in constants:
            kept["table"] = kept_refs["table"]

        def step(n: jax.Array, carry: jax.Array) -> jax.Array:
            slot, stage = jax.lax.rem(n, slots), jax.lax.rem(n, STAGES)
            plgpu.barrier_wait(barrier.at[slot])

            def read(stream: str) -> jax.Array:
                return plgpu.load(rings[stream].at[slot], layout=row if stream in is_row else layout, optimized=False)

            carry, results = visit(n, carry, read, kept, tools)
            plgpu.wait_smem_to_gmem(STAGES - 1, wait_read_only=True)  # the stage written STAGES positions ago is free
            for x, value in results.items():
                mosaic_gpu_store(stages[x].at[stage], value.astype(outputs[x]))
            plgpu.commit_smem()
            for k, x in enumerate(results):
                plgpu.copy_smem_to_gmem(stages[x].at[stage], where(sinks[x], x, n), commit_group=k == len(results) - 1)

            @pl.when(n + slots < positions)
            def _() -> None:
                fetch(n + slots, slot)

            return carry

        start = plgpu.layout_cast(jnp.zeros((num_labels, block), jnp.float32), layout)
        jax.lax.fori_loop(0, positions, step, start)
        plgpu.wait_smem_to_gmem(0)

    body.__name__ = name
    full = lambda x: (positions, padded) if x in is_row else (positions, num_labels, padded)
    scratch = [plgpu.SMEM((slots, *extent(x)), streams[x].dtype) for x in order]
    scratch += [plgpu.SMEM((STAGES, *extent(x)), dtype) for x, dtype in outputs.items()]
    scratch.append(plgpu.Barrier(num_arrivals=len(order), num_barriers=slots))
    scratch += [
        plgpu.SMEM((rows, block), dtype) for rows, dtype in zip(shift_rows, (jnp.float32, jnp.int32), strict=False)
    ]
    return plgpu.kernel(
        body,
        out_type=tuple(jax.ShapeDtypeStruct(full(x), dtype) for x, dtype in outputs.items()),
        scratch_types=tuple(scratch),
        grid=(padded // block,),
        grid_names=("block",),
        compiler_params=plgpu.CompilerParams(),
        interpret=interpret,
    )(*streams.values(), *constants.values())


def _table(a: jax.Array, table: Any, scale: jax.Array, tools: _Tools, with_indices: bool) -> tuple[Any, Any]:
    """Loop over the sending label, ascending with <: the lowest index wins. a is read back label by label."""
    layout, spread = tools.layout, tools.lanes.spread
    mosaic_gpu_store(tools.scratch, a)
    shape = a.shape

    def visit(mu: jax.Array, found: tuple) -> tuple:
        sent = plgpu.load(tools.scratch.at[mu], layout=layout.reduce(0), optimized=False)
        cost = plgpu.load(table.at[mu], layout=layout.reduce(1), optimized=False)
        candidate = spread(sent) + spread(scale) * jax.lax.broadcast_in_dim(cost, shape, (0,))
        t = jnp.minimum(found[0], candidate)
        if not with_indices:
            return (t,)
        return t, jnp.where(candidate < found[0], plgpu.layout_cast(jnp.full(shape, mu), layout), found[1])

    start = (plgpu.layout_cast(jnp.full(shape, jnp.inf, a.dtype), layout),)
    if with_indices:
        start = (*start, plgpu.layout_cast(jnp.zeros(shape, jnp.int32), layout))
    found = jax.lax.fori_loop(0, shape[0], visit, start)
    return found if with_indices else (found[0], None)


def _gather_senders(v: jax.Array, p: jax.Array, tools: _Tools) -> jax.Array:
    """sum over lam with P(lam) = mu of v(lam), one sender at a time, through shared memory."""

    def send(mu: jax.Array, _: None) -> None:
        sender = plgpu.layout_cast(jnp.full(p.shape, mu), tools.layout)
        mosaic_gpu_store(tools.scratch.at[mu], tools.lanes.total(jnp.where(p == sender, v, jnp.zeros_like(v))))

    jax.lax.fori_loop(0, v.shape[0], send, None)
    return plgpu.load(tools.scratch, layout=tools.layout, optimized=False)


def _lanes(label: jax.Array, config: Config, scratch: list[Any]) -> mp.Lanes:
    shape, layout = label.shape, config.layout

    def in_registers(x: jax.Array) -> Any:
        def shifted(offset: int, fill: Any) -> jax.Array:
            pad = plgpu.layout_cast(jnp.full((abs(offset), shape[1]), fill, x.dtype), layout)
            return jnp.concatenate([pad, x[:-offset]] if offset > 0 else [x[-offset:], pad], axis=0)

        return shifted

    def in_shared_memory(x: jax.Array) -> Any:
        buffer = scratch[0 if x.dtype == jnp.float32 else 1]
        pad = (buffer.shape[0] - shape[0]) // 2
        mosaic_gpu_store(buffer.at[pl.ds(pad, shape[0])], x)

        def shifted(offset: int, fill: Any) -> jax.Array:
            # The rows beyond the labels hold rubbish; masking them also spares the layout inference a search.
            y = plgpu.load(buffer.at[pl.ds(pad - offset, shape[0])], layout=layout, optimized=False)
            inside = label >= offset if offset > 0 else label < shape[0] + offset
            return jnp.where(inside, y, jnp.full_like(y, fill))

        return shifted

    return mp.Lanes(
        spread=lambda row: jax.lax.broadcast_in_dim(row, shape, (1,)),
        least=lambda x: jnp.min(x, axis=0),
        total=lambda x: jnp.sum(x, axis=0),
        shifts=in_registers if config.lanes == 1 else in_shared_memory,
    )


def _choose(num_labels: int, pairwise: Pairwise, lines: int) -> Config:
    found = choose(num_labels, pairwise, lines)
    if isinstance(found, str):
        raise NotImplementedError(found)
    return found


def _pad_lines(lines: int, config: Config) -> Any:
    missing = -lines % config.lines
    return lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)]) if missing else x
