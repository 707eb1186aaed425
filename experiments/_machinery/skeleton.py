"""The `new` command: the skeleton of a method, which passes the checks except for what only its author can write.

It is a library file and its lines at the family's face, a test against a slow oracle, a recipe, a page of results and,
for a transformation, a row in the registry of the batteries.
"""

import importlib.util
import keyword
import pathlib
import re
import string
import subprocess
import sys
from typing import Any, NamedTuple

from experiments._machinery import pages, registry
from experiments._machinery.errors import ExperimentError
from experiments._machinery.files import write_text

KINDS = ("function", "loss", "transformation")
ROOT = registry.FOLDER.parent
TEMPLATES = pathlib.Path(__file__).parent / "templates"
REGISTRY = pathlib.Path("tests/registry/transformations.py")
BY_HAND = """\
Left for you:
- the mathematics in {library}, a doctest, and `[key]` at the end of `Source:`
- the entry of that key in jaxlib_methods/references.bib
- the oracle in {test}
- what is compared in {recipe}, and its targets
- run it, `python -m experiments report --write`, and write the claim and the verdict into {page}
- a row of README.md's table and one on the family's page of "How to choose"
"""


class Skeleton(NamedTuple):
    """Paths from the root of the repository, and what is to stand there."""

    library: pathlib.Path
    test: pathlib.Path
    recipe: pathlib.Path
    page: pathlib.Path
    texts: dict[pathlib.Path, str]  # of new files
    changes: dict[pathlib.Path, str]  # of files that are there: the whole new text


def make(name: str, family: str, kind: str, *, root: pathlib.Path = ROOT) -> Skeleton:
    """The skeleton of a method.

    Args:
      name: of the function that a reader of the paper would call, and of the experiment.
      family: a package of `jaxlib_methods`.
      kind: one of `KINDS`.
      root: of the repository.

    Raises:
      ExperimentError: the name is none or is taken, or there is no such family.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or keyword.iskeyword(name):
        raise ExperimentError(f"{name!r} is no name of a function; take lower case, digits and underscores")
    face = root / "jaxlib_methods" / family / "__init__.py"
    families = sorted(
        path.parent.name for path in root.glob("jaxlib_methods/[a-z]*/__init__.py") if path.parent.name != "kernels"
    )
    if family not in families:
        raise ExperimentError(f"there is no family {family!r}; known are {', '.join(families)}")
    library = pathlib.Path("jaxlib_methods") / family / f"_{name}.py"
    test = pathlib.Path("tests/jaxlib_methods") / family / f"test_{name}.py"
    recipe = pathlib.Path("experiments/methods") / f"{name}.py"
    page = pathlib.Path("experiments/results") / f"{name}.md"
    for path in (library, library.with_name(f"{name}.py"), test, recipe, page):
        if (root / path).exists():
            raise ExperimentError(f"there is a {path} already; take another name")
    words = name.replace("_", " ")
    values = {"name": name, "family": family, "Name": words.title().replace(" ", ""), "title": words.capitalize()}
    fill = lambda template: string.Template((TEMPLATES / f"{template}_{kind}.txt").read_text()).substitute(values)
    texts = {library: fill("library"), test: fill("test"), recipe: fill("recipe"), page: pages.skeleton(name)}
    public = [name, f"scale_by_{name}"] if kind == "transformation" else [name]
    changes = {face.relative_to(root): _with_names(face.read_text(), f"jaxlib_methods.{family}._{name}", public)}
    if kind == "transformation":
        rows = f'    Entry("scale_by_{name}", {family}.scale_by_{name}, as_optimizer=by_rate(0.1)),\n'
        rows += f'    Entry("{name}", {family}.{name}, {{"learning_rate": 0.1}}),\n'
        changes[REGISTRY] = _with_rows((root / REGISTRY).read_text(), family, rows)
    texts, changes = ({path: _in_style(path, text, root) for path, text in of.items()} for of in (texts, changes))
    return Skeleton(library, test, recipe, page, texts, changes)


def _with_names(face: str, module: str, names: list[str]) -> str:
    """A family's face with more names, imported and in `__all__`; ruff brings them into their order."""
    before, opened, rest = face.partition("__all__ = [\n")
    if not opened:
        raise ExperimentError(f"the face of {module.rpartition('.')[0]} has no list __all__ with a name a line")
    line = f"from {module} import {', '.join(f'{name} as {name}' for name in names)}\n\n"
    return before.rstrip() + "\n" + line + opened + "".join(f'    "{name}",\n' for name in names) + rest


def _in_style(path: pathlib.Path, text: str, root: pathlib.Path) -> str:
    """The text as ruff sorts and formats it; as it is where ruff is not installed."""
    if path.suffix == ".py" and importlib.util.find_spec("ruff"):
        for command in (("check", "--fix", "--quiet", "--exit-zero"), ("format",)):
            ruff = [sys.executable, "-m", "ruff", *command, "--stdin-filename", str(path), "-"]
            text = subprocess.run(ruff, cwd=root, input=text, capture_output=True, text=True, check=True).stdout
    return text


def _with_rows(text: str, family: str, rows: str) -> str:
    """The registry with more rows at the end of `ENTRIES`."""
    before, opened, rest = text.partition("\nENTRIES")
    listed, closed, after = rest.partition("\n]")
    if not (opened and closed):
        raise ExperimentError(f"{REGISTRY} has no list ENTRIES that ends in a line of its own")
    head = re.search(r"^from jaxlib_methods import (.*)$", before, re.MULTILINE)
    if head and family not in head.group(1).split(", "):
        families = ", ".join(sorted([*head.group(1).split(", "), family]))
        before = before[: head.start(1)] + families + before[head.end(1) :]
    return before + opened + listed + "\n" + rows.rstrip("\n") + closed + after


def main(options: Any) -> int:
    """The `new` command: prints what it would write, or writes it."""
    skeleton = make(options.name, options.family, options.kind)
    for path, text in {**skeleton.texts, **skeleton.changes}.items():
        if options.write:
            write_text(ROOT / path, text)
            print(f"{'wrote' if path in skeleton.texts else 'changed'} {path}")
        elif path in skeleton.texts:
            print(f"# {'-' * 20} {path}\n\n{text}")
        else:
            old = (ROOT / path).read_text().splitlines()
            added = [line for line in text.splitlines() if line not in old]
            print(f"# {'-' * 20} {path}, more lines\n\n" + "\n".join(added) + "\n")
    paths = {"library": skeleton.library, "test": skeleton.test, "recipe": skeleton.recipe, "page": skeleton.page}
    print(BY_HAND.format(**paths), end="")
    return 0
