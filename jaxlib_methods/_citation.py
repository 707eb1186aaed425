"""BibTeX of exactly the methods in use, read from their docstrings.

Every public docstring ends in a paragraph `Source: ... [key]`; the entry of each key stands once, as plain BibTeX in
the docstring of the defining module or of one of its parent packages. Nothing is registered anywhere else.
"""

import functools
import importlib
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
      BibTeX entries separated by an empty line, each once, in the order of first mention; "" when all the objects
      are this library's own utilities.

    Raises:
      ValueError: for an object whose docstring has no `Source:` paragraph or names a key without an entry.

    Example:
      >>> from jaxlib_methods import trees
      >>> citation(trees.label_tree, trees.mask_tree)
      ''

    Source: this library.
    """
    if not objects:
        raise ValueError("citation needs at least one function, class, instance or module")
    entries: dict[str, str] = {}
    for obj in objects:
        for documented in _documented(obj):
            entries |= {key: entry for key, entry in _entries_of(documented).items() if key not in entries}
    return "\n\n".join(entries.values())


def _documented(obj: Any) -> Iterator[Callable | type | types.ModuleType]:
    """The functions, classes and modules with docstrings that stand behind an object."""
    if inspect.ismodule(obj):
        yield obj
        members = [getattr(obj, name) for name in getattr(obj, "__all__", ())]
        for member in members:
            if inspect.ismodule(member) or callable(member):
                yield from _documented(member)
    elif getattr(obj, "_fields", None) == ("init", "update"):  # an optax.GradientTransformation
        factories = [f for f in dict.fromkeys(_factories(obj)) if _SOURCE.search(f.__doc__ or "")]
        if not factories:
            raise ValueError(f"no transformation of this library is in {obj!r}; cite its factory, as in citation(sgd)")
        yield from factories
    elif isinstance(obj, functools.partial):
        yield from _documented(obj.func)
    elif inspect.isclass(obj) or hasattr(obj, "__qualname__"):
        yield inspect.unwrap(obj)
    else:
        yield type(obj)


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
            yield functools.reduce(getattr, owner.split("."), importlib.import_module(obj.__module__))
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


def _entries_of(obj: Callable | type | types.ModuleType) -> dict[str, str]:
    """The entries that one docstring asks for, by key; a module asks for those that stand in its own docstring."""
    if inspect.ismodule(obj):
        return _parse(obj.__doc__ or "")
    name = f"{obj.__module__}.{obj.__qualname__}"
    # A subclass that says nothing implements what its base class implements.
    owners = [c for c in inspect.getmro(obj) if _SOURCE.search(c.__doc__ or "")][:1] if inspect.isclass(obj) else [obj]
    sources = [text for owner in owners for text in _SOURCE.findall(owner.__doc__ or "")]
    if not sources:
        raise ValueError(f"the docstring of {name} has no `Source:` paragraph, so there is nothing to cite")
    keys = [key for text in sources for group in _KEYS.findall(text) for key in re.split(r"\s*[,;]\s*", group)]
    if not keys and not any("this library" in " ".join(text.split()) for text in sources):
        raise ValueError(f"`Source:` of {name} names no [key] and does not say 'this library'")
    known = _known_entries(owners[0].__module__)
    missing = [key for key in keys if key not in known]
    if missing:
        raise ValueError(
            f"{name} cites {missing}, but no such BibTeX entry stands in the docstring of {owners[0].__module__} "
            f"or of its parent packages; the entries there are {sorted(known)}"
        )
    return {key: known[key] for key in keys}


@functools.cache
def _known_entries(module_name: str) -> dict[str, str]:
    """All entries in the docstrings of a module and of its parent packages."""
    parts = module_name.split(".")
    modules = [importlib.import_module(".".join(parts[:depth])) for depth in range(1, len(parts) + 1)]
    return {key: entry for module in modules for key, entry in _parse(module.__doc__ or "").items()}


def _parse(docstring: str) -> dict[str, str]:
    """BibTeX entries by key: from each `@type{key,` to the brace that closes it."""
    text = inspect.cleandoc(docstring)
    entries = {}
    for start in _ENTRY.finditer(text):
        depth = 0
        for end in range(text.index("{", start.start()), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                entries[start[1]] = inspect.cleandoc(text[start.start() : end + 1])
                break
        else:
            raise ValueError(f"the BibTeX entry {start[1]!r} is never closed by a brace")
    return entries
