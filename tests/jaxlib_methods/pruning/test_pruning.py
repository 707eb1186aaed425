"""Baselines, schedules, scopes, masks in optimizer states, and clear errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jaxlib_methods import models, pruning, trees

PARAMS = {"a": jnp.array([[1.0, -4.0], [2.0, -3.0]]), "b": jnp.array([0.5, 8.0])}


def quadratic(params, batch):
    return jnp.mean((batch @ params["a"] @ params["b"]) ** 2)


@pytest.mark.contract
def test_grasp_is_the_derivative_of_the_gradient_flow(x64, key):
    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    batch = jax.random.normal(key, (5, 2), jnp.float64)

    def flow(gates):
        gated = jax.tree.map(jnp.multiply, params, gates)
        return optax.tree.norm(jax.grad(quadratic)(gated, batch), squared=True)

    # d|g|^2/dc at c = 1 is 2 w H g: the gates of the parameters, not of the gradient.
    expected = jax.grad(lambda gates: flow(gates) / 2)(jax.tree.map(jnp.ones_like, params))
    ours = pruning.grasp(quadratic, params, batch)
    for name in params:
        np.testing.assert_allclose(ours[name], expected[name], rtol=1e-10)


def test_synflow_conserves_flow_in_every_layer_and_reads_no_data(key):
    forward = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    ones = pruning.synflow(forward, PARAMS, jnp.ones((1, 2)))
    noise = pruning.synflow(forward, PARAMS, jax.random.normal(key, (1, 2)))
    np.testing.assert_allclose(jnp.sum(ones["a"]), jnp.sum(ones["b"]), rtol=1e-6)
    np.testing.assert_array_equal(ones["a"], noise["a"])


def test_magnitude_and_random_scores(key):
    np.testing.assert_array_equal(pruning.scores.magnitude(PARAMS)["a"], np.abs(PARAMS["a"]))
    draws = pruning.scores.random({"a": jnp.zeros(1000), "b": jnp.zeros(1000)}, key=key)
    assert abs(float(draws["a"].mean()) - 0.5) < 0.05 and not jnp.array_equal(draws["a"], draws["b"])


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.75])
def test_scope_per_layer_keeps_the_same_share_of_every_leaf(sparsity):
    masks = pruning.prune_masks(pruning.scores.magnitude(PARAMS), sparsity, scope="per_layer")
    for name, leaf in PARAMS.items():
        assert int(masks[name].sum()) == round(leaf.size * (1 - sparsity))
    together = pruning.prune_masks(pruning.scores.magnitude(PARAMS), 0.5)
    assert [int(together[name].sum()) for name in PARAMS] == [2, 1]


@pytest.mark.parametrize("scope", ["global", "per_layer"])
def test_masks_inside_shard_map_are_parts_of_those_of_the_whole_network(scope, key):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    scores = {"a": jax.random.uniform(key, (16, 3)), "b": jnp.ones((24,)), "bn": None, "c": jnp.arange(5.0)}
    specs = {"a": P("model"), "b": P("model"), "bn": None, "c": P()}
    local = lambda scores: pruning.prune_masks(scores, 0.6, scope=scope, specs=specs)
    masks = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs))(scores)
    expected = pruning.prune_masks(scores, 0.6, scope=scope)
    assert masks["bn"] is None
    for name in ("a", "b", "c"):
        np.testing.assert_array_equal(masks[name], expected[name])


@pytest.mark.parametrize("scope", ["global", "per_layer"])
@pytest.mark.parametrize("schedule", ["exponential", "linear"])
def test_iterative_pruning_equals_a_loop_in_python(schedule, scope, key):
    params = {"a": jax.random.normal(key, (8, 6)), "b": jax.random.normal(jax.random.key(1), (6,)), "bn": None}
    score = lambda p: {"a": jnp.abs(p["a"] * p["b"][None, :]), "b": jnp.abs(p["b"]) * p["a"].sum() ** 2, "bn": None}
    steps, sparsity = 5, 0.7
    masks = pruning.iterative_prune(score, params, sparsity, num_steps=steps, schedule=schedule, scope=scope)
    expected = {"a": np.ones((8, 6), bool), "b": np.ones(6, bool)}
    for t in range(1, steps + 1):
        share = (1 - sparsity) ** (t / steps) if schedule == "exponential" else 1 - sparsity * t / steps
        masked = {name: jnp.where(mask, params[name], 0.0) for name, mask in expected.items()}
        scores = {n: np.where(expected[n], s, -np.inf) for n, s in score(masked).items() if s is not None}
        groups = [("a", "b")] if scope == "global" else [("a",), ("b",)]
        for group in groups:
            flat = np.concatenate([scores[name].ravel() for name in group])
            keep = np.zeros(flat.size, bool)
            keep[np.argsort(-flat, kind="stable")[: round(flat.size * share)]] = True
            for name in group:
                size = scores[name].size
                expected[name], keep = keep[:size].reshape(scores[name].shape), keep[size:]
    assert masks["bn"] is None
    for name in expected:
        np.testing.assert_array_equal(masks[name], expected[name])


def test_candidates_by_policy_on_a_network_with_batch_norm():
    build = lambda: models.create("alexnet_s", num_classes=10, input_shape=(32, 32, 3), rngs=nnx.Rngs(0))
    params = nnx.state(nnx.eval_shape(build), nnx.Param)
    names = jax.tree.leaves(trees.path_names(params))
    snip = dict(zip(names, jax.tree.leaves(pruning.mark_prunable(params, "snip")), strict=True))
    assert not any(gated for name, gated in snip.items() if "bn" in name)
    assert all(gated for name, gated in snip.items() if "bn" not in name)
    weights = dict(zip(names, jax.tree.leaves(pruning.mark_prunable(params, "weights")), strict=True))
    assert {name.rpartition("/")[2] for name, gated in weights.items() if gated} == {"kernel"}


def test_none_is_never_pruned():
    masks = pruning.prune_masks({"a": jnp.abs(PARAMS["a"]), "b": None}, 0.5)
    masked = pruning.apply_masks(PARAMS, masks)
    assert masks["b"] is None
    np.testing.assert_array_equal(masked["b"], PARAMS["b"])
    np.testing.assert_array_equal(masked["a"], [[0, -4], [0, -3]])


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 8)])
def test_packing_is_exact(shape, key):
    masks = {"w": jax.random.bernoulli(key, 0.5, shape), "frozen": None}
    packed = pruning.masks.pack_masks(masks)
    assert packed["w"].dtype == jnp.uint8 and packed["w"].size == -(-max(masks["w"].size, 1) // 8)
    back = pruning.masks.unpack_masks(packed, masks)
    assert back["frozen"] is None
    np.testing.assert_array_equal(back["w"], masks["w"])


def test_a_link_for_chains_and_masks_from_a_function():
    nonzero = lambda params: jax.tree.map(lambda p: p != 0, params)
    params = {"w": jnp.array([1.0, 0.0])}
    optimizer = optax.chain(optax.sgd(1.0, momentum=0.9), pruning.masks.mask_updates(nonzero))
    updates, _ = optimizer.update({"w": jnp.array([1.0, jnp.nan])}, optimizer.init(params), params)
    np.testing.assert_array_equal(updates["w"], [-1, 0])


def test_masks_can_be_replaced_without_recompiling():
    optimizer = pruning.pruned(optax.sgd(1.0), {"w": jnp.array([True, False])})
    params = {"w": jnp.ones(2)}
    state = optimizer.init(params)
    update = jax.jit(optimizer.update)
    grads = {"w": jnp.ones(2)}
    np.testing.assert_array_equal(update(grads, state, params)[0]["w"], [-1, 0])
    state = state._replace(masks={"w": jnp.array([False, True])})
    np.testing.assert_array_equal(update(grads, state, params)[0]["w"], [0, -1])
    assert update._cache_size() == 1


def test_summary_counts_what_is_kept():
    rows = pruning.sparsity.summarize_sparsity(pruning.prune_masks(pruning.scores.magnitude(PARAMS), 0.5))
    assert [(row.path, row.kept, row.total) for row in rows] == [("a", 2, 4), ("b", 1, 2), ("total", 3, 6)]
    assert rows[-1].sparsity == 0.5
    assert "50.0%" in pruning.sparsity.format_sparsity(rows)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.2, float("nan")])
def test_sparsity_outside_its_range_is_an_error(sparsity):
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        pruning.prune_masks(PARAMS, sparsity)
    with pytest.raises(ValueError, match=r"sparsity must lie in \[0, 1\)"):
        pruning.iterative_prune(pruning.scores.magnitude, PARAMS, sparsity)


def test_bad_input_is_named():
    batch = jnp.ones((4, 2))
    with pytest.raises(ValueError, match="batch is empty"):
        pruning.connection_sensitivity(quadratic, PARAMS, batch[:0])
    with pytest.raises(ValueError, match="num_microbatches must divide the batch, got 3 for 4"):
        pruning.connection_sensitivity(quadratic, PARAMS, batch, num_microbatches=3)
    with pytest.raises(ValueError, match="the loss is nan"):
        pruning.connection_sensitivity(quadratic, PARAMS, batch * jnp.nan)
    with pytest.raises(ValueError, match="NaN"):
        pruning.prune_masks({"w": jnp.array([1.0, jnp.nan])}, 0.5)
    overflow = lambda params: jax.tree.map(lambda p: jnp.abs(p) * 1e38 * 1e38, params)
    with pytest.raises(ValueError, match="not finite before cut 1 of 3"):
        pruning.iterative_prune(overflow, PARAMS, 0.5, num_steps=3)
    with pytest.raises(ValueError, match="policy must be"):
        pruning.mark_prunable(PARAMS, "kernels")
    with pytest.raises(ValueError, match="scope must be"):
        pruning.prune_masks(PARAMS, 0.5, scope="layer")
    with pytest.raises(ValueError, match="at 'a' the parameter has the shape"):
        pruning.apply_masks(PARAMS, {"a": jnp.ones(3, bool), "b": None})
    with pytest.raises(ValueError, match="masks must be a tree like the parameters"):
        pruning.pruned(optax.sgd(0.1), {"c": None}).init(PARAMS)
