"""Transforms at stage boundaries: laws of the random matrices, the maps of weights and moments, and the attacks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxlib_methods.parallel.unextractable import (
    Sides,
    Transform,
    draw_transform,
    draw_transforms,
    estimate_bridge,
    extraction_probability,
    morph,
    transform_momentum,
)
from jaxlib_methods.parallel.unextractable.morphing import cast_like, master_copy

RULES = [("V", Sides(right="b")), ("U", Sides(left="b"))]


@pytest.fixture(scope="module")
def large():
    return draw_transform(512, key=jax.random.key(0))


@pytest.mark.contract
def test_orthogonal_transforms_are_orthogonal_and_uniform(large):
    T = large
    assert np.abs(T.matrix.T @ T.matrix - np.eye(512)).max() < 1e-13
    np.testing.assert_array_equal(T.inverse, T.matrix.T)
    draws = draw_transform(8, key=jax.random.key(1), batch=(2000,)).matrix[:, 0, 0]
    assert abs((draws < 0).mean() - 0.5) < 0.05 and abs(draws.mean()) < 0.03
    raw = np.linalg.qr(np.random.default_rng(0).standard_normal((2000, 8, 8)))[0][:, 0, 0]
    assert (raw < 0).all() and abs(raw.mean() + 0.285) < 0.02  # LAPACK's own signs are not uniform
    traces = np.trace(draw_transform(8, key=jax.random.key(2), batch=(40, 50)).matrix, axis1=-2, axis2=-1)
    moments = [(traces**n).mean() for n in (1, 2, 4)]
    np.testing.assert_allclose(moments, [0, 1, 3], atol=0.7)  # of the uniform distribution on O(8), like a normal's
    assert abs(moments[0]) < 0.1 and abs(moments[1] - 1) < 0.15


def test_the_product_of_reflections_against_a_loop():
    key, width = jax.random.key(5), 6
    rows = np.random.default_rng(np.asarray(jax.random.key_data(key)).reshape(-1)).standard_normal((width, width))
    product = np.eye(width)
    for i in range(width - 1):
        x = rows[i] * (np.arange(width) >= i)
        axis = np.eye(width)[i]
        v = x + np.copysign(np.linalg.norm(x), x[i]) * axis
        sign = -np.sign(x[i])  # the reflection takes x to sign ||x|| axis
        H = np.eye(width) - 2 * np.outer(v, v) / (v @ v)
        np.testing.assert_allclose(H @ x, sign * np.linalg.norm(x) * axis, atol=1e-12)
        product = product @ H @ (np.eye(width) + (sign - 1) * np.outer(axis, axis))
    product[:, -1] *= np.sign(rows[-1, -1])
    np.testing.assert_allclose(draw_transform(width, key=key).matrix, product, atol=1e-14)
    assert draw_transform(1, key=key).matrix.shape == (1, 1) and abs(draw_transform(1, key=key).matrix.item()) == 1


def test_a_transformed_matrix_is_scrambled(large):
    W = np.random.default_rng(0).standard_normal((512, 512))
    WT = W @ large.matrix
    assert np.linalg.norm(WT - W) / np.linalg.norm(W) == pytest.approx(np.sqrt(2), abs=0.01)
    assert abs((WT * W).sum() / np.linalg.norm(W) ** 2) < 0.01


@pytest.mark.parametrize("spread", [0.0, 0.01, 0.5])
def test_condition_numbers_are_bounded_also_of_products(spread):
    transforms = [
        draw_transform(16, key=jax.random.key(k), spread=spread, scale=2.0 if k % 2 else 0.5) for k in range(6)
    ]
    product = np.eye(16)
    for n, T in enumerate(transforms, start=1):
        product = product @ T.matrix
        assert np.linalg.cond(T.matrix) <= np.exp(2 * spread) * (1 + 1e-12)
        assert np.linalg.cond(product) <= np.exp(2 * n * spread) * (1 + 1e-12)
        np.testing.assert_allclose(T.matrix @ T.inverse, np.eye(16), atol=1e-13)
    assert abs(np.linalg.slogdet(product)[1]) <= 6 * 16 * spread + 1e-12  # the scales cancel in pairs
    if spread == 0:
        np.testing.assert_allclose(transforms[1].matrix.T @ transforms[1].matrix, 4 * np.eye(16), atol=1e-12)


def test_kernels_convolutions_biases_and_stacks_are_folded_where_a_product_is_unchanged():
    random = np.random.default_rng(0)
    T = draw_transform(5, key=jax.random.key(0), spread=0.3)
    params = {
        "V": {"kernel": random.standard_normal((3, 5)), "bias": random.standard_normal(5)},
        "U": random.standard_normal((2, 2, 5, 4)),  # a convolution's
        "other": random.standard_normal(3),
    }
    new = morph(params, {"b": T}, RULES)
    x, y = random.standard_normal((7, 3)), np.einsum
    hidden = lambda p: x @ p["V"]["kernel"] + p["V"]["bias"]
    np.testing.assert_allclose(
        y("ni,hwio->nhwo", hidden(new), new["U"]), y("ni,hwio->nhwo", hidden(params), params["U"]), atol=1e-12
    )
    assert new["other"] is params["other"]
    stack = {"V": random.standard_normal((4, 3, 5)), "b": random.standard_normal((4, 5))}
    layers = draw_transform(5, key=jax.random.key(1), batch=(4,))
    stacked = morph(stack, {"t": layers}, [("", Sides(right="t"))])
    for k in range(4):
        np.testing.assert_allclose(stacked["V"][k], stack["V"][k] @ layers.matrix[k], atol=1e-14)
        np.testing.assert_allclose(stacked["b"][k], stack["b"][k] @ layers.matrix[k], atol=1e-14)


def test_parameters_on_devices_stay_there_and_split_stacks_are_folded_part_by_part():
    mesh = jax.make_mesh((4,), ("stage",))
    stack = jax.random.normal(jax.random.key(0), (4, 3, 5))
    layers = {"t": draw_transform(5, key=jax.random.key(1), batch=(4,))}
    split = jax.device_put(stack, NamedSharding(mesh, PartitionSpec("stage")))
    new = morph({"V": split}, layers, [("V", Sides(right="t"))])["V"]
    assert new.sharding == split.sharding and new.dtype == split.dtype
    np.testing.assert_array_equal(new, morph({"V": np.asarray(stack)}, layers, [("V", Sides(right="t"))])["V"])
    across = jax.device_put(stack[..., :4], NamedSharding(mesh, PartitionSpec(None, None, "stage")))
    with pytest.raises(ValueError, match=r"'V' is split along its last two axes.*gather it"):
        morph({"V": across}, {"t": draw_transform(4, key=jax.random.key(1))}, [("V", Sides(right="t"))])


def test_master_copy_keeps_what_folding_in_low_precision_loses():
    """Chains of 200 orthogonal transforms and back, of one matrix in bfloat16: options A, B and C."""
    W = {"V": jnp.asarray(np.random.default_rng(0).standard_normal((16, 16)), jnp.bfloat16)}
    rules, one = [("V", Sides(right="b"))], {}
    in_place, each, master, total = W, W, master_copy(W), np.eye(16)
    for k in range(200):
        one = {"b": draw_transform(16, key=jax.random.key(k))}
        in_place = morph(in_place, one, rules, precision="parameter")
        each = morph(each, one, rules)
        master = morph(master, one, rules)
        total = total @ one["b"].matrix
    back = {"b": Transform(total.T, total)}
    error = lambda p: np.linalg.norm(master_copy(morph(master_copy(p), back, rules))["V"] - master_copy(W)["V"])
    size = np.linalg.norm(master_copy(W)["V"])
    assert error(in_place) / size > 0.02 and error(each) / size > 0.01
    assert error(cast_like(master, W)) / size < 0.003  # rounded to bfloat16 once
    assert error(master) / size < 1e-12
    assert cast_like(master, W)["V"].dtype == jnp.bfloat16


# ------------------------------------------------------------------------------ the optimizer's state


def two_layers():
    a, b = jax.random.split(jax.random.key(3))
    return {"V": jax.random.normal(a, (4, 6)), "U": jax.random.normal(b, (6, 6))}


def two_layer_loss(params, x):
    return jnp.sum(jnp.tanh(jnp.tanh(x @ params["V"] @ params["U"])) ** 3)


def test_gradients_transform_as_the_rule_says(x64):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), two_layers())
    x = jax.random.normal(jax.random.key(9), (5, 4), jnp.float64)
    T = {"b": draw_transform(6, key=jax.random.key(1), spread=0.5)}
    gradients = jax.grad(two_layer_loss)(params, x)
    mapped = transform_momentum({"mu": gradients}, params, T, RULES)["mu"]
    new = morph(params, T, RULES)
    for name in new:  # finite differences of the transformed network
        for i, j in ((0, 0), (2, 3), (3, 5)):
            step = jax.tree.map(jnp.zeros_like, new)
            step[name] = step[name].at[i, j].set(1e-5)
            plus, minus = (two_layer_loss(jax.tree.map(lambda p, s: p + h * s, new, step), x) for h in (1, -1))
            np.testing.assert_allclose(mapped[name][i, j], (plus - minus) / 2e-5, rtol=1e-6, atol=1e-9)


def muon(exact_rate=0.1):
    """Momentum and the polar factor by an SVD."""

    def orthogonalise(updates, params=None):
        polar = lambda M: jnp.matmul(*jnp.linalg.svd(M, full_matrices=False)[::2], precision="highest")
        return jax.tree.map(polar, updates)

    return optax.chain(optax.trace(0.9), optax.stateless(orthogonalise), optax.scale(-exact_rate))


@functools.partial(jax.jit, static_argnums=0)
def train_step(tx, params, state, x):
    updates, state = tx.update(jax.grad(two_layer_loss)(params, x), state, params)
    return optax.apply_updates(params, updates), state


def both_ways(tx, T, **options):
    """The parameters after steps and a transform in between, and after the steps with the transform at the end."""
    x, params = jax.tree.map(
        lambda a: a.astype(jnp.float64), (jax.random.normal(jax.random.key(9), (5, 4)), two_layers())
    )
    params, state = train_step(tx, params, tx.init(params), x)
    plain, plain_state = train_step(tx, params, state, x)
    plain, _ = train_step(tx, plain, plain_state, x)
    moved, state = morph(params, T, RULES), transform_momentum(state, params, T, RULES, **options)
    moved, state = train_step(tx, moved, state, x)
    moved, _ = train_step(tx, moved, state, x)
    plain = morph(plain, T, RULES)
    return max(float(jnp.abs(a - b).max()) for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(moved), strict=True))


def test_muon_and_momentum_commute_with_orthogonal_transforms_and_adam_does_not(x64):
    T = {"b": draw_transform(6, key=jax.random.key(1))}
    skewed = {"b": draw_transform(6, key=jax.random.key(1), spread=0.5)}
    exact, momentum = muon(), optax.sgd(0.02, momentum=0.9)
    assert both_ways(exact, T) < 1e-11
    assert both_ways(exact, skewed) > 1e-3
    assert both_ways(momentum, T) < 1e-13
    with jax.numpy_dtype_promotion("standard"):
        adam = optax.adam(0.02)
        with pytest.raises(ValueError, match=r"nu\['U'\] of the optimizer state is no first moment.*use SGD, momentum"):
            both_ways(adam, T)
        assert both_ways(adam, T, second_moments="keep") > 1e-3
        assert both_ways(adam, T, second_moments="reset") > 1e-3


def test_moments_of_parameters_without_a_rule_stay_and_counters_too():
    params = {**two_layers(), "free": jnp.ones(3)}
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.partition(
            {"sgd": optax.sgd(0.1, momentum=0.9), "adam": optax.adam(0.1)},
            {"V": "sgd", "U": "sgd", "free": "adam"},
        )
        _, state = tx.update(params, tx.init(params), params)
    T = {"b": draw_transform(6, key=jax.random.key(1))}
    new = transform_momentum(state, params, T, RULES)
    adam = new.inner_states["adam"].inner_state[0]
    np.testing.assert_array_equal(adam.nu["free"], state.inner_states["adam"].inner_state[0].nu["free"])
    assert adam.count == 1
    trace = new.inner_states["sgd"].inner_state[0].trace
    np.testing.assert_allclose(trace["V"], params["V"] @ T["b"].matrix.astype(np.float32), rtol=1e-4, atol=1e-5)
    assert jax.tree.structure(new) == jax.tree.structure(state)


# ------------------------------------------------------------------------------ attacks and errors


def test_probabilities_of_the_worked_example():
    sizes = {"num_replicas": 10, "num_stages": 10, "num_transforms": 10**6}
    full = extraction_probability(1e-3, **sizes)
    assert full == pytest.approx(5.109e-10, rel=1e-3)  # evaluated naively in float64, 5 * 2^-53 * 10^6 = 5.55e-10
    assert full < (10**6 - 2) * (3 * 1e-3 * 10) ** 10 == pytest.approx(5.90e-10, rel=2e-3)
    for kind in ("none", "partial"):
        assert extraction_probability(1e-3, **sizes, incompatibility=kind) == pytest.approx(1.0)
    small = {"num_replicas": 2, "num_stages": 3, "num_transforms": 5}
    p = 0.01
    expected = {
        "none": (1 - (1 - p) ** 10) ** 3,
        "partial": (1 - (1 - (1 - (1 - p) ** 6) ** 2) ** 3) ** 2,
        "full": 1 - (1 - (1 - (1 - p) ** 6) ** 3) ** 3,
    }
    for kind, value in expected.items():
        assert extraction_probability(p, **small, incompatibility=kind) == pytest.approx(value, rel=1e-9)
    assert extraction_probability(1.0, **small) == 1 and extraction_probability(0.0, **small) == 0
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 1.5"):
        extraction_probability(1.5, **small)
    with pytest.raises(ValueError, match="num_transforms must be at least 2, got 1"):
        extraction_probability(0.5, **(small | {"num_transforms": 1}))
    with pytest.raises(ValueError, match="incompatibility must be one of"):
        extraction_probability(0.5, **small, incompatibility="some")


@pytest.mark.parametrize("spread", [None, 0.5])
def test_the_bridge_is_found_from_the_same_inputs_and_not_from_others(spread):
    random = np.random.default_rng(0)
    X, others = random.standard_normal((2, 20, 8))
    T = draw_transform(8, key=jax.random.key(2), spread=spread).matrix
    options = {"orthogonal": spread is None}
    assert np.abs(estimate_bridge(X, X @ T, **options) - T).max() < 1e-6
    assert np.linalg.norm(estimate_bridge(X, others @ T, **options) - T) / np.linalg.norm(T) > 0.5
    with pytest.raises(ValueError, match="activations of the same inputs have one shape"):
        estimate_bridge(X, X[:3])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: draw_transform(0, key=jax.random.key(0)), "width must be at least 1, got 0"),
        (lambda: draw_transform(3, key=jax.random.key(0), spread=-1.0), "spread must not be negative"),
        (lambda: draw_transform(3, key=jax.random.key(0), scale=2.0), "scale must be positive, and needs a spread"),
        (lambda: morph({"V": np.eye(3)}, {}, [("W", Sides())]), "W"),
        (
            lambda: morph(
                {"V": np.eye(3)}, draw_transforms(["c"], 3, key=jax.random.key(0)), [("V", Sides(right="b"))]
            ),
            r"no rule names the transforms \['c'\]; the rules name \['b'\]",
        ),
        (
            lambda: morph(
                {"V": np.eye(3)}, draw_transforms(["b"], 4, key=jax.random.key(0)), [("V", Sides(right="b"))]
            ),
            r"a transform \(4, 4\) does not fit axis -1 of 'V' with shape \(3, 3\)",
        ),
        (
            lambda: morph({"V": np.eye(3)}, {}, [("V", Sides())], precision="half"),
            "precision must be one of",
        ),
        (
            lambda: transform_momentum({}, {}, {}, [], second_moments="?"),
            "second_moments must be one of",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
