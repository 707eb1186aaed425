"""TRWP-4 on a grid as others would have it: the scan one writes in JAX, its PyTorch form, PGMax's max-product."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def naive(unaries: jax.Array, table: jax.Array, *, iterations: int) -> jax.Array:
    """TRWP-4 as one writes it down: a scan along the lines, an L x L minimum, a running belief."""

    def sweep(b: jax.Array, own: jax.Array, opposite: jax.Array, reverse: bool) -> jax.Array:
        s = 0.5 * (b - own) - opposite  # positions first

        def step(m: jax.Array, s_i: jax.Array) -> tuple[jax.Array, jax.Array]:
            t = ((s_i + 0.5 * m)[:, :, None] + table[None]).min(1)
            m = t - t.min(-1, keepdims=True)
            return m, m

        zero = jnp.zeros_like(s[0])
        if reverse:
            _, m = jax.lax.scan(step, zero, s[1:], reverse=True)
            return jnp.concatenate([m, zero[None]])
        _, m = jax.lax.scan(step, zero, s[:-1])
        return jnp.concatenate([zero[None], m])

    def iteration(carry: tuple, _: None) -> tuple[tuple, None]:
        b, messages = carry
        messages = list(messages)
        for d in range(4):
            turn = (lambda x: x.swapaxes(0, 1)) if d < 2 else (lambda x: x)
            m = turn(sweep(turn(b), turn(messages[d]), turn(messages[d ^ 1]), d % 2 == 1))
            b, messages[d] = b + m - messages[d], m
        return (b, tuple(messages)), None

    start = (unaries, (jnp.zeros_like(unaries),) * 4)
    return jax.lax.scan(iteration, start, None, length=iterations)[0][0]


def in_torch(unaries: np.ndarray, table: np.ndarray, *, iterations: int) -> Callable[[], np.ndarray]:
    """The same in PyTorch: a Python loop along the lines, all lines at once."""
    import torch

    theta, v = torch.from_numpy(np.array(unaries)), torch.from_numpy(np.array(table))

    def sweep(b: Any, own: Any, opposite: Any, reverse: bool) -> Any:
        s = 0.5 * (b - own) - opposite
        m = torch.zeros_like(s)
        order = range(len(s) - 1, 0, -1) if reverse else range(len(s) - 1)
        for i in order:
            t = ((s[i] + 0.5 * m[i])[:, :, None] + v[None]).amin(1)
            m[i - 1 if reverse else i + 1] = t - t.amin(-1, keepdim=True)
        return m

    def solve() -> Any:
        with torch.no_grad():
            b, messages = theta.clone(), [torch.zeros_like(theta) for _ in range(4)]
            for _ in range(iterations):
                for d in range(4):
                    turn = (lambda x: x.transpose(0, 1)) if d < 2 else (lambda x: x)
                    m = turn(sweep(turn(b), turn(messages[d]), turn(messages[d ^ 1]), d % 2 == 1))
                    b, messages[d] = b + m - messages[d], m
        return b.numpy()

    return solve


def pgmax_max_product(
    unaries: np.ndarray, table: np.ndarray, *, iterations: int, tell: Callable[[str], None]
) -> Callable[[], jax.Array]:
    """Max-product BP of PGMax on the same grid; building the graph is timed apart and told."""
    import time
    import types

    from jax.extend import backend
    from pgmax import fgraph, fgroup, infer, vgroup

    # PGMax 0.6.1 asks for the platform by a name that JAX has removed.
    if not hasattr(jax.lib, "xla_bridge"):
        jax.lib.xla_bridge = types.SimpleNamespace(get_backend=backend.get_backend)

    height, width, labels = unaries.shape
    start = time.perf_counter()
    variables = vgroup.NDVarArray(num_states=labels, shape=(height, width))
    graph = fgraph.FactorGraph(variable_groups=[variables])
    pairs = [[variables[i, j], variables[i, j + 1]] for i in range(height) for j in range(width - 1)]
    pairs += [[variables[i, j], variables[i + 1, j]] for i in range(height - 1) for j in range(width)]
    graph.add_factors(fgroup.PairwiseFactorGroup(variables_for_factors=pairs, log_potential_matrix=-table))
    bp = infer.build_inferer(graph.bp_state, backend="bp")
    arrays = bp.init(evidence_updates={variables: -unaries})
    built = time.perf_counter() - start
    solve = lambda: bp.get_beliefs(bp.run(arrays, num_iters=iterations, damping=0.0, temperature=0.0))[variables]
    start = time.perf_counter()
    jax.block_until_ready(solve())
    tell(f"pgmax {unaries.shape}: graph built in {built:.1f} s, first run {time.perf_counter() - start:.1f} s")
    return solve
