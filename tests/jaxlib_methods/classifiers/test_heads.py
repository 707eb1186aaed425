"""The classifier heads: running means, absent classes, gradients, evaluation, checkpoints, and eight devices as one."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P

from jaxlib_methods.classifiers import (
    FixedETFHead,
    NearestETFHead,
    NormalizedHead,
    dot_regression_loss,
    etf_weights,
    nearest_etf,
    simplex_etf,
)
from jaxlib_methods.classifiers._polar import GRAM_MIN_COLUMNS
from jaxlib_methods.classifiers.class_means import class_sums, normalize_features, running_class_means, validate_batch

D, K, B = 8, 4, 16
LABELS = jnp.arange(B, dtype=jnp.int32) % K


def features(seed=0, shape=(B, D), dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def step(graphdef, state, h, labels):
    """One training step as a pure function: mean loss, logits and the new state."""
    head = nnx.merge(graphdef, state, copy=True)
    logits = head(h, labels)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.mean(loss), (logits, nnx.state(head))


# Running means


def average(values, average="ema"):
    F, seen = jnp.zeros((1, 1)), jnp.zeros(1, bool)
    for t, v in enumerate(values):
        batch = (jnp.full((1, 1), v), jnp.ones(1), jnp.zeros(1))
        F, seen = running_class_means(batch, F, seen, jnp.int32(t), average=average)
    return float(F[0, 0])


def test_ema_weights_are_s_over_triangular_number():
    values = [0.5, -1.0, 3.0, 2.0, 7.0]
    t = len(values)
    np.testing.assert_allclose(
        average(values), sum(s * v for s, v in enumerate(values, 1)) * 2 / (t * (t + 1)), rtol=1e-6
    )
    np.testing.assert_allclose(average([1.0, 2.0, 3.0]), 7 / 3, rtol=1e-6)
    np.testing.assert_allclose(average([1.0, 2.0, 6.0], "cumulative"), 3, rtol=1e-6)


def test_ema_weight_has_a_floor():
    batch = (jnp.ones((1, 1)), jnp.ones(1), jnp.zeros(1))
    F, _ = running_class_means(batch, jnp.zeros((1, 1)), jnp.ones(1, bool), jnp.int32(10**7))
    np.testing.assert_allclose(F, 1e-4, rtol=1e-5)


def test_class_means_are_centred_by_the_batch_mean():
    f = normalize_features(features())
    batch = class_sums(f, LABELS, K)
    Z, seen = running_class_means(batch, jnp.zeros((D, K)), jnp.zeros(K, bool), jnp.int32(0))
    expected = np.stack([np.asarray(f)[np.asarray(LABELS) == c].mean(0) for c in range(K)], 1)
    np.testing.assert_allclose(Z, expected - np.asarray(f).mean(0)[:, None], atol=1e-5)
    assert seen.all()


@pytest.mark.parametrize("unseen", ["global_mean", "zero"])
def test_absent_classes_keep_their_mean_and_unseen_ones_take_the_stand_in(unseen):
    f = normalize_features(features())
    labels = jnp.where(LABELS < 2, LABELS, 0)  # classes 2 and 3 are absent
    F = features(5, (D, K))
    seen = jnp.array([True, True, True, False])  # 2 was met before, 3 never
    batch = class_sums(f, labels, K)
    Z, now = running_class_means(batch, F, seen, jnp.int32(3), unseen=unseen)
    assert now.tolist() == [True, True, True, False]
    np.testing.assert_allclose(Z[:, 2], F[:, 2], atol=1e-6)
    np.testing.assert_allclose(Z[:, 3], batch[2] if unseen == "global_mean" else 0, atol=1e-6)
    m0 = batch[0][:, 0] / batch[1][0] - batch[2]
    np.testing.assert_allclose(Z[:, 0], 2 / 5 * m0 + 3 / 5 * F[:, 0], atol=1e-5)


def test_a_class_met_only_in_complete_batches_counts_as_seen():
    """The official code updates its flags only in incomplete batches and then overwrites the class's mean."""
    head = NearestETFHead(D, K)
    head(features(0), LABELS)
    mean = head.mean[...]
    head(features(1), jnp.where(LABELS == 3, 0, LABELS))
    assert head.seen[...].all()
    np.testing.assert_allclose(head.mean[...][:, 3], mean[:, 3], atol=1e-6)


def test_a_label_outside_the_classes_counts_in_the_mean_only():
    f = jnp.array([[1.0], [2.0], [6.0]])
    sums, counts, mean = class_sums(f, jnp.array([0, -1, 7]), 2)
    assert sums.tolist() == [[1.0, 0.0]] and counts.tolist() == [1.0, 0.0] and mean.tolist() == [3.0]


def test_class_sums_are_those_of_a_loop_and_every_feature_gets_its_class_gradient():
    f, labels = features(), jnp.asarray(np.random.default_rng(0).integers(-1, K + 1, B), jnp.int32)
    expected = np.zeros((D, K))
    for vector, label in zip(np.asarray(f), np.asarray(labels), strict=True):
        if 0 <= label < K:
            expected[:, label] += vector
    np.testing.assert_allclose(class_sums(f, labels, K)[0], expected, atol=1e-5)
    weights = features(3, (D, K))
    gradient = jax.jit(jax.grad(lambda f: jnp.sum(class_sums(f, labels, K)[0] * weights)))(f)
    inside = ((labels >= 0) & (labels < K))[:, None]
    np.testing.assert_array_equal(gradient, jnp.where(inside, weights.T[jnp.clip(labels, 0, K - 1)], 0))


def test_gradient_flows_through_the_alpha_weighted_current_term_only():
    f = normalize_features(features())

    def loss(f, F, count):
        return jnp.sum(running_class_means(class_sums(f, LABELS, K), F, jnp.ones(K, bool), count)[0] ** 2)

    F = jnp.zeros((D, K))
    g1, gF = jax.grad(loss, argnums=(0, 1))(f, F, jnp.int32(0))
    g9 = jax.grad(loss)(f, F, jnp.int32(9))
    assert g1.any() and not gF.any()
    np.testing.assert_allclose(g9, (2 / 11) ** 2 * g1, atol=1e-6)  # once in Z, once in dZ


# The nearest-ETF head


@pytest.mark.contract
def test_two_training_steps_follow_the_paper_line_by_line():
    head = NearestETFHead(D, K, temperature=5.0)
    F, prox = np.zeros((D, K)), None
    for t, h in enumerate([features(0), features(1)], 1):
        logits = head(h, LABELS)
        f = np.asarray(normalize_features(h, temperature=5.0), np.float64)
        mu = f.mean(0)
        m = np.stack([f[np.asarray(LABELS) == c].mean(0) - mu for c in range(K)], 1)
        F = 2 / (t + 1) * m + (1 - 2 / (t + 1)) * F
        U = nearest_etf(jnp.asarray(F, jnp.float32), prox)
        W = etf_weights(U)
        np.testing.assert_allclose(logits, f @ np.asarray(W).T - (np.asarray(W) @ mu)[None], atol=2e-3)
        np.testing.assert_allclose(head.mean[...], F, atol=1e-5)
        np.testing.assert_allclose(head.prox[...], U, atol=1e-3)
        prox = head.prox[...]
    assert int(head.count[...]) == 2
    np.testing.assert_allclose(jnp.linalg.norm(head.kernel[...], axis=0), 1, atol=1e-5)


def test_implicit_path_can_be_switched_off_and_the_direct_path_stays():
    h = features()
    grads, losses = {}, {}
    for implicit in (True, False):
        graphdef, state = nnx.split(NearestETFHead(D, K, implicit_gradient=implicit))
        value_and_grad = jax.jit(jax.value_and_grad(lambda h: step(graphdef, state, h, LABELS), has_aux=True))
        (losses[implicit], _), grads[implicit] = value_and_grad(h)
    assert losses[True] == losses[False]
    assert jnp.linalg.norm(grads[True] - grads[False]) > 1e-2 * jnp.linalg.norm(grads[False])

    def direct(h):  # weights as constants, bias through mu_G
        f = normalize_features(h)
        head = NearestETFHead(D, K)
        head(h, LABELS)
        W = jax.lax.stop_gradient(head.kernel[...])
        logits = f @ W - (jnp.mean(f, axis=0) @ W)[None, :]
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, LABELS))

    np.testing.assert_allclose(jax.jit(jax.grad(direct))(h), grads[False], atol=1e-6)


def test_whole_head_gradient_matches_finite_differences(x64):
    head = NearestETFHead(D, K, param_dtype=jnp.float64)
    head(features(3, dtype=jnp.float64), LABELS)  # a step before: a frame to stay close to, alpha < 1
    graphdef, state = nnx.split(head)
    loss = jax.jit(lambda h: step(graphdef, state, h, LABELS)[0])
    h, direction = features(0, dtype=jnp.float64), features(1, dtype=jnp.float64)
    e = 1e-5
    f = lambda k: float(loss(h + k * e * direction))
    finite = (8 * (f(1) - f(-1)) - (f(2) - f(-2))) / (12 * e)
    exact = float(jnp.sum(jax.jit(jax.grad(loss))(h) * direction))
    assert abs(finite - exact) < 1e-7 * max(1.0, abs(exact))


def test_evaluation_uses_the_last_frame_and_leaves_the_state_alone():
    head = NearestETFHead(D, K)
    logits = head(features(), LABELS)
    head.eval()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(head)))
    np.testing.assert_allclose(head(features()), logits, atol=1e-5)
    assert head(features(9, (3, D))).shape == (3, K)
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(head)))
    head.train()
    head(features(), LABELS)
    assert int(head.count[...]) == 2


def test_nothing_in_the_etf_heads_is_a_parameter():
    for head in (NearestETFHead(D, K), FixedETFHead(D, K)):
        assert not jax.tree.leaves(nnx.state(head, nnx.Param))
        assert jax.tree.leaves(nnx.state(head, nnx.BatchStat))


def test_checkpoint_restores_the_head_bit_for_bit(tmp_path):
    head = NearestETFHead(D, K)
    head(features(0), LABELS)
    saved = nnx.to_pure_dict(nnx.state(head))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "head", saved)
        checkpointer.wait_until_finished()
        fresh = NearestETFHead(D, K)
        restored = checkpointer.restore(tmp_path / "head", nnx.to_pure_dict(nnx.state(fresh)))
    graphdef, state = nnx.split(fresh)
    nnx.replace_by_pure_dict(state, restored)
    fresh = nnx.merge(graphdef, state)
    np.testing.assert_array_equal(fresh(features(1), LABELS), head(features(1), LABELS))
    np.testing.assert_array_equal(fresh.prox[...], head.prox[...])


def test_bfloat16_features_are_classified_in_float32():
    h = features(0, (B, D), jnp.bfloat16)
    head = NearestETFHead(D, K)
    logits = head(h, LABELS)
    assert logits.dtype == jnp.float32 and head.prox[...].dtype == jnp.float32
    reference = NearestETFHead(D, K)(h.astype(jnp.float32), LABELS)
    np.testing.assert_array_equal(logits, reference)
    graphdef, state = nnx.split(NearestETFHead(D, K))
    assert jax.eval_shape(jax.grad(lambda h: step(graphdef, state, h, LABELS)[0]), h).dtype == jnp.bfloat16


def test_zero_features_give_finite_logits_and_gradients():
    graphdef, state = nnx.split(NearestETFHead(D, K))
    loss, grad = jax.jit(jax.value_and_grad(lambda h: step(graphdef, state, h, LABELS)[0]))(jnp.zeros((B, D)))
    np.testing.assert_allclose(loss, np.log(K), rtol=1e-6)
    assert jnp.isfinite(grad).all()


def test_one_dimension_less_than_classes_trains():
    graphdef, state = nnx.split(NearestETFHead(K - 1, K))
    h = features(0, (B, K - 1))
    f = jax.jit(jax.value_and_grad(functools.partial(step, graphdef), argnums=1, has_aux=True))
    first = None
    for _ in range(30):
        (loss, (_, state)), g = f(state, h, LABELS)
        h = h - 0.5 * g
        first = loss if first is None else first
    assert float(loss) < 0.3 * float(first)


def test_training_steps_compile_once():
    graphdef, state = nnx.split(NearestETFHead(D, K))
    f = jax.jit(functools.partial(step, graphdef))
    for seed in range(3):
        _, (_, state) = f(state, features(seed), LABELS)
    assert f._cache_size() == 1


# Eight devices


def run_steps(one_step, state, W, batch):
    """Three steps of a linear backbone trained through the head."""
    losses = []
    for seed in range(3):
        loss, W, state = one_step(state, W, features(seed, (batch, 6), jnp.float64))
        losses.append(loss)
    return jnp.stack(losses), W, nnx.to_pure_dict(state)


@pytest.mark.parametrize("partitioner", ["jit", "shard_map"])
@pytest.mark.parametrize(("classes", "width"), [(K, D), (GRAM_MIN_COLUMNS, 40)], ids=["svd", "gram"])
def test_eight_devices_equal_one(partitioner, classes, width, x64):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    W = features(7, (6, width), jnp.float64)
    batch = 4 * classes
    labels = jnp.arange(batch, dtype=jnp.int32) % classes

    def one_step(graphdef, state, W, x, labels, axis=None):
        def loss(W):
            value, (_, new) = step(graphdef, state, x @ W, labels)
            return value if axis is None else jax.lax.pmean(value, axis), new

        (value, state), g = jax.value_and_grad(loss, has_aux=True)(W)
        return value, W - 0.3 * g, state

    graphdef, state = nnx.split(NearestETFHead(width, classes, param_dtype=jnp.float64))
    single = run_steps(jax.jit(lambda s, W, x: one_step(graphdef, s, W, x, labels)), state, W, batch)
    split = NamedSharding(mesh, P("data"))
    if partitioner == "jit":
        sharded = jax.jit(lambda s, W, x, y: one_step(graphdef, s, W, x, y))
    else:
        graphdef, state = nnx.split(NearestETFHead(width, classes, axis_name="data", param_dtype=jnp.float64))
        sharded = jax.jit(
            jax.shard_map(
                lambda s, W, x, y: one_step(graphdef, s, W, x, y, "data"),
                mesh=mesh,
                in_specs=(P(), P(), P("data"), P("data")),
                out_specs=P(),
            )
        )
    put = lambda x: jax.device_put(x, split)
    state, W = jax.device_put((state, W), NamedSharding(mesh, P()))
    many = run_steps(lambda s, W, x: sharded(s, W, put(x), put(labels)), state, W, batch)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), single, many)
    assert jnp.abs(single[1] - W).max() > 1e-3


def test_fixed_head_averages_its_bias_over_the_mesh():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    h = features()
    head = FixedETFHead(D, K, axis_name="data")
    sharded = jax.shard_map(lambda h: head(h), mesh=mesh, in_specs=P("data"), out_specs=P("data"))(h)
    np.testing.assert_allclose(sharded, FixedETFHead(D, K)(h), atol=1e-5)


# The baselines


def test_fixed_head_is_the_canonical_frame_with_a_bias_that_carries_no_gradient():
    h = features()
    head = FixedETFHead(D, K)
    f, W = normalize_features(h), simplex_etf(K, D)
    np.testing.assert_allclose(head(h), f @ W.T - (W @ f.mean(0))[None], atol=1e-5)
    with_constant = jax.grad(lambda h: jnp.sum((normalize_features(h) @ W.T - (W @ f.mean(0))[None, :]) ** 2))(h)
    np.testing.assert_allclose(jax.grad(lambda h: jnp.sum(head(h) ** 2))(h), with_constant, atol=1e-4)
    rotated = FixedETFHead(D, K, rngs=nnx.Rngs(0)).kernel[...]
    np.testing.assert_allclose(rotated.T @ rotated, W @ W.T, atol=1e-5)
    assert jnp.abs(rotated - W.T).max() > 0.1


def test_normalized_head_has_unit_rows_no_bias_and_any_width():
    head = NormalizedHead(2, 7, rngs=nnx.Rngs(0), temperature=3.0)
    kernel = head.kernel[...]
    np.testing.assert_allclose(jnp.linalg.norm(kernel, axis=0), 1, atol=1e-6)
    h = features(0, (5, 2))
    np.testing.assert_allclose(head(h), normalize_features(h, temperature=3.0) @ kernel, atol=1e-5)
    head.kernel[...] = 3 * kernel
    head.renormalize()
    np.testing.assert_allclose(head.kernel[...], kernel, atol=1e-6)


def test_dot_regression_pulls_the_true_logit_to_one_and_only_that():
    logits = jnp.array([[3.0, 9.0, 0.0], [1.0, 1.0, 5.0]])
    labels = jnp.array([0, 1])
    np.testing.assert_allclose(dot_regression_loss(logits, labels), [2.0, 0.0])
    g = jax.grad(lambda l: jnp.sum(dot_regression_loss(l, labels)))(logits)
    np.testing.assert_allclose(g, [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])


# Errors


def nan_features():
    return features().at[3, 2].set(jnp.nan)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: NearestETFHead(3, 5), "num_features=3"),
        (lambda: FixedETFHead(3, 5), "num_features=3"),
        (lambda: NearestETFHead(D, K, temperature=0.0), "temperature must be positive, got 0.0"),
        (lambda: NearestETFHead(D, K, proximal_weight=-1.0), "proximal_weight must be positive, got -1.0"),
        (lambda: NearestETFHead(D, K, average="mean"), "average .* got 'mean'"),
        (lambda: NearestETFHead(D, K, unseen="mean"), "unseen .* got 'mean'"),
        (lambda: NearestETFHead(D, K)(features()), "labels are needed in training"),
        (lambda: NearestETFHead(D, K)(features(0, (B, 3)), LABELS), r"\(16, 3\)"),
        (lambda: NearestETFHead(D, K)(features(), LABELS + 1), "got 4 at index 3"),
        (lambda: NearestETFHead(D, K)(features(), LABELS - 1), "got -1 at index 0"),
        (lambda: NearestETFHead(D, K)(nan_features(), LABELS), "in 1 of 16 rows, first row 3"),
        (lambda: validate_batch(features(), LABELS[:3], num_classes=K), r"\(16, 8\) and \(3,\)"),
    ],
)
def test_errors_name_the_argument_and_its_value(call, words):
    with pytest.raises(ValueError, match=words):
        call()
