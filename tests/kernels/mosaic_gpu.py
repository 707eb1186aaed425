"""What the tests of Mosaic GPU kernels share: the interpreter, and lowering for a GPU that is not here."""

import jax
import pytest

from jaxlib_methods import _compat

needs_mosaic = pytest.mark.skipif(_compat.MOSAIC_GPU_MISSING is not None, reason=str(_compat.MOSAIC_GPU_MISSING))


def interpreted(**options):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return plgpu.InterpretGPUParams(**options)


def export_for_h200(function, *arguments):
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H200", num_cores=None, platform="gpu")
    unstable = jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")
    with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)):
        exported = jax.export.export(jax.jit(function), platforms=["cuda"], disabled_checks=[unstable])(*arguments)
    return exported.mlir_module()
