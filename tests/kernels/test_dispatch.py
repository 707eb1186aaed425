"""The choice of an implementation, with the sweep as the kernel that has all of them, and the one cost model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from jaxlib_methods.kernels import Cost, packed_matmul, scanline, threshold
from jaxlib_methods.kernels.scanline import Pairwise, api


def sweep(u, **options):
    potts = Pairwise("potts", jnp.float32(1), semimetric=True)
    return scanline.sweep(u, None, potts, edge_probability=1.0, **options)


def prefer(monkeypatch, platform, *names):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    monkeypatch.setattr(api, "KERNEL", dataclasses.replace(api.KERNEL, preference={platform: names}))


@pytest.fixture
def u():
    return jnp.zeros((3, 4, 5), jnp.float32)


@pytest.mark.contract
@pytest.mark.parametrize("platform", ["gpu", "tpu", "cpu"])
def test_none_means_the_program_that_was_measured(platform, monkeypatch, u):
    # No kernel has been timed on its device: a caller who names none gets XLA everywhere.
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert "pallas" not in str(jax.make_jaxpr(lambda u: sweep(u))(u))


def test_one_line_puts_a_measured_kernel_first(monkeypatch, u):
    prefer(monkeypatch, "tpu", "pallas_tpu", "xla")
    assert "scanline_sweep" in str(jax.make_jaxpr(lambda u: sweep(u))(u))  # traced anew, not from JAX's cache


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_what_a_kernel_refuses_goes_to_the_next(platform, monkeypatch, u):
    prefer(monkeypatch, platform, f"pallas_{platform}", "xla")
    assert "scanline_sweep" not in str(jax.make_jaxpr(lambda u: sweep(u, step=(1, 1)))(u))


def test_a_name_never_falls_back(u):
    with pytest.raises(NotImplementedError, match=r"step \(1, 0\)"):
        sweep(u, step=(1, 1), implementation="pallas_tpu")


def test_if_nothing_works_every_reason_is_told(monkeypatch, u):
    prefer(monkeypatch, "tpu", "pallas_tpu", "pallas_gpu")
    with pytest.raises(ExceptionGroup, match="no implementation of sweep") as caught:
        sweep(u, step=(1, 1))
    assert [str(reason).split(":")[0] for reason in caught.value.exceptions] == ["pallas_tpu", "pallas_gpu"]


def test_a_kernel_that_does_not_exist_is_named_and_so_is_a_name_that_is_none(u):
    with pytest.raises(NotImplementedError, match="threshold has no 'pallas_gpu'; it has 'xla'"):
        threshold.keep_largest([jnp.ones(3)], 1, implementation="pallas_gpu")
    with pytest.raises(ValueError, match=r"implementation must be None or one of 'xla', .*'cuda'"):
        sweep(u, implementation="cuda")


@pytest.mark.parametrize("kernel", [packed_matmul, scanline, threshold])
def test_workloads_have_names_of_their_own_and_the_small_ones_are_tagged(kernel):
    names = [spec.name for spec in kernel.ARG_SPECS]
    assert len(set(names)) == len(names) and any("ci" in spec.tags for spec in kernel.ARG_SPECS)


def test_the_roofline_is_the_slower_of_arithmetic_and_traffic():
    cost = Cost(flops=300, bytes_accessed=100)
    assert (cost.floor_s(flops_per_s=100, bytes_per_s=10), cost.floor_s(flops_per_s=10, bytes_per_s=10)) == (10, 30)
    assert cost.floor_s(bytes_per_s=50) == 2
    assert cost.pallas().flops == 300
