"""What depends on the version of JAX, in one file."""

import jax

# Mosaic GPU kernels are written against the API of JAX 0.11; before, loads need an index and the interpreter differs.
MOSAIC_GPU_MISSING = (
    f"Mosaic GPU kernels need JAX 0.11 or newer, got {jax.__version__}" if jax.__version_info__ < (0, 11) else None
)


def mosaic_gpu_store(ref: object, value: jax.Array) -> None:
    """Stores registers in shared memory, by narrow writes where the layout has no wide ones.

    JAX 0.12 has a function for it, and without it searches the register layouts for one with wide writes; before 0.12
    every store was free to be narrow.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu  # not loaded with the library: only these kernels need it

    if hasattr(plgpu, "store"):
        plgpu.store(ref, value, optimized=False)
    else:
        ref[...] = value
