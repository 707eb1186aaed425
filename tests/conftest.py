"""JAX in its strictest mode for every test: no silent promotion, no silent broadcasting, eight fake devices."""

import os
import pathlib

import jax
import pytest

import tests.type_checks  # noqa: F401 - named in pyproject.toml, and to be loaded before the library

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)

pytest_plugins = ["tests.cpu_budgets"]

# Much of the time would be spent on optimising programs that run for a millisecond. XLA reads this with its
# first device; processes that tests start inherit it.
QUICK_COMPILATION = "--xla_backend_optimization_level=0"
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK_COMPILATION}".strip()

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CACHE = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache")) / "jaxlib_methods"
jax.config.update("jax_compilation_cache_dir", str(CACHE / f"xla-{jax.__version__}"))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture
def key():
    """A typed key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture
def x64():
    """Float64 inside one test: for finite differences and exact oracles."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="session")
def shared_data():
    """The real data beside the checkout; tests that need it are skipped where it is not there."""
    path = REPOSITORY.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip("../shared/data is not beside this checkout")
    return path
