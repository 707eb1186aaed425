"""What the site is made of: every public name has its place, documented arguments are real ones, notebooks run."""

import importlib
import inspect
import re

import pytest

from docs import generate, notebooks
from tests.library_modules import REPOSITORY, is_public, module_names

PAGES = generate.api_pages()
NOTEBOOKS = sorted((REPOSITORY / "docs" / "pages" / "notebooks").glob("*.py"))


def test_every_public_name_is_documented_once():
    documented = re.findall(r"^::: (\S+)$", "\n".join(PAGES.values()), re.MULTILINE)
    assert len(documented) == len(set(documented))
    for name in filter(is_public, (name for name, _ in module_names())):
        module = importlib.import_module(name)
        if getattr(module, "__all__", ()):
            assert name in documented
            for attribute in set(generate.names_of(module)):
                path = f"{name}.{attribute}"
                assert path in documented or generate.homes()[path] in documented, path


@pytest.mark.parametrize("module", generate.public_modules().values(), ids=generate.public_modules())
def test_the_arguments_of_a_docstring_are_those_of_the_signature(module):
    wrong = [f"{name}: {args}" for name in generate.names_of(module) if (args := unknown_arguments(module, name))]
    assert not wrong, "\n".join(wrong)


def unknown_arguments(module, name):
    """What `Args:` documents and the signature (or the fields of a class) does not have."""
    obj = getattr(module, name)
    if not hasattr(obj, "__qualname__") or not obj.__module__.startswith("jaxlib_methods"):
        return set()  # a constant or a type
    section = re.search(r"^Args:\n(.*?)(?=\n\S|\Z)", inspect.getdoc(obj) or "", re.DOTALL | re.MULTILINE)
    documented = re.findall(r"^  (\*{0,2}\w+(?:, \*{0,2}\w+)*):", section[1], re.MULTILINE) if section else []
    makers = (obj, obj.__init__) if inspect.isclass(obj) else (obj,)  # nnx's metaclass hides the arguments of __init__
    known = {*getattr(obj, "__annotations__", ()), *(name for f in makers for name in inspect.signature(f).parameters)}
    return {arg.strip("* ") for group in documented for arg in group.split(",")} - known


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path):
    outputs = notebooks.run(path)
    assert len(outputs) == sum(not cell.is_text for cell in notebooks.cells_of(path))


def test_a_notebook_shows_prints_values_and_figures(tmp_path):
    path = tmp_path / "small.py"
    path.write_text(
        "# %% [markdown]\n# # A title\n#\n# Text.\n\n# %%\nprint(1)\n2 + 3\n\n"
        "# %%\nimport matplotlib.pyplot as plt\n\nplt.plot([1, 2]);\n"
    )
    assert notebooks.cells_of(path)[0].source == "# A title\n\nText."
    page, figures = notebooks.render(path)
    assert "```text\n1\n5\n```" in page
    assert [*figures] == ["small_0.png"] and figures["small_0.png"].startswith(b"\x89PNG")
    path.write_text("# %%\n1 / 0\n")
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        notebooks.run(path)


def test_docstrings_show_doctests_as_code_and_link_their_sources():
    text = "One. A pair [i][j], `a[i][j]`.\n\nExample:\n  >>> a[0][1]\n\nSource: Somebody (2001) [one2001a; two2002b]."
    assert generate.rewrite(text) == (
        "One. A pair [i]&#91;j], `a[i][j]`.\n\nExamples:\n  >>> a[0][1]\n\n"
        "**Source:** Somebody (2001) ([one2001a][ref-one2001a], [two2002b][ref-two2002b])."
    )
