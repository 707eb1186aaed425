"""The backward pass against finite differences and JAX's own differentiation, in float64; its memory to the byte."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import message_passing as mp
from jaxlib_methods.message_passing import _sweeps
from jaxlib_methods.message_passing._problem import Problem, Schedule

SHAPE, L = (2, 4, 5), 4
ITERATIONS = 3


def pairwise(kind, key):
    if kind == "table":
        return mp.potentials.table(jax.random.uniform(key, (L, L), jnp.float64, 0.1, 3.0))
    if kind == "profile":
        return mp.potentials.toeplitz(jnp.array([0.3, 0.1, 1.7]), 1.3, semimetric=False)
    return {"potts": mp.potentials.potts(1.1), "linear2": mp.potentials.truncated_linear(0.7, truncation=2)}[kind]


def problem(key, directions, kind):
    """Continuous random costs, so that no two labels tie and the energy is differentiable where it is looked at."""
    keys = jax.random.split(key, 4)
    unaries = jax.random.uniform(keys[0], (*SHAPE, L), jnp.float64, 0.0, 4.0)
    weights = jax.random.uniform(keys[1], (directions, *SHAPE), jnp.float64, 0.2, 2.0)
    return mp.GridMRF(unaries, pairwise(kind, keys[2]), weights), jax.random.normal(keys[3], unaries.shape, jnp.float64)


@pytest.mark.parametrize(
    ("directions", "method", "kind"),
    [
        (4, "trwp", "table"),
        (4, "trwp", "profile"),
        (4, "trwp", "potts"),
        (4, "isgmr", "linear2"),
        (8, "trwp", "linear2"),
        (8, "isgmr", "profile"),
        (16, "trwp", "table"),
        (16, "isgmr", "linear2"),
    ],
)
def test_gradients_equal_finite_differences(key, x64, directions, method, kind):
    mrf, g = problem(key, directions, kind)
    solver = mp.trwp if method == "trwp" else mp.isgmr
    loss = jax.jit(
        jax.value_and_grad(
            lambda m: (solver(m, num_iterations=ITERATIONS, num_directions=directions).beliefs * g).sum()
        )
    )
    gradient = loss(mrf)[1]
    step = 1e-6
    for n, (name, part) in enumerate(
        [("unaries", gradient.unaries), ("edge_weights", gradient.edge_weights), ("pairwise", gradient.pairwise)]
    ):
        leaves, treedef = jax.tree.flatten(part)
        keys = jax.random.split(jax.random.fold_in(key, n), len(leaves))
        direction = jax.tree.unflatten(
            treedef, [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        )
        at = lambda s: loss(
            mrf._replace(**{name: jax.tree.map(lambda x, v: x + s * v, getattr(mrf, name), direction)})
        )[0]
        expected = (at(step) - at(-step)) / (2 * step)
        found = sum((a * b).sum() for a, b in zip(leaves, jax.tree.leaves(direction), strict=True))
        np.testing.assert_allclose(found, expected, rtol=1e-6, err_msg=name)
    # Messages ignore constants per pixel, so the labels of a pixel share what the loss asks of it.
    np.testing.assert_allclose(gradient.unaries.sum(-1), g.sum(-1), atol=1e-12)


@pytest.mark.contract
def test_every_entry_equals_jax_differentiating_the_recursion(key, x64):
    mrf, g = problem(key, 4, "table")
    schedule = Schedule(4, 0.5, False)

    def plain(mrf):
        p = Problem(*mrf, None, schedule).lines()
        messages, _ = _sweeps.run(schedule, p, p.zeros(4), 2)
        return (_sweeps.beliefs(p, messages) * g).sum()

    ours = jax.jit(jax.grad(lambda m: (mp.trwp(m, num_iterations=2).beliefs * g).sum()))(mrf)
    theirs = jax.jit(jax.grad(plain))(mrf)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), ours, theirs)


def test_recomputing_from_checkpoints_gives_the_same_gradient(key, x64):
    mrf, g = problem(key, 4, "linear2")
    gradient = lambda every: jax.jit(
        jax.grad(lambda m: (mp.trwp(m, num_iterations=6, checkpoint_every=every).beliefs * g).sum())
    )(mrf)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), gradient(None), gradient(2))


def test_images_one_after_the_other_give_the_same_as_together(key, x64, monkeypatch):
    mrf, g = problem(key, 4, "table")
    start = mp.trwp(mrf, num_iterations=1).messages

    def solve(limit):
        monkeypatch.setattr(_sweeps, "CPU_CHUNK_BYTES", limit)
        jax.clear_caches()
        solution = lambda m: mp.trwp(m, num_iterations=2, messages=start)
        gradient = jax.grad(lambda m: (solution(m).beliefs * g).sum())(mrf)
        return solution(mrf), gradient

    together, apart = solve(2**20), solve(1)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), together, apart)


@pytest.mark.parametrize("variant", ["messages", "path_costs"])
def test_sgm_gradients_equal_finite_differences(key, x64, variant):
    mrf, g = problem(key, 4, "linear2")
    loss = jax.jit(jax.value_and_grad(lambda m: (mp.sgm(m, variant=variant).beliefs * g).sum()))
    gradient = loss(mrf)[1]
    v = jax.random.normal(key, mrf.unaries.shape, jnp.float64)
    at = lambda s: loss(mrf._replace(unaries=mrf.unaries + s * v))[0]
    np.testing.assert_allclose((gradient.unaries * v).sum(), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("directions", [4])
def test_residuals_are_one_byte_per_pixel_label_direction_and_iteration(directions):
    mrf = mp.GridMRF(jnp.zeros((*SHAPE, L)), mp.potentials.potts(1.0))
    schedule = Schedule(directions, 0.5, False, num_iterations=ITERATIONS)
    forward = lambda u: _sweeps._solve_forward(None, Problem(u, mrf.pairwise, None, None, schedule))
    _, (_, indices) = jax.eval_shape(forward, mrf.unaries)
    p_bytes = sum(p.size * p.dtype.itemsize for p, _ in indices)
    q_bytes = sum(q.size * q.dtype.itemsize for _, q in indices)
    pixels = SHAPE[0] * SHAPE[1] * SHAPE[2]
    assert p_bytes == ITERATIONS * directions * pixels * L
    assert q_bytes == ITERATIONS * directions * pixels
    # Nothing else the size of an image is kept: all that leaves the forward pass is these and V.
    _, vjp = jax.vjp(
        lambda u: mp.trwp(mrf._replace(unaries=u), num_iterations=ITERATIONS, num_directions=directions).beliefs,
        mrf.unaries,
    )
    kept = sum(x.nbytes for x in jax.tree.leaves(vjp) if hasattr(x, "nbytes") and x.size > 1)
    assert kept == p_bytes + q_bytes


def test_soft_variant_tends_to_the_hard_one_and_has_its_gradient(key, x64):
    mrf, g = problem(key, 4, "table")
    loss = jax.jit(
        jax.value_and_grad(lambda m, t: (mp.trwp(m, num_iterations=2, temperature=t).beliefs * g).sum()),
    )
    hard = (mp.trwp(mrf, num_iterations=2).beliefs * g).sum()
    np.testing.assert_allclose(loss(mrf, 1e-4)[0], hard, rtol=1e-5)
    warm, gradient = loss(mrf, 1.0)
    assert abs(warm - hard) > 0.1
    v = jax.random.normal(key, mrf.unaries.shape, jnp.float64)
    at = lambda s: loss(mrf._replace(unaries=mrf.unaries + s * v), 1.0)[0]
    np.testing.assert_allclose((gradient.unaries * v).sum(), (at(1e-6) - at(-1e-6)) / 2e-6, rtol=1e-5)


def test_gradients_keep_float32_and_the_structure_of_the_problem(key):
    mrf = mp.GridMRF(jnp.zeros((3, 4, 2)), mp.potentials.truncated_linear(1.0, truncation=1), jnp.ones((8, 3, 4)))
    gradient = jax.grad(lambda m: mp.trwp(m, num_iterations=2).beliefs[..., 0].sum())(mrf)
    assert jax.tree.structure(gradient) == jax.tree.structure(mrf)
    assert all(a.dtype == b.dtype == jnp.float32 for a, b in zip(*map(jax.tree.leaves, (gradient, mrf)), strict=True))
    assert (gradient.edge_weights[4:] == 0).all()
    assert dataclasses.replace(gradient.pairwise, weight=mrf.pairwise.weight) == mrf.pairwise
