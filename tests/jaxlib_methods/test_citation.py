"""`citation` on a small package of its own, and the whole public API: documented, with sources that resolve."""

import ast
import importlib
import inspect
import re
import sys
import types

import jax
import optax
import pytest

import jaxlib_methods
from jaxlib_methods import _citation, citation, trees
from tests.library_modules import REPOSITORY, is_public, module_names

REFERENCES = """
@inproceedings{first2002method, title={First}}

@misc{second2003method,
  title = "Second",
}

@article{shared2001,
  title = {A title with {Nested} braces},
}
"""

MODULE = '''
"""A paper."""
import functools
import jax
import optax

__all__ = ["Layer", "Sub", "scale_by_first", "second"]

def scale_by_first(rate):
    """One.

    Source: First (ICML 2002), arXiv:0000.00001, eq. 5
    [first2002method, shared2001].
    """
    def update(updates, state, params=None, **extra):
        return jax.tree.map(lambda g: rate * g, updates), state
    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)

@jax.jit
def second(x):
    """Two.

    Source: Second, Section 3 [second2003method]; used also in [shared2001].
    """
    return x

class Layer:
    """A layer.

    Source: [shared2001].
    """

class Sub(Layer):
    pass

def own():
    """Mine."""

def lost():
    """Lost.

    Source: Somebody [nowhere1999].
    """

def keyless():
    """Keyless.

    Source: somebody, somewhere.
    """
'''


@pytest.fixture
def family(monkeypatch):
    """A module `jaxlib_methods._example` with references of its own."""
    module = types.ModuleType("jaxlib_methods._example")
    exec(compile(MODULE.strip(), "_example.py", "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(_citation, "references", lambda: _citation._parse(REFERENCES))
    return module


def keys(text):
    return [line.split("{")[1].split(",")[0] for line in text.splitlines() if line.startswith("@")]


class TestCitation:
    @pytest.mark.contract
    def test_a_function_and_the_order_of_its_keys(self, family):
        text = citation(family.scale_by_first)
        assert keys(text) == ["first2002method", "shared2001"]
        assert text.endswith("@article{shared2001,\n  title = {A title with {Nested} braces},\n}")

    def test_entries_are_separated_by_an_empty_line(self, family):
        assert citation(family.second).split("\n\n")[0] == '@misc{second2003method,\n  title = "Second",\n}'

    def test_each_entry_once_in_the_order_of_first_mention(self, family):
        both = citation(family.second, family.scale_by_first)
        assert keys(both) == ["second2003method", "shared2001", "first2002method"]

    def test_classes_instances_and_subclasses(self, family):
        for obj in (family.Layer, family.Layer(), family.Sub, family.Sub()):
            assert keys(citation(obj)) == ["shared2001"]

    def test_jitted_functions_and_partials(self, family):
        assert keys(citation(jax.tree_util.Partial(family.second))) == ["second2003method", "shared2001"]
        assert keys(citation(jax.jit(family.scale_by_first))) == ["first2002method", "shared2001"]

    def test_a_module_cites_everything_public(self, family):
        assert keys(citation(family)) == ["shared2001", "first2002method", "second2003method"]

    def test_a_transformation_inside_a_chain(self, family):
        transformation = family.scale_by_first(0.1)
        chained = optax.chain(optax.clip(1.0), optax.chain(optax.masked(transformation, True), optax.scale(-1.0)))
        for obj in (transformation, chained):
            assert keys(citation(obj)) == ["first2002method", "shared2001"]

    def test_own_utilities_cite_nothing(self, family):
        assert citation(family.own, trees.label_tree, citation) == ""

    def test_errors_name_the_object_and_the_remedy(self, family):
        with pytest.raises(ValueError, match=r"_example\.lost cites \['nowhere1999'\], which .*references"):
            citation(family.lost)
        with pytest.raises(ValueError, match=r"keyless names no \[key\]"):
            citation(family.keyless)
        with pytest.raises(ValueError, match="cite its factory"):
            citation(optax.sgd(0.1))
        with pytest.raises(ValueError, match="sin is not of jaxlib_methods"):
            citation(jax.numpy.sin)
        with pytest.raises(ValueError, match="at least one"):
            citation()

    def test_a_broken_list_of_references_is_an_error(self):
        with pytest.raises(ValueError, match="'open2004' is never closed"):
            _citation._parse("@misc{open2004, title={")
        with pytest.raises(ValueError, match="'again2005' stands twice"):
            _citation._parse("@misc{again2005, year={2005}} @misc{again2005, year={2005}}")


PUBLIC = [name for name, package in module_names() if is_public(name) and (package or ".kernels." not in name)]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_api_is_documented_and_cited(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    assert hasattr(module, "__all__") or name == "jaxlib_methods.kernels", f"{name} has no __all__"
    problems = [problem for attribute in getattr(module, "__all__", ()) if (problem := flaw(module, attribute))]
    assert not problems, "\n".join(problems)


def flaw(module, attribute):
    """What a public object lacks. Constants and type aliases carry no docstring; modules are visited themselves."""
    obj = getattr(module, attribute)
    if not hasattr(obj, "__qualname__") or not obj.__module__.startswith("jaxlib_methods"):
        return None
    if not inspect.getdoc(obj):
        return f"{module.__name__}.{attribute} has no docstring"
    try:
        citation(obj)
    except ValueError as error:
        return f"{module.__name__}.{attribute}: {error}"


def test_every_entry_is_sorted_complete_and_named_by_a_docstring():
    entries = _citation.references()
    assert list(entries) == sorted(entries)
    for key, entry in entries.items():
        fields = dict(re.findall(r"^  (\w+) = \{(.*?)\},$", entry, re.DOTALL | re.MULTILINE))
        assert {"title", "author", "year"} <= set(fields), key
    used = {
        key
        for source in sources_on_disk()
        for group in _citation._KEYS.findall(source)
        for key in re.split(r"[,;]\s*", group)
    }
    assert used == set(entries)


def sources_on_disk():
    """Every `Source:` paragraph of the library, private functions included."""
    for folder in (REPOSITORY / "jaxlib_methods", REPOSITORY / "kernels"):
        for path in folder.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield from _citation._SOURCE.findall(ast.get_docstring(node) or "")


def test_a_package_is_cited_as_the_sum_of_its_public_names():
    public = [getattr(trees, name) for name in trees.__all__]
    assert citation(trees) == citation(*public) == ""
    assert citation(jaxlib_methods.normalization) in citation(jaxlib_methods)
