"""Imports point one way: from what is particular to what is shared. Read off the sources, so that nothing is loaded."""

import ast
import pathlib
import sys

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent.parent

# What every part of the library may import of the library. A family is whatever is not listed.
SHARED = {"typing", "_moved", "_version"}
LIBRARY = {
    "typing": set(),
    "_core": {"_core"},
    "trees": {"_core"},
    "kernels": {"_core", "_compat", "kernels"},
    "models": {"_core", "kernels", "models", "trees"},
}
FAMILY = {"_core", "_compat", "kernels", "models", "trees"}
# What the library may need; flax only where there are parameters or state, which is its import's business.
THIRD_PARTIES = {"flax", "jax", "numpy", "optax", "scipy"}
ON_DEMAND = {"maxflow"}  # graph cuts, where it is installed
STANDARD = set(sys.stdlib_module_names)
# `tasks` know no method, `data` no task, the machinery neither.
EXPERIMENTS = {
    "_machinery": {"_machinery"},
    "data": {"_machinery", "data"},
    "tasks": {"_machinery", "data", "tasks"},
    "methods": {"_machinery", "data", "tasks"},
}


def sources(folder):
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        if folder != "jaxlib_methods" or "kernels" not in path.relative_to(REPOSITORY / folder).parts[:1]:
            yield path


def imported(path):
    """(line, module) of every import of a file, also inside functions; `from package import module` names both."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def strays(path, package, allowed):
    """Imports from `package` of what is not allowed, as 'file:line: name'."""
    for line, name in imported(path):
        parts = name.split(".")
        if parts[0] == package and len(parts) > 1 and parts[1] not in allowed:
            yield f"{path.relative_to(REPOSITORY)}:{line}: {name}"


def part_of(path, folder):
    return path.relative_to(REPOSITORY / folder).parts[0].removesuffix(".py")


def test_a_family_never_imports_another():
    found = []
    for path in sources("jaxlib_methods"):
        part = part_of(path, "jaxlib_methods")
        if part != "__init__" and not (part.startswith("_") and part != "_core"):
            found += strays(path, "jaxlib_methods", SHARED | LIBRARY.get(part, FAMILY | {part}))
    for path in sources("kernels"):
        found += strays(path, "jaxlib_methods", SHARED | LIBRARY["kernels"])
    assert not found, "\n".join(found)


@pytest.mark.parametrize("folder", ["jaxlib_methods", "kernels"])
def test_the_library_needs_little(folder):
    found = []
    for path in sources(folder):
        for line, name in imported(path):
            package = name.split(".")[0]
            if package not in {"jaxlib_methods"} | THIRD_PARTIES | ON_DEMAND | STANDARD:
                found.append(f"{path.relative_to(REPOSITORY)}:{line}: {name}")
    assert not found, "\n".join(found)


def test_experiments_go_from_methods_to_tasks_to_data_to_the_machinery():
    found = []
    for path in sources("experiments"):
        part = part_of(path, "experiments")
        allowed = EXPERIMENTS.get(part)
        if allowed is not None:
            found += strays(path, "experiments", allowed | {part} if path.name == "__init__.py" else allowed)
    assert not found, "\n".join(found)


@pytest.mark.parametrize(("folder", "others"), [("peers", ("benchmarks", "experiments")), ("benchmarks", ())])
def test_nothing_imports_its_users(folder, others):
    forbidden = {"tests", "docs", *others}
    found = [
        f"{path.relative_to(REPOSITORY)}:{line}: {name}"
        for path in sources(folder)
        for line, name in imported(path)
        if name.split(".")[0] in forbidden
    ]
    assert not found, "\n".join(found)
