"""The tree-type contract: the same rules give the same answer on every container that users keep parameters in."""

from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods import trees


class Pair(NamedTuple):
    kernel: Any
    bias: Any


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
        self.bn = nnx.BatchNorm(2, rngs=rngs)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        boxed = nn.with_partitioning(nn.initializers.ones, (None, "model"))
        return nn.Dense(2, kernel_init=boxed, name="head")(nn.Dense(3, name="body")(x))


class Scale(eqx.Module):
    value: jax.Array  # a field with the name that flax uses for its box: it must stay in the path


def linen_variables():
    return LinenNet().init(jax.random.key(0), jnp.zeros((1, 4)))


ARRAY = np.ones(2, np.float32)
# container, the paths of its leaves
CONTAINERS = {
    "dict": (lambda: {"a": {"kernel": ARRAY, "bias": ARRAY}}, ["a/bias", "a/kernel"]),
    "integer keys": (lambda: {0: ARRAY, 1: {2: ARRAY}}, ["0", "1/2"]),
    "tuple": (lambda: (ARRAY, [ARRAY, ARRAY]), ["0", "1/0", "1/1"]),
    "named tuple": (lambda: Pair(kernel=ARRAY, bias=[ARRAY]), ["kernel", "bias/0"]),
    "none leaves": (lambda: {"a": None, "b": (None, ARRAY)}, ["b/1"]),
    "bare array": (lambda: ARRAY, [""]),
    "bare number": (lambda: 1.0, [""]),
    "empty": (lambda: {"a": None, "b": ()}, []),
    "linen": (
        linen_variables,
        ["params/body/bias", "params/body/kernel", "params/head/bias", "params/head/kernel"],
    ),
    "nnx.State": (
        lambda: nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param),
        [
            "bn/bias",
            "bn/scale",
            "conv1/bias",
            "conv1/kernel",
            "layers/0/bias",
            "layers/0/kernel",
            "layers/1/bias",
            "layers/1/kernel",
        ],
    ),
    "nnx.Module": (
        lambda: nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))]),
        ["0/bias", "0/kernel"],
    ),
    "nnx.Variable": (lambda: nnx.Param(jnp.ones(2)), [""]),
    "nnx.Variable of a dict": (lambda: nnx.State({"w": nnx.Param({"value": jnp.ones(2)})}), ["w/value"]),
    "equinox": (
        lambda: eqx.filter(eqx.nn.MLP(2, 2, 2, 1, key=jax.random.key(0)), eqx.is_array),
        ["layers/0/weight", "layers/0/bias", "layers/1/weight", "layers/1/bias"],
    ),
    "a field called value": (lambda: {"scale": Scale(jnp.ones(2))}, ["scale/value"]),
    "shapes without arrays": (lambda: {"w": jax.ShapeDtypeStruct((2,), jnp.float32)}, ["w"]),
}


@pytest.fixture(params=CONTAINERS, scope="module")
def container(request):
    build, paths = CONTAINERS[request.param]
    return build(), paths


@pytest.fixture(params=sorted(CONTAINERS.keys() - {"bare number", "empty", "shapes without arrays"}), scope="module")
def trainable(request):
    build, paths = CONTAINERS[request.param]
    return build(), paths


class TestEveryContainer:
    @pytest.mark.contract
    def test_path_names(self, container):
        tree, paths = container
        names = trees.path_names(tree)
        assert jax.tree.leaves(names) == paths
        assert jax.tree.structure(names) == jax.tree.structure(tree)

    def test_labels_and_masks_agree(self, container):
        tree, paths = container
        pattern = "kernel|weight|0"
        labels = trees.label_tree(tree, [(pattern, "yes")], default="no", allow_unmatched=True)
        mask = trees.mask_tree(tree, pattern, allow_unmatched=True)
        expected = [any(word in path for word in ("kernel", "weight", "0")) for path in paths]
        assert [label == "yes" for label in jax.tree.leaves(labels)] == expected
        assert jax.tree.leaves(mask) == expected
        assert all(type(leaf) is bool for leaf in jax.tree.leaves(mask))
        assert jax.tree.structure(mask) == jax.tree.structure(labels) == jax.tree.structure(tree)

    def test_partition_and_combine_are_inverse(self, container):
        tree, _ = container
        mask = trees.mask_tree(tree, "kernel|weight|0", allow_unmatched=True)
        chosen, rest = trees.partition(tree, mask)
        assert len(jax.tree.leaves(chosen)) == sum(jax.tree.leaves(mask))
        assert len(jax.tree.leaves(chosen)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree))
        for whole in (trees.combine(chosen, rest), trees.combine(rest, chosen)):
            assert jax.tree.structure(whole) == jax.tree.structure(tree)
            assert all(a is b for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(tree), strict=True))

    def test_optax_partition_freezes_what_the_labels_say(self, trainable):
        tree, paths = trainable
        labels = lambda tree: trees.label_tree(tree, [("bias", "frozen")], default="trained", allow_unmatched=True)
        optimizer = optax.partition({"trained": optax.sgd(1.0), "frozen": optax.set_to_zero()}, labels)
        grads = jax.tree.map(jnp.ones_like, tree)
        updates, _ = optimizer.update(grads, optimizer.init(tree), tree)
        for path, update in zip(paths, jax.tree.leaves(updates), strict=True):
            np.testing.assert_array_equal(update, 0.0 if "bias" in path else -1.0)

    def test_optax_masked_transforms_what_the_mask_says(self, trainable):
        tree, paths = trainable
        optimizer = optax.masked(optax.scale(3.0), lambda tree: trees.mask_tree(tree, "bias", allow_unmatched=True))
        updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, tree), optimizer.init(tree), tree)
        for path, update in zip(paths, jax.tree.leaves(updates), strict=True):
            np.testing.assert_array_equal(update, 3.0 if "bias" in path else 1.0)


class TestRules:
    params = {"conv": {"kernel": 1.0, "bias": 2.0}, "head": {"kernel": 3.0}}  # noqa: RUF012

    def test_the_first_match_wins(self):
        rules = [("kernel", "a"), ("head", "b"), ("bias", "c")]
        labels = trees.label_tree(self.params, rules, allow_unmatched=True)
        assert labels == {"conv": {"kernel": "a", "bias": "c"}, "head": {"kernel": "a"}}

    def test_the_expression_is_searched_anywhere_unless_anchored(self):
        assert trees.mask_tree(self.params, "ern")["head"]["kernel"]
        with pytest.raises(ValueError, match=r"'\^kernel'"):
            trees.mask_tree(self.params, "^kernel")

    def test_a_rule_that_matches_nothing_is_an_error_with_the_rule_and_the_paths(self):
        with pytest.raises(ValueError, match=r"'kernl'.*'conv/bias', 'conv/kernel', 'head/kernel'"):
            trees.label_tree(self.params, [("kernl", "a")], default="b")
        with pytest.raises(ValueError, match=r"'kernl'.*'conv/bias'"):
            trees.mask_tree(self.params, "bias", "kernl")
        assert not any(jax.tree.leaves(trees.mask_tree(self.params, "kernl", allow_unmatched=True)))

    def test_a_shadowed_rule_is_an_error_that_says_so(self):
        with pytest.raises(ValueError, match=r"'head'.*earlier rules take, 'head/kernel'"):
            trees.label_tree(self.params, [("kernel", "a"), ("head", "b")], default="c")

    def test_a_leaf_without_a_label_is_an_error(self):
        with pytest.raises(ValueError, match=r"no rule matches 'conv/bias'.*default="):
            trees.label_tree(self.params, [("kernel", "a")])

    def test_a_long_list_of_paths_is_cut(self):
        many = {f"layer{i}": 0.0 for i in range(9)}
        with pytest.raises(ValueError, match=r"'layer4' and 4 more"):
            trees.mask_tree(many, "kernel")

    def test_a_broken_expression_is_an_error(self):
        with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
            trees.mask_tree(self.params, "(")

    def test_match_counts(self):
        rules = [("kernel", "a"), ("head", "b"), ("bn", "c")]
        assert trees.match_counts(self.params, rules) == {"kernel": 2, "head": 0, "bn": 0, "": 1}


class TestPartition:
    def test_a_mask_may_be_a_prefix(self):
        tree = {"a": {"w": 1.0, "b": 2.0}, "c": 3.0}
        chosen, rest = trees.partition(tree, {"a": True, "c": False})
        assert chosen == {"a": {"w": 1.0, "b": 2.0}, "c": None}
        assert rest == {"a": {"w": None, "b": None}, "c": 3.0}

    def test_an_elementwise_mask_is_an_error(self):
        with pytest.raises(ValueError, match=r"Python bools.*'w'.*mask_tree"):
            trees.partition({"w": ARRAY}, {"w": ARRAY > 0})

    def test_two_values_for_one_leaf_are_an_error(self):
        with pytest.raises(ValueError, match="2 values for one leaf"):
            trees.combine({"w": 1.0}, {"w": 2.0})
        with pytest.raises(ValueError, match="at least one"):
            trees.combine()

    def test_gradients_through_a_partition(self):
        params = {"w": jnp.array(2.0), "frozen": jnp.array(3.0)}
        trained, frozen = trees.partition(params, trees.mask_tree(params, "^w$"))

        @jax.jit
        def loss(trained):
            whole = trees.combine(trained, frozen)
            return whole["w"] * whole["frozen"]

        assert jax.tree.leaves(jax.grad(loss)(trained)) == [3.0]


class TestFindStates:
    def test_in_a_deep_chain(self):
        inner = optax.chain(optax.clip(1.0), optax.masked(optax.adam(optax.constant_schedule(0.1)), {"w": True}))
        optimizer = optax.MultiSteps(optax.chain(inner, optax.trace(0.9)), every_k_schedule=1)
        params = {"w": ARRAY}
        state = optimizer.init(params)
        assert len(trees.find_states(state, optax.ScaleByAdamState)) == 1
        assert len(trees.find_states(state, optax.TraceState)) == 1
        assert trees.find_states(state, optax.ScaleByLionState) == []
        (masked,) = trees.find_states(state, optax.MaskedState)
        assert trees.find_states(masked, optax.ScaleByAdamState)[0].count == 0
