"""Nine checks of SNIP, and what its scores and masks promise."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxlib_methods import models, pruning, trees


def loss_fn(params, batch):
    """Cross-entropy of a bias-free ReLU network given as a list of kernels."""
    logits = forward(params, batch["x"])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"]).mean()


def forward(params, x):
    *hidden, last = params
    for kernel in hidden:
        x = jax.nn.relu(x @ kernel)
    return x @ last


@pytest.fixture
def network(key):
    keys = jax.random.split(key, 5)
    sizes = (6, 12, 10, 4)
    params = [jax.random.normal(k, s) * s[0] ** -0.5 for k, s in zip(keys, itertools.pairwise(sizes), strict=False)]
    batch = {"x": jax.random.normal(keys[3], (16, 6)), "y": jax.random.randint(keys[4], (16,), 0, 4)}
    return params, batch


@pytest.mark.contract
def test_1_gate_gradient_is_weight_times_gradient(network):
    params, batch = network
    gated = lambda gates: loss_fn(jax.tree.map(jnp.multiply, params, gates), batch)
    expected = jax.grad(gated)(jax.tree.map(jnp.ones_like, params))
    for ours, explicit in zip(pruning.scores.gate_gradient(loss_fn, params, batch), expected, strict=True):
        np.testing.assert_allclose(ours, explicit, rtol=1e-5, atol=1e-7)


def test_2_worked_example():
    w, x = jnp.array([1.0, -2.0, 0.5]), jnp.array([[3.0, 1.0, -4.0]])
    square = lambda w, x: jnp.mean((x @ w) ** 2) / 2
    np.testing.assert_array_equal(pruning.scores.gate_gradient(square, w, x), [-3, 2, 2])
    scores = pruning.connection_sensitivity(square, w, x)
    np.testing.assert_allclose(scores, np.array([3, 2, 2]) / 7, rtol=1e-6)
    mask = pruning.prune_masks(scores, sparsity=1 / 3)  # a rule ">= the second largest" would keep three
    np.testing.assert_array_equal(mask, [True, True, False])


@pytest.mark.parametrize(
    ("model", "shape", "sparsity", "kept"),
    [
        ("lenet5", (28, 28, 1), 0.9, 43_108),
        ("lenet5", (28, 28, 1), 0.99, 4_311),
        ("lenet300", (28, 28, 1), 0.95, 13_331),
    ],
)
def test_3_exact_count_for_a_tied_network(model, shape, sparsity, kept):
    build = lambda: models.create(model, num_classes=10, input_shape=shape, rngs=nnx.Rngs(0))
    shapes = nnx.state(nnx.eval_shape(build), nnx.Param)
    scores = jax.tree.map(lambda s: jnp.round(jnp.linspace(0, 9, s.size)).reshape(s.shape), shapes)
    masks = pruning.prune_masks(scores, sparsity)
    total = pruning.sparsity.summarize_sparsity(masks)[-1]
    assert abs(total.kept - kept) <= 1  # 13330.5 rounds by floating-point error
    assert total.kept == round(total.total * (1 - sparsity))


def test_3_exact_count_of_vgg_d():
    build = lambda: models.create("vgg_d", num_classes=10, input_shape=(32, 32, 3), rngs=nnx.Rngs(0))
    params = nnx.state(nnx.eval_shape(build), nnx.Param)
    gated = trees.partition(params, pruning.mark_prunable(params, "snip"))[0]
    total = sum(leaf.size for leaf in jax.tree.leaves(gated))
    assert total == 15_245_130
    assert round(total * (1 - 0.95)) in (762_256, 762_257)


def test_4_scores_sum_to_one_and_ignore_the_scale_of_the_loss(network):
    params, batch = network
    scores = pruning.connection_sensitivity(loss_fn, params, batch)
    np.testing.assert_allclose(sum(jnp.sum(s) for s in scores), 1, rtol=1e-5)
    larger = pruning.connection_sensitivity(lambda p, b: 1e3 * loss_fn(p, b), params, batch)
    for a, b in zip(scores, larger, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_5_zero_biases_score_zero_and_are_pruned(key):
    model = models.create("lenet300", num_classes=10, input_shape=(4, 4, 1), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    batch = {"x": jax.random.normal(key, (20, 4, 4, 1)), "y": jnp.arange(20) % 10}
    loss = lambda p, b: optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, p)(b["x"]), b["y"]).mean()
    scores = pruning.connection_sensitivity(loss, params, batch)
    nonzero = sum(int(jnp.sum(s > 0)) for s in jax.tree.leaves(scores))
    total = sum(s.size for s in jax.tree.leaves(scores))
    for sparsity in (0.9, 1 - nonzero / total):
        masks = pruning.prune_masks(scores, sparsity)
        for name in ("dense1", "dense2", "dense3"):
            assert not jnp.any(scores[name]["bias"][...]) and not jnp.any(masks[name]["bias"][...])


def test_6_every_layer_conserves_the_signed_sum(x64, network):
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, network)
    sums = [float(jnp.sum(g)) for g in pruning.scores.gate_gradient(loss_fn, params, batch)]
    logits = forward(params, batch["x"])
    by_logits = jax.grad(lambda z: optax.softmax_cross_entropy_with_integer_labels(z, batch["y"]).mean())(logits)
    np.testing.assert_allclose(sums, float(jnp.sum(logits * by_logits)), rtol=1e-12)


def test_7_rescaling_neighbouring_layers_changes_nothing(network):
    params, batch = network
    scaled = [4.0 * params[0], 0.25 * params[1], params[2]]
    ours = pruning.connection_sensitivity(loss_fn, params, batch)
    for a, b in zip(ours, pruning.connection_sensitivity(loss_fn, scaled, batch), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-9)


def test_7_batch_norm_in_training_mode_hides_the_scale_of_a_layer(x64, network):
    params, batch = jax.tree.map(lambda x: x.astype(jnp.float64) if x.dtype == jnp.float32 else x, network)

    def loss(params, batch):
        x = batch["x"] @ params[0]
        x = x - x.mean(0, keepdims=True)
        x = x * jax.lax.rsqrt((x**2).mean(0, keepdims=True) + 1e-12)
        return loss_fn(params[1:], {"x": jax.nn.relu(x), "y": batch["y"]})

    ours = pruning.connection_sensitivity(loss, params, batch)
    scaled = pruning.connection_sensitivity(loss, [3.0 * params[0], *params[1:]], batch)
    for a, b in zip(ours, scaled, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-12)


def test_8_micro_batches_average_signed_gradients(network):
    params, batch = network
    whole = pruning.connection_sensitivity(loss_fn, params, batch)
    parts = pruning.connection_sensitivity(loss_fn, params, batch, num_microbatches=2)
    for a, b in zip(whole, parts, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)
    for a, b in zip(pruning.prune_masks(whole, 0.7), pruning.prune_masks(parts, 0.7), strict=True):
        np.testing.assert_array_equal(a, b)
    halves = [jax.tree.map(lambda x, i=i: x[8 * i : 8 * i + 8], batch) for i in range(2)]
    absolute = [jax.tree.map(jnp.abs, pruning.scores.gate_gradient(loss_fn, params, half)) for half in halves]
    wrong = jax.tree.map(lambda a, b: (a + b) / 2, *absolute)
    masks = pruning.prune_masks(wrong, 0.7)
    assert any(bool(jnp.any(a != b)) for a, b in zip(masks, pruning.prune_masks(whole, 0.7), strict=True))


def test_8_micro_batches_hold_one_gradient_at_a_time():
    w, batch = jax.ShapeDtypeStruct((100, 100), jnp.float32), jax.ShapeDtypeStruct((32, 100), jnp.float32)
    score = lambda w, x: pruning.scores.gate_gradient(lambda w, x: jnp.mean((x @ w) ** 2), w, x, num_microbatches=16)
    memory = jax.jit(score).lower(w, batch).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 100 * 100 * 4  # bytes of four copies of w; sixteen if they were stacked


def test_8_devices_average_signed_gradients(network):
    params, batch = network
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    score = lambda p, b: pruning.connection_sensitivity(loss_fn, p, b, axis_name="data", num_microbatches=2)
    sharded = jax.jit(jax.shard_map(score, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(params, batch)
    for a, b in zip(pruning.connection_sensitivity(loss_fn, params, batch), sharded, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("packed", [False, True])
def test_9_pruned_entries_and_their_momentum_stay_zero(network, packed):
    params, batch = network
    masks = pruning.prune_masks(pruning.connection_sensitivity(loss_fn, params, batch), 0.8)
    params = pruning.apply_masks(params, masks)
    inner = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    optimizer = pruning.pruned(inner, masks, packed=packed)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss_fn)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    start = params
    for _ in range(20):
        params, state = step(params, state)
    (trace,) = trees.find_states(state, optax.TraceState)
    for p, mask, moment, before in zip(params, masks, trace.trace, start, strict=True):
        assert not jnp.any(jnp.where(mask, 0.0, p)) and not jnp.any(jnp.where(mask, 0.0, moment))
        assert jnp.any(p != before)
