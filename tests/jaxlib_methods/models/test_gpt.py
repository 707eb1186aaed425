"""Decoders: parameter counts by hand, attention and rotary positions against NumPy, and what the designs promise."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxlib_methods import models, trees
from jaxlib_methods.models import GPT, GPT_CONFIGS, GPTConfig

TINY = ("gpt_tiny", "llama_tiny")


def count(config):
    params = nnx.state(nnx.eval_shape(lambda: GPT(config, rngs=nnx.Rngs(0))), nnx.Param)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def small(name, **changes):
    return dataclasses.replace(GPT_CONFIGS[name], **{"layers": 2, "width": 32, "block_size": 16, **changes})


def tokens(key, config, batch=2, length=12):
    return jax.random.randint(key, (batch, length), 0, config.vocab_size)


class TestCounts:
    def test_gpt2_small_is_the_published_124_million(self):
        assert count(GPT_CONFIGS["gpt2_small"]) == 124_439_808

    def test_asyncpp_by_hand(self):
        d, vocab = 768, 50_257
        embedding = vocab * d + 512 * d
        attention = 3 * d * d + d * d + d  # queries, keys and values have no bias, the output has
        mlp = d * 4 * d + 4 * d + 4 * d * d + d
        norms = 2 * (d + d)
        head = 2 * d + d * vocab + vocab  # final norm, untied matrix and its bias
        assert embedding + 8 * (attention + mlp + norms) + head == 134_324_305
        assert count(GPT_CONFIGS["asyncpp"]) == 134_324_305

    def test_llama_by_hand(self):
        d, vocab, hidden, kv = 768, 50_257, 2048, 4 * 64
        block = 2 * d * d + 2 * d * kv + 3 * d * hidden + 2 * d
        assert 2 * vocab * d + 12 * block + d == 152_711_424
        assert count(GPT_CONFIGS["llama_small"]) == 152_711_424

    def test_untying_adds_the_matrix(self):
        config = GPT_CONFIGS["gpt2_small"]
        assert count(dataclasses.replace(config, tied=False)) - count(config) == 50_257 * 768

    def test_a_tied_model_has_one_table_and_its_gradient_is_the_sum_of_both_uses(self, key):
        config = small("gpt_tiny", layers=1, tied=True, head_bias=False)
        model = GPT(config, rngs=nnx.Rngs(0))
        assert "tokens" not in nnx.state(model, nnx.Param)["head"]
        graph, params = nnx.split(model, nnx.Param)
        stages, cut = models.gpt_stages(config), models.split_gpt_params(config, params)
        x = tokens(key, config)

        def by_stages(embed, blocks, head):
            y = stages.embed(embed, x)
            for block in blocks:
                y = stages.block(block, y)
            return jnp.mean(stages.head(head, y) ** 2)

        parts = jax.jit(jax.grad(by_stages, argnums=(0, 2)))(*cut)
        whole = jax.jit(jax.grad(lambda params: jnp.mean(nnx.merge(graph, params)(x) ** 2)))(params)
        table = lambda tree: tree["tokens"]["embedding"][...]
        np.testing.assert_allclose(table(parts[0]) + table(parts[1]), table(whole["embed"]), rtol=1e-4, atol=1e-6)
        assert abs(table(parts[0])).max() > 0 and abs(table(parts[1])).max() > 0


@pytest.mark.parametrize("name", TINY)
class TestBothDesigns:
    def test_future_tokens_do_not_change_past_logits(self, name, key):
        config = small(name)
        model = nnx.jit(GPT(config, rngs=nnx.Rngs(0)))
        x = tokens(key, config)
        changed = x.at[:, 7].set((x[:, 7] + 1) % config.vocab_size)
        before, after = model(x), model(changed)
        np.testing.assert_array_equal(before[:, :7], after[:, :7])
        assert (abs(before[:, 7:] - after[:, 7:]).max((0, 2)) > 1e-4).all()  # every later position sees it

    def test_initial_loss_is_that_of_a_uniform_guess(self, name, key):
        config = GPT_CONFIGS[name]
        x = tokens(key, config, 4, 65)
        logits = nnx.jit(GPT(config, rngs=nnx.Rngs(0)))(x[:, :-1])
        loss = -jnp.take_along_axis(jax.nn.log_softmax(logits), x[:, 1:, None], axis=-1).mean()
        assert logits.dtype == jnp.float32
        # Logits of variance d * 0.02^2 cost half their variance over log V in expectation.
        assert abs(loss - math.log(config.vocab_size) - config.width * 0.02**2 / 2) < 0.03

    def test_half_precision_computes_on_float32_parameters(self, name, key):
        config = small(name)
        wide = GPT(config, rngs=nnx.Rngs(0))
        half = GPT(dataclasses.replace(config, dtype="bfloat16"), rngs=nnx.Rngs(0))
        for a, b in zip(jax.tree.leaves(nnx.state(wide)), jax.tree.leaves(nnx.state(half)), strict=True):
            assert b.dtype == jnp.float32
            np.testing.assert_array_equal(a, b)
        x = tokens(key, config)
        with jax.numpy_dtype_promotion("standard"):  # flax's norms and jax's attention promote to float32 on their own
            assert nnx.eval_shape(lambda: half.blocks[0](half.embed(x))).dtype == jnp.bfloat16
            exact, rough = nnx.jit(wide)(x), nnx.jit(half)(x)
        assert rough.dtype == jnp.float32
        assert 0 < abs(exact - rough).max() < 0.03 * abs(exact).max()

    def test_scan_over_stacked_blocks_is_the_model(self, name, key):
        config = small(name, layers=3)
        model = GPT(config, rngs=nnx.Rngs(0))
        embed, blocks, head = models.split_gpt_params(config, nnx.state(model, nnx.Param))
        stages = models.gpt_stages(config)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        x = tokens(key, config)

        @jax.jit
        def by_stages(embed, stacked, head):
            y, _ = jax.lax.scan(lambda y, params: (stages.block(params, y), None), stages.embed(embed, x), stacked)
            return stages.head(head, y)

        np.testing.assert_allclose(by_stages(embed, stacked, head), nnx.jit(model)(x), rtol=1e-4, atol=1e-5)

    @pytest.mark.contract
    def test_attention_is_the_softmax_of_numpy(self, name, key):
        config = small(name, kv_heads=2, init_std=0.3)
        attention = GPT(config, rngs=nnx.Rngs(0)).blocks[0].attention
        x = jax.random.normal(key, (2, 7, config.width))
        exact = attention_by_loops(config, attention, np.asarray(x, np.float64))
        np.testing.assert_allclose(attention(x), exact, rtol=1e-4, atol=1e-5)


def attention_by_loops(config, attention, x):
    """One query at a time, in float64, with rotations written as complex products."""
    d = config.head_width
    matrix = lambda layer: np.asarray(layer.kernel[...], np.float64)
    out = np.zeros_like(x)
    for b in range(x.shape[0]):
        for head in range(config.heads):
            group = head * config.kv_heads // config.heads
            column = lambda h: slice(h * d, (h + 1) * d)
            q, k, v = (
                x[b] @ matrix(layer)[:, column(h)]
                for layer, h in ((attention.query, head), (attention.key, group), (attention.value, group))
            )
            if config.position == "rotary":
                q, k = turned(q), turned(k)
            for t in range(x.shape[1]):
                scores = np.exp([q[t] @ k[s] / math.sqrt(d) for s in range(t + 1)])
                out[b, t, column(head)] = sum(w * v[s] for s, w in enumerate(scores / scores.sum()))
    out = out @ matrix(attention.out)
    return out if attention.out.bias is None else out + np.asarray(attention.out.bias[...])


def turned(x):
    half = x.shape[1] // 2
    angle = np.outer(np.arange(len(x)), 10_000.0 ** (-np.arange(half) / half))
    z = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * angle)
    return np.concatenate([z.real, z.imag], axis=1)


class TestRotary:
    def test_scores_depend_on_the_distance_alone(self, key):
        q, k = jax.random.normal(key, (2, 16))
        everywhere = lambda vector: models.gpt.rotate(jnp.broadcast_to(vector, (1, 40, 1, 16)))[0, :, 0]
        scores = np.asarray(everywhere(q) @ everywhere(k).T)
        for distance in range(-20, 21):
            diagonal = np.diagonal(scores, distance)
            np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-4)
        assert np.ptp(scores) > 1.0  # and the distance matters

    def test_lengths_stay_and_position_zero_is_not_turned(self, key):
        x = jax.random.normal(key, (2, 9, 3, 8))
        y = models.gpt.rotate(x)
        np.testing.assert_allclose(jnp.linalg.norm(y, axis=-1), jnp.linalg.norm(x, axis=-1), rtol=1e-5)
        np.testing.assert_array_equal(y[:, 0], x[:, 0])
        assert models.gpt.rotate(x.astype(jnp.bfloat16)).dtype == jnp.bfloat16


def test_grouped_heads_are_repeated_heads(key):
    config = small("llama_tiny", kv_heads=2)
    grouped, full = GPT(config, rngs=nnx.Rngs(0)), GPT(dataclasses.replace(config, kv_heads=None), rngs=nnx.Rngs(0))
    params = nnx.state(grouped, nnx.Param)
    repeated = lambda kernel: jnp.repeat(kernel.reshape(32, 2, 8), 2, axis=1).reshape(32, 32)
    wide = jax.tree.map(
        lambda path, leaf: repeated(leaf) if path.split("/")[-2] in ("key", "value") else leaf,
        trees.path_names(params),
        params,
    )
    nnx.update(full, wide)
    x = tokens(key, config)
    np.testing.assert_allclose(nnx.jit(grouped)(x), nnx.jit(full)(x), rtol=1e-4, atol=1e-5)


def test_initialisation_of_gpt2_shrinks_what_adds_to_the_residual_stream():
    config = small("gpt_tiny", layers=8, width=64, scaled_residual=True)
    block = GPT(config, rngs=nnx.Rngs(0)).blocks[3]
    for layer, std in ((block.mlp.up, 0.02), (block.mlp.down, 0.005), (block.attention.out, 0.005)):
        assert abs(layer.kernel[...].std() / std - 1) < 0.1
        assert not layer.bias[...].any()
    assert block.attention.query.bias is None


def test_layer_norm_and_rms_norm_against_numpy(key):
    x = 3.0 + jax.random.normal(key, (2, 5, 32))
    centred = np.asarray(x) - np.asarray(x).mean(-1, keepdims=True)
    for name, y in (("gpt_tiny", centred), ("llama_tiny", np.asarray(x))):
        norm = GPT(small(name), rngs=nnx.Rngs(0)).blocks[0].norm1
        np.testing.assert_allclose(norm(x), y / np.sqrt((y**2).mean(-1, keepdims=True) + 1e-5), rtol=1e-4, atol=1e-5)


def test_mlps_against_numpy(key):
    x = jax.random.normal(key, (1, 2, 32))
    for name, kind in (("gpt_tiny", "relu"), ("gpt_tiny", "gelu"), ("llama_tiny", "swiglu")):
        mlp = GPT(small(name, mlp=kind, init_std=0.5), rngs=nnx.Rngs(0)).blocks[0].mlp
        up = np.asarray(x) @ np.asarray(mlp.up.kernel[...])
        if kind == "relu":
            hidden = np.maximum(up, 0)
        elif kind == "gelu":
            hidden = 0.5 * up * (1 + np.tanh(math.sqrt(2 / math.pi) * (up + 0.044715 * up**3)))
        else:
            gate = np.asarray(x) @ np.asarray(mlp.gate.kernel[...])
            hidden = gate / (1 + np.exp(-gate)) * up
        np.testing.assert_allclose(mlp(x), hidden @ np.asarray(mlp.down.kernel[...]), rtol=1e-3, atol=1e-3)


def test_rotary_models_take_any_length_and_learned_positions_end():
    logits = lambda name: nnx.eval_shape(lambda: GPT(small(name), rngs=nnx.Rngs(0))(jnp.zeros((1, 20), jnp.int32)))
    assert logits("llama_tiny").shape == (1, 20, 256)
    with pytest.raises(ValueError, match="20 tokens and the model has 16 positions"):
        logits("gpt_tiny")


def test_flash_attention_is_asked_for_where_it_exists(monkeypatch):
    implementation = models.gpt._implementation
    half = dataclasses.replace(GPT_CONFIGS["gpt2_small"], dtype="bfloat16")
    assert implementation(half) == "xla"
    hopper = type("Device", (), {"device_kind": "NVIDIA H200", "compute_capability": "9.0"})
    monkeypatch.setattr(jax, "devices", lambda: [hopper])
    assert implementation(half) == "cudnn"
    assert implementation(GPT_CONFIGS["gpt2_small"]) == "xla"  # float32 has no flash kernel
    assert implementation(dataclasses.replace(half, attention="xla")) == "xla"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "heads must divide width, got 4 heads and width 30"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got 3 and 4"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"mlp": "tanh"}, "mlp must be one of 'relu', 'gelu', 'swiglu', got 'tanh'"),
        ({"attention": "flash"}, "attention must be None or one of 'xla', 'cudnn', got 'flash'"),
        ({"position": "rotary", "width": 12}, "even number of features a head, got 3"),
        ({"tied": True}, "a tied head has no bias"),
    ],
)
def test_bad_configurations_name_the_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**changes)
