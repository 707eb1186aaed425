"""What the Mosaic GPU kernels have in common."""

import jax


def device_reason() -> str | None:
    """Why the GPU at hand is not for these kernels; None if it is, or if there is none (to lower for another one)."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    capability = str(device.compute_capability)
    if capability.startswith("9."):
        return None
    return f"the GPU kernel is written for Hopper (compute capability 9), got {device.device_kind} with {capability}"
