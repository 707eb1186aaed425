"""The selection by counting against a stable sort: any values, any tree, any sharding, any traced count."""

import functools

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from jaxlib_methods.kernels.threshold import ARG_SPECS, keep_largest, reference

SHAPES = ((3, 5), (), (2, 2, 3), (0, 4), (7,))
SIZE = 35


def oracle(leaves, kappa):
    """The mask of a stable descending argsort over the concatenated leaves; numpy keeps subnormals and -0 = +0."""
    flat = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in leaves])
    kept = np.zeros(flat.size, bool)
    kept[np.argsort(-flat, kind="stable")[:kappa]] = True
    parts = np.split(kept, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    return [part.reshape(np.shape(leaf)) for part, leaf in zip(parts, leaves, strict=True)]


def assert_same(masks, expected):
    for mask, wanted in zip(masks, expected, strict=True):
        assert mask.dtype == bool and mask.shape == wanted.shape
        np.testing.assert_array_equal(mask, wanted)


def split(flat):
    parts = np.split(flat, np.cumsum([int(np.prod(shape)) for shape in SHAPES])[:-1])
    return [part.reshape(shape) for part, shape in zip(parts, SHAPES, strict=True)]


@functools.cache
def jitted(per_leaf=False):
    if per_leaf:
        return jax.jit(lambda scores, kappas: keep_largest(scores, list(kappas)))
    return jax.jit(keep_largest)


SPECIAL = [0.0, -0.0, 1e-45, 2e-45, 1e-38, 1.0, 1.0000001, 3e38, np.inf, -np.inf, -1.0]
VALUES = {
    "non-negative": st.floats(0, np.inf, width=32, allow_subnormal=True),
    "signed": st.floats(-np.inf, np.inf, width=32, allow_subnormal=True),
    "many ties": st.sampled_from([0.0, 1.0, 2.0]),
    "special": st.sampled_from([float(np.float32(x)) for x in SPECIAL]),
}


@pytest.mark.contract
@pytest.mark.parametrize("values", VALUES)
@hypothesis.settings(deadline=None, max_examples=60, derandomize=True)
@hypothesis.given(data=st.data(), kappa=st.integers(0, SIZE))
def test_equals_a_stable_argsort(values, data, kappa):
    leaves = split(data.draw(hnp.arrays(np.float32, SIZE, elements=VALUES[values])))
    masks = jitted()([jnp.asarray(leaf) for leaf in leaves], kappa)
    assert sum(int(mask.sum()) for mask in masks) == kappa
    assert_same(masks, oracle(leaves, kappa))


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_dtype(dtype, ties, x64):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 3, SIZE) if ties else rng.standard_normal(SIZE)
    leaves = [jnp.asarray(leaf, dtype) for leaf in split(values)]
    for kappa in (0, 1, 11, 34, SIZE):
        assert_same(jitted()(leaves, kappa), oracle(leaves, kappa))


def test_float64_is_not_rounded_to_float32(x64):
    scores = 1 + np.arange(8) * 1e-15
    np.testing.assert_array_equal(keep_largest(jnp.asarray(scores), 3), np.arange(8) >= 5)


def test_mixed_dtypes_are_compared_exactly():
    leaves = [jnp.array([1.0, 2.0], jnp.bfloat16), jnp.array([1.001, 2.5], jnp.float16), jnp.array([1.002, 1.0])]
    for kappa in range(7):
        assert_same(keep_largest(leaves, kappa), oracle(leaves, kappa))


@pytest.mark.parametrize("ties", [False, True])
def test_a_tree_of_counts_cuts_every_leaf_by_itself(ties):
    rng = np.random.default_rng(1)
    leaves = split((rng.integers(0, 3, SIZE) if ties else rng.standard_normal(SIZE)).astype(np.float32))
    for share in (0.0, 0.3, 0.5, 1.0):
        kappas = np.array([round(leaf.size * share) for leaf in leaves])
        masks = jitted(per_leaf=True)([jnp.asarray(leaf) for leaf in leaves], kappas)
        assert_same(masks, [oracle([leaf], k)[0] for leaf, k in zip(leaves, kappas, strict=True)])


def test_one_compilation_serves_all_counts():
    traces = []

    @jax.jit
    def select(scores, kappa):
        traces.append(None)
        return keep_largest(scores, kappa)

    scores = jnp.arange(6.0)
    for kappa in (-3, 0, 2, 6, 9):  # traced counts are clipped
        np.testing.assert_array_equal(select(scores, kappa), np.arange(6) >= 6 - min(max(kappa, 0), 6))
    assert len(traces) == 1


def test_vmap():
    scores = jnp.asarray(np.random.default_rng(2).integers(0, 4, (3, 6)), jnp.float32)
    masks = jax.vmap(keep_largest)(scores, jnp.array([1, 3, 5]))
    for mask, row, kappa in zip(masks, scores, (1, 3, 5), strict=True):
        np.testing.assert_array_equal(mask, oracle([row], kappa)[0])


def test_none_and_empty_trees():
    assert keep_largest({"a": None, "b": {}}, 0) == {"a": None, "b": {}}
    masks = keep_largest({"a": None, "b": jnp.array([1.0, 2.0])}, 1)
    assert masks["a"] is None and masks["b"].tolist() == [False, True]


# ------------------------------------------------------------------------------------------------------------- shards


SHARDED_SHAPES = {"both": (8, 6), "rows": (4, 3, 2), "pair": (16,), "replicated": (5,)}
SPECS = {"both": P("x", "y"), "rows": P("x"), "pair": P(("x", "y")), "replicated": P()}


def sharded_scores(ties, seed=0):
    rng = np.random.default_rng(seed)
    draw = lambda shape: (rng.integers(0, 3, shape) if ties else rng.random(shape)).astype(np.float32)
    return {name: draw(shape) for name, shape in SHARDED_SHAPES.items()}


def make_mesh(kind):
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind, kind))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_jit_over_shards_equals_one_device_and_moves_no_scores(kind):
    mesh = make_mesh(kind)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPECS.items()}
    select = jax.jit(keep_largest, out_shardings=shardings if kind == AxisType.Auto else None)
    with jax.set_mesh(mesh):
        for ties in (False, True):
            scores = sharded_scores(ties)
            placed = {name: jax.device_put(leaf, shardings[name]) for name, leaf in scores.items()}
            for kappa in (0, 17, 40, 93):
                masks = select(placed, kappa)
                expected = dict(zip(sorted(scores), oracle([scores[n] for n in sorted(scores)], kappa), strict=True))
                for name, mask in masks.items():
                    np.testing.assert_array_equal(mask, expected[name])
                    assert mask.sharding.is_equivalent_to(shardings[name], mask.ndim)
        program = select.lower(placed, 17).compile().as_text()
    gathered = [line for line in program.splitlines() if " all-gather(" in line]
    assert gathered and all(line.split("=")[1].split("[")[0].strip() == "s32" for line in gathered)
    assert "f32[8,6]" not in program and "f32[16]" not in program  # no device ever sees a whole leaf


def test_shard_map_equals_one_device():
    mesh = make_mesh(AxisType.Auto)
    local = lambda scores, kappa: keep_largest(scores, kappa, specs=SPECS)
    select = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(SPECS, P()), out_specs=SPECS))
    for ties in (False, True):
        scores = sharded_scores(ties, seed=1)
        for kappa in (0, 17, 40, 93):
            masks = select(scores, kappa)
            assert_same(
                [masks[name] for name in sorted(masks)], oracle([scores[name] for name in sorted(scores)], kappa)
            )


def test_shard_map_with_a_count_for_every_leaf():
    mesh = make_mesh(AxisType.Auto)
    kappas = {name: int(np.prod(shape)) // 3 for name, shape in SHARDED_SHAPES.items()}
    local = lambda scores: keep_largest(scores, kappas, specs=SPECS)
    masks = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(SPECS,), out_specs=SPECS))(sharded_scores(True))
    for name, leaf in sharded_scores(True).items():
        np.testing.assert_array_equal(masks[name], oracle([leaf], kappas[name])[0])


# --------------------------------------------------------------------------------------------- cost, workloads, errors


def test_no_array_of_the_scores_size_is_written_but_the_masks():
    scores = {"a": jax.ShapeDtypeStruct((1000, 1000), jnp.float32), "b": jax.ShapeDtypeStruct((10**5,), jnp.float32)}
    memory = jax.jit(keep_largest).lower(scores, 5).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 20_000


@pytest.mark.parametrize("spec", [spec for spec in ARG_SPECS if "ci" in spec.tags], ids=lambda spec: spec.name)
def test_real_workloads(spec):
    rng = np.random.default_rng(0)
    scores = {name: np.abs(rng.standard_normal(leaf.shape, np.float32)) for name, leaf in spec.args["scores"].items()}
    for name in scores:
        if name.endswith("bias"):
            scores[name][...] = 0
    masks = keep_largest(scores, spec.args["num_keep"])
    names = sorted(scores)
    assert_same([masks[name] for name in names], oracle([scores[name] for name in names], spec.args["num_keep"]))


def test_workloads_have_the_published_sizes():
    sizes = {spec.name: sum(leaf.size for leaf in spec.args["scores"].values()) for spec in ARG_SPECS}
    assert (sizes["lenet_300_100"], sizes["lenet5_caffe"], sizes["vgg_d"]) == (266_610, 431_080, 15_245_130)
    assert sizes["resnet50"] == 25_557_032 - 53_120  # torchvision's count without the scale and shift of batch norm


def test_few_passes(x64):
    """11 passes for the worst float32 input, 22 for float64: the interval shrinks by WAYS each time."""
    for dtype, bound in ((jnp.float32, 11), (jnp.float64, 22)):
        low = jnp.asarray([jnp.iinfo(reference.ordered_bits(jnp.ones((), dtype)).dtype).min])
        high, passes = -(low + 1), 0
        while low[0] < high[0]:  # the worst case: always the widest part, which is the first one
            high = reference._candidates(low[:, None], high[:, None])[:, 0] - 1
            passes += 1
        assert passes <= bound


@pytest.mark.parametrize("nan", [np.nan, -np.nan])
def test_nan_is_an_error_that_names_the_leaf(nan):
    scores = {"fine": jnp.ones(3), "bad": jnp.array([1.0, nan])}
    with pytest.raises(ValueError, match=r"scores\['bad'\] contains NaN"):
        keep_largest(scores, 2)
    assert sum(int(mask.sum()) for mask in jax.jit(keep_largest)(scores, 2).values()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({"a": jnp.arange(3)}, 1), r"scores\['a'\] must be float16.*got int32"),
        ((jnp.ones(3), 4), r"num_keep must lie in \[0, 3\], the number of scores, got 4"),
        ((jnp.ones(3), -1), r"num_keep must lie in \[0, 3\]"),
        ((jnp.ones(3), 1.5), "num_keep must be an integer, got 1.5"),
        (([jnp.ones(3)], [1, 2]), "num_keep must be one integer or a tree like scores"),
        (([jnp.ones(3)], [4]), r"num_keep\[0\] must lie in \[0, 3\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        keep_largest(*arguments)


def test_bad_specs():
    with pytest.raises(ValueError, match="more entries than dimensions"):
        keep_largest(jnp.ones(3), 1, specs=P("x", "y"))
    with pytest.raises(ValueError, match="a prefix of scores"):
        keep_largest([jnp.ones(3)], 1, specs=[P(), P()])


def test_too_many_scores_for_32_bits():
    with pytest.raises(ValueError, match="enable 64-bit integers"):
        jax.eval_shape(lambda scores: keep_largest(scores, 1), jax.ShapeDtypeStruct((2**16, 2**15), jnp.float32))


def test_implementations_by_name():
    assert keep_largest(jnp.ones(2), 1, implementation="xla").tolist() == [True, False]
    with pytest.raises(NotImplementedError, match="pallas_gpu"):
        keep_largest(jnp.ones(2), 1, implementation="pallas_gpu")
    with pytest.raises(ValueError, match="implementation must be"):
        keep_largest(jnp.ones(2), 1, implementation="triton")
