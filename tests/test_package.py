"""The face of the package: families on demand, a quick import, few names, and old names that still lead somewhere."""

import importlib
import subprocess
import sys
import warnings

import pytest

import jaxlib_methods
from tests.library_modules import is_public, module_names

pytestmark = pytest.mark.contract
PACKAGES = [name for name, is_package in module_names() if is_package and is_public(name)]

# Seconds to import the library once JAX is there, on a quiet core a few milliseconds; and what that brings in.
IMPORT = """
import sys, time
import jax
began = time.process_time()
import jaxlib_methods
print(time.process_time() - began)
print(*[name for name in sys.modules if name.startswith("jaxlib_methods.")])
"""


def test_has_a_version():
    assert jaxlib_methods.__version__.count(".") == 2


def test_families_are_loaded_when_they_are_asked_for_and_shown_before():
    shown = subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True).stdout
    seconds, loaded = shown.splitlines()
    assert float(seconds) < 0.05
    assert loaded.split() == ["jaxlib_methods._version"]
    assert set(dir(jaxlib_methods)) == set(jaxlib_methods.__all__)
    with pytest.raises(AttributeError, match=r"no attribute 'prunning'; it has .*pruning"):
        _ = jaxlib_methods.prunning


@pytest.mark.parametrize("name", jaxlib_methods.__all__)
def test_attributes(name):
    assert getattr(jaxlib_methods, name) is not None


@pytest.mark.parametrize("name", PACKAGES)
def test_old_names_lead_to_new_ones(name):
    module = importlib.import_module(name)
    moved = getattr(vars(module).get("__getattr__"), "moved", {})
    assert not set(moved) & set(getattr(module, "__all__", ())), "a name is both old and new"
    for old, new in moved.items():
        if old in vars(module):  # an old submodule that something has imported
            continue
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert getattr(module, old) is not None
        assert [w.category for w in caught] == [DeprecationWarning], old
        assert f"jaxlib_methods.{new} since" in str(caught[0].message)


def test_a_name_that_never_was_there_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'magnitudes'"):
        _ = jaxlib_methods.pruning.magnitudes
