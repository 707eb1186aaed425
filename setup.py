"""Finds the packages: `kernels/` at the top level is installed as `jaxlib_methods.kernels`.

Everything else is declared in pyproject.toml; only this mapping needs code, because setuptools' own discovery
does not follow `package-dir` into a second root.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["jaxlib_methods", "jaxlib_methods.*"])
    + ["jaxlib_methods." + name for name in find_packages(include=["kernels", "kernels.*"])],
    package_dir={"jaxlib_methods": "jaxlib_methods", "jaxlib_methods.kernels": "kernels"},
)
