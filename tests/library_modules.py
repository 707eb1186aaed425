"""The names of the library's modules, found on disk without importing them, so that one broken module fails alone."""

import pathlib
import pkgutil

import jaxlib_methods

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent


def module_names():
    """All modules as (name, whether it is a package), with `kernels/` under its installed name."""
    package = pathlib.Path(jaxlib_methods.__file__).parent
    kernels = package / "kernels"  # there in a wheel; beside the package in a checkout
    yield "jaxlib_methods", True
    yield from _below(package, "jaxlib_methods.")
    if not kernels.is_dir():
        yield "jaxlib_methods.kernels", True
        yield from _below(REPOSITORY / "kernels", "jaxlib_methods.kernels.")


def is_public(name):
    return not any(part.startswith("_") for part in name.split("."))


def _below(folder, prefix):
    for module in pkgutil.iter_modules([str(folder)]):
        yield prefix + module.name, module.ispkg
        if module.ispkg:
            yield from _below(folder / module.name, prefix + module.name + ".")
