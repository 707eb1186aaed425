"""A subspace GPT in coordinates: the subspace network, any transform of its boundaries, and Adam that goes on."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxlib_methods import optimizers, trees
from jaxlib_methods.models import GPT, GPTConfig, gpt_stages, split_gpt_params
from jaxlib_methods.parallel.boundaries import fixed_embedding, random_subspace, subspace_model
from jaxlib_methods.parallel.unextractable import (
    draw_transform,
    draw_transforms,
    estimate_entry_bridge,
    morph,
    transform_momentum,
)
from jaxlib_methods.parallel.unextractable.gpt_coordinates import (
    coordinate_gpt_mask,
    coordinate_gpt_params,
    coordinate_gpt_rules,
    coordinate_gpt_stages,
)

V, D_MODEL, K = 50, 8, 3
SIZES = {"vocab_size": V, "block_size": 6, "layers": 2, "width": D_MODEL, "heads": 2, "mlp_width": 12, "subspace": K}
CONFIG = GPTConfig(**SIZES, mlp="gelu", full_rank_blocks=0)
LLAMA = GPTConfig(  # the second block is dense
    **SIZES, position="rotary", norm="rms", mlp="swiglu", bias=False, head_bias=False, full_rank_blocks=1
)
TOKENS = jnp.arange(12).reshape(2, 6)
TARGETS = jnp.arange(100, 112).reshape(2, 6) % V
SUBSPACE = random_subspace(key=jax.random.key(7), vocab_size=V, width=D_MODEL, rank=K)
NAMES = [("boundary", 0), ("middle", 0), ("boundary", 1), ("middle", 1), ("boundary", 2)]
RULES = coordinate_gpt_rules(2)
PUBLIC = 5 * (SUBSPACE.U,)


def private_bases():
    return tuple(draw_transform(D_MODEL, key=jax.random.key(200 + i)).matrix[:, :K] for i in range(5))


@functools.cache
def stages_of(config):
    return coordinate_gpt_stages(config, lambda ids: fixed_embedding(ids, SUBSPACE))


def drawn(config):
    """Parameters of the subspace network by part, far from their small initial values."""
    shapes = nnx.state(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))), nnx.Param)
    random = np.random.default_rng(0)
    return split_gpt_params(config, jax.tree.map(lambda p: random.normal(0, 0.5, p.shape).astype(p.dtype), shapes))


def wide(config):
    return dataclasses.replace(config, dtype="float64", param_dtype="float64")


def build(bases=None):
    """(stages, parameters) in float64, on the host."""
    config = wide(CONFIG)
    params = coordinate_gpt_params(config, drawn(config), bases or private_bases())
    return stages_of(config), jax.tree.map(np.asarray, params)


@functools.partial(jax.jit, static_argnums=0)
def logits(stages, params):
    embed, blocks, head = params
    x = stages.embed(embed, TOKENS)
    for block in blocks:
        x = stages.block(block, x)
    return stages.head(head, x)


def cross_entropy(y):
    return optax.softmax_cross_entropy_with_integer_labels(y, TARGETS).mean(), y


@functools.partial(jax.jit, static_argnums=0)
def value_and_grad(stages, params):
    return jax.value_and_grad(lambda params: cross_entropy(logits(stages, params)), has_aux=True)(params)


def difference(a, b):
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() / np.abs(a).max()


def subspace_network(config, parts):
    """The logits of the network with the basis U for all."""
    plain = gpt_stages(config)
    model = subspace_model(plain.embed, plain.block, lambda p, X, _: plain.head(p, X), SUBSPACE)
    embed, blocks, head = parts
    x = model.embed(embed, TOKENS)
    for block in blocks:
        x = model.block(block, x)
    return model.head(head, x, None)


@pytest.mark.contract
def test_with_the_basis_of_all_it_is_the_subspace_network_and_has_its_gradients(flax_x64):
    config = wide(CONFIG)
    parts, (stages, params) = drawn(config), build(PUBLIC)
    of_network = jax.value_and_grad(lambda parts: cross_entropy(subspace_network(config, parts)), has_aux=True)
    (_, expected), theirs = jax.jit(of_network)(parts)
    (_, y), (embed, blocks, head) = value_and_grad(stages, params)
    assert difference(expected, y) < 1e-12
    ours = (embed, [block["block"] for block in blocks], head["head"])
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert np.abs(b).max() > 1e-6
        np.testing.assert_allclose(a, b, atol=1e-12 * np.abs(b).max())
    constants = jax.tree.leaves([head["transforms"], *(block["transforms"] for block in blocks)])
    assert max(np.abs(leaf).max() for leaf in constants) == 0


def test_a_llama_with_a_dense_block_at_the_end_is_its_subspace_network(flax_x64):
    config = wide(LLAMA)
    parts = drawn(config)
    params = coordinate_gpt_params(config, parts, PUBLIC[:3])
    expected = jax.jit(lambda parts: subspace_network(config, parts))(parts)
    assert difference(expected, logits(stages_of(config), params)) < 1e-12


def test_coordinates_and_ids_are_what_crosses_a_boundary():
    stages, params = stages_of(CONFIG), coordinate_gpt_params(CONFIG, drawn(CONFIG), private_bases())
    x = jax.eval_shape(lambda p: stages.block(p[1][0], stages.embed(p[0], TOKENS)), params)
    assert (x["x"].shape, x["x"].dtype.name) == ((2, 6, K), "float32")
    assert (x["ids"].shape, x["ids"].dtype.name) == ((2, 6), "uint8")
    large = dataclasses.replace(CONFIG, vocab_size=257)
    ids = jax.eval_shape(coordinate_gpt_stages(large).embed, drawn(large)[0], TOKENS)["ids"]
    assert ids.dtype.name == "uint16"


def test_the_function_stays_after_fifty_orthogonal_and_fifty_skewed_transforms(flax_x64):
    stages, start = build()
    before, params = logits(stages, start), start
    for k in range(100):
        spread = None if k < 50 else 0.1
        params = morph(params, draw_transforms(NAMES, K, key=jax.random.key(k), spread=spread), RULES)
    assert difference(before, logits(stages, params)) < 1e-12
    moved = [
        not np.allclose(a, b, atol=0.05) for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True)
    ]
    # tokens and positions; four matrices, two kernels and two biases a block; the head's matrix
    assert sum(moved) == 2 + 2 * 8 + 1 == sum(jax.tree.leaves(coordinate_gpt_mask(params)))
    one_sided = [(regex, sides) for regex, sides in RULES if "/1/transforms/D1" not in regex]
    assert difference(before, logits(stages, morph(start, _draw(0), one_sided))) > 0.01


def _draw(k):
    return draw_transforms(NAMES, K, key=jax.random.key(k))


# ------------------------------------------------------------------------------------------- the optimizer's state


@functools.partial(jax.jit, static_argnums=0)
def update(tx, gradients, state, params):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def both_ways(tx, spread=None, **options):
    """The parameters after transforms between steps, less those with the same transforms after all steps."""
    stages, moved = build()
    to_host = lambda tree: jax.tree.map(np.asarray, tree)
    train_step = lambda params, state: update(tx, value_and_grad(stages, params)[1], state, params)
    plain, state = moved, jax.jit(tx.init)(moved)
    plain_state, transforms = (
        state,
        [draw_transforms(NAMES, K, key=jax.random.key(k), spread=spread) for k in range(2)],
    )
    for step in range(4):
        plain, plain_state = train_step(plain, plain_state)
        moved, state = train_step(moved, state)
        if step < 2:
            moved, state = to_host((moved, state))
            state = transform_momentum(state, moved, transforms[step], RULES, **options)
            moved = morph(moved, transforms[step], RULES)
    for T in transforms:
        plain = morph(to_host(plain), T, RULES)
    pairs = zip(jax.tree.leaves(plain), jax.tree.leaves(to_host(moved)), strict=True)
    return max(np.abs(a - b).max() for a, b in pairs)


def decays(params):
    return trees.mask_tree(params, r"^(?!.*transforms/)")


def row_shared(shared=coordinate_gpt_mask):
    """Clipped, with weight decay."""
    adam = optimizers.row_shared_adamw(0.03, weight_decay=0.1, mask=decays, shared=shared)
    return optax.chain(optax.clip_by_global_norm(0.5), adam)


def test_row_shared_adamw_commutes_with_orthogonal_transforms_and_adam_does_not(flax_x64):
    shared = row_shared()
    assert both_ways(shared) < 1e-11
    assert both_ways(shared, spread=0.5) > 1e-3
    assert both_ways(optax.adam(0.03), second_moments="keep") > 1e-3
    _, params = build()
    shapes = jax.eval_shape(row_shared(shared=None).init, params)  # biases with elementwise second moments
    state = jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes)
    with pytest.raises(ValueError, match=r"\['bias'\] of the optimizer state is no first moment.*use SGD, momentum"):
        transform_momentum(state, params, _draw(0), RULES)


# ------------------------------------------------------------------------------------------- what an attacker sees


def exit_at_one(block, transforms):
    return morph(block, transforms, [("transforms/Q2", (None, ("boundary", 1))), ("mlp/down", (None, ("boundary", 1)))])


@pytest.mark.parametrize("bases", ["public", "private"])
def test_a_single_look_gives_the_frames_of_a_public_basis_and_not_those_of_private_ones(flax_x64, bases):
    """Block 0 from time 1; block 1 and the head from time 3; the attacker knows U and computes the bridge."""
    stages, params = build(PUBLIC if bases == "public" else None)
    before, at = logits(stages, params), [params]
    transforms = [_draw(k) for k in range(3)]
    for T in transforms:
        at.append(morph(at[-1], T, RULES))
    first, later = at[1][1][0], at[3][1][1]
    boundary = [T["boundary", 1].matrix for T in transforms]
    since_start, bridge = boundary[0] @ boundary[1] @ boundary[2], boundary[1] @ boundary[2]

    U = np.asarray(SUBSPACE.U, np.float64)
    product = lambda D: estimate_entry_bridge(U.T, D)  # of all transforms since time 0
    leaving = product(first["transforms"]["D2"]) @ first["transforms"]["Q2"]  # Q2 = M^-1 T
    entering = product(later["transforms"]["D1"])
    guess = np.linalg.inv(leaving) @ entering
    repaired = exit_at_one(first, {("boundary", 1): _transform(guess)})
    error = lambda block: difference(before, logits(stages, (at[1][0], [block, later], at[3][2])))
    assert error(first) > 0.1
    if bases == "public":
        assert np.abs(entering - since_start).max() < 1e-6 and np.abs(guess - bridge).max() < 1e-6
        assert error(repaired) < 1e-6
    else:
        assert np.abs(entering - since_start).max() > 0.3 and np.abs(guess - bridge).max() > 0.3
        assert error(repaired) > 0.1
    # two looks at one stage give the bridge between them in both cases
    looks = (at[time][1][1]["transforms"]["D1"] for time in (1, 3))
    np.testing.assert_allclose(estimate_entry_bridge(*looks), bridge, atol=1e-12)


def _transform(matrix):
    return draw_transform(K, key=jax.random.key(0))._replace(matrix=matrix, inverse=np.linalg.inv(matrix))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: coordinate_gpt_stages(dataclasses.replace(CONFIG, subspace=None)), "set config.subspace to the rank"),
        (lambda: coordinate_gpt_params(CONFIG, drawn(CONFIG), PUBLIC[:2]), "bases must be two for each block and one"),
        (
            lambda: coordinate_gpt_params(CONFIG, drawn(CONFIG), [*PUBLIC[:4], SUBSPACE.U.T]),
            r"bases must have the shape \(8, 3\).*got \(3, 8\) as number 4",
        ),
        (lambda: estimate_entry_bridge(np.eye(2), np.eye(3)), "entry matrices of one stage have one shape"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
