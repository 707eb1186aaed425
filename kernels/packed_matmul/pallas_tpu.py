"""The product as a Pallas TPU kernel: words come to the chip packed and are decoded there, plane by plane.

The grid is (blocks of m, of n, of rows of words), the last one summed in a float32 scratch. A program holds the
activations of all P planes that meet its block of words: [P, m, rows]. What this kernel does not do `can_use` says in
words. It has not run on a TPU yet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxlib_methods.kernels._dispatch import require
from jaxlib_methods.kernels.packed_matmul.cost import cost_estimate
from jaxlib_methods.kernels.packed_matmul.layout import WORD, decode, rows_for

BLOCK_M = 128
BLOCK_N = 256
BLOCK_ROWS = 128


def can_use(shape: tuple[int, int, int], dtype: Any, num_labels: int) -> str | None:
    """Why these arguments are not for this kernel, or None if they are. A pure function of static facts.

    Args:
      shape: (m, depth, n) of the product.
      dtype: of the activations.
      num_labels: of the weights.

    Returns:
      The reason, or None.

    Example:
      >>> can_use((8, 4096, 4096), jnp.bfloat16, 2)
      >>> can_use((8, 4096, 4096), jnp.float64, 2)
      'the TPU kernel multiplies float32 and bfloat16, got float64'
    """
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"the TPU kernel multiplies float32 and bfloat16, got {jnp.dtype(dtype).name}"
    if num_labels > 4:
        return f"the TPU kernel decodes up to four labels by selects, got {num_labels}"
    if min(shape) < 1:
        return f"the TPU kernel needs a product without empty axes, got {shape}"
    return None


def matmul(
    x: jax.Array, words: jax.Array, labels: tuple[float, ...], bits: int, *, interpret: Any = False
) -> jax.Array:
    """See `jaxlib_methods.kernels.packed_matmul.packed_matmul`; `interpret` runs the kernel on the CPU, for tests."""
    (m, depth), n = x.shape, words.shape[1]
    require(can_use((m, depth, n), x.dtype, len(labels)))
    planes, rows = WORD // bits, rows_for(depth, bits)
    # A block of rows is a tile of lanes of the activations: whole where that is one block, else padded to full tiles.
    block_rows = rows if rows <= 2 * BLOCK_ROWS else BLOCK_ROWS
    padded = pl.cdiv(rows, block_rows) * block_rows
    x = jnp.pad(x, ((0, 0), (0, planes * rows - depth))).reshape(m, planes, rows)  # zeros meet the padding's codes
    x = jnp.pad(x.transpose(1, 0, 2), ((0, 0), (0, 0), (0, padded - rows)))
    words = jnp.pad(jax.lax.bitcast_convert_type(words, jnp.int32), ((0, padded - rows), (0, 0)))
    block_m, block_n = min(BLOCK_M, m), min(BLOCK_N, n)
    return pl.pallas_call(
        functools.partial(_kernel, labels=labels, bits=bits),
        grid=(pl.cdiv(m, block_m), pl.cdiv(n, block_n), padded // block_rows),
        in_specs=[
            pl.BlockSpec((planes, block_m, block_rows), lambda i, j, k: (0, i, k)),
            pl.BlockSpec((block_rows, block_n), lambda i, j, k: (k, j)),
        ],
        out_specs=pl.BlockSpec((block_m, block_n), lambda i, j, k: (i, j)),
        out_shape=jax.ShapeDtypeStruct((m, n), x.dtype),
        scratch_shapes=[pltpu.VMEM((block_m, block_n), jnp.float32)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=cost_estimate(m, depth, n, bits, itemsize=x.dtype.itemsize).pallas(),
        interpret=interpret,
        name="packed_matmul",
    )(x, words)


def _kernel(x: Any, words: Any, out: Any, total: Any, *, labels: tuple[float, ...], bits: int) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    def add_plane(j: jax.Array, _: None) -> None:
        codes = jax.lax.shift_right_logical(words[...], jnp.full(words.shape, bits * j, jnp.int32))
        weights = decode(codes & jnp.int32(2**bits - 1), labels, jnp.float32).astype(x.dtype)
        total[...] += jnp.dot(x[j], weights, preferred_element_type=jnp.float32)

    jax.lax.fori_loop(0, WORD // bits, add_plane, None)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _() -> None:
        out[...] = total[...].astype(out.dtype)
