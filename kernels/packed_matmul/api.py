"""x @ W with W packed in bits: validation and the choice of an implementation."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels._dispatch import Kernel
from jaxlib_methods.kernels.packed_matmul import layout
from jaxlib_methods.typing import Implementation

KERNEL = Kernel("packed_matmul", ("xla", "pallas_gpu", "pallas_tpu"))


def packed_matmul(
    x: jax.Array,
    words: jax.Array,
    labels: Sequence[float | int],
    *,
    implementation: Implementation | None = None,
) -> jax.Array:
    r"""Product of activations with packed weights, $y_{\cdot n} = \sum_k x_{\cdot k} q_{c(k, n)}$.

    The weights take 1/32 (two labels) or 1/16 (up to four) of float32's memory, and as much less traffic; the
    arithmetic is that of the dense product after decoding. So a product that waits for its weights (few rows of x, a
    large matrix) may gain time, and one that does not loses the time of decoding.

    Args:
      x: [..., K], floating.
      words: uint32 [ceil(K bits / 32), N] from `pack_codes`, bits = `bits_for(len(labels))`.
      labels: the value of each code; at most 256.
      implementation: None or "xla" for the program that runs everywhere; "pallas_gpu" (Hopper, at most 8 rows of x) and
        "pallas_tpu" for the kernels, which have not been timed on their devices and so are never chosen unasked.

    Returns:
      [..., N] in the dtype of x, summed in float32.

    Raises:
      ValueError: shapes, dtypes or labels that do not fit.
      NotImplementedError: the named implementation does not exist or does not support the arguments.

    Example:
      >>> words = layout.pack_codes(jnp.array([[0, 1], [1, 1], [1, 0]]), 1)
      >>> packed_matmul(jnp.array([1.0, 2.0, 4.0]), words, (-1, 1)).tolist()
      [5.0, -1.0]
    """
    labels = tuple(float(label) for label in labels)
    bits = layout.bits_for(len(labels))
    if x.ndim < 1 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x must be floating [..., K], got {x.dtype} {x.shape}")
    layout.check_words(words, bits, x.shape[-1])
    return _apply(x, words, labels, bits, implementation)


@functools.partial(jax.jit, static_argnames=("labels", "bits", "implementation"))
def _apply(
    x: jax.Array, words: jax.Array, labels: tuple[float, ...], bits: int, implementation: Implementation | None
) -> jax.Array:
    y = KERNEL.run("matmul", implementation, x.reshape(-1, x.shape[-1]), words, labels, bits)
    return y.reshape(*x.shape[:-1], words.shape[1])
