"""Imports of the experiments point one way: methods -> tasks -> data -> _machinery, and no method imports another."""

import ast
import pathlib

import pytest

import experiments

ROOT = pathlib.Path(experiments.__file__).parent
BELOW = {
    "_machinery": {"_machinery"},
    "data": {"data", "_machinery"},
    "tasks": {"tasks", "data", "_machinery"},
    "methods": {"tasks", "data", "_machinery"},
}


def imported(path):
    """The rooms of `experiments` that a module imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "experiments":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("experiments."))


@pytest.mark.parametrize("room", BELOW)
def test_a_room_imports_from_those_below_it_alone(room):
    for path in sorted((ROOT / room).glob("*.py")):
        wrong = set(imported(path)) - BELOW[room]
        assert not wrong, f"{path.relative_to(ROOT)} imports from {wrong}; what two need moves down"
