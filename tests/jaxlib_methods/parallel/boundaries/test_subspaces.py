"""Subspace networks: lossless boundaries, what they cost, which optimizers stay in the subspace, how it moves."""

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
from jaxlib_methods.parallel import boundaries
from jaxlib_methods.parallel.boundaries import Subspace
from jaxlib_methods.parallel.pipelines import links

CONFIG = GPTConfig(
    vocab_size=31, layers=3, width=24, heads=2, position="rotary", norm="rms", mlp="gelu", qkv_bias=True, subspace=5
)
DENSE = dataclasses.replace(CONFIG, subspace=None)
SUBSPACE = boundaries.random_subspace(key=jax.random.key(7), vocab_size=31, width=24, rank=5)
IDS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 7)), jnp.int32)
TARGETS = jnp.roll(IDS, -1, axis=1)
PROJECTED = r"(out|down)/(kernel|bias)$"  # what adds to the residual stream; embed/tokens does too


def drawn_params(config, seed=0, scale=0.3):
    """Parameters far from their small initial values, biases included."""
    shapes = nnx.state(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))), nnx.Param)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.normal(scale=scale, size=p.shape), p.dtype), shapes)


def dense_params(params, config, subspace):
    """W = Z U^T for every constrained leaf: what a dense model with the same function holds."""
    lifted = trees.mask_tree(params, "^embed/tokens", *(f"^blocks/{i}/.*{PROJECTED}" for i in range(config.layers - 1)))
    return jax.jit(lambda params: jax.tree.map(lambda p, z: p @ subspace.U.T if z else p, params, lifted))(params)


def codec_pass(stream):
    """Through a boundary by plain autodiff."""
    codec = boundaries.subspace_codec(SUBSPACE)
    message, _ = codec.encode(stream, codec.init(stream))
    return codec.decode(message, codec.init(stream))[0]


def transmitted(stream):
    """Through a boundary whose two directions are coded apart, as in a pipeline."""
    forward, backward = (
        boundaries.subspace_codec(SUBSPACE),
        boundaries.subspace_gradient_codec(SUBSPACE),
    )
    states = forward.init(stream), forward.init(stream)
    return boundaries.codecs.coded_boundary(forward, backward)(stream, states)[0]


def stream_loss(params, config, cross=lambda stream: stream, cut_after=range(CONFIG.layers - 1)):
    """The loss of a model whose stream crosses a boundary after the named blocks."""
    fns = gpt_stages(config)
    head = lambda p, x, y: optax.softmax_cross_entropy_with_integer_labels(fns.head(p, x), y).mean()
    if config.subspace:
        embed, block = fns.embed, fns.block
    else:
        embed, block = lambda p, ids, U, fixed: fns.embed(p, ids, None, fixed), lambda p, x, U: fns.block(p, x)
    model = boundaries.subspace_model(embed, block, head, SUBSPACE)
    of_embed, blocks, of_head = split_gpt_params(config, params)
    stream = model.embed(of_embed, IDS)
    for i, of_block in enumerate(blocks):
        stream = model.block(of_block, stream)
        stream = cross(stream) if i in cut_after else stream
    return model.head(of_head, stream, TARGETS)


value_and_grad = jax.jit(jax.value_and_grad(stream_loss), static_argnums=(1, 2, 3))


def assert_trees_close(a, b, tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance * max(1e-3, float(jnp.max(jnp.abs(y)))), rtol=0)


# ------------------------------------------------------------------------------------------------ lossless coding


@pytest.mark.contract
def test_every_boundary_is_lossless_and_a_full_rank_projection_is_not():
    fns, params = gpt_stages(CONFIG), drawn_params(CONFIG)
    embed, blocks, _ = split_gpt_params(CONFIG, params)
    error = lambda x: jnp.max(jnp.abs(codec_pass({"x": x, "ids": IDS})["x"] - x))
    block, dense_block = jax.jit(fns.block), jax.jit(gpt_stages(DENSE).block)
    x, errors = fns.embed(embed, IDS, SUBSPACE.U, boundaries.fixed_embedding(IDS, SUBSPACE)), []
    for _ in range(4):
        for of_block in blocks:
            x = block(of_block, x, SUBSPACE.U)
            errors.append(float(error(x)))
    assert len(errors) == 8 and max(errors) <= 1e-5
    full_rank = split_gpt_params(DENSE, dense_params(params, CONFIG, SUBSPACE))[1][-1]
    assert float(error(dense_block(full_rank, x))) > 0.1


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.05)])
def test_the_codec_projects_the_table_once_and_codes_the_same_coordinates(dtype, tolerance):
    """X U - (T_fixed U)[ids] - PE U against (X - T_fixed[ids] - PE) U in float64; half precision keeps its rounding."""
    rng = np.random.default_rng(6)
    X, PE = rng.normal(size=(2, 7, 24)), rng.normal(size=(9, 24))
    subspace = SUBSPACE._replace(PE=jnp.asarray(PE, jnp.float32))
    codec = boundaries.subspace_codec(subspace, activation_dtype=dtype)
    x = {"x": jnp.asarray(X, dtype), "ids": IDS, "weight": jnp.ones(2)}
    message, _ = codec.encode(x, codec.init(x))
    expected = (X - np.asarray(subspace.T_fixed, np.float64)[IDS] - PE[:7]) @ np.asarray(subspace.U, np.float64)
    assert message["x"].arrays["C"].dtype == dtype and message["weight"] is x["weight"]
    np.testing.assert_allclose(np.asarray(message["x"].arrays["C"], np.float64), expected, atol=tolerance)


def test_rows_drawn_from_keys_are_those_of_the_table():
    draw = functools.partial(
        boundaries.random_subspace, key=jax.random.key(9), vocab_size=31, width=24, rank=5, embedding_std=0.5
    )
    table, keys = draw(), draw(stored=False)
    assert keys.T_fixed.shape == (31,) and table.T_fixed.shape == (31, 24)
    assert 0.4 < float(jnp.std(table.T_fixed)) < 0.6
    np.testing.assert_array_equal(boundaries.fixed_embedding(IDS, keys), table.T_fixed[IDS])
    X = boundaries.subspaces.subspace_reconstruct(jnp.ones((2, 7, 5)), IDS, keys)
    for subspace in (table, keys):
        codec, x = boundaries.subspace_codec(subspace), {"x": X, "ids": IDS}
        message, _ = jax.jit(codec.encode)(x, ())
        np.testing.assert_allclose(message["x"].arrays["C"], 1.0, atol=1e-5)
        np.testing.assert_allclose(codec.decode(message, ())[0]["x"], X, atol=1e-5)


def test_additive_positions_stay_on_their_stage():
    PE = jnp.asarray(np.random.default_rng(1).normal(size=(9, 24)), jnp.float32)
    subspace = SUBSPACE._replace(PE=PE)
    C = jnp.asarray(np.random.default_rng(2).normal(size=(2, 7, 5)), jnp.float32)
    X = boundaries.subspaces.subspace_reconstruct(C, IDS, subspace)
    np.testing.assert_allclose(
        X - boundaries.subspaces.subspace_reconstruct(C, IDS, SUBSPACE),
        jnp.broadcast_to(PE[:7], X.shape),
        atol=1e-6,
    )
    np.testing.assert_allclose(boundaries.subspaces.subspace_coordinates(X, IDS, subspace), C, atol=1e-5)
    without_table = Subspace(SUBSPACE.U, None, PE)
    np.testing.assert_allclose(
        boundaries.subspaces.subspace_coordinates(
            boundaries.subspaces.subspace_reconstruct(C, IDS, without_table), IDS, without_table
        ),
        C,
        atol=1e-5,
    )
    with pytest.raises(ValueError, match="7 tokens and PE 5"):
        boundaries.fixed_embedding(IDS, SUBSPACE._replace(PE=PE[:5]))


@pytest.mark.parametrize("cross", [codec_pass, transmitted], ids=["autodiff", "two codecs"])
def test_loss_and_all_gradients_do_not_see_the_boundaries(cross):
    params = drawn_params(CONFIG)
    loss, gradients = value_and_grad(params, CONFIG)
    cut_loss, cut_gradients = value_and_grad(params, CONFIG, cross)
    np.testing.assert_allclose(cut_loss, loss, rtol=1e-6)
    assert_trees_close(cut_gradients, gradients, 1e-5)


def test_the_gradient_of_the_stream_is_projected_and_its_coordinates_are_kept():
    params = drawn_params(CONFIG)
    embed, blocks, head = split_gpt_params(CONFIG, params)
    fns = gpt_stages(CONFIG)
    x = fns.embed(embed, IDS, SUBSPACE.U, boundaries.fixed_embedding(IDS, SUBSPACE))

    def loss(x, cross):
        x = fns.block(blocks[0], cross({"x": x, "ids": IDS})["x"], SUBSPACE.U)
        return optax.softmax_cross_entropy_with_integer_labels(fns.head(head, x), TARGETS).mean()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    G, cut = gradient(x, lambda stream: stream), gradient(x, transmitted)
    np.testing.assert_allclose(cut @ SUBSPACE.U, G @ SUBSPACE.U, atol=1e-6)
    assert float(jnp.linalg.norm(cut - G)) > 0.1 * float(jnp.linalg.norm(G))


def test_the_full_model_is_its_stages_and_a_dense_model_with_lifted_weights():
    params = drawn_params(CONFIG)
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(CONFIG, rngs=nnx.Rngs(0))))
    fixed = boundaries.fixed_embedding(IDS, SUBSPACE)
    logits = jax.jit(lambda params: nnx.merge(graph, params)(IDS, SUBSPACE.U, fixed))(params)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS).mean()
    np.testing.assert_allclose(value_and_grad(params, CONFIG)[0], loss, rtol=1e-6)
    dense = dense_params(params, CONFIG, SUBSPACE)
    np.testing.assert_allclose(value_and_grad(dense, DENSE)[0], loss, rtol=1e-5)


def test_with_k_equal_to_d_training_is_that_of_the_dense_model():
    square = dataclasses.replace(CONFIG, subspace=24)
    subspace = boundaries.random_subspace(key=jax.random.key(8), vocab_size=31, width=24, rank=24)
    params = drawn_params(square, scale=0.1)
    dense = dense_params(params, square, subspace)

    def curve(params, config, U):
        graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))))

        def loss(params):
            logits = nnx.merge(graph, params)(IDS, U, boundaries.fixed_embedding(IDS, subspace))
            return optax.softmax_cross_entropy_with_integer_labels(logits, TARGETS).mean()

        def step(params, _):
            value, gradient = jax.value_and_grad(loss)(params)
            return jax.tree.map(lambda p, g: p - 0.5 * g, params, gradient), value

        return jax.jit(lambda params: jax.lax.scan(step, params, length=10)[1])(params)

    losses = curve(params, square, subspace.U)
    assert losses[-1] < losses[0] - 0.1
    np.testing.assert_allclose(curve(dense, DENSE, None), losses, rtol=1e-4)


# ------------------------------------------------------------------------------------------------ what it costs


def test_the_published_configuration_has_its_number_of_parameters():
    design = {"position": "rotary", "norm": "rms", "qkv_bias": True, "subspace": 160}
    config = GPTConfig(vocab_size=50_304, layers=8, width=1024, heads=8, mlp_width=11_292, **design)
    shapes = nnx.state(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))), nnx.Param)
    assert sum(p.size for p in jax.tree.leaves(shapes)) == 203_822_240
    embed, blocks, head = split_gpt_params(config, shapes)
    assert len(blocks) == 7 and len(head["blocks"]) == 1
    assert head["blocks"][0]["mlp"]["down"]["kernel"].shape == (11_292, 1024)
    assert blocks[6]["mlp"]["down"]["kernel"].shape == (11_292, 160) and embed["tokens"]["embedding"].shape == (
        50_304,
        160,
    )


@pytest.mark.parametrize(
    ("d", "k", "V", "ratio", "ratio_with_ids"), [(1024, 160, 50_304, 6.4, 6.36), (4096, 40, 50_000, 102.4, 99.9)]
)
def test_a_message_is_k_values_of_a_token_and_its_id(d, k, V, ratio, ratio_with_ids):
    x = jax.ShapeDtypeStruct((3, 5, d), "bfloat16")
    stream = {"x": x, "ids": jax.ShapeDtypeStruct((3, 5), "int32")}
    sizes = []

    def measure(U, T_fixed):
        codecs = (
            boundaries.subspace_codec(Subspace(U, T_fixed), activation_dtype="bfloat16"),
            boundaries.subspace_gradient_codec(Subspace(U, T_fixed)),
        )
        sizes.extend(boundaries.payload_bytes(codec, x) / 15 for codec, x in zip(codecs, (stream, [x]), strict=True))

    jax.eval_shape(measure, jax.ShapeDtypeStruct((d, k), "float32"), jax.ShapeDtypeStruct((V, d), "bfloat16"))
    forward, backward = sizes
    dense = boundaries.payload_bytes(boundaries.identity_codec(), x) / 15
    assert (dense, forward, backward) == (2 * d, 2 * k + 2, 2 * k)
    assert round(dense / backward, 1) == ratio and dense / forward == pytest.approx(ratio_with_ids, abs=0.05)


def test_the_floor_of_a_step_over_slow_links():
    link = links.LINKS["200 Mbit/s + 50 ms"]
    floor = lambda size, count: links.blocking_floor(
        link, num_tokens=524_288, forward_bytes=size, backward_bytes=size, num_microbatches=count
    )
    dense, coded = floor(2048, 64), floor(322, 32)
    assert round(dense, 1) == 92.3 and round(coded, 1) == 16.7


# ------------------------------------------------------------------------------- optimizers that stay in the subspace


def dense_in_subspace():
    params = dense_params(drawn_params(CONFIG), CONFIG, SUBSPACE)
    constrained = trees.mask_tree(
        params, "^embed/tokens", *(f"^blocks/{i}/.*{PROJECTED}" for i in range(CONFIG.layers - 1))
    )
    return params, constrained


def test_projecting_weights_alone_depends_on_the_place_of_the_boundaries_and_projecting_gradients_does_not():
    params, constrained = dense_in_subspace()
    P = SUBSPACE.U @ SUBSPACE.U.T
    inside = value_and_grad(params, DENSE)[1]
    at_boundary = value_and_grad(params, DENSE, codec_pass, (0,))[1]
    kernel = lambda gradients: gradients["blocks"][0]["mlp"]["down"]["kernel"]
    np.testing.assert_allclose(kernel(inside) @ P, kernel(at_boundary), atol=1e-6)
    assert float(jnp.linalg.norm(kernel(inside) - kernel(at_boundary))) > 0.1 * float(jnp.linalg.norm(kernel(inside)))

    adam = functools.partial(optax.adam, 1e-2)
    after = optimizers.row_shared.project_rows(SUBSPACE.U, constrained, project_weights=True)
    both = optax.chain(optimizers.row_shared.project_rows(SUBSPACE.U, constrained), adam(), after)

    def moved(optimizer, gradients):
        update = jax.jit(lambda g: optax.apply_updates(params, optimizer.update(g, optimizer.init(params), params)[0]))
        with jax.numpy_dtype_promotion("standard"):  # optax.adam
            return update(gradients)

    after_alone = [kernel(moved(optax.chain(adam(), after), g)) for g in (inside, at_boundary)]
    assert float(jnp.max(jnp.abs(after_alone[0] - after_alone[1]))) > 1e-3
    same = [kernel(moved(both, g)) for g in (inside, at_boundary)]
    # Adam's first step is the sign of the gradient: entries that are zero up to rounding may differ.
    assert float(jnp.mean(jnp.abs(same[0] - same[1]) > 1e-5)) < 0.01
    for W in (*after_alone, *same):
        np.testing.assert_allclose(W @ P, W, atol=1e-6)


# ------------------------------------------------------------------------------------------------ moving the subspace


def test_the_grassmann_step_finds_the_dominant_directions_and_stays_orthonormal():
    rng = np.random.default_rng(3)
    top = np.linalg.qr(rng.normal(size=(10, 2)))[0]
    G = jnp.asarray(rng.normal(size=(400, 2)) * 3 @ top.T + 0.1 * rng.normal(size=(400, 10)), jnp.float32)
    U = boundaries.random_subspace(key=jax.random.key(1), vocab_size=1, width=10, rank=2).U
    step = jax.jit(lambda U: boundaries.grassmann.grassmann_step(U, boundaries.grassmann.gradient_moment(G, U), 0.02))
    for _ in range(200):
        U = step(U)
    np.testing.assert_allclose(U.T @ U, np.eye(2), atol=1e-5)
    exact = np.linalg.eigh(np.asarray(G.T @ G))[1][:, -2:]
    assert np.linalg.svd(np.asarray(U).T @ exact, compute_uv=False).min() > 0.999


def test_one_grassmann_step_by_hand():
    e1, Sigma = jnp.array([[1.0], [0.0]]), jnp.ones((2, 2))
    np.testing.assert_allclose(
        boundaries.grassmann.grassmann_step(e1, Sigma @ e1, 0.1)[:, 0], [0.980581, 0.196116], atol=1e-6
    )
    worst = jnp.array([[0.0, 0.0], [0.0, 1.0]])  # e1 is an eigenvector of it: stationary, although the worst choice
    np.testing.assert_allclose(boundaries.grassmann.grassmann_step(e1, worst @ e1, 0.1), e1)
    G = jnp.asarray(np.random.default_rng(4).normal(size=(3, 5, 2)), jnp.float32)
    Sigma = jnp.einsum("bni,bnj->ij", G, G) / 15
    np.testing.assert_allclose(boundaries.grassmann.gradient_moment(G, e1), Sigma @ e1, rtol=1e-5)


def test_changing_to_a_basis_of_the_same_span_changes_nothing():
    params = drawn_params(CONFIG)
    rotation = jnp.asarray(np.linalg.qr(np.random.default_rng(5).normal(size=(5, 5)))[0], jnp.float32)
    turned = SUBSPACE._replace(U=SUBSPACE.U @ rotation)
    coordinates = trees.mask_tree(
        params, "^embed/tokens", *(f"^blocks/{i}/.*{PROJECTED}" for i in range(CONFIG.layers - 1))
    )
    changed = boundaries.grassmann.change_basis(params, SUBSPACE.U, turned.U, coordinates)
    graph = nnx.graphdef(nnx.eval_shape(lambda: GPT(CONFIG, rngs=nnx.Rngs(0))))
    forward = jax.jit(lambda params, U, fixed: nnx.merge(graph, params)(IDS, U, fixed))
    apply = lambda params, subspace: forward(params, subspace.U, boundaries.fixed_embedding(IDS, subspace))
    before = apply(params, SUBSPACE)
    np.testing.assert_allclose(apply(changed, turned), before, atol=1e-4)
    assert float(jnp.max(jnp.abs(apply(params, turned) - before))) > 0.1


def test_a_move_of_the_subspace_between_two_steps():
    """Moments summed up by the codec, the step of U, new coordinates: closer to the gradients, and lossless again."""
    params = drawn_params(CONFIG)
    _, blocks, head = split_gpt_params(CONFIG, params)
    fns = gpt_stages(CONFIG)

    def gradient(subspace, X):
        loss = lambda X: jnp.sum(jax.nn.log_softmax(fns.head(head, fns.block(blocks[0], X, subspace.U)))[..., 0])
        return jax.grad(loss)(X)

    codec = boundaries.subspace_gradient_codec(SUBSPACE, track=True)
    C = jnp.asarray(np.random.default_rng(7).normal(size=(3, 2, 7, 5)), jnp.float32)
    G = jax.jit(jax.vmap(lambda C: gradient(SUBSPACE, boundaries.subspaces.subspace_reconstruct(C, IDS, SUBSPACE))))(C)
    sender = codec.init([G[0]])
    for g in G:
        message, sender = codec.encode([g], sender)
    received, _ = codec.decode(message, codec.init([G[2]]))
    np.testing.assert_allclose(received[0], G[2] @ SUBSPACE.U @ SUBSPACE.U.T, atol=1e-5 * float(jnp.max(jnp.abs(G))))
    Sigma = np.einsum("abni,abnj->ij", G, G) / (3 * 2 * 7)
    np.testing.assert_allclose(sender.Y / 3, Sigma @ SUBSPACE.U, rtol=1e-3, atol=1e-5 * np.max(np.abs(Sigma)))
    assert int(sender.count) == 3

    U = boundaries.grassmann.grassmann_step(SUBSPACE.U, sender.Y / 3, 0.1 / np.linalg.norm(Sigma, 2))
    outside = lambda U: np.trace((np.eye(24) - U @ U.T) @ Sigma)
    assert outside(U) < 0.98 * outside(SUBSPACE.U)
    moved = SUBSPACE._replace(U=U)
    coordinates = trees.mask_tree(params, "^embed/tokens", *(f"^blocks/{i}/.*{PROJECTED}" for i in range(2)))
    embed, blocks, _ = split_gpt_params(CONFIG, boundaries.grassmann.change_basis(params, SUBSPACE.U, U, coordinates))
    X = fns.block(blocks[0], fns.embed(embed, IDS, U, boundaries.fixed_embedding(IDS, moved)), U)
    C = boundaries.subspaces.subspace_coordinates(X, IDS, moved)
    np.testing.assert_allclose(boundaries.subspaces.subspace_reconstruct(C, IDS, moved), X, atol=1e-5)


# ------------------------------------------------------------------------------------------------ errors


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"rank must lie in \[1, 4\], got 5"):
        boundaries.random_subspace(key=jax.random.key(0), vocab_size=3, width=4, rank=5)
    with pytest.raises(TypeError, match="dictionary with 'x' and 'ids'"):
        boundaries.subspace_codec(SUBSPACE).init(jnp.zeros((2, 3, 24)))
    with pytest.raises(TypeError, match="activations of float32, got bfloat16"):
        boundaries.subspace_codec(SUBSPACE).init({"x": jnp.zeros((2, 7, 24), jnp.bfloat16), "ids": IDS})
    with pytest.raises(ValueError, match="pass U"):
        nnx.eval_shape(lambda: GPT(CONFIG, rngs=nnx.Rngs(0))(IDS))
    for changes, message in (
        ({"subspace": 25}, "must not exceed width"),
        ({"tied": True, "head_bias": False}, "set tied=False"),
        ({"full_rank_blocks": 4}, "full_rank_blocks must lie between 0 and the 3 blocks"),
        ({"subspace": 0}, "subspace must be at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match="pass params"):
        link = optimizers.row_shared.project_rows(SUBSPACE.U, True, project_weights=True)
        link.update(jnp.zeros((2, 24)), link.init(jnp.zeros((2, 24))))
