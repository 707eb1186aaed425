"""What a product with packed weights costs in arithmetic and in memory traffic."""

from jaxlib_methods.kernels._cost import Cost
from jaxlib_methods.kernels.packed_matmul.layout import rows_for


def cost_estimate(m: int, depth: int, n: int, bits: int, *, itemsize: int = 4) -> Cost:
    """Cost of x [m, depth] @ W [depth, n]: activations read, words read once, results written.

    Decoding is not counted: it is integer work on chip, and its amount depends on the blocks.

    Args:
      m, depth, n: the shape of the product.
      bits: of a packed weight; 8 * itemsize for the dense product.
      itemsize: bytes of an activation.

    Returns:
      A `Cost`.

    Example:
      >>> cost_estimate(1, 4096, 4096, 1).bytes_accessed, cost_estimate(1, 4096, 4096, 32).bytes_accessed
      (2129920, 67141632)
    """
    weights = 4 * rows_for(depth, bits) * n if bits <= 8 else depth * n * bits // 8
    return Cost(2 * m * depth * n, itemsize * (m * depth + m * n) + weights)
