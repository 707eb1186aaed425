"""Checks with numbers worked by hand: proximal mean-field (pmf) and mirror descent (md)."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxlib_methods import quantization as qn

close = np.testing.assert_allclose


# ------------------------------------------------------------------------------------------------ proximal mean-field


@pytest.mark.contract
def test_pmf_1_the_step_minimises_the_proximal_objective():
    u0, g, eta, beta = np.array([0.5, 0.5]), np.array([1.0, -1.0]), 0.5, 2.0
    step = qn.steps.proximal_mean_field_step(
        jnp.float32(u0), jnp.float32(g), learning_rate=eta, inverse_temperature=beta
    )
    close(step, [0.1192, 0.8808], atol=5e-5)
    first = np.linspace(1e-6, 1 - 1e-6, 200_001)
    u = np.stack([first, 1 - first])
    objective = eta * g @ u - u0 @ u + (u * np.log(u)).sum(0) / beta  # -H(u) = sum u log u
    close(u[:, objective.argmin()], step, atol=1e-4)


def test_pmf_2_the_binary_softmax_is_a_tanh():
    x, beta = jax.random.normal(jax.random.key(0), (2, 50)), 3.0
    w = qn.project(x, qn.Lattice(), beta)
    close(w, jnp.tanh(beta * (x[1] - x[0]) / 2), atol=1e-6)


@pytest.mark.parametrize(
    ("jacobian", "expected"),
    [("exact", (-0.52295, 0.52295)), ("single", (-0.90793, 1.33796)), ("double", (-1.00118, 1.31615))],
)
def test_pmf_3_the_three_jacobians(jacobian, expected):
    x = jnp.array([[0.3], [-0.2]])
    lattice = qn.Lattice()
    close(qn.auxiliary.auxiliary_to_primal(x, lattice, 1.5)[:, 0], [0.67918, 0.32082], atol=1e-5)
    close(qn.project(x, lattice, 1.5), [-0.35836], atol=1e-5)
    through = jax.grad(lambda x: 0.8 * qn.project(x, lattice, 1.5, jacobian=jacobian).sum())(x)
    close(through[:, 0], expected, atol=1e-5)
    rule = qn.rules.scale_by_proximal_mean_field(lattice, inverse_temperature=1.5, jacobian=jacobian)
    by_weights, _ = rule.update(jnp.array([0.8]), rule.init(x), x)
    by_rows, _ = rule.update(jnp.array([[-0.8], [0.8]]), rule.init(x), x)
    close(by_weights[:, 0], expected, atol=1e-5)
    close(by_rows, by_weights)


@pytest.mark.parametrize("labels", [(-1, 1), (0.5, -2)])
def test_pmf_3_the_closed_forms_for_two_labels(labels):
    """Against the formulas for any number of labels in float64, into saturation, with respect to w and to u."""
    rng, beta = np.random.default_rng(0), 3.0
    x = rng.normal(size=(2, 300)) * np.geomspace(0.01, 1.5, 300)  # beyond, float64 loses the expected values
    g = {"w": rng.normal(size=300), "u": rng.normal(size=(2, 300))}
    softmax = lambda z: np.exp(z - z.max(0)) / np.exp(z - z.max(0)).sum(0)
    u = softmax(beta * x)
    lattice = qn.Lattice(labels)
    close(
        qn.auxiliary.auxiliary_to_primal(jnp.float32(x), lattice, beta), u, rtol=3e-5
    )  # the small probability as well
    close(qn.project(jnp.float32(x), lattice, beta), np.asarray(labels) @ u, atol=2e-6)
    for jacobian, v in (("exact", u), ("single", u), ("double", softmax(beta * u))):
        for of, gradient in g.items():
            lifted = np.asarray(labels)[:, None] * gradient if of == "w" else gradient
            inner = (v * lifted).sum(0)
            expected = beta * (v * (lifted - inner) if jacobian == "exact" else lifted - v * inner)
            rule = qn.rules.scale_by_proximal_mean_field(lattice, inverse_temperature=beta, jacobian=jacobian)
            found, _ = rule.update(jnp.float32(gradient), rule.init(jnp.float32(x)), jnp.float32(x))
            scale = {"rtol": 3e-5, "atol": 0} if jacobian == "exact" else {"atol": 2e-5}
            close(found, expected, **scale)


def test_pmf_3_the_exact_jacobians_are_finite_differences(x64):
    rng = np.random.default_rng(0)
    aux, g, h = rng.normal(size=(3, 4)), rng.normal(size=4), 1e-6
    for projection, x in (("softmax", aux), ("sparsemax", 0.3 * aux), ("tanh", aux[0])):
        lattice = qn.Lattice((-1, 0, 1), projection=projection)
        loss = lambda x, lattice=lattice: jnp.asarray(g) @ qn.project(x, lattice, 1.7, jacobian="exact")
        found = jax.grad(loss)(jnp.asarray(x))
        for index in np.ndindex(x.shape):
            e = np.zeros(x.shape)
            e[index] = h
            slope = (loss(jnp.asarray(x + e)) - loss(jnp.asarray(x - e))) / (2 * h)
            close(found[index], slope, atol=1e-8)


def test_pmf_4_gradients_sum_to_zero_but_for_the_surrogates():
    x, g = jax.random.normal(jax.random.key(0), (2, 3, 40))
    total = lambda projection, jacobian: jnp.abs(
        jax.vjp(
            lambda x: qn.auxiliary.auxiliary_to_primal(
                x, qn.Lattice((-1, 0, 1), (), projection), 2.0, jacobian=jacobian
            ),
            x,
        )[1](g)[0].sum(0)
    ).max()
    assert total("softmax", "exact") < 1e-6
    assert total("sparsemax", "exact") < 1e-6
    assert total("softmax", "single") > 0.1
    assert total("softmax", "double") > 0.1


@pytest.mark.parametrize("projection", ["softmax", "sparsemax", "argmax"])
@pytest.mark.parametrize("d", [2, 3])
@pytest.mark.parametrize("beta", [1e4, 1e35])
def test_pmf_5_rows_are_feasible_for_any_auxiliary_variables(projection, d, beta):
    x = jax.random.normal(jax.random.key(1), (d, 200)) * 10.0 ** jnp.arange(-8, 12, 0.1)[None]
    x = jnp.concatenate([x, jnp.zeros((d, 1)), jnp.full((d, 1), -3e38)], axis=1)
    u = qn.auxiliary.auxiliary_to_primal(x, qn.Lattice(qn.labels.symmetric_labels(d), projection=projection), beta)
    assert (u >= 0).all()
    close(u.sum(0), 1, atol=1e-6)


@pytest.mark.parametrize(
    ("x", "expected"),
    [((0.3, 0.9), (0.2, 0.8)), ((2, 0.5), (1, 0)), ((0.1, 0.2, 0.9), (1 / 30, 2 / 15, 5 / 6))],
)
def test_pmf_6_sparsemax_values(x, expected):
    close(qn.projections.sparsemax_projection(jnp.array(x, jnp.float32)), expected, atol=1e-6)


@pytest.mark.parametrize("d", [2, 3, 4, 6])
def test_pmf_6_the_closed_forms_for_few_labels_are_the_simplex_projection(d):
    x = jax.random.normal(jax.random.key(0), (d, 30)).at[1, :5].set(0.25).at[0, :5].set(0.25)  # ties as well
    with jax.numpy_dtype_promotion("standard"):
        expected = jax.vmap(optax.projections.projection_simplex, 1, 1)(2.5 * x)
    close(qn.projections.sparsemax_projection(x, 2.5), expected, atol=1e-6)


def test_pmf_7_the_limit_is_the_argmax():
    x = jax.random.normal(jax.random.key(2), (3, 500))
    top = jnp.sort(x, axis=0)
    beta = 100.0
    clear = (top[-1] - top[-2]) * beta > 20
    assert clear.sum() > 100
    soft, hard = qn.projections.softmax_projection(x, beta), qn.projections.argmax_projection(x)
    assert jnp.abs(soft - hard)[:, clear].max() < 1e-6
    close(qn.projections.softmax_projection(x, 1e6), hard, atol=1e-6)


def test_pmf_8_the_layer_equals_the_authors_expanded_layer():
    key, labels = jax.random.key(0), qn.labels.TERNARY
    image = jax.random.normal(key, (2, 6, 6, 3))
    aux = jax.random.normal(jax.random.key(1), (3, 3, 3, 3, 4))  # labels, window, window, in, out
    convolve = lambda kernel: jax.lax.conv_general_dilated(
        image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    u = qn.auxiliary.auxiliary_to_primal(aux, qn.Lattice(labels), 2.0)
    expanded = jnp.moveaxis(u, 0, -1).reshape(3, 3, 3, 4 * 3)  # consecutive groups of d output channels
    authors = convolve(expanded).reshape(2, 6, 6, 4, 3) @ jnp.array(labels)
    close(convolve(qn.project(aux, qn.Lattice(labels), 2.0)), authors, atol=1e-5)


def test_pmf_9_icm_is_binary_connects_clipped_step():
    lattice, eta = qn.Lattice(projection="argmax"), 0.05
    aux = jnp.array([[0.3, 0.0, -0.9, 0.2], [-0.3, 0.4, 0.9, 0.25]])
    W = aux[1] - aux[0]
    close(qn.project(aux, lattice), jnp.sign(W))
    g = jnp.array([0.7, -2.0, 3.0, 5.0])
    rule = qn.rules.scale_by_icm(lattice)
    updates, _ = rule.update(g, rule.init(aux), aux)
    moved = aux - eta * updates
    close(moved[1] - moved[0], W - 2 * eta * jnp.where(jnp.abs(W) <= 1, g, 0), atol=1e-6)


def test_pmf_10_symmetries_of_the_ternary_set():
    aux = jax.random.normal(jax.random.key(0), (3, 20))
    order = jnp.array([2, 0, 1])
    for projection in ("softmax", "sparsemax", "argmax"):
        w = qn.project(aux, qn.Lattice((-1, 0, 1), projection=projection), 1.3)
        close(qn.project(aux[order], qn.Lattice((1, -1, 0), projection=projection), 1.3), w, atol=1e-7)
    assert not qn.project(jnp.ones((3, 5)), qn.Lattice((-1, 0, 1))).any()


@pytest.mark.parametrize(("rho", "every", "final"), [(1.1, 1000, 13_781), (1.01, 100, 20_959), (1.05, 500, 17_293)])
def test_pmf_the_tuned_schedules_end_at_the_cap(rho, every, final):
    free = qn.inverse_temperature_schedule(rho, every, maximum=1e35)
    close(free(100_000), final, rtol=1e-3)
    capped = qn.inverse_temperature_schedule(rho, every)
    assert capped(100_000) == 10_000
    close([float(capped(t)) for t in (0, 1, every, every + 1)], [1, rho, rho, rho**2], rtol=1e-5)


# --------------------------------------------------------------------------------------------------- mirror descent


def md_run(optimizer, aux, lattice, gradients, read):
    state = optimizer.init(aux)
    for g in gradients:
        updates, state = optimizer.update(jnp.float32(g), state, aux)
        aux = optax.apply_updates(aux, updates)
    return read(aux, state)


def test_md_1_the_closed_form_is_the_dual_form():
    w, beta, eta, g = 0.5, 2.0, 0.1, 0.7
    r, e = (1 + w) / (1 - w), np.exp(-2 * beta * eta * g)
    close((r * e - 1) / (r * e + 1), 0.3878834, atol=5e-8)
    close(np.tanh(np.arctanh(w) - beta * eta * g), 0.3878834, atol=5e-8)
    close(qn.steps.mirror_step_tanh(jnp.float32(w), jnp.float32(-eta * g), beta), 0.3878834, atol=1e-7)


def test_md_2_the_exponentiated_gradient():
    u = qn.steps.mirror_step_softmax(jnp.float32([0.6, 0.4]), jnp.float32([-0.02, 0.01]), 2.0)
    close(u, [0.5855174, 0.4144826], atol=1e-7)


TANH = qn.Lattice(projection="tanh")


def both_forms(beta, last, chain, gradients, w0=0.3):
    """w after the literal and after the stable form; `last` is the beta that the stable form is read with."""
    literal = optax.chain(*chain, qn.rules.scale_by_mirror_descent(TANH, inverse_temperature=beta))
    stable = optax.chain(qn.rules.scale_by_stable_mirror_descent(TANH, inverse_temperature=beta), *chain)
    first = beta(0) if callable(beta) else beta
    w = md_run(literal, jnp.float32(w0), TANH, gradients, lambda w, state: w)
    x = md_run(stable, jnp.float32(np.arctanh(w0) / first), TANH, gradients, lambda x, state: x)
    return w, qn.project(x, TANH, last)


def test_md_3_the_two_forms_agree_only_while_beta_is_constant():
    gradients = (0.1, -0.2, 0.05)
    literal, stable = both_forms(2.0, 2.0, [optax.sgd(0.1)], gradients)
    close(literal, 0.3090725, atol=2e-7)
    close(stable, 0.3090725, atol=2e-7)
    grows = lambda count: 2.0 * 1.2 ** jnp.asarray(count, jnp.float32)
    literal, stable = both_forms(grows, 2.88, [optax.sgd(0.1)], gradients)
    close(literal, 0.3123250, atol=2e-7)
    close(stable, 0.4301724, atol=2e-7)


@pytest.mark.parametrize("lattice", [TANH, qn.Lattice()], ids=["tanh", "softmax"])
def test_md_4_the_same_with_adam(lattice):
    aux = qn.init_auxiliary(jnp.zeros((5, 4)), lattice, key=jax.random.key(0))
    target = jax.random.normal(jax.random.key(1), (5, 4))
    loss = lambda w: jnp.sum((w - target) ** 2)
    primal = qn.auxiliary.auxiliary_to_primal(aux, lattice, 2.0)
    literal, stable = (
        make(0.05, lattice, inverse_temperature=2.0) for make in (qn.mirror_descent, qn.stable_mirror_descent)
    )
    states = literal.init(primal), stable.init(aux)
    for _ in range(10):
        w, v = qn.auxiliary.primal_to_weights(primal, lattice), qn.project(aux, lattice, 2.0)
        close(w, v, atol=3e-6)
        step, first = literal.update(jax.grad(loss)(w), states[0], primal)
        dual_step, second = stable.update(jax.grad(loss)(v), states[1], aux)
        primal, aux, states = primal + step, aux + dual_step, (first, second)


@pytest.mark.parametrize("labels", [(-1, 1), (-0.5, 2.0)])
def test_md_5_the_mirror_map_inverts_the_projection(labels, x64):
    beta, lattice = 1.7, qn.Lattice(labels, projection="tanh")
    phi = lambda w: qn.steps.mirror_map(w, beta, labels=labels)
    w = jnp.linspace(labels[0] + 1e-5, labels[1] - 1e-5, 101)
    x = jax.grad(phi)(w)
    close(qn.project(x, lattice, beta), w, atol=1e-10)
    dual = jnp.linspace(-2, 2.5, 101)
    close(jax.grad(phi)(qn.project(dual, lattice, beta)), dual, atol=1e-6)

    def bregman(a, b):
        return phi(a) - phi(b) - jax.grad(phi)(b) * (a - b)

    table = jax.vmap(jax.vmap(bregman, (None, 0)), (0, None))(w, w)
    assert (table[~np.eye(101, dtype=bool)] > 0).all()
    close(jnp.diagonal(table), 0, atol=1e-12)
    u = jax.nn.softmax(jax.random.normal(jax.random.key(0), (3, 9)), axis=0)
    dual = jax.grad(lambda u: qn.steps.mirror_map(u, beta, projection="softmax"))(u)
    close(qn.projections.softmax_projection(dual, beta), u, rtol=1e-12)


def test_md_6_the_binary_softmax_step_is_the_tanh_step():
    aux, g, beta, eta = jax.random.normal(jax.random.key(0), (2, 30)), 0.7, 1.5, 0.2
    close(qn.project(aux, qn.Lattice(), beta), jnp.tanh(beta * (aux[1] - aux[0]) / 2), atol=1e-6)
    u = qn.projections.softmax_projection(aux, beta)
    stepped = qn.steps.mirror_step_softmax(u, -eta * jnp.array([[-g], [g]]) * jnp.ones_like(u), beta)
    w = u[1] - u[0]
    close(stepped[1] - stepped[0], qn.steps.mirror_step_tanh(w, jnp.full_like(w, -eta * g), beta), atol=1e-6)


def test_md_7_variables_stay_inside_and_no_gradient_no_change():
    rng = np.random.default_rng(0)
    w = jnp.float32(rng.uniform(-1, 1, 500).clip(-1 + 1e-7, 1 - 1e-7))
    u = jax.nn.softmax(5 * jax.random.normal(jax.random.key(0), (3, 500)), axis=0)
    rules = {
        "tanh": qn.rules.scale_by_mirror_descent(TANH, inverse_temperature=1e6),
        "softmax": qn.rules.scale_by_mirror_descent(qn.Lattice(qn.labels.TERNARY), inverse_temperature=1e6),
    }
    states = {"tanh": rules["tanh"].init(w), "softmax": rules["softmax"].init(u)}
    unmoved, _ = rules["tanh"].update(jnp.zeros_like(w), states["tanh"], w)
    assert not unmoved.any()
    unmoved, _ = rules["softmax"].update(jnp.zeros_like(u), states["softmax"], u)
    assert not unmoved.any()
    for scale in (1e-8, 1e-3, 10.0, 1e30):
        step, _ = rules["tanh"].update(jnp.float32(rng.normal(size=500) * scale), states["tanh"], w)
        w = w + step
        assert (jnp.abs(w) < 1).all()
        step, _ = rules["softmax"].update(jnp.float32(rng.normal(size=(3, 500)) * scale), states["softmax"], u)
        u = u + step
        assert (u >= 0).all()
        close(u.sum(0), 1, atol=1e-6)


def test_md_8_the_limit_of_the_stable_form_is_the_straight_through_estimator():
    x = jax.random.normal(jax.random.key(0), (1000,))
    far = jnp.abs(x) > 1e-4
    w = qn.project(x, TANH, 1e6)
    close(w[far], jnp.sign(x)[far])
    g = jax.random.normal(jax.random.key(1), x.shape)
    stable = qn.rules.scale_by_stable_mirror_descent(TANH, inverse_temperature=1e6)
    hard = qn.rules.scale_by_straight_through(qn.Lattice(projection="round"), clip=False)
    np.testing.assert_array_equal(stable.update(g, stable.init(x), x)[0], hard.update(g, hard.init(x), x)[0])


EXTREME = jnp.float32([0.0, 1e-45, -1e-38, 1e-20, -1e-4, 0.5, -0.5, 1.0, 1e10, -3e38])


@pytest.mark.parametrize("beta", [1e6, 1e35])
@pytest.mark.parametrize("projection", ["softmax", "sparsemax", "tanh"])
@pytest.mark.parametrize("labels", [qn.labels.BINARY, qn.labels.TERNARY])
def test_md_9_no_projection_gives_nan(beta, projection, labels):
    lattice = qn.Lattice(labels, projection=projection)
    aux = (
        jnp.stack([EXTREME, EXTREME[::-1], 2 * EXTREME[::-1].clip(-1e38)][: len(labels)]) if lattice.lifted else EXTREME
    )
    w = qn.project(aux, lattice, beta)
    assert jnp.isfinite(w).all() and (jnp.abs(w) <= 1).all()
    for jacobian in ("exact", "single", "double") if projection == "softmax" else ("exact",):
        grad = jax.grad(lambda x: qn.project(x, lattice, beta, jacobian=jacobian).sum())(aux)
        assert jnp.isfinite(grad).all(), jacobian


@pytest.mark.parametrize("beta", [1e6, 1e35])
@pytest.mark.parametrize("lattice", [TANH, qn.Lattice()], ids=["tanh", "softmax"])
def test_md_9_the_literal_form_is_cut_where_the_authors_overflows(beta, lattice):
    w = jnp.float32([-1 + 1e-7, 0.0, 0.5, 1 - 1e-7])
    primal = jnp.stack([(1 - w) / 2, (1 + w) / 2]) if lattice.lifted else w
    rule = qn.rules.scale_by_mirror_descent(lattice, inverse_temperature=beta)
    for sign in (1, -1):
        step = jnp.full_like(primal, 3e38 * sign)
        moved = primal + rule.update(step.at[..., 0].set(1e-30), rule.init(primal), primal)[0]
        assert jnp.isfinite(moved).all()
    with np.errstate(over="ignore", invalid="ignore"):
        r, e = np.float32((1 + w[3]) / (1 - w[3])), np.exp(np.float32(100))
        assert np.isnan(np.float32(r * e - 1) / np.float32(r * e + 1))  # what the odds form gives


def test_md_10_gd_tanh_is_the_stable_gradient_times_the_slope():
    x, g, beta = jnp.linspace(-2, 2, 30), jnp.linspace(1, 3, 30), 1.3
    gd = qn.rules.scale_by_proximal_mean_field(TANH, inverse_temperature=beta)
    stable = qn.rules.scale_by_stable_mirror_descent(TANH, inverse_temperature=beta)
    w = qn.project(x, TANH, beta)
    ours, _ = gd.update(g, gd.init(x), x)
    close(ours, beta * (1 - w**2) * stable.update(g, stable.init(x), x)[0], rtol=2e-5)


def test_md_the_ternary_tanh_and_its_rounding():
    x, beta = jnp.linspace(-1.5, 1.5, 301), 7.0
    lattice = qn.Lattice(qn.labels.TERNARY, projection="tanh")
    w = qn.project(x, lattice, beta)
    close(w, 0.5 * (np.tanh(beta * (x + 0.5)) + np.tanh(beta * (x - 0.5))), atol=1e-6)
    np.testing.assert_array_equal(qn.quantize(w, lattice), np.where(w <= -0.5, -1, np.where(w >= 0.5, 1, 0)))
    np.testing.assert_array_equal(qn.quantize(x, lattice, inverse_temperature=beta), qn.quantize(w, lattice))


@pytest.mark.parametrize(
    ("rho", "every", "final"),
    [(1.02, 200, 2.0e4), (1.2, 2000, 9.1e3), (1.2, 500, 6.9e15), (1.1, 200, 5.0e20), (1.02, 100, 4.0e8)],
)
def test_md_final_inverse_temperatures(rho, every, final):
    close(qn.inverse_temperature_schedule(rho, every, maximum=1e35)(100_000), final, rtol=0.02)
