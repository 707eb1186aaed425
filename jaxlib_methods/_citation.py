"""BibTeX of exactly the methods in use: docstrings name keys, `references.bib` holds the entries.

What comes from a paper ends its docstring in a paragraph `Source: ... [key]`. Nothing is registered anywhere else.
"""

import functools
import importlib
import importlib.resources
import inspect
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

_SOURCE = re.compile(r"^[ \t]*Source:(.*?)(?:\n[ \t]*\n|\Z)", re.DOTALL | re.MULTILINE)
_KEYS = re.compile(r"\[([A-Za-z][\w:.-]*(?:\s*[,;]\s*[A-Za-z][\w:.-]*)*)\]")
_ENTRY = re.compile(r"@\w+\{\s*([^\s,{}]+)\s*,")


def citation(*objects: Any) -> str:
    """Returns the BibTeX entries of the methods that the objects implement.

    Args:
      *objects: functions and classes of this library, instances of its classes, optax transformations built by it
        (also chained with others), and its modules and packages (everything public in them).

    Returns:
      BibTeX entries separated by an empty line, each once, in the order of first mention; "" when none of the objects
      comes from a paper.

    Raises:
      ValueError: for an object that is not of this library, or whose docstring names a key without an entry.

    Example:
      >>> from jaxlib_methods import trees
      >>> citation(trees.label_tree, trees.mask_tree)
      ''
    """
    if not objects:
        raise ValueError("citation needs at least one function, class, instance or module")
    documented = [found for obj in objects for found in _documented(obj)]
    return "\n\n".join(dict.fromkeys(references()[key] for found in documented for key in keys_of(found)))


def _documented(obj: Any) -> Iterator[Callable | type | types.ModuleType]:
    """The functions, classes and modules with docstrings that stand behind an object."""
    if inspect.ismodule(obj):
        yield obj
        members = [getattr(obj, name) for name in getattr(obj, "__all__", ())]
        for member in members:
            if inspect.ismodule(member) or (hasattr(member, "__qualname__") and _is_ours(member)):
                yield from _documented(member)
    elif getattr(obj, "_fields", None) == ("init", "update"):  # an optax.GradientTransformation
        factories = list(dict.fromkeys(_factories(obj)))
        if not factories:
            raise ValueError(f"no transformation of this library is in {obj!r}; cite its factory, as in citation(sgd)")
        yield from factories
    elif isinstance(obj, functools.partial):
        yield from _documented(obj.func)
    elif inspect.isclass(obj) or hasattr(obj, "__qualname__"):
        yield inspect.unwrap(obj)
    else:
        yield type(obj)


def _is_ours(obj: Any) -> bool:
    return (getattr(obj, "__module__", None) or obj.__name__).partition(".")[0] == "jaxlib_methods"


def _factories(obj: Any, seen: set[int] | None = None) -> Iterator[Callable]:
    """The functions of this library whose closures make up a transformation: the parts of a chain live in cells."""
    seen = set() if seen is None else seen
    obj = inspect.unwrap(obj) if callable(obj) else obj
    if id(obj) in seen:
        return
    seen.add(id(obj))
    if isinstance(obj, tuple | list):
        children = obj
    elif isinstance(obj, dict):
        children = obj.values()
    elif inspect.isfunction(obj):
        owner, nested, _ = obj.__qualname__.partition(".<locals>")
        if nested and obj.__module__.startswith("jaxlib_methods."):
            found: Any = importlib.import_module(obj.__module__)
            for name in owner.split("."):
                found = getattr(found, name)
            yield found
        children = [cell.cell_contents for cell in obj.__closure__ or () if _is_filled(cell)]
    else:
        children = (obj.func, *obj.args, *obj.keywords.values()) if isinstance(obj, functools.partial) else ()
    for child in children:
        yield from _factories(child, seen)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - reading it is the question
    except ValueError:
        return False
    return True


def keys_of(obj: Callable | type | types.ModuleType) -> list[str]:
    """The keys that the docstring of one function, class or module names, in order."""
    name = obj.__name__ if inspect.ismodule(obj) else f"{obj.__module__}.{obj.__qualname__}"
    # A subclass that names no source implements what its base class implements.
    owners = inspect.getmro(obj) if inspect.isclass(obj) else (obj,)
    if not any(map(_is_ours, owners)):
        raise ValueError(f"{name} is not of jaxlib_methods, so there is nothing to cite")
    sources = next((found for o in owners if (found := _SOURCE.findall(o.__doc__ or ""))), [])
    keys = [key for text in sources for group in _KEYS.findall(text) for key in re.split(r"\s*[,;]\s*", group)]
    if sources and not keys:
        raise ValueError(f"`Source:` of {name} names no [key]")
    missing = [key for key in keys if key not in references()]
    if missing:
        raise ValueError(f"{name} cites {missing}, which jaxlib_methods/references.bib does not have")
    return keys


@functools.cache
def references() -> dict[str, str]:
    """The entries of `references.bib` by key."""
    return _parse((importlib.resources.files("jaxlib_methods") / "references.bib").read_text("utf-8"))


def _parse(text: str) -> dict[str, str]:
    """BibTeX entries by key: from each `@type{key,` to the brace that closes it."""
    entries = {}
    for start in _ENTRY.finditer(text):
        depth = 0
        for end in range(text.index("{", start.start()), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                break
        else:
            raise ValueError(f"the BibTeX entry {start[1]!r} is never closed by a brace")
        if start[1] in entries:
            raise ValueError(f"the BibTeX entry {start[1]!r} stands twice")
        entries[start[1]] = text[start.start() : end + 1]
    return entries
