"""Decoder-only language models: the GPT-2 and NanoGPT designs and the Llama design, from one description.

A model is `head(block(... block(embed(tokens))))`, and the three are modules of their own, so that a pipeline can hold
them on different devices (`_gpt_stages.py`). Parameters are stored in `param_dtype` and every matrix product runs in
`dtype`; norms, softmax and logits are accumulated in float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlib_methods._core import checks
from jaxlib_methods._core.dtypes import compute_dtype
from jaxlib_methods._core.linalg import matmul
from jaxlib_methods.typing import GPTMLP, AttentionImplementation, GPTNorm, GPTPosition

__all__ = ["GPT", "GPT_CONFIGS", "GPTConfig", "rotate"]


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Sizes and design of a `GPT`; `GPT_CONFIGS` holds the published ones, `dataclasses.replace` varies them.

    Args:
      vocab_size: number of tokens V.
      block_size: longest sequence T that learned positions allow; rotary positions take any length.
      layers: number of blocks L.
      width: size d of the residual stream.
      heads: query heads; each has d / heads features.
      kv_heads: heads of keys and values, a divisor of `heads`; None: as many as `heads`.
      mlp_width: hidden units of the MLP; None: 4 d.
      position: "learned" (added to the embedding) or "rotary" (turns queries and keys).
      norm: "layer" (LayerNorm with scale and bias) or "rms" (RMSNorm with scale), before each sublayer.
      mlp: "relu", "gelu" (tanh form) or "swiglu" (down(silu(gate x) * up x)).
      qkv_bias: whether the projections to queries, keys and values have a bias.
      bias: whether the other projections of a block have one.
      head_bias: whether the logits have one.
      tied: whether the head's matrix is the token embedding.
      init_std: standard deviation of every matrix at the start; biases are zero.
      scaled_residual: divide it by sqrt(2 L) for the two projections that add to the residual stream, as GPT-2.
      norm_eps: epsilon of the norms.
      rotary_base: base of the rotary frequencies.
      dtype: of the computation, for example "bfloat16".
      param_dtype: of the stored parameters.
      attention: implementation of `jax.nn.dot_product_attention`, "xla" or "cudnn" (flash attention; on what it does
        not support it raises). None: "cudnn" for half precision on an NVIDIA GPU from Ampere on and up to 128 features
        a head, else "xla".
      subspace: rank k of a subspace network, whose residual stream is a fixed part plus k coordinates in a basis U
        that is no parameter: the embedding and the two projections of a block that add to the stream then end in k
        features, and the model is called with U. None: a dense model.
      full_rank_blocks: how many of the last blocks of a subspace network are dense all the same; their output does
        not cross a boundary of a pipeline. Without `subspace` it has no effect.

    Raises:
      ValueError: for a size below 1, heads that do not divide, an unknown name of a design choice, or a subspace that
        the other choices do not allow.

    Example:
      >>> config = dataclasses.replace(GPT_CONFIGS["llama_tiny"], layers=2, kv_heads=2)
      >>> config.layers, config.head_width
      (2, 40)

    Source: Radford et al. (2019) [radford2019language]; Ajanthan et al. (ICML 2025), arXiv:2505.01099
    [ajanthan2025nesterov]; Touvron et al. (2023), arXiv:2302.13971 [touvron2023llama].
    """

    vocab_size: int = 256
    block_size: int = 128
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    mlp_width: int | None = None
    position: GPTPosition = "learned"
    norm: GPTNorm = "layer"
    mlp: GPTMLP = "relu"
    qkv_bias: bool = False
    bias: bool = True
    head_bias: bool = True
    tied: bool = False
    init_std: float = 0.02
    scaled_residual: bool = False
    norm_eps: float = 1e-5
    rotary_base: float = 10_000.0
    dtype: str = "float32"
    param_dtype: str = "float32"
    attention: AttentionImplementation | None = None
    subspace: int | None = None
    full_rank_blocks: int = 1

    def __post_init__(self):
        sizes = ("vocab_size", "block_size", "layers", "width", "heads", "kv_heads", "mlp_width", "subspace")
        checks.at_least(1, **{name: getattr(self, name) for name in sizes})
        checks.one_of(GPTPosition, position=self.position)
        checks.one_of(GPTNorm, norm=self.norm)
        checks.one_of(GPTMLP, mlp=self.mlp)
        checks.one_of(AttentionImplementation | None, attention=self.attention)
        if self.width % self.heads:
            raise ValueError(f"heads must divide width, got {self.heads} heads and width {self.width}")
        if self.kv_heads is not None and self.heads % self.kv_heads:
            raise ValueError(f"kv_heads must divide heads, got {self.kv_heads} and {self.heads}")
        if self.position == "rotary" and self.head_width % 2:
            raise ValueError(f"rotary positions need an even number of features a head, got {self.head_width}")
        if self.tied and self.head_bias:
            raise ValueError("a tied head has no bias; set head_bias=False, or tied=False")
        if self.subspace is not None and self.subspace > self.width:
            raise ValueError(f"subspace must not exceed width, got rank {self.subspace} and width {self.width}")
        if self.subspace is not None and self.tied:
            raise ValueError("the embedding of a subspace network has k features and is no head; set tied=False")
        if not 0 <= self.full_rank_blocks <= self.layers and self.subspace is not None:
            raise ValueError(
                f"full_rank_blocks must lie between 0 and the {self.layers} blocks, got {self.full_rank_blocks}"
            )

    @property
    def head_width(self) -> int:
        """Features of one head."""
        return self.width // self.heads

    @property
    def stream_width(self) -> int:
        """Features of what a constrained part adds to the residual stream: k, or d without a subspace."""
        return self.subspace or self.width


_LLAMA = {
    "position": "rotary",
    "norm": "rms",
    "mlp": "swiglu",
    "bias": False,
    "head_bias": False,
}

# By name: two that train on a CPU, then GPT-2 small (124,439,808 parameters), the NanoGPT-like model of AsyncPP
# (134,324,305) and a Llama of the same depth and width (152,711,424).
GPT_CONFIGS = {
    "gpt_tiny": GPTConfig(),
    "llama_tiny": GPTConfig(width=160, mlp_width=432, **_LLAMA),
    "gpt2_small": GPTConfig(
        vocab_size=50_257,
        block_size=1024,
        layers=12,
        width=768,
        heads=12,
        mlp="gelu",
        qkv_bias=True,
        head_bias=False,
        tied=True,
        scaled_residual=True,
    ),
    "asyncpp": GPTConfig(vocab_size=50_257, block_size=512, layers=8, width=768, heads=12),
    "llama_small": GPTConfig(
        vocab_size=50_257, block_size=1024, layers=12, width=768, heads=12, kv_heads=4, mlp_width=2048, **_LLAMA
    ),
}


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary positions: feature pair i of position t is turned by the angle t * base^(-2 i / d).

    The product of a turned query and a turned key depends on their positions through the difference alone. The pair
    of feature i is i + d/2, as in the published Llama weights.

    Args:
      x: queries or keys, (B, T, heads, d) with d even.
      base: of the geometric sequence of frequencies.

    Returns:
      The turned features, of the shape and dtype of `x`; the angles are computed in float32.

    Example:
      >>> x = jnp.ones((1, 2, 1, 2))
      >>> [round(float(value), 4) for value in rotate(x)[0, 1, 0]]  # one radian
      [-0.3012, 1.3818]

    Source: Su et al. (Neurocomputing 2024), arXiv:2104.09864, eq. 34 [su2024roformer].
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequencies[None, :]
    cos, sin = jnp.cos(angles)[None, :, None, :], jnp.sin(angles)[None, :, None, :]
    a, b = jnp.split(x.astype(compute_dtype(x.dtype)), 2, axis=-1)
    cos, sin = cos.astype(a.dtype), sin.astype(a.dtype)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def _norm(config: GPTConfig, rngs: nnx.Rngs) -> nnx.Module:
    options = {
        "epsilon": config.norm_eps,
        "dtype": jnp.dtype(config.dtype),
        "param_dtype": jnp.dtype(config.param_dtype),
        "use_fast_variance": False,
        "rngs": rngs,
    }
    return (nnx.LayerNorm if config.norm == "layer" else nnx.RMSNorm)(config.width, **options)


def _normal(config: GPTConfig, *, residual: bool = False) -> Callable[..., jax.Array]:
    scale = math.sqrt(2 * config.layers) if residual and config.scaled_residual else 1.0
    return nnx.initializers.normal(config.init_std / scale)


def _linear(
    config: GPTConfig, size_in: int, size_out: int, bias: bool, rngs: nnx.Rngs, *, residual: bool = False
) -> nnx.Linear:
    return nnx.Linear(
        size_in,
        size_out,
        use_bias=bias,
        dtype=jnp.dtype(config.dtype),
        param_dtype=jnp.dtype(config.param_dtype),
        kernel_init=_normal(config, residual=residual),
        rngs=rngs,
    )


def _table(config: GPTConfig, rows: int, rngs: nnx.Rngs) -> nnx.Embed:
    return nnx.Embed(
        rows, config.stream_width, param_dtype=jnp.dtype(config.param_dtype), embedding_init=_normal(config), rngs=rngs
    )


def _lift(y: jax.Array, U: jax.Array | None) -> jax.Array:
    """Coordinates (..., k) to the residual stream, y U^T; exact to the rounding of y's dtype on every backend."""
    if U is None:
        raise ValueError("a model with config.subspace is called with its basis; pass U, an array (width, subspace)")
    return matmul(y, U.T.astype(y.dtype))


class _Embed(nnx.Module):
    """Tokens (B, T) to the residual stream (B, T, d)."""

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.config = config
        self.tokens = _table(config, config.vocab_size, rngs)
        if config.position == "learned":
            self.positions = _table(config, config.block_size, rngs)

    def coordinates(self, tokens: jax.Array) -> jax.Array:
        """What is trained: (B, T, k) in a subspace network, (B, T, d) in another."""
        config = self.config
        x = self.tokens(tokens.astype(jnp.int32))
        if config.position == "learned":
            if tokens.shape[1] > config.block_size:
                raise ValueError(
                    f"the sequence has {tokens.shape[1]} tokens and the model has {config.block_size} positions; "
                    "cut it, or build the model with a larger block_size"
                )
            x += self.positions.embedding[...][None, : tokens.shape[1]]
        return x.astype(config.dtype)

    def __call__(self, tokens: jax.Array, U: jax.Array | None = None, fixed: jax.Array | None = None) -> jax.Array:
        x = self.coordinates(tokens)
        if self.config.subspace is not None:
            x = _lift(x, U)
        return x if fixed is None else x + fixed.astype(x.dtype)


class _Attention(nnx.Module):
    """Causal self-attention; with fewer heads of keys and values, each serves a group of consecutive query heads."""

    def __init__(self, config: GPTConfig, width_out: int, *, rngs: nnx.Rngs):
        self.config = config
        width, kv_width = config.width, (config.kv_heads or config.heads) * config.head_width
        self.query = _linear(config, width, width, config.qkv_bias, rngs)
        self.key = _linear(config, width, kv_width, config.qkv_bias, rngs)
        self.value = _linear(config, width, kv_width, config.qkv_bias, rngs)
        self.out = _linear(config, width, width_out, config.bias, rngs, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        by_head = lambda y: y.reshape(*y.shape[:2], -1, config.head_width)
        q, k, v = by_head(self.query(x)), by_head(self.key(x)), by_head(self.value(x))
        if config.position == "rotary":
            q, k = rotate(q, config.rotary_base), rotate(k, config.rotary_base)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=_implementation(config))
        return self.out(y.reshape(x.shape))


def _implementation(config: GPTConfig) -> AttentionImplementation:
    if config.attention is not None:
        return config.attention
    device = jax.devices()[0]
    ampere = device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 8
    fits = jnp.dtype(config.dtype).itemsize == 2 and config.head_width <= 128 and config.head_width % 8 == 0
    return "cudnn" if ampere and fits else "xla"


class _MLP(nnx.Module):
    """down(act(up x)), or down(silu(gate x) * up x)."""

    def __init__(self, config: GPTConfig, width_out: int, *, rngs: nnx.Rngs):
        self.config = config
        hidden = config.mlp_width or 4 * config.width
        self.up = _linear(config, config.width, hidden, config.bias, rngs)
        if config.mlp == "swiglu":
            self.gate = _linear(config, config.width, hidden, config.bias, rngs)
        self.down = _linear(config, hidden, width_out, config.bias, rngs, residual=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.config.mlp == "swiglu":
            return self.down(nnx.silu(self.gate(x)) * self.up(x))
        act = nnx.relu if self.config.mlp == "relu" else functools.partial(nnx.gelu, approximate=True)
        return self.down(act(self.up(x)))


class _Block(nnx.Module):
    """x + attention(norm x), then x + mlp(norm x); a constrained block adds coordinates times U^T."""

    def __init__(self, config: GPTConfig, *, constrained: bool, rngs: nnx.Rngs):
        self.constrained = constrained
        width_out = config.stream_width if constrained else config.width
        self.norm1 = _norm(config, rngs)
        self.attention = _Attention(config, width_out, rngs=rngs)
        self.norm2 = _norm(config, rngs)
        self.mlp = _MLP(config, width_out, rngs=rngs)

    def __call__(self, x: jax.Array, U: jax.Array | None = None) -> jax.Array:
        add = lambda y: _lift(y, U) if self.constrained else y
        x += add(self.attention(self.norm1(x)))
        return x + add(self.mlp(self.norm2(x)))


class _Head(nnx.Module):
    """The residual stream (B, T, d) to logits (B, T, V) in float32."""

    def __init__(self, config: GPTConfig, tokens: nnx.Embed, *, rngs: nnx.Rngs):
        self.norm = _norm(config, rngs)
        if config.tied:
            self.tokens = tokens
        else:
            self.logits = _linear(config, config.width, config.vocab_size, config.head_bias, rngs)
        self.config = config

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        kernel = self.tokens.embedding[...].T if self.config.tied else self.logits.kernel[...]
        wide = compute_dtype(x.dtype)
        logits = jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=wide)
        return logits + self.logits.bias[...].astype(wide)[None, None] if self.config.head_bias else logits


class GPT(nnx.Module):
    """A decoder-only transformer with pre-norm blocks, after its `GPTConfig`.

    Parameter paths: embed/tokens, embed/positions, blocks/i/{norm1,norm2},
    blocks/i/attention/{query,key,value,out}, blocks/i/mlp/{up,gate,down}, head/norm, head/logits; every matrix is
    (in, out), every embedding (rows, d). With `config.subspace` the embeddings and, in all but the last
    `full_rank_blocks` blocks, the kernels and biases of out and down end in k features instead of d.

    Args:
      config: sizes and design.
      rngs: of the initialisation.

    Raises:
      ValueError: when called, if learned positions end before the sequence does.

    Example:
      >>> model = GPT(GPTConfig(layers=1, width=8, heads=2), rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 5), jnp.int32)).shape
      (2, 5, 256)

    Source: Radford et al. (2019) [radford2019language]; Ajanthan et al. (ICML 2025), arXiv:2505.01099, official code
    [ajanthan2025nesterov]; Touvron et al. (2023), arXiv:2302.13971 [touvron2023llama]; Su et al. (2024),
    arXiv:2104.09864 [su2024roformer]; grouped query heads: Ainslie et al. (EMNLP 2023), arXiv:2305.13245
    [ainslie2023gqa]; subspace networks: Ramasinghe et al. (NeurIPS 2025), arXiv:2506.01260 [ramasinghe2025protocol].
    """

    def __init__(self, config: GPTConfig, *, rngs: nnx.Rngs):
        self.embed = _Embed(config, rngs=rngs)
        dense_from = 0 if config.subspace is None else config.layers - config.full_rank_blocks
        self.blocks = nnx.List([_Block(config, constrained=i < dense_from, rngs=rngs) for i in range(config.layers)])
        self.head = _Head(config, self.embed.tokens, rngs=rngs)

    def __call__(self, tokens: jax.Array, U: jax.Array | None = None, fixed: jax.Array | None = None) -> jax.Array:
        """Maps tokens, integers (B, T), to logits of the next token, float32 (B, T, V).

        U (d, k) is the basis of a subspace network; `fixed` (B, T, d) is added to the embedding and is no parameter.
        """
        x = self.embed(tokens, U, fixed)
        for block in self.blocks:
            x = block(x, U)
        return self.head(x)
