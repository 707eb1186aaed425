"""Quantized networks, trained and attacked: a short run from end to end, what stands beside it, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments._machinery import cases, runner
from experiments._machinery.errors import DataError
from experiments.data import images as data
from experiments.methods import attack_quantized, quantize
from experiments.tasks import quantized_networks
from jaxlib_methods import trees
from jaxlib_methods.quantization import lattice as quantization

CIFAR_RESNET = {"dataset": "cifar10", "model": "resnet18"}


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """The folder and the metrics of a run that is also attacked."""
    folder = tmp_path_factory.mktemp("quantize")
    # A prime batch stays on one device: eight fake ones on two cores mostly wait for one another.
    options = {"steps": 20, "evaluate_every": 20, "batch_size": 97, "validation_fraction": 0.0}
    config = quantize.Config(methods=("float", "md_softmax"), **options)
    with jax.numpy_dtype_promotion("standard"):  # optax.adam's counter needs it
        result = runner.run(quantize, config, folder, smoke=True)
    return folder, {record["variant"]: record["metrics"] for record in result["records"]}


def test_a_short_run_leaves_results_figures_and_networks_in_bits(short_run):
    folder, metrics = short_run
    assert {name: set(of) for name, of in metrics.items()} == {
        "float": {"test_error"}, "md_softmax": {"test_error", "label_share"},
    }  # fmt: skip
    for figure in ("annealing", "training"):
        assert (folder / f"{figure}.png").stat().st_size > 5000
    case = json.loads((cases.folder(folder, "md_softmax", 0) / "metrics.json").read_text())
    assert 30 < case["details"]["times_smaller"] < 32  # biases and a layer's last rows fill their words only in part
    assert [point["step"] for point in case["curve"]] == list(range(1, 21))
    betas = [point["beta"] for point in case["curve"]]
    assert betas == sorted(betas) and betas[0] == 1.0 and betas[-1] == pytest.approx(100 ** (19 / 50), rel=1e-3)


def test_the_networks_of_a_run_are_attacked(short_run, tmp_path):
    folder, trained = short_run
    options = {"methods": ("md_softmax",), "attacks": ("pgd",), "epsilons": (0.0, 0.3), "images": 90, "batch_size": 80}
    config = attack_quantized.Config(networks=str(folder), steps=3, **options)
    (record,) = runner.run(attack_quantized, config, tmp_path, smoke=True)["records"]
    metrics, names = record["metrics"], ("pgd", "pgd++ njs", "pgd++ hns")
    assert set(metrics) == {"accuracy", "vanished", "logit_gap", "singular_value", *names}
    curve = json.loads((cases.folder(tmp_path, "md_softmax", 0) / "metrics.json").read_text())["curve"]
    assert [point["epsilon"] for point in curve] == [0.0, 0.1, 0.3]
    for name in names:
        values = [point[name] for point in curve]
        assert values[0] == metrics["accuracy"] and values == sorted(values, reverse=True)
        assert values[1] == metrics[name] and values[2] < values[0]
    networks = quantized_networks.load(quantize.Config(validation_fraction=0.0), quantized_networks.Settings())
    test = networks.task.dataset.test
    logits = jax.jit(networks.task.logits)(*networks.read(folder, "md_softmax", 0), jnp.asarray(test.images))
    right = np.asarray(logits).argmax(1) == test.labels
    assert 100 * right[:90].mean() == pytest.approx(metrics["accuracy"])
    assert 100 * (~right).mean() == pytest.approx(trained["md_softmax"]["test_error"])
    assert (tmp_path / "success.png").stat().st_size > 5000


def test_networks_that_do_not_fit_are_named(short_run, tmp_path):
    attack = lambda **options: attack_quantized.load(attack_quantized.Config(**options))
    with pytest.raises(DataError, match="is no run of the experiment quantize"):
        attack(networks=str(tmp_path))
    with pytest.raises(DataError, match="has model 'lenet300', not 'alexnet_s'"):
        attack(networks=str(short_run[0]), model="alexnet_s")
    networks = quantized_networks.load(quantize.Config(), quantized_networks.Settings())
    with pytest.raises(DataError, match="there is no network"):
        networks.read(tmp_path, "pmf", 0)
    cases.folder(tmp_path, "pmf", 0).mkdir(parents=True)
    np.savez(cases.folder(tmp_path, "pmf", 0) / "network.npz", a=np.zeros(3))
    with pytest.raises(DataError, match="holds another network"):
        networks.read(tmp_path, "pmf", 0)


def test_published_attacks_stand_beside_the_runs_they_belong_to():
    options = CIFAR_RESNET | {"epsilon": 0.03137}
    found = attack_quantized.targets(attack_quantized.Config(**options))
    assert found["md_tanh_s"]["pgd"].value == 26.98 and found["md_tanh_s"]["fgsm++ hns"].value == 2.51
    assert found["float"]["pgd_l2++ njs"].value == 0.09
    assert attack_quantized.targets(attack_quantized.Config(**(options | {"epsilon": 0.1}))) == {}


def test_published_errors_stand_beside_the_runs_they_belong_to():
    found = quantize.targets(quantize.Config(**CIFAR_RESNET))
    assert found["md_tanh_s"]["test_error"].value == 6.82
    assert (found["pmf"]["test_error"].value, found["pmf"]["test_error"].kind) == (6.76, "authors' code")
    assert quantize.targets(quantize.Config()) == {}
    assert quantize.targets(quantize.Config(**CIFAR_RESNET, labels=(-1, 0, 1), methods=("pmf",))) == {}


def fake_networks(monkeypatch, config, settings):
    """Of ten random images in the shape of CIFAR-10."""
    pixels, labels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), np.uint8), np.arange(10, dtype=np.int32)
    split = data.Split(pixels, labels)
    monkeypatch.setattr(data, "load", lambda *_: data.Dataset("tiny", split, None, split, 10))
    return quantized_networks.load(config, settings._replace(batch_size=10))


def test_the_papers_recipe_of_every_method(monkeypatch):
    for model in ("vgg_d", "resnet18"):
        config = quantize.Config(dataset="cifar10", model=model, recipe="paper")
        networks = fake_networks(monkeypatch, config, quantized_networks.Settings())
        for method in ("float", *quantized_networks.METHODS):
            recipe, steps = networks.recipe(method)
            assert steps == 100_000 and recipe.growth >= 1 and recipe.learning_rate > 0
    assert networks.recipe("pmf")[0] == quantized_networks.Recipe(1e-3, 0.3, 1.1, 1000)


@pytest.mark.parametrize("model", ["vgg_d", "resnet18", "resnet8_strided"])
def test_convolutional_networks_are_quantized_but_for_the_batch_norm(model, monkeypatch):
    settings = quantized_networks.Settings(keep_float=("^dense/bias",) if model == "resnet18" else ())
    recipe = "paper" if model in quantized_networks.PAPER_RECIPES else "short"
    config = quantize.Config(dataset="cifar10", model=model, recipe=recipe)
    program = fake_networks(monkeypatch, config, settings).program("pmf")
    aux, _ = jax.eval_shape(program.init, jax.random.key(0))
    sets = quantization.label_sets(program.lattice, aux, strict=True)
    for path, leaf, labels in zip(jax.tree.leaves(trees.path_names(aux)), jax.tree.leaves(aux), sets, strict=True):
        kept = "bn/" in path or (model == "resnet18" and path == "dense/bias")
        assert (labels is None) == kept, path
        assert kept or leaf.shape[0] == 2


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (quantize.Config, {"methods": ()}, "methods is empty"),
        (quantize.Config, {"recipe": "paper"}, "recipe 'paper' is for the models resnet18, vgg_d, got 'lenet300'"),
        (quantize.Config, {"labels": (-1, 0, 1)}, "is defined for two labels"),
        (quantize.Config, {"final_beta": 0.5}, "final_beta must be at least 1, got 0.5; beta grows from 1"),
        (attack_quantized.Config, {"epsilon": 0.0}, "epsilon must be positive"),
        (attack_quantized.Config, {"attacks": ()}, "attacks is empty"),
    ],
)
def test_bad_options_are_named(config, options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)
