"""What the README shows is true: its example runs, its commands and its experiments exist."""

import pathlib
import re

import jax
import pytest

from experiments._machinery import registry

pytestmark = pytest.mark.contract

README = (pathlib.Path(__file__).parent.parent / "README.md").read_text()


def test_the_example_runs_and_stays_sparse():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw mixes integer and float types
        names: dict = {}
        exec(example, names)
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(names["masks"]))
    assert kept == round(0.1 * (8 * 32 + 32))
    moved = sum(int((update != 0).sum()) for update in jax.tree.leaves(names["updates"]))
    assert 0 < moved <= kept


@pytest.mark.parametrize("command", re.findall(r"make (\w+)", README))
def test_its_make_targets_exist(command):
    makefile = (pathlib.Path(__file__).parent.parent / "Makefile").read_text()
    assert re.search(rf"^{command}:", makefile, re.MULTILINE)


def test_every_experiment_is_in_its_table():
    missing = [entry.name for entry in registry.entries() if f"`{entry.name}`" not in README]
    assert not missing, f"add {missing} to the methods table of README.md"
