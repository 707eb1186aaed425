"""What the README shows is true: its example runs, its commands, links and experiments exist; and it stays short."""

import pathlib
import re

import jax
import pytest

from experiments._machinery import registry

pytestmark = pytest.mark.contract

ROOT = pathlib.Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EXAMPLE = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_example_runs_and_stays_sparse():
    (example,) = EXAMPLE
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw mixes integer and float types
        names: dict = {}
        exec(example, names)
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(names["masks"]))
    assert kept == round(0.1 * (8 * 32 + 32))
    moved = sum(int((update != 0).sum()) for update in jax.tree.leaves(names["updates"]))
    assert 0 < moved <= kept


def test_the_site_starts_with_the_same_example():
    assert re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "pages" / "index.md").read_text(), re.DOTALL) == EXAMPLE


@pytest.mark.parametrize("command", re.findall(r"make (\w+)", README))
def test_its_make_targets_exist(command):
    assert re.search(rf"^{command}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_experiment_is_in_its_table():
    missing = [entry.name for entry in registry.entries() if f"`{entry.name}`" not in README]
    assert not missing, f"add {missing} to the methods table of README.md"


def test_it_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 80
    links = re.findall(r"\]\(([^):]+)\)", README)
    assert links and all((ROOT / link).exists() for link in links)
