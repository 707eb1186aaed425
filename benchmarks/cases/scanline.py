"""The scanline sweep's kernels against its XLA program: a pair of sweeps, its backward, and a TRWP-4 iteration.

Cases are the workloads of `jaxlib_methods.kernels.scanline.arg_specs`, batch 1 and 8 (on a CPU batch 1 only). The
fraction of the copy ceiling is for the traffic that the schedule cannot avoid: 24 bytes per unary cost for a pair of
sweeps, 80 for an iteration in pair form (48, with a line kept on chip, would be 0.6 of the fraction shown). On a GPU
the kernel is also timed for every number of lanes per line that fits. On other platforms than its own a kernel is
skipped with a note: the interpreter's time says nothing.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.timing import Case, Implementation, Options, Record, Skip, measure
from jaxlib_methods.kernels import ArgSpec, scanline
from jaxlib_methods.kernels.scanline import arg_specs, pallas_gpu, pallas_gpu_config as layouts, pallas_tpu
from jaxlib_methods.kernels.scanline.arg_specs import sweep_shape
from jaxlib_methods.kernels.scanline.cost import ITERATION_BYTES, backward_cost_estimate
from jaxlib_methods.kernels.scanline.request import Sweep

RHO = 0.5  # of TRWP on a four-connected grid
BATCHES = (1, 8)
KERNELS = {"gpu": "pallas_gpu", "tpu": "pallas_tpu"}


def run(options: Options) -> Iterator[Record]:
    """Yields the cases `NAME batch=B pair | backward | iteration`; with --quick only the smallest workload's."""
    platform = jax.devices()[0].platform
    modes = {"pair": _pair, "backward": _backward, "iteration": _iteration}
    for spec in arg_specs.ARG_SPECS[:1] if options.quick else arg_specs.ARG_SPECS:
        for batch in BATCHES if platform in KERNELS else BATCHES[:1]:
            for mode, make in modes.items():
                name = f"{spec.name} batch={batch} {mode}"
                if options.selects(name):
                    yield from measure(make(spec, batch, name, platform), options)


def _pair(spec: ArgSpec, batch: int, name: str, platform: str) -> Case:
    """Both directions along the rows: the messages of a direction are the other's opposite."""
    shape = sweep_shape(spec, batch=batch)
    u, m, q = _costs(shape, 3)

    def rows(sweep: Callable[..., Any]) -> Implementation:
        def pair(u: jax.Array, m: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
            m = sweep(u, q, spec.args["pairwise"], edge_probability=RHO, out=m)
            return m, sweep(u, m, spec.args["pairwise"], edge_probability=RHO, reverse=True, out=q)

        return Implementation(jax.jit(pair, donate_argnums=(1, 2)), (u, m, q))

    implementations = _implementations(shape, spec, platform, scanline.sweep, rows)
    if isinstance(implementations.get("pallas_gpu"), Implementation):
        for config in _other_layouts(spec, shape[2]):
            implementations[f"pallas_gpu, {config.lanes} lanes"] = rows(_with_layout(config))
    return Case("scanline", name, implementations, reference="xla", bytes=24 * spec.args["u"].size * batch)


def _backward(spec: ArgSpec, batch: int, name: str, platform: str) -> Case:
    """dS of both directions of a pair, from the argmins of the forward pass; no gradient in V is asked for."""
    shape = sweep_shape(spec, batch=batch)
    u, opposite = _costs(shape, 2)
    forward = jax.jit(functools.partial(scanline.sweep, edge_probability=RHO, with_indices=True))
    _, p, q = forward(u, opposite, spec.args["pairwise"])

    def rows(backward: Callable[..., Any]) -> Implementation:
        def pair(dm: jax.Array, p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
            route = lambda ds, reverse: backward(
                dm, ds, p, q, spec.args["pairwise"], edge_probability=RHO, reverse=reverse
            )[0]
            ds = route(None, False)
            return ds, route(ds, True)

        return Implementation(jax.jit(pair), (u, p, q))

    implementations = _implementations(shape, spec, platform, scanline.sweep_backward, rows)
    needed = [
        backward_cost_estimate(shape, spec.args["pairwise"], with_opposite=o).bytes_accessed for o in (False, True)
    ]
    return Case("scanline", name, implementations, reference="xla", bytes=sum(needed))


def _iteration(spec: ArgSpec, batch: int, name: str, platform: str) -> Case:
    """Four sweeps, and the unary costs of each pair rebuilt from the other pair's messages by a transpose."""
    shapes = sweep_shape(spec, batch=batch), sweep_shape(spec, vertical=True, batch=batch)
    thetas = _costs(shapes[0], 1)[0], _costs(shapes[1], 1)[0]
    messages = tuple(jnp.zeros(shapes[d // 2], jnp.float32) for d in range(4))

    def turn(x: jax.Array) -> jax.Array:
        """[positions, L, batch x lines] to [lines, L, batch x positions]."""
        positions, labels, _ = x.shape
        x = x.reshape(positions, labels, batch, -1).transpose(3, 1, 2, 0)
        return x.reshape(x.shape[0], labels, batch * positions)

    def rows(sweep: Callable[..., Any]) -> Implementation:
        def iteration(messages: tuple[jax.Array, ...], thetas: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            m = list(messages)
            for pair in range(2):
                u = thetas[pair] + turn(m[2 - 2 * pair] + m[3 - 2 * pair])
                for d in (2 * pair, 2 * pair + 1):
                    m[d] = sweep(u, m[d ^ 1], spec.args["pairwise"], edge_probability=RHO, reverse=d % 2 == 1, out=m[d])
            return tuple(m)

        return Implementation(jax.jit(iteration, donate_argnums=0), (messages, thetas))

    implementations = _implementations(shapes[0], spec, platform, scanline.sweep, rows)
    needed = ITERATION_BYTES["pair form"] * spec.args["u"].size * batch
    return Case("scanline", name, implementations, reference="xla", bytes=needed)


def _implementations(
    shape: tuple[int, int, int],
    spec: ArgSpec,
    platform: str,
    function: Callable[..., Any],
    rows: Callable[[Callable[..., Any]], Implementation],
) -> dict[str, Implementation | Skip]:
    """The kernels, each where it can run, before the program that runs everywhere."""
    reasons = {
        "pallas_gpu": pallas_gpu.can_use(shape, jnp.float32, spec.args["pairwise"]) or pallas_gpu.device_reason(),
        "pallas_tpu": pallas_tpu.can_use(shape, jnp.float32, spec.args["pairwise"]),
    }
    found: dict[str, Implementation | Skip] = {}
    for home, name in KERNELS.items():
        if platform != home:
            reasons[name] = f"it runs on a {home.upper()}, this is a {platform.upper()}"
        if reasons[name] is not None:
            found[name] = Skip(reasons[name])
        else:
            found[name] = rows(functools.partial(function, implementation=name))
    return found | {"xla": rows(functools.partial(function, implementation="xla"))}


def _with_layout(config: layouts.Config) -> Callable[..., Any]:
    """The GPU kernel's sweep in another layout than it would choose."""

    def sweep(u: jax.Array, opposite: jax.Array, pairwise: Any, **options: Any) -> jax.Array:
        return pallas_gpu.sweep(Sweep(u=u, opposite=opposite, pairwise=pairwise, **options), config=config)

    return sweep


def _other_layouts(spec: ArgSpec, lines: int) -> list[layouts.Config]:
    """Every number of lanes per line that fits, but the one that the kernel chooses itself."""
    chosen = layouts.choose(spec.args["u"].shape[1], spec.args["pairwise"], lines)
    fitting = []
    for lanes in layouts.LANES_PER_LINE:
        config = layouts.Config(lanes, layouts.MIN_SLOTS)
        fits = layouts.smem_bytes(spec.args["u"].shape[1], config, spec.args["pairwise"]) <= layouts.SMEM_BUDGET
        if fits and spec.args["u"].shape[1] % lanes == 0 and lanes != chosen.lanes:
            fitting.append(config)
    return fitting


def _costs(shape: tuple[int, int, int], count: int) -> list[jax.Array]:
    """Small integers, so that the order of additions makes no difference to the error."""
    draw = jax.jit(lambda key: jax.random.randint(key, shape, 0, 64).astype(jnp.float32))
    return [draw(key) for key in jax.random.split(jax.random.key(0), count)]
