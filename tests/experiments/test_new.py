"""The skeleton of a method: it passes the checks of style, and its recipe runs once the mathematics is written."""

import importlib
import pathlib
import shutil
import subprocess
import sys

import jax
import optax
import pytest

import jaxlib_methods
from experiments._machinery import pages, registry, runner, skeleton
from experiments._machinery.cli import main
from experiments._machinery.errors import ExperimentError

FAMILIES = sorted(set(jaxlib_methods.__all__) - {"__version__", "citation", "trees", "typing", "kernels"})
METHODS = {
    "function": lambda x: x.sum(-1),
    "loss": optax.softmax_cross_entropy_with_integer_labels,
    "transformation": optax.sgd,
}


def ruff(*arguments):
    return subprocess.run([sys.executable, "-m", "ruff", *arguments], cwd=skeleton.ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("kind", skeleton.KINDS)
def test_a_skeleton_is_in_style_and_its_recipe_runs(kind, tmp_path, monkeypatch):
    made = skeleton.make("small_thing", "normalization", kind)
    assert skeleton.REGISTRY in made.changes if kind == "transformation" else skeleton.REGISTRY not in made.changes
    for path, text in {**made.texts, **made.changes}.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    config = ("--config", str(skeleton.ROOT / "pyproject.toml"))
    for command in (("check", *config), ("format", "--check", *config)):
        done = ruff(*command, str(tmp_path))
        assert done.returncode == 0, done.stdout
    monkeypatch.setattr(jaxlib_methods.normalization, "small_thing", METHODS[kind], raising=False)
    module = registry.load(str(tmp_path / made.recipe))
    config = module.Config(**module.SMOKE)
    with jax.numpy_dtype_promotion("standard"):
        result = runner.run(module, config, tmp_path / "run", smoke=True)
    assert [record["variant"] for record in result["records"]] == list(module.variants(config))
    assert (tmp_path / "run" / "small_thing.png").exists() and module.targets(config) == {}
    library = registry.load(str(tmp_path / made.library))
    with pytest.raises(NotImplementedError, match=r"write .*small_thing"):
        if kind == "transformation":
            rule = library.scale_by_small_thing()
            rule.update(jax.numpy.ones(2), rule.init(jax.numpy.ones(2)))
        else:
            library.small_thing(*[jax.numpy.ones(2)] * (2 if kind == "loss" else 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_face_takes_one_more_name(family):
    face = pathlib.Path(importlib.import_module(f"jaxlib_methods.{family}").__file__)
    (text,) = skeleton.make("small_thing", family, "function").changes.values()
    added = [line for line in text.splitlines() if line not in face.read_text().splitlines()]
    assert added == [
        f"from jaxlib_methods.{family}._small_thing import small_thing as small_thing",
        '    "small_thing",',
    ]


def test_its_page_has_what_a_page_needs():
    page = skeleton.make("small_thing", "low_rank", "function").texts[
        pathlib.Path("experiments/results/small_thing.md")
    ]
    for block in ("table", "commands"):
        assert "new\n" in pages.with_block(page, block, "new\n")
    assert "**Claim.**" in page and "## What differs from the paper" in page and "](figures/small_thing.png)" in page
    assert all(verdict in pages.said(page, "Verdict") for verdict in pages.VERDICTS)


@pytest.mark.parametrize(
    ("name", "family", "message"),
    [
        ("Small", "low_rank", "'Small' is no name of a function"),
        ("lambda", "low_rank", "'lambda' is no name of a function"),
        ("small_thing", "kernels", "there is no family 'kernels'; known are classifiers, "),
        ("stereo", "message_passing", r"there is a experiments/methods/stereo.py already"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, family, message):
    with pytest.raises(ExperimentError, match=message):
        skeleton.make(name, family, "function")


def test_the_command_prints_or_writes(tmp_path, monkeypatch, capsys):
    assert main(["new", "small_thing", "--family", "low_rank"]) == 0
    shown = capsys.readouterr().out
    assert "jaxlib_methods/low_rank/_small_thing.py" in shown and "Left for you:" in shown
    assert not (skeleton.ROOT / "jaxlib_methods/low_rank/_small_thing.py").exists()
    shutil.copytree(skeleton.ROOT / "jaxlib_methods/low_rank", tmp_path / "jaxlib_methods/low_rank")
    monkeypatch.setattr(skeleton, "ROOT", tmp_path)
    monkeypatch.setattr(skeleton.make, "__kwdefaults__", {"root": tmp_path})
    assert main(["new", "small_thing", "--family", "low_rank", "--write"]) == 0
    assert '"small_thing",' in (tmp_path / "jaxlib_methods/low_rank/__init__.py").read_text()
    assert "def small_thing" in (tmp_path / "jaxlib_methods/low_rank/_small_thing.py").read_text()
