"""A quantized network in bits: 1 bit for two labels, 2 for three and four, and so on up to 8."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlib_methods.kernels import packed_matmul as kernel
from jaxlib_methods.quantization.lattice import Lattice, assert_quantized, label_sets
from jaxlib_methods.typing import Implementation, PyTree

__all__ = [
    "PackedWeight",
    "pack",
    "packed_bytes",
    "packed_matmul",
    "unpack",
]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("words",), meta_fields=("labels", "shape", "dtype"))
@dataclasses.dataclass(frozen=True)
class PackedWeight:
    """One weight array in bits; the words are its only leaf.

    Attributes:
      words: uint32 [ceil(K bits / 32), N] of the weight as a matrix [K, N], N its last axis.
      labels: the value of each code.
      shape: of the weight.
      dtype: of the weight, by name.
    """

    words: jax.Array
    labels: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str


def pack(network: PyTree, lattice: Lattice) -> PyTree:
    """Stores a quantized network in bits; `unpack` gives the same bits back.

    Args:
      network: what `quantize` returned.
      lattice: its label sets, at most 256 labels each; excluded leaves stay as they are.

    Returns:
      A tree like `network` with a `PackedWeight` in the place of every quantized array.

    Raises:
      ValueError: a weight that is not in its label set.

    Example:
      >>> import jax.numpy as jnp
      >>> packed = pack({"w": jnp.ones((64, 100))}, Lattice())
      >>> packed["w"].words.shape, packed_bytes(packed), unpack(packed)["w"].shape
      ((2, 100), 800, (64, 100))
    """
    assert_quantized(network, lattice)
    leaves, structure = jax.tree.flatten(network)
    pairs = zip(label_sets(lattice, network), leaves, strict=True)
    return structure.unflatten([w if labels is None else _pack(labels, jnp.asarray(w)) for labels, w in pairs])


@functools.partial(jax.jit, static_argnums=0)
def _pack(labels: tuple[float, ...], w: jax.Array) -> PackedWeight:
    matrix = w.reshape(math.prod(w.shape[:-1]), w.shape[-1]) if w.ndim > 1 else w.reshape(-1, 1)
    codes = jnp.zeros(matrix.shape, jnp.int32)
    for code, q in enumerate(labels[1:], start=1):
        codes = jnp.where(matrix == w.dtype.type(q), code, codes)
    return PackedWeight(kernel.pack_codes(codes, kernel.bits_for(len(labels))), labels, w.shape, w.dtype.name)


def unpack(packed: PyTree) -> PyTree:
    """Undoes `pack`.

    Args:
      packed: a tree with `PackedWeight` nodes.

    Returns:
      The network, in its own shapes and dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> w = jnp.array([-1.0, 0.0, 1.0])
      >>> unpack(pack(w, Lattice((-1, 0, 1)))).tolist()
      [-1.0, 0.0, 1.0]
    """

    def one(node: Any) -> Any:
        if not isinstance(node, PackedWeight):
            return node
        matrix = math.prod(node.shape) // node.words.shape[1] if node.words.shape[1] else 0
        codes = kernel.unpack_codes(node.words, kernel.bits_for(len(node.labels)), matrix)
        return kernel.decode(codes, node.labels, node.dtype).reshape(node.shape)

    return jax.tree.map(one, packed, is_leaf=_is_packed)


def packed_bytes(tree: PyTree) -> int:
    """Bytes of all arrays of a tree, packed or not.

    Args:
      tree: any pytree of arrays or shapes.

    Returns:
      Their sizes in bytes, added up.

    Example:
      >>> import jax.numpy as jnp
      >>> packed_bytes({"w": jnp.ones((64, 100))})
      25600
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def packed_matmul(x: jax.Array, weight: PackedWeight, *, implementation: Implementation | None = None) -> jax.Array:
    """A dense layer's product with a packed kernel, x @ W, decoded on the way.

    Args:
      x: [..., K].
      weight: of shape (K, N).
      implementation: as in `jaxlib_methods.kernels.packed_matmul.packed_matmul`.

    Returns:
      [..., N] in the dtype of x.

    Raises:
      ValueError: a weight that is no matrix, or shapes that do not fit.
      NotImplementedError: as the kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> w = pack(jnp.array([[1.0, -1.0], [1.0, 1.0]]), Lattice())
      >>> packed_matmul(jnp.array([[3.0, 4.0]]), w).tolist()
      [[7.0, 1.0]]
    """
    if len(weight.shape) != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"weight must be a packed ({x.shape[-1]}, N) matrix, got one of shape {weight.shape}")
    return kernel.packed_matmul(x, weight.words, weight.labels, implementation=implementation)


def _is_packed(node: Any) -> bool:
    return isinstance(node, PackedWeight)
