"""MkDocs: adds the generated pages, the results and the notebooks; links names in backticks; typesets mathematics.

Mathematics becomes MathML while the site is built, so that a browser needs neither a script nor a network.
"""

import concurrent.futures
import html
import logging
import pathlib
import re
import sys

import latex2mathml.converter
from mkdocs.structure.files import File

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from docs import generate, notebooks

LOG = logging.getLogger("mkdocs.hooks")
INCLUDED = ("experiments/results", "benchmarks", "CHANGELOG.md", "CONTRIBUTING.md")
SUFFIXES = {".md", ".png", ".json"}


def on_config(config):
    sections = {title: entry for entry in config.nav for title in entry}
    sections["API"]["API"] = _tree(list(generate.api_pages()))
    for title, root in (("Results", "experiments/results"), ("Benchmarks", "benchmarks/results")):
        sections[title][title] += sorted(p.relative_to(generate.REPOSITORY).as_posix() for p in _pages(root))
    return config


def _pages(root):
    return [path for path in (generate.REPOSITORY / root).glob("*.md") if path.name != "README.md"]


def _tree(paths):
    """Pages as mkdocs's nav: `x.md` comes first in the section of `x/`."""
    nav = []
    for path in sorted(paths):
        parent = str(pathlib.PurePosixPath(path).parent) + ".md"
        if parent not in paths:
            below = [p for p in sorted(paths) if p.startswith(path.removesuffix(".md") + "/")]
            nav.append({_title(path): [{_title(p): p} for p in (path, *below)] if below else path})
    return nav


def _title(path):
    return path.removeprefix("api/").removesuffix(".md").replace("/", ".")


def on_files(files, config):
    for path, text in generate.api_pages().items():
        files.append(File.generated(config, path, content=text))
    files.append(File.generated(config, "references.md", content=generate.references_page()))
    files.append(File.generated(config, "gallery.md", content=generate.gallery_page()))
    sources = sorted((pathlib.Path(config.docs_dir) / "notebooks").glob("*.py"))
    with concurrent.futures.ThreadPoolExecutor(max_workers=2) as pool:
        rendered = list(pool.map(notebooks.render, sources))
    for source, (page, images) in zip(sources, rendered, strict=True):
        files.append(File.generated(config, f"notebooks/{source.stem}.md", content=page))
        for name, content in images.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    for root in INCLUDED:
        top = generate.REPOSITORY / root
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in SUFFIXES:
                relative = path.relative_to(generate.REPOSITORY).as_posix()
                files.append(File(relative, str(generate.REPOSITORY), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown, page, config, files):
    """Links of included pages to files that are not on the site become plain code."""

    def unlink(match):
        text, target = match[1], match[2]
        if "://" in target or target.startswith(("#", "mailto:")):
            return match[0]
        folder = pathlib.PurePosixPath(page.file.src_uri).parent
        path = _normal(folder / target.partition("#")[0])
        return match[0] if path in files.src_uris else f"{text} (`{path}`)"

    if page.file.src_uri.startswith(tuple(INCLUDED)):
        return re.sub(r"(?<!!)\[([^\]\n]+)\]\(([^)\s]+)\)", unlink, markdown)
    return markdown


def _normal(path):
    parts = []
    for part in path.parts:
        parts = parts[:-1] if part == ".." else [*parts, part]
    return "/".join(parts)


def on_page_content(content, page, config, files):
    content = re.sub(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', _typeset, content, flags=re.DOTALL)
    parts = re.split(r"(<pre.*?</pre>|<a\b.*?</a>|<h\d.*?</h\d>|<autoref.*?</autoref>)", content, flags=re.DOTALL)
    parts[::2] = [re.sub(r"<code>([\w.]+)(?:\(\))?</code>", lambda m: _link(m, page), part) for part in parts[::2]]
    return "".join(parts)


def _typeset(match):
    display = "block" if match[1] == "div" else "inline"
    return latex2mathml.converter.convert(html.unescape(match[2]).strip(), display=display)


HOMES = generate.homes()
MODULES = generate.public_modules()
FAMILIES = {name.split(".")[1] for name in MODULES if "." in name}


def _link(match, page):
    """A public name in backticks becomes a link; one that looks like a name of a family and is none is an error."""
    name = match[1].removeprefix("jaxlib_methods.")
    contexts = [""]
    if page.file.src_uri.startswith("api/"):  # a docstring says a neighbour's name without its module
        module = page.file.src_uri.removeprefix("api/").removesuffix(".md").replace("/", ".")
        contexts += [module + ".", module.partition(".")[0] + "."]
    for context in contexts:
        path = f"jaxlib_methods.{context}{name}"
        if path in HOMES or path in MODULES:
            shown = re.sub(r"(?<=\w)([._])(?=\w)", r"\1<wbr>", match[0])  # where a narrow column may break it
            return f'<autoref identifier="{HOMES.get(path, path)}">{shown}</autoref>'
    records = page.file.src_uri.startswith(("CHANGELOG", "experiments/", "benchmarks/"))  # names of their time
    if name.partition(".")[0] in FAMILIES and "." in name and not records and not _is_member(name):
        LOG.warning(f"{page.file.src_uri} names `{match[1]}`, which is not public")
    return match[0]


def _is_member(name):
    """Whether it is an attribute of a public class, or a private module that a docstring of its neighbour names."""
    owner, _, last = name.rpartition(".")
    return f"jaxlib_methods.{owner}" in HOMES or last.startswith("_") or last in {"py", "md", "npz"}


def on_env(env, config, files):
    """Every public name is on the site."""
    anchors = _anchors(config)
    missing = sorted(set(HOMES.values()) - anchors)
    if missing:
        LOG.warning(f"public names without documentation: {', '.join(missing)}")
    return env


def _anchors(config):
    return set(config.plugins["autorefs"]._primary_url_map) | set(config.plugins["autorefs"]._secondary_url_map)
