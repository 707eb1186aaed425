"""The wheel holds the library whole and nothing else, and works where there is no checkout."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent

# Imports every subpackage of the kernels and prints the file of each module of the library that this loads.
IMPORT_ALL = """
import pkgutil, sys
import jaxlib_methods, jaxlib_methods.kernels as kernels
for module in pkgutil.iter_modules(kernels.__path__, "jaxlib_methods.kernels."):
    __import__(module.name)
for name, module in sorted(sys.modules.items()):
    if name.partition(".")[0] == "jaxlib_methods":
        print(name, module.__file__)
"""


def git(*arguments):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("this is not a git checkout")
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # 1: `git grep` has found nothing
    return done.stdout.splitlines()


def run(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def sources():
    """Files that a fresh clone has, or will have once what lies here is committed."""
    listed = git("ls-files", "--cached", "--others", "--exclude-standard")
    return sorted({name for name in listed if (REPOSITORY / name).is_file() or (REPOSITORY / name).is_symlink()})


@pytest.fixture(scope="module")
def wheel(sources, tmp_path_factory):
    """The wheel, built from the source distribution, in a copy: a build in the checkout would leave `build/` behind."""
    copy = tmp_path_factory.mktemp("source")
    for name in sources:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPOSITORY / name, copy / name, follow_symlinks=False)
    out = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, cwd=copy)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """A folder with the installed wheel alone; its dependencies come from the environment."""
    target = tmp_path_factory.mktemp("installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=target)
    return target


def test_wheel_holds_every_file_of_the_library_and_nothing_else(wheel, sources):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    library = {name for name in sources if name.startswith("jaxlib_methods/") and (REPOSITORY / name).is_file()}
    kernels = {f"jaxlib_methods/{name}" for name in sources if name.startswith("kernels/")}
    assert held == library | kernels
    assert {"jaxlib_methods/__init__.py", "jaxlib_methods/kernels/__init__.py"} <= held


def test_wheel_carries_the_licence_and_the_oldest_supported_versions(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        text = archive.read(metadata).decode()
        assert any(name.endswith("licenses/LICENSE") for name in archive.namelist())
    assert "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.11" in text
    assert re.search(r"^Requires-Dist: jax>=0\.10\.2$", text, re.MULTILINE)


def test_installed_library_and_kernels_import_from_an_empty_folder(installed, tmp_path):
    shown = run(sys.executable, "-c", IMPORT_ALL, cwd=tmp_path, PYTHONPATH=str(installed))
    modules = dict(line.split(" ", 1) for line in shown.splitlines())
    assert {"jaxlib_methods", "jaxlib_methods.kernels"} <= modules.keys()
    for name, file in modules.items():
        assert pathlib.Path(file).is_relative_to(installed), f"{name} comes from {file}"


def test_experiments_run_against_the_installed_wheel(installed, sources, tmp_path):
    for name in sources:
        if name.startswith("experiments/"):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, tmp_path / name)
    command = ("-m", "experiments", "run", "snip", "--smoke")
    run(sys.executable, *command, cwd=tmp_path, PYTHONPATH=str(installed))
    assert list(tmp_path.glob("**/result.json")), "the run has left no result.json beside experiments/"


def test_no_tracked_file_names_a_registry_or_a_place_on_this_machine():
    # Put together here, so that this file does not name them either.
    hosts = ["files.python" + "hosted", "pypi.org" + "/simple"]
    places = {str(REPOSITORY), str(REPOSITORY.parent), str(pathlib.Path.home())}
    places -= {os.sep, tempfile.gettempdir()}  # what any machine has is no trace of this one
    patterns = [re.escape(host) for host in hosts]
    patterns += [rf"(^|[^[:alnum:]_./-]){re.escape(place)}(/|[^[:alnum:]_.-]|$)" for place in sorted(places)]
    found = git("grep", "-n", "-I", "-E", "|".join(patterns))
    assert not found, "\n".join(found)
