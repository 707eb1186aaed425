"""The quantization experiment: a short run from end to end, what it compares with, and what it refuses."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from experiments import data, quantize, runner
from jaxlib_methods import trees
from jaxlib_methods.quantization import _lattice as quantization


def test_a_short_run_leaves_results_figures_and_networks_in_bits(tmp_path):
    config = quantize.Config(methods=("float", "pmf", "md_tanh"), steps=20, evaluate_every=20)
    with jax.numpy_dtype_promotion("standard"):  # optax.adam's counter needs it
        result = runner.run(quantize, config, tmp_path, smoke=True)
    assert tuple(result) == runner.RESULT_KEYS
    metrics = result["metrics"]
    assert {"test_error float", "test_error pmf", "label_share pmf", "label_share md_tanh"} < set(metrics)
    for figure in ("annealing", "training"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000
    case = json.loads((tmp_path / "cases/pmf-seed0/metrics.json").read_text())
    assert 30 < case["times_smaller"] < 32  # biases and the last rows of a layer fill their words only in part
    history = case["history"]
    assert [record["step"] for record in history] == list(range(1, 21))
    betas = [record["beta"] for record in history]
    assert betas == sorted(betas) and betas[0] == 1.0 and betas[-1] == pytest.approx(1000 ** (19 / 50), rel=1e-3)


def test_published_numbers_stand_beside_the_runs_they_belong_to():
    paper = quantize.PAPER(quantize.Config(dataset="cifar10", model="resnet18"))
    assert paper["test_error pmf"] == 6.76 and paper["test_error md_tanh_s"] == 6.82
    assert quantize.PAPER(quantize.Config()) == {}
    ternary = quantize.Config(dataset="cifar10", model="resnet18", labels=(-1, 0, 1), methods=("pmf",))
    assert quantize.PAPER(ternary) == {}


def test_the_papers_recipe_of_every_method():
    for model in ("vgg_d", "resnet18"):
        config = quantize.Config(dataset="cifar10", model=model, recipe="paper", methods=("float", *quantize.METHODS))
        for method in config.methods:
            recipe, steps = quantize._recipe(config, method)
            assert steps == 100_000 and recipe.rho >= 1 and recipe.learning_rate > 0
    assert quantize._recipe(config, "pmf")[0] == quantize.Recipe(1e-3, 0.3, 1.1, 1000)


@pytest.mark.parametrize("model", ["vgg_d", "resnet18"])
def test_the_networks_for_a_gpu_are_quantized_but_for_the_batch_norm(model):
    images, labels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8), np.arange(10, dtype=np.int32)
    split = data.Split(images, labels)
    dataset = data.Dataset("tiny", split, None, split, 10)
    config = quantize.Config(dataset="cifar10", model=model, recipe="paper", batch_size=10, keep_float=("^dense/bias",))
    if model == "vgg_d":
        config = dataclasses.replace(config, keep_float=())
    task = quantize._task(config, dataset, quantize.build_network(config, dataset), "pmf")
    aux, _ = jax.eval_shape(task.init, jax.random.key(0))
    sets = quantization.label_sets(task.lattice, aux, strict=True)
    for path, leaf, labels in zip(jax.tree.leaves(trees.path_names(aux)), jax.tree.leaves(aux), sets, strict=True):
        kept = "bn/" in path or (model == "resnet18" and path == "dense/bias")
        assert (labels is None) == kept, path
        assert kept or leaf.shape[0] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"methods": ()}, "methods is empty"),
        ({"model": "lenet6"}, "unknown model 'lenet6'"),
        ({"recipe": "paper"}, "recipe 'paper' is for the models resnet18, vgg_d, got 'lenet300'"),
        ({"labels": (-1, 0, 1)}, "is defined for two labels"),
        ({"final_beta": 0.5}, "final_beta must be at least 1, got 0.5"),
        ({"steps": 0}, "steps must be positive"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        quantize.Config(**options)
