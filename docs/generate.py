"""What the site takes from the library: a page for each public module that says `__all__`, and the references."""

import functools
import importlib
import inspect
import pathlib
import pkgutil
import re
import types

import jaxlib_methods
from jaxlib_methods import _citation

EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
SOURCE = re.compile(r"^Source:(.*?)(?=\n[ \t]*\n|\Z)", re.DOTALL | re.MULTILINE)
KEYS = re.compile(r"(?:\[|&#91;)([A-Za-z][\w:.-]*(?:\s*[,;]\s*[A-Za-z][\w:.-]*)*)\]")

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def public_modules() -> dict[str, types.ModuleType]:
    """The modules without an underscore that have an `__all__`, families before their submodules."""
    names = ["jaxlib_methods"]
    for module in pkgutil.walk_packages(jaxlib_methods.__path__, "jaxlib_methods."):
        if "._" not in module.name:
            names.append(module.name)
    modules = {name: importlib.import_module(name) for name in sorted(names)}
    return {name: module for name, module in modules.items() if getattr(module, "__all__", ())}


def names_of(module: types.ModuleType) -> list[str]:
    """The names of `__all__` but for modules, which have pages of their own: functions, then classes, then values."""
    names = [name for name in module.__all__ if not inspect.ismodule(getattr(module, name)) and name[0] != "_"]
    return sorted(names, key=lambda name: (not callable(getattr(module, name)), inspect.isclass(getattr(module, name))))


def homes() -> dict[str, str]:
    """Where each public name is documented: `jaxlib_methods.x.y.name` -> the first module that offers the same object.

    A function at a family's face is documented there, and its submodule refers to it.
    """
    first: dict[tuple[int, str], str] = {}
    found = {}
    for module_name, module in public_modules().items():
        for name in names_of(module):
            path = f"{module_name}.{name}"
            found[path] = first.setdefault((id(getattr(module, name)), name), path)
    return found


def page_path(module_name: str) -> str:
    """The page of a module, below the site's root."""
    return f"api/{module_name.removeprefix('jaxlib_methods.').replace('.', '/')}.md"


def api_pages() -> dict[str, str]:
    """The Markdown of every module's page, by path."""
    home = homes()
    modules = public_modules()
    pages = {}
    for module_name, module in modules.items():
        lines = [f"::: {module_name}", "    options: {members: false, heading_level: 1, show_root_full_path: true}", ""]
        below = [name for name in modules if name.rpartition(".")[0] == module_name]
        if below:
            lines += ["| module | |", "| --- | --- |"]
            lines += [f"| [`{name}`][{name}] | {_first_line(modules[name])} |" for name in below] + [""]
        for name in names_of(module):
            path = f"{module_name}.{name}"
            if home[path] == path:
                lines += [f"::: {path}", ""]
        elsewhere = [home[f"{module_name}.{name}"] for name in names_of(module)]
        elsewhere = [path for path in elsewhere if path.rpartition(".")[0] != module_name]
        if elsewhere:
            lines += [
                "Documented at the family's face: " + ", ".join(f"[`{p.rpartition('.')[2]}`][{p}]" for p in elsewhere)
            ]
        pages[page_path(module_name)] = "\n".join(lines) + "\n"
    return pages


def gallery_page() -> str:
    """Every figure of the results' pages with the claim of its experiment and the command that drew it."""
    lines = ["# Gallery", "", "Every figure of the experiments, with the claim that it bears on and the command.", ""]
    for path in sorted((REPOSITORY / "experiments" / "results").glob("*.md")):
        text = path.read_text()
        figures = re.findall(r"!?\[([^\]]*)\]\((figures/[^)]+\.png)\)", text.replace("\n", " "))
        if path.name == "README.md" or not figures:
            continue
        claim = re.search(r"^\*\*Claim\.\*\* (.*)$", text, re.MULTILINE)[1]
        command = re.search(r"`(python -m experiments run [^`]+)`", text)[1]
        lines += [f"## [{path.stem}](experiments/results/{path.name})", "", claim, "", "```sh", command, "```", ""]
        for caption, figure in figures:
            lines += [f"![{caption}](experiments/results/{figure})", "", f"*{caption}*", ""]
    return "\n".join(lines)


def references_page() -> str:
    """Every entry of `references.bib` under an anchor of its key, with the names whose docstrings name it."""
    users: dict[str, list[str]] = {}
    for path in sorted(set(homes().values())):
        obj = functools.reduce(getattr, path.split(".")[1:], jaxlib_methods)
        if not hasattr(obj, "__qualname__") or not obj.__module__.startswith("jaxlib_methods"):
            continue  # a constant or a type
        for key in _citation.keys_of(inspect.unwrap(obj)):
            users.setdefault(key, []).append(path)
    lines = [
        "# References",
        "",
        "`jaxlib_methods.citation(...)` prints these entries for the objects that you use.",
        "",
    ]
    for key, entry in _citation.references().items():
        title = re.search(r"title = \{(.*?)\},\n", entry, re.DOTALL)[1]
        lines += [f"## {_plain(title)} {{#ref-{key}}}", "", "```bibtex", entry, "```", ""]
        if key in users:
            lines += [
                "Used by " + ", ".join(f"[`{p.removeprefix('jaxlib_methods.')}`][{p}]" for p in users[key]) + ".",
                "",
            ]
    return "\n".join(lines)


def _link(path: str) -> str:
    return f"[`{path.removeprefix('jaxlib_methods.')}`][{path}]"


def _plain(title: str) -> str:
    return " ".join(title.translate(str.maketrans("", "", "{}")).split())


def _first_line(module: types.ModuleType) -> str:
    return (module.__doc__ or "").strip().splitlines()[0].replace("|", r"\|")


def rewrite(docstring: str) -> str:
    """Doctests as a section of code, `[key]` of a source as a link to its reference, `[i][j]` of prose as it stands."""
    before, *example = EXAMPLE.split(docstring, maxsplit=1)
    prose = before.split("`")
    prose[::2] = [part.replace("][", "]&#91;") for part in prose[::2]]
    text = "Examples:".join(["`".join(prose), *example])
    return SOURCE.sub(lambda source: "**Source:**" + KEYS.sub(_reference_links, source[1]), text)


def _reference_links(keys: re.Match) -> str:
    return "(" + ", ".join(f"[{key}][ref-{key}]" for key in re.split(r"\s*[,;]\s*", keys[1])) + ")"
