"""What simulated delays cost: one optimizer step with stale weights or late gradients against the bare optimizer.

The parameters are split evenly into 8 stages with the delays 7, ..., 0, and a step is NAdam's on the gradient of a
quadratic, all buffers donated. `bytes` is the least that the bare optimizer must move, 7 passes over the N parameters:
g, m, v and w are read, m, v and w written. A history adds one read and one write of the delayed 7/8 of them, so that
8.75 / 7 = 1.25 is the least that the delays can cost where memory is the limit. The gradient's own passes come on top.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.timing import Case, Implementation, Options, Record, measure
from jaxlib_methods import optimizers

HEADLINES = (
    ("nadam N=1e7", "stale weights", ("bare",)),
    ("nadam N=1e7", "late gradients", ("bare",)),
)
P = 8
SIZES = {"1e6": 10**6, "1e7": 10**7}  # parameters of all stages
PASSES = 7  # over the parameters, of a bare NAdam step


def run(options: Options) -> Iterator[Record]:
    """Yields one case per number of parameters, with --quick the smaller one."""
    for name, size in SIZES.items():
        if not options.selects(f"nadam N={name}") or (options.quick and size > 10**6):
            continue
        implementations = {kind: _step(kind, size) for kind in ("bare", "stale weights", "late gradients")}
        yield from measure(
            Case(
                benchmark="delays",
                name=f"nadam N={name}",
                implementations=implementations,
                bytes=PASSES * 4 * size,
                seconds=20.0,
            ),
            options,
        )


def make_step(kind: str, size: int) -> tuple[Callable[..., Any], Any, Any]:
    """A jitted step `(params, state) -> (params, state)` that donates both, and what it starts from."""
    tau = [(f"stage{j}", delay) for j, delay in enumerate(optimizers.delays.pipeline_delays(P))]
    links = {
        "stale weights": [optimizers.delays.keep_param_history(tau)],
        "late gradients": [optimizers.delays.delay_gradients(tau)],
    }
    optimizer = optax.chain(*links.get(kind, []), optimizers.nadam(1e-3))
    params = {f"stage{j}": jnp.linspace(-1.0, 1.0, size // P) for j in range(P)}

    def step(params: Any, state: Any) -> tuple[Any, Any]:
        at = optimizers.delays.stale_params(state, params) if kind == "stale weights" else params
        updates, state = optimizer.update(gradient(at), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)), params, optimizer.init(params)


def gradient(params: Any) -> Any:
    """Of a quadratic that couples neighbours by a matrix product, which XLA does not fuse into the optimizer."""
    mix = jnp.eye(8) + 0.1 * jnp.eye(8, k=1)
    return jax.tree.map(lambda p: (p.reshape(-1, 8) @ mix).reshape(-1), params)


def _step(kind: str, size: int) -> Implementation:
    step, params, state = make_step(kind, size)
    return Implementation(step, (params, state))
