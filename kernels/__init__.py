"""Accelerated inner loops, each beside a plain `jax.numpy` reference. Imported as `jaxlib_methods.kernels`."""
