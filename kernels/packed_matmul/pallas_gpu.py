"""The product with few rows of activations as a Mosaic GPU kernel for Hopper, where dense weights wait for memory.

The grid is (blocks of columns, blocks of rows of words). A warpgroup fetches its words, still packed, and the
activations that meet them, decodes in registers, and keeps one sum for each row of activations and each column. It
multiplies on the ordinary float32 units: with few rows the time goes into the weights. What blocks of rows have found
XLA adds up. What this kernel does not do `can_use` says in words. It has not run on a GPU yet.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxlib_methods._compat import MOSAIC_GPU_MISSING, mosaic_gpu_store
from jaxlib_methods.kernels._dispatch import require
from jaxlib_methods.kernels._hopper import device_reason
from jaxlib_methods.kernels.packed_matmul.layout import WORD, decode, rows_for

THREADS = 128  # one warpgroup
MAX_M = 8  # rows of activations, a register each for every column of a thread; 32 planes of them fill a TMA box of 256
COLUMNS = (256, 128)  # of a block, the first that divides n; at most a TMA box
ROWS = (64, 32, 16, 8)  # of words in a block
# Blocks for two of an H200's 132 multiprocessors each: fewer rows a block make more of them, and more sums to add up.
# An estimate.
BLOCKS = 264


def can_use(shape: tuple[int, int, int], dtype: Any, num_labels: int) -> str | None:
    """Why these arguments are not for this kernel, or None if they are. A pure function of static facts.

    Args:
      shape: (m, depth, n) of the product.
      dtype: of the activations.
      num_labels: of the weights.

    Returns:
      The reason, or None.

    Example:
      >>> can_use((100, 4096, 4096), jnp.float64, 2) is None
      False
    """
    if MOSAIC_GPU_MISSING is not None:
        return MOSAIC_GPU_MISSING
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16, jnp.float16):
        return f"the GPU kernel adds in float32, got activations in {jnp.dtype(dtype).name}"
    if num_labels > 4:
        return f"the GPU kernel decodes up to four labels by selects, got {num_labels}"
    if shape[0] > MAX_M:
        return f"the GPU kernel is for at most {MAX_M} rows of activations, got {shape[0]}"
    if min(shape) < 1:
        return f"the GPU kernel needs a product without empty axes, got {shape}"
    return None


def choose_block(rows: int, n: int) -> tuple[int, int]:
    """Rows of words and columns of a block: as many as divide, since padding copies the words, and leave enough blocks.

    Args:
      rows: of words.
      n: columns.

    Returns:
      (rows, columns) of a block.

    Example:
      >>> choose_block(128, 4096), choose_block(784, 4096), choose_block(25, 300)
      ((8, 256), (16, 256), (8, 128))
    """
    columns = next((size for size in COLUMNS if n % size == 0), COLUMNS[-1])
    enough = (size for size in ROWS if rows % size == 0 and rows // size * pl.cdiv(n, columns) >= BLOCKS)
    return next(enough, ROWS[-1]), columns


def matmul(x: jax.Array, words: jax.Array, labels: tuple[float, ...], bits: int, *, interpret: Any = None) -> jax.Array:
    """See `jaxlib_methods.kernels.packed_matmul.packed_matmul`; `interpret` runs the kernel on the CPU, for tests."""
    (m, depth), n = x.shape, words.shape[1]
    require(can_use((m, depth, n), x.dtype, len(labels)) or device_reason())
    planes, rows = WORD // bits, rows_for(depth, bits)
    block_rows, block_columns = choose_block(rows, n)
    missing_rows, missing_columns = -rows % block_rows, -n % block_columns
    dtype, x = x.dtype, x.astype(jnp.float32)
    x = jnp.pad(x, ((0, 0), (0, planes * rows - depth))).reshape(m, planes, rows).transpose(2, 1, 0)
    x = jnp.pad(x, ((0, missing_rows), (0, 0), (0, 0))).reshape(-1, planes * m)  # zeros meet the padding's codes
    words = jnp.pad(jax.lax.bitcast_convert_type(words, jnp.int32), ((0, missing_rows), (0, missing_columns)))
    grid = (words.shape[1] // block_columns, words.shape[0] // block_rows)
    body = functools.partial(_kernel, labels=labels, bits=bits, m=m)
    body.__name__ = "packed_matmul"
    sums = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((grid[1], m, words.shape[1]), jnp.float32),
        scratch_types=(
            plgpu.SMEM((block_rows, planes * m), jnp.float32),
            plgpu.SMEM((block_rows, block_columns), jnp.int32),
            plgpu.Barrier(num_arrivals=2),
        ),
        grid=grid,
        grid_names=("columns", "rows"),
        interpret=interpret,
    )(x, words)
    return sums.sum(0)[:, :n].astype(dtype)


def _kernel(
    x: Any, words: Any, out: Any, x_block: Any, word_block: Any, arrived: Any, *, labels: Any, bits: int, m: int
) -> None:
    block_rows, block_columns = word_block.shape
    block = jax.lax.axis_index("rows")
    rows = pl.ds(block * block_rows, block_rows)
    columns = pl.ds(jax.lax.axis_index("columns") * block_columns, block_columns)
    layout = plgpu.Layout.WG_STRIDED((block_columns,), vec_size=block_columns // THREADS)
    plgpu.copy_gmem_to_smem(x.at[rows], x_block, arrived)
    plgpu.copy_gmem_to_smem(words.at[rows, columns], word_block, arrived)
    plgpu.barrier_wait(arrived)

    def add_row(r: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        def add_plane(j: jax.Array, carry: tuple) -> tuple:
            codes, sums = carry
            weights = decode(codes & jnp.int32(2**bits - 1), labels, jnp.float32)
            sums = tuple(total + x_block[r, j * m + i] * weights for i, total in enumerate(sums))
            return jax.lax.shift_right_logical(codes, jnp.full(codes.shape, bits, jnp.int32)), sums

        codes = plgpu.load(word_block.at[r], layout=layout)
        return jax.lax.fori_loop(0, WORD // bits, add_plane, (codes, sums))[1]

    zeros = plgpu.layout_cast(jnp.zeros((block_columns,), jnp.float32), layout)
    for i, total in enumerate(jax.lax.fori_loop(0, block_rows, add_row, (zeros,) * m)):
        mosaic_gpu_store(out.at[block, i, columns], total)
