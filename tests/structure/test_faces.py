"""What a user sees first of a family: few names, with a docstring, and everything else in named submodules."""

import importlib
import inspect
import subprocess
import sys

import pytest

import jaxlib_methods
from tests.library_modules import is_public, module_names

pytestmark = pytest.mark.contract

# Of a kernel its package is the face; the files in it have the names that every kernel's have.
MODULES = [name for name, _ in module_names() if is_public(name) and not (".kernels." in name and name.count(".") > 2)]
FAMILIES = sorted(set(jaxlib_methods.__all__) - {"__version__", "citation", "trees", "typing"})
MOST_NAMES = 15


@pytest.mark.parametrize("family", FAMILIES)
def test_a_face_has_few_names(family):
    names = importlib.import_module(f"jaxlib_methods.{family}").__all__
    assert len(names) <= MOST_NAMES, f"{len(names)} names at the face of {family}"


@pytest.mark.parametrize("name", MODULES)
def test_a_public_module_says_what_it_is_and_what_it_has(name):
    module = importlib.import_module(name)
    assert inspect.getdoc(module), f"{name} has no docstring"
    assert hasattr(module, "__all__"), f"{name} has no __all__"
    missing = [n for n in module.__all__ if not hasattr(module, n)]
    assert not missing, f"{name} has no {missing}"


@pytest.mark.parametrize("name", MODULES)
def test_what_is_public_says_what_it_does(name):
    module = importlib.import_module(name)
    silent = [
        n
        for n in module.__all__
        if (inspect.isfunction(value := getattr(module, n)) or inspect.isclass(value)) and not value.__doc__
    ]
    assert not silent, f"{name}: {silent} have no docstring"


# In an interpreter of its own: elsewhere a submodule becomes an attribute as soon as anything has imported it. A module
# without names of its own only says where old ones have gone.
SUBMODULES = """
import importlib, pkgutil, sys
for name in sys.argv[1:]:
    package = importlib.import_module(name)
    there = set(vars(package))
    for module in pkgutil.iter_modules(package.__path__, name + "."):
        short = module.name.rpartition(".")[2]
        if not short.startswith("_") and short not in there and importlib.import_module(module.name).__all__:
            print(module.name)
"""


def test_public_submodules_are_attributes_of_their_family():
    packages = [n for n, package in module_names() if package and is_public(n) and ".kernels" not in n and "." in n]
    run = subprocess.run([sys.executable, "-c", SUBMODULES, *packages], capture_output=True, text=True, check=True)
    assert not run.stdout, run.stdout
