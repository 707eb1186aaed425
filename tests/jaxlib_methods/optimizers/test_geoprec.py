"""GeoPrecGD and its metric: solves against the dense inverse, Figure 1, and how it relates to Newton's method."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

from jaxlib_methods import trees
from jaxlib_methods.optimizers import geoprec_gd, reduced_objective
from jaxlib_methods.optimizers.geoprec import PullbackMetricState, pullback_metric, scale_by_pullback_metric
from jaxlib_methods.optimizers.reduction import small_slope
from tests.jaxlib_methods.optimizers.reduction_problems import dense_metric, figure1, normal, run, smooth_problem

pytestmark = pytest.mark.usefixtures("x64")


def test_figure_1_gradient_descent_takes_128_steps_and_geoprec_gd_one():
    f = lambda x: figure1(x[0], x[1])
    eta = 1 / (5 + np.sqrt(17))
    x, steps = jnp.array([1.0, 0.0]), 0
    step = jax.jit(lambda x: x - eta * jax.grad(f)(x))
    while f(x) > 1e-12:
        x, steps = step(x), steps + 1
    assert steps == 128
    F = reduced_objective(figure1, lambda x1: x1)
    start, after = run(geoprec_gd(1.0, lambda x1: x1), F, jnp.array(1.0), 1)
    assert F(start) == 1 and F(after) <= 1e-12


# ---------------------------------------------------------------------------------------------------- solves with R


@pytest.mark.contract
@pytest.mark.parametrize("n2", [3, 12])
@pytest.mark.parametrize("solver", ["cg", "woodbury"])
def test_solvers_agree_with_the_dense_inverse(solver, n2):
    _, psi, x1 = smooth_problem(8, n2)
    g = normal(8, seed=9)
    rule = scale_by_pullback_metric(psi, solver=solver, tolerance=1e-12, max_iterations=50)
    z, _ = rule.update(g, rule.init(x1), x1)
    np.testing.assert_allclose(z, np.linalg.solve(dense_metric(psi, x1)[0], g), atol=1e-8)


def nested_problem():
    """x1 and x2 are different pytrees with leaves of rank 0 to 2."""
    x1 = {"layer": {"w": normal(3, 4), "b": normal(4, seed=1)}, "scale": (jnp.array(0.7),)}

    def psi(x1):
        h = jnp.tanh(x1["layer"]["w"]) @ x1["layer"]["b"]
        return {"mean": jnp.mean(h), "outer": x1["scale"][0] * h[:, None] * h[None, :2]}

    return psi, x1


@pytest.mark.parametrize("solver", ["cg", "woodbury", None])
def test_any_pytree_into_any_other(solver):
    psi, x1 = nested_problem()
    g = jax.tree.map(lambda p: jnp.cos(p) + 1, x1)
    rule = scale_by_pullback_metric(psi, solver=solver, tolerance=1e-12, max_iterations=50)
    z, state = jax.jit(rule.update)(g, rule.init(x1), x1)
    assert jax.tree.structure(z) == jax.tree.structure(x1) == jax.tree.structure(state.z)
    expected = np.linalg.solve(dense_metric(psi, x1)[0], ravel_pytree(g)[0])
    np.testing.assert_allclose(ravel_pytree(z)[0], expected, atol=1e-9)


def test_projection_has_a_closed_form_and_eigenvalues_one_and_two():
    Q, _ = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 2)))
    Pi = jnp.asarray(Q @ Q.T)
    psi, x1, v = lambda x: Pi @ x + 1.0, normal(6), normal(6, seed=1)  # affine
    np.testing.assert_allclose(np.linalg.eigvalsh(dense_metric(psi, x1)[0]), [1] * 4 + [2] * 2, atol=1e-12)
    rule = scale_by_pullback_metric(psi, solver="projection")
    z, _ = rule.update(v, rule.init(x1), x1)
    np.testing.assert_array_equal(z, v - Pi @ v / 2)
    np.testing.assert_allclose(pullback_metric(psi, x1)(z), v, atol=1e-12)
    # Two distinct eigenvalues: two iterations, also for a multiple of a projection.
    for mapping in (psi, small_slope(psi, 0.3)):
        cg = scale_by_pullback_metric(mapping, solver="cg", tolerance=1e-14, max_iterations=2)
        z, _ = cg.update(v, cg.init(x1), x1)
        np.testing.assert_allclose(pullback_metric(mapping, x1)(z), v, atol=1e-12)


def passes_of(solver, n1, n2, max_iterations=10):
    """How the chosen solve shows in the program: conjugate gradients loop, Woodbury factors an n2 x n2 matrix."""
    psi = lambda x: jnp.sin(jnp.ones((n2, n1), x.dtype) @ x)
    rule = scale_by_pullback_metric(psi, solver=solver, max_iterations=max_iterations)
    text = str(jax.make_jaxpr(rule.update)(jnp.ones(n1), rule.init(jnp.ones(n1)), jnp.ones(n1)))
    return "while" in text, "cholesky" in text


def test_the_solver_is_chosen_by_the_number_of_passes_through_psi():
    cg, woodbury = (True, False), (False, True)
    assert passes_of(None, 30, 20) == woodbury
    assert passes_of(None, 30, 21) == cg  # 21 rows against two passes in each of ten iterations
    assert passes_of(None, 30, 21, max_iterations=11) == woodbury
    assert passes_of(None, 20, 20) == cg
    assert passes_of("cg", 30, 2) == cg and passes_of("woodbury", 3, 20) == woodbury


def test_psi_is_linearised_once_a_step_and_warm_starts_save_iterations():
    calls = []
    A = normal(12, 8, seed=1) * 3

    def psi(x1):
        calls.append(None)
        return jnp.sin(A @ x1)

    rule = scale_by_pullback_metric(psi, solver="cg", tolerance=1e-12, max_iterations=50)
    x1, g = normal(8), normal(8, seed=1)
    state = rule.init(x1)
    calls.clear()
    z, state = rule.update(g, state, x1)
    assert len(calls) == 1
    # From the exact solution, times whatever factor, no iteration is needed; from zero, one is not enough.
    one = scale_by_pullback_metric(psi, solver="cg", tolerance=1e-9, max_iterations=1)
    warm, _ = one.update(-3.0 * g, PullbackMetricState(z), x1)
    np.testing.assert_allclose(warm, -3.0 * z, atol=1e-9)
    cold, _ = one.update(-3.0 * g, one.init(x1), x1)
    assert jnp.abs(cold + 3.0 * z).max() > 0.1


def test_every_truncated_solve_descends_whatever_it_starts_from():
    A = normal(12, 8, seed=1) * 30  # R has condition 1e4: one iteration is far from the solution
    psi, x1 = lambda x1: A @ x1, normal(8)
    rule = scale_by_pullback_metric(psi, solver="cg", max_iterations=1)
    update = jax.jit(rule.update)
    R = dense_metric(psi, x1)[0]
    for seed in range(20):
        g, previous = normal(8, seed=2 * seed), 1e3 * normal(8, seed=2 * seed + 1)
        z, cold = (np.asarray(update(g, PullbackMetricState(start), x1)[0]) for start in (previous, jnp.zeros(8)))
        g, exact = np.asarray(g), np.linalg.solve(R, g)
        error = lambda v: float((v - exact) @ R @ (v - exact))
        assert g @ z > 0 and error(z) <= (1 + 1e-9) * error(0 * exact) and error(cold) <= error(0 * exact)


def test_a_gradient_that_is_not_finite_spoils_one_step_only():
    _, psi, x1 = smooth_problem()
    rule = scale_by_pullback_metric(psi, solver="cg", tolerance=1e-12, max_iterations=50)
    bad, state = rule.update(jnp.ones(5).at[1].set(jnp.nan), rule.init(x1), x1)
    assert jnp.isnan(bad).any() and jnp.isfinite(state.z).all()
    bad, state = rule.update(jnp.ones(5), state, jnp.full(5, jnp.nan))  # no Psi there
    assert jnp.isnan(bad).any()
    good, _ = rule.update(jnp.ones(5), state, x1)
    np.testing.assert_allclose(good, np.linalg.solve(dense_metric(psi, x1)[0], np.ones(5)), atol=1e-9)


def test_half_precision_is_solved_in_float32():
    x1 = normal(4, 3).astype(jnp.bfloat16)
    rule = scale_by_pullback_metric(lambda x: 2 * x)
    z, state = rule.update(jnp.full((4, 3), 5, jnp.bfloat16), rule.init(x1), x1)
    assert z.dtype == jnp.bfloat16 and state.z.dtype == jnp.float32
    np.testing.assert_allclose(z.astype(jnp.float32), 1.0)


# ------------------------------------------------------------------------------- relation to Newton and Gauss-Newton


def test_geoprec_gd_is_newton_and_gauss_newton_for_an_isotropic_hessian_only():
    n1, n2 = 5, 3
    A, b, x1 = normal(n2, n1, seed=1), normal(n1 + n2, seed=2), normal(n1, seed=3)
    distance = lambda x1, x2: 0.5 * jnp.sum((jnp.concatenate([x1, x2]) - b) ** 2)
    S = normal(n1 + n2, n1 + n2, seed=4)
    H = S @ S.T + jnp.eye(n1 + n2)

    def quadratic(x1, x2):
        r = jnp.concatenate([x1, x2]) - b
        return 0.5 * r @ H @ r

    affine, curved = lambda x: A @ x + 1.0, lambda x: jnp.sin(A @ x)

    def step(f, psi):
        start, after = run(geoprec_gd(1.0, psi, tolerance=1e-13, max_iterations=50), reduced_objective(f, psi), x1, 1)
        return after - start

    def newton(f, psi):
        F = reduced_objective(f, psi)
        return -jnp.linalg.solve(jax.hessian(F)(x1), jax.grad(F)(x1))

    def gauss_newton(psi):
        residual = lambda x: jnp.concatenate([x, psi(x)]) - b
        J = jax.jacobian(residual)(x1)
        return -jnp.linalg.lstsq(J, residual(x1))[0]

    np.testing.assert_allclose(step(distance, affine), newton(distance, affine), atol=1e-10)
    np.testing.assert_allclose(step(distance, curved), gauss_newton(curved), atol=1e-10)
    assert jnp.linalg.norm(step(distance, curved) - newton(distance, curved)) > 1e-2
    assert jnp.linalg.norm(step(quadratic, affine) - newton(quadratic, affine)) > 1e-2


# -------------------------------------------------------------------------------------------------------- optimizer


def test_schedules_weight_decay_and_state():
    F, psi, x1 = (lambda x: jnp.sum(x**2)), (lambda x: 2 * x), jnp.ones(3)
    schedule = optax.exponential_decay(0.5, 1, 0.5)
    tx = geoprec_gd(schedule, psi, weight_decay=0.1, mask=lambda p: jax.tree.map(lambda _: True, p))
    steps = run(tx, F, x1, 2)
    for t in range(2):  # R = 5, grad = 2 x
        expected = steps[t] - schedule(t) * (2 * steps[t] / 5 + 0.1 * steps[t])
        np.testing.assert_allclose(steps[t + 1], expected, rtol=1e-12)
    (state,) = trees.find_states(tx.init(x1), PullbackMetricState)
    assert state.z.shape == (3,)


def test_one_jitted_step_computes_psi_once():
    """F and the metric linearise the same Psi; the compiler finds it out, so that nothing needs to be handed over."""
    A = normal(40, 40)
    psi = lambda x: jnp.linalg.svd(A * x[:, None], compute_uv=False)
    F = reduced_objective(lambda x1, x2: jnp.sum(x2**2) + jnp.sum(x1**2), psi)
    tx, x1 = geoprec_gd(0.1, psi), jnp.ones(40)

    def svds(function, *args):
        text = jax.jit(function).lower(*args).compile().as_text()
        return sum("custom-call(" in line and "gesdd" in line for line in text.splitlines())

    alone = svds(jax.value_and_grad(F), x1)
    both = svds(lambda x1, state: tx.update(jax.grad(F)(x1), state, x1), x1, tx.init(x1))
    assert alone == 1 and both == 1


# ------------------------------------------------------------------------------------------------------------- errors


def test_bad_input_is_named():
    double = lambda x: 2 * x
    x1 = {"w": jnp.ones(3)}
    with pytest.raises(ValueError, match="got 'newton'"):
        geoprec_gd(0.1, double, solver="newton")
    with pytest.raises(ValueError, match=r"tolerance must be positive, got 0\.0"):
        geoprec_gd(0.1, double, tolerance=0.0)
    with pytest.raises(ValueError, match="max_iterations must be at least 1, got 0"):
        scale_by_pullback_metric(double, max_iterations=0)

    rule = scale_by_pullback_metric(lambda x: x["w"] * 2)
    state = rule.init(x1)
    with pytest.raises(ValueError, match=r"call update\(gradients, state, params\)"):
        rule.update(x1, state)
    with pytest.raises(ValueError, match="the gradient has the structure"):
        rule.update(jnp.ones(3), state, x1)
    with pytest.raises(ValueError, match=r"the gradient has shape \(2,\) at 'w', params has \(3,\)"):
        rule.update({"w": jnp.ones(2)}, state, x1)

    with pytest.raises(ValueError, match="x1 must hold real floating arrays, got int32 at 'w'"):
        rule.init({"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match=r"mapping\(x1\) must hold real floating arrays, got int64"):
        scale_by_pullback_metric(lambda x: jnp.argmax(x["w"])).init(x1)
    with pytest.raises(ValueError, match="at least one array"):
        scale_by_pullback_metric(lambda x: ()).init(x1)
    with pytest.raises(ValueError, match="x1 is not finite at 'w'"):
        rule.init({"w": jnp.array([1.0, jnp.nan, 0.0])})
    with pytest.raises(ValueError, match=r"mapping\(x1\) is not finite; start where mapping is defined"):
        scale_by_pullback_metric(lambda x: jnp.log(x["w"] - 1)).init(x1)
    jax.eval_shape(rule.init, x1)  # traced values are not looked at


@pytest.mark.parametrize(
    ("psi", "message"),
    [
        (lambda x: 2 * x, "it is not idempotent"),
        (lambda x: jnp.stack([x[0] + x[1], 0 * x[1]]), "it is not symmetric"),
        (lambda x: x[:1], r"mapping\(x1\) has shape \(1,\), x1 has \(2,\)"),
        (lambda x: (x, x), "mapping.* has the structure"),
    ],
)
def test_a_projection_must_be_one(psi, message):
    rule = scale_by_pullback_metric(psi, solver="projection")
    with pytest.raises(ValueError, match=message):
        rule.init(jnp.ones(2))
