"""The quantization experiment: a short run from end to end, what it compares with, and what it refuses."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import attack_quantized, quantize
from experiments._machinery import runner
from experiments._machinery.errors import DataError
from experiments.data import images as data
from jaxlib_methods import trees
from jaxlib_methods.quantization import lattice as quantization


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder and the result of a run that is also attacked."""
    folder = tmp_path_factory.mktemp("quantize")
    # A prime batch stays on one device: eight fake ones on two cores mostly wait for one another.
    options = {"steps": 20, "evaluate_every": 20, "batch_size": 97, "validation_fraction": 0.0}
    config = quantize.Config(methods=("float", "md_softmax"), **options)
    with jax.numpy_dtype_promotion("standard"):  # optax.adam's counter needs it
        return folder, runner.run(quantize, config, folder, smoke=True)


def test_a_short_run_leaves_results_figures_and_networks_in_bits(short_run):
    tmp_path, result = short_run
    assert tuple(result) == runner.RESULT_KEYS
    metrics = result["metrics"]
    assert {"test_error float", "test_error md_softmax", "label_share md_softmax"} == set(metrics)
    for figure in ("annealing", "training"):
        assert (tmp_path / f"{figure}.png").stat().st_size > 5000
    case = json.loads((tmp_path / "cases/md_softmax-seed0/metrics.json").read_text())
    assert 30 < case["times_smaller"] < 32  # biases and the last rows of a layer fill their words only in part
    history = case["history"]
    assert [record["step"] for record in history] == list(range(1, 21))
    betas = [record["beta"] for record in history]
    assert betas == sorted(betas) and betas[0] == 1.0 and betas[-1] == pytest.approx(100 ** (19 / 50), rel=1e-3)


def test_the_networks_of_a_run_are_attacked(short_run, tmp_path):
    options = {"methods": ("md_softmax",), "attacks": ("pgd",), "epsilons": (0.0, 0.3), "images": 90, "batch_size": 80}
    config = attack_quantized.Config(networks=str(short_run[0]), steps=3, **options)
    result = runner.run(attack_quantized, config, tmp_path, smoke=True)
    metrics = result["metrics"]
    names = [f"adversarial_accuracy md_softmax pgd{end}" for end in ("", "++ njs", "++ hns")]
    diagnostics = {f"{name} md_softmax" for name in ("accuracy", "vanished", "logit_gap", "singular_value")}
    assert diagnostics | {*names} == set(metrics)
    curves = json.loads((tmp_path / "curves.json").read_text())["md_softmax seed 0"]
    assert curves["epsilon"] == [0.0, 0.1, 0.3]
    for name, scaling in zip(names, attack_quantized.SCALINGS, strict=True):
        curve = curves[f"pgd {scaling}"]
        assert curve[0] == metrics["accuracy md_softmax"] and curve == sorted(curve, reverse=True)
        assert curve[1] == metrics[name] and curve[2] < curve[0]
    dataset = data.load("digits")
    network = quantize.build_network(quantize.Config(), dataset)
    params, batch_norm = quantize.load_trained(short_run[0] / "cases" / "md_softmax-seed0", network)
    logits = jax.jit(network.apply, static_argnums=3)(params, batch_norm, jnp.asarray(dataset.test.images), False)[0]
    right = np.asarray(logits).argmax(1) == dataset.test.labels
    assert 100 * right[:90].mean() == pytest.approx(metrics["accuracy md_softmax"])
    assert 100 * (~right).mean() == pytest.approx(short_run[1]["metrics"]["test_error md_softmax"])
    assert (tmp_path / "success.png").stat().st_size > 5000


def test_networks_that_do_not_fit_are_named(short_run, tmp_path):
    dataset = data.load("digits")
    attack = lambda **options: attack_quantized.train(attack_quantized.Config(**options), tmp_path)
    with pytest.raises(DataError, match="is no run of the experiment quantize"):
        attack(networks=str(tmp_path))
    with pytest.raises(DataError, match="has model 'lenet300', not 'alexnet_s'"):
        attack(networks=str(short_run[0]), model="alexnet_s")
    with pytest.raises(DataError, match="there is no network"):
        quantize.load_trained(tmp_path, quantize.build_network(quantize.Config(), dataset))
    np.savez(tmp_path / "network.npz", a=np.zeros(3))
    with pytest.raises(DataError, match="holds another network"):
        quantize.load_trained(tmp_path, quantize.build_network(quantize.Config(), dataset))
    with pytest.raises(ValueError, match="epsilon must be positive"):
        attack_quantized.Config(epsilon=0.0)
    with pytest.raises(ValueError, match="attacks is empty"):
        attack_quantized.Config(attacks=())


def test_published_attacks_stand_beside_the_runs_they_belong_to():
    options = {"dataset": "cifar10", "model": "resnet18", "epsilon": 0.03137}
    paper = attack_quantized.PAPER(attack_quantized.Config(**options))
    assert paper["adversarial_accuracy md_tanh_s pgd"] == 26.98
    assert paper["adversarial_accuracy md_tanh_s fgsm++ hns"] == 2.51
    assert paper["adversarial_accuracy float pgd_l2++ njs"] == 0.09
    assert attack_quantized.PAPER(attack_quantized.Config(**(options | {"epsilon": 0.1}))) == {}


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


@pytest.mark.parametrize("model", ["vgg_d", "resnet18", "resnet8_strided"])
def test_convolutional_networks_are_quantized_but_for_the_batch_norm(model):
    images, labels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8), np.arange(10, dtype=np.int32)
    split = data.Split(images, labels)
    dataset = data.Dataset("tiny", split, None, split, 10)
    keep_float = ("^dense/bias",) if model == "resnet18" else ()
    recipe = "paper" if model in quantize.PAPER_RECIPES else "short"
    config = quantize.Config(dataset="cifar10", model=model, recipe=recipe, batch_size=10, keep_float=keep_float)
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
