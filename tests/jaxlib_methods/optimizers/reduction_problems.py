"""Problems with a reduction mapping, and their dense metrics, for the tests of the mappings and of GeoPrecGD."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

figure1 = lambda x1, x2: x1**2 + 2 * (x2 - x1) ** 2


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def run(tx, F, x1, steps):
    state, visited = tx.init(x1), [x1]

    @jax.jit
    def step(x1, state):
        updates, state = tx.update(jax.grad(F)(x1), state, x1)
        return optax.apply_updates(x1, updates), state

    for _ in range(steps):
        x1, state = step(x1, state)
        visited.append(x1)
    return visited


def smooth_problem(n1=5, n2=3):
    """A non-convex f and a nonlinear Psi, both of flat vectors."""
    A, B = normal(n2, n1, seed=1), normal(n1 + n2, n1 + n2, seed=2)
    f = lambda x1, x2: jnp.sum(jnp.cos(B @ jnp.concatenate([x1, x2]))) + 0.5 * jnp.sum(x1**2) * jnp.sum(x2)
    psi = lambda x1: jnp.sin(A @ x1) + x1[0] ** 2
    return f, psi, normal(n1, seed=3)


def dense_metric(psi, x1):
    flat, unravel = ravel_pytree(x1)
    J = jax.jit(jax.jacobian(lambda v: ravel_pytree(psi(unravel(v)))[0]))(flat)
    return np.eye(flat.size) + np.asarray(J).T @ np.asarray(J), np.asarray(J)
