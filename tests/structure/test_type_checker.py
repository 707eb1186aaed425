"""What a type checker, and so an editor, sees of the library: every public name, from outside of the checkout."""

import importlib
import pathlib
import subprocess
import sys

import jaxlib_methods
from tests.library_modules import is_public, module_names

PYREFLY = pathlib.Path(sys.executable).parent / "pyrefly"
ROOT = pathlib.Path(jaxlib_methods.__file__).parent.parent


def check(source, tmp_path):
    (tmp_path / "user.py").write_text(source)
    installed = pathlib.Path(sys.prefix).parent == ROOT  # and not another checkout
    beside = "" if installed else f'search-path = ["{ROOT}"]'
    (tmp_path / "pyrefly.toml").write_text(f'python-interpreter-path = "{sys.executable}"\n{beside}\n')
    command = [PYREFLY, "check", "--output-format", "min-text"]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)


def test_every_public_name_is_found_and_has_a_type(tmp_path):
    lines = ["from typing import reveal_type", "import jaxlib_methods as jm"]
    for name, _ in module_names():
        if is_public(name) and name.count("."):
            for public in getattr(importlib.import_module(name), "__all__", ()):
                alias = f"{name}.{public}".replace(".", "_")
                lines += [f"from {name} import {public} as {alias}", f"reveal_type({alias})"]
    lines += [f"reveal_type(jm.{name})" for name in jaxlib_methods.__all__]
    found = check("\n".join(lines), tmp_path)
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-2000:]
    unknown = [line for line in found.stdout.splitlines() if line.endswith("revealed type: Unknown [reveal-type]")]
    assert not unknown, "\n".join(unknown)


def test_a_wrong_call_is_seen(tmp_path):
    found = check(
        "import jaxlib_methods as jm\n"
        "jm.pruning.prune_masks({}, sparsity=0.9, scope='everywhere')\n"
        "jm.pruning.prune_maskes({}, sparsity=0.9)\n"
        "jm.prunning\n",
        tmp_path,
    )
    errors = [line for line in found.stdout.splitlines() if line.startswith("ERROR")]
    expected = ((":2:", "scope"), (":3:", "prune_maskes"), (":4:", "prunning"))
    assert len(errors) == len(expected), found.stdout
    for error, (place, word) in zip(errors, expected, strict=True):
        assert place in error and word in error
