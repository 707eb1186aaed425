"""Finds experiments without importing them: `list` must be instant and must not need JAX.

An experiment is a module of `methods/` with `class Config`, `def variants` and `def run`; the first line of its
docstring describes it and a paragraph `Paper: ...` names its source.
"""

import ast
import importlib
import importlib.util
import pathlib
import sys
from types import ModuleType
from typing import NamedTuple

from experiments._machinery.errors import ExperimentError

FOLDER = pathlib.Path(__file__).parent.parent


class Entry(NamedTuple):
    name: str
    description: str
    paper: str


def entries() -> list[Entry]:
    """All experiments of the folder, by name."""
    found = []
    for path in sorted((FOLDER / "methods").glob("*.py")):
        tree = ast.parse(path.read_text())
        if {"Config", "variants", "run"} <= {getattr(node, "name", None) for node in tree.body}:
            paragraphs = [part.split() for part in (ast.get_docstring(tree) or "").split("\n\n")]
            paper = next((words[1:] for words in paragraphs if words[:1] == ["Paper:"]), [])
            found.append(Entry(path.stem, " ".join(paragraphs[0]), " ".join(paper)))
    return found


def print_list() -> int:
    """The `list` command."""
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "what it does", "paper", box=None, pad_edge=False)
    for entry in entries():
        table.add_row(*entry)
    Console().print(table)
    return 0


def load(name: str) -> ModuleType:
    """Imports an experiment by its name, or from a path to a `.py` file anywhere."""
    if name.endswith(".py"):
        path = pathlib.Path(name)
        if not path.is_file():
            raise ExperimentError(f"there is no file {path}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module  # dataclasses look their module up
        spec.loader.exec_module(module)
        return module
    known = [entry.name for entry in entries()]
    if name not in known:
        raise ExperimentError(f"unknown experiment {name!r}; known are {', '.join(known) or 'none'}")
    return importlib.import_module(f"experiments.methods.{name}")
