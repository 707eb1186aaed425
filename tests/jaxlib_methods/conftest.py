import jax
import pytest


@pytest.fixture
def flax_x64():
    """Float64 inside one test, with the promotions that flax's norms make between it and float32."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        yield
