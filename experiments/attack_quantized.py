"""Attacks on networks with binary weights: plain, and with a temperature that gives the gradients back.

Paper: Gupta, Ajanthan, "Improved Gradient-Based Adversarial Attacks for Quantized Networks", AAAI 2022

    python -m experiments run attack_quantized                              # LeNet-300-100 on the embedded digits
    python -m experiments run attack_quantized --data-dir DIR --dataset mnist --networks runs/quantize_mnist
    python -m experiments run attack_quantized --data-dir DIR --dataset cifar10 --model resnet18 --recipe paper \\
        --epsilon 0.03137 --epsilons 0.00784 0.01569 0.03137                # for a GPU

Networks are those of a finished run of the experiment quantize with the same data and model (`--networks`), or are
trained first in the same way. Every network is attacked by FGSM, PGD (L-infinity) and PGD (L2), each plain and as its
++ form with network Jacobian scaling (njs) and Hessian-norm scaling (hns); the step is a quarter of epsilon, and 2.5
radii / T for L2. Radii are in units of the pixels' range; that of L2 is epsilon times 15 sqrt(N / 3072) for images of N
numbers, the paper's 15 on CIFAR. As in the paper beta_1 is measured on normalised images.

`adversarial_accuracy` is that over all attacked images, in percent at `epsilon`: lower means a stronger attack. A
network whose adversarial accuracy falls from the plain to the ++ attack only hid its gradients. `vanished` is the share
of images, in percent, whose input gradient is exactly zero in float32; `logit_gap` the median distance of the two
largest logits; `singular_value` the mean one of the logits' Jacobian. curves.json has all radii. `--logit-factor 50`
multiplies all logits, which changes no prediction: a control in which gradients are hidden on purpose.
Figure: success by epsilon.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments import quantize
from experiments._machinery import cases
from experiments._machinery.errors import DataError
from experiments._machinery.files import write_json
from experiments.data import images as data
from jaxlib_methods import robustness

SCALINGS = ("plain", "njs", "hns")
# Adversarial accuracy at epsilon = 8/255 (L2: 120/255), from the tables of the specification: the ICLR 2021 submission.
PUBLISHED = {
    "cifar10/resnet18": {
        "float": {"fgsm": (7.62, 5.55, 5.35), "pgd": (0.0, None, None), "pgd_l2": (45.18, 0.09, 0.05)},
        "md_tanh_s": {"fgsm": (40.49, 3.46, 2.51), "pgd": (26.98, 0.0, 0.0), "pgd_l2": (74.59, 0.05, 0.05)},
    },
    "cifar10/vgg_d": {
        "float": {"pgd": (0.04, None, None)},
        "md_tanh_s": {"fgsm": (57.55, 4.00, 3.43), "pgd": (47.32, 0.0, 0.0), "pgd_l2": (61.90, 0.35, 1.32)},
    },
}


@dataclasses.dataclass(frozen=True)
class Config:
    """The networks are cases of the experiment quantize; all attacks on one of them are one case here."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, or a path to an .npz
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    model: str = "lenet300"  # lenet300, lenet5, resnet8_strided, vgg_d, resnet18, or another of the library
    methods: tuple[quantize.Name, ...] = ("float", "bc", "pmf", "md_tanh_s")
    attacks: tuple[Literal["fgsm", "pgd", "pgd_l2"], ...] = ("fgsm", "pgd", "pgd_l2")
    networks: str | None = None  # folder of a finished quantize run; None: train them here
    seeds: int = 1
    recipe: Literal["short", "paper"] = "short"  # of the training
    training_steps: int | None = None  # None: the recipe's
    epsilon: float = 0.1  # of the table; added to the radii of the figure
    epsilons: tuple[float, ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
    logit_factor: float = 1.0  # multiplies the logits of every network
    l2_factor: float | None = None  # radius of the L2 ball over epsilon; None: the paper's 15, scaled to the images
    steps: int = 20  # of PGD
    restarts: int = 1
    images: int = 1000  # of the test set, from its start
    batch_size: int = 250

    def __post_init__(self):
        for name in ("seeds", "steps", "restarts", "images", "batch_size", "epsilon", "logit_factor", "l2_factor"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("methods", "attacks"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        if min(self.epsilons, default=0) < 0:
            raise ValueError(f"epsilons must not be negative, got {self.epsilons}")


SMOKE = {
    "methods": ("float", "md_tanh_s"), "attacks": ("pgd",), "training_steps": 60, "epsilons": (0.05,), "steps": 4,
    "images": 100, "batch_size": 100,
}  # fmt: skip


def PAPER(config: Config) -> dict[str, float]:
    """The published numbers that this configuration can be compared with."""
    found = {}
    if (
        math.isclose(config.epsilon, 8 / 255, rel_tol=1e-3)
        and config.l2_factor in (None, 15)
        and config.logit_factor == 1
    ):
        for method, attacks in PUBLISHED.get(f"{config.dataset}/{config.model}", {}).items():
            for attack, values in attacks.items():
                for scaling, value in zip(SCALINGS, values, strict=True):
                    if value is not None:
                        found[_name(method, attack, scaling)] = value
    return found


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Trains or loads the networks, attacks them, draws the figure and returns the accuracies, one per seed."""
    training = quantize.Config(
        dataset=config.dataset,
        data_dir=config.data_dir,
        model=config.model,
        methods=config.methods,
        seeds=config.seeds,
        recipe=config.recipe,
        steps=config.training_steps,
    )
    folder = workdir / "networks" if config.networks is None else pathlib.Path(config.networks)
    if config.networks is None:
        quantize.train(training, folder)
        fraction = training.validation_fraction
    else:
        fraction = _run_of(folder, config)["validation_fraction"]
    dataset = data.load(config.dataset, config.data_dir, fraction)  # images are normalised by the training part
    network = quantize.build_network(training, dataset)
    target = _target(config, dataset, network)
    metrics: dict[str, list[float]] = {}
    curves: dict[str, Any] = {}
    for method in config.methods:
        for seed in range(config.seeds):
            case = f"{method}-seed{seed}"
            trained = quantize.load_trained(folder / "cases" / case, network)
            attack = functools.partial(_attack_network, config, target, trained, method, seed)
            found = cases.run_or_load(workdir / "attacks" / case, attack)
            curves[f"{method} seed {seed}"] = found["curve"]
            for name, value in found["metrics"].items():
                metrics.setdefault(name, []).append(value)
    if jax.process_index() == 0:
        write_json(workdir / "curves.json", curves)
        _figure(config, curves, _l2_factor(config, target.images), workdir)
    return metrics


def _name(method: str, attack: str, scaling: str) -> str:
    return f"adversarial_accuracy {method} {attack}" + ("" if scaling == "plain" else f"++ {scaling}")


def _run_of(folder: pathlib.Path, config: Config) -> dict[str, Any]:
    """The configuration of a quantize run; raises DataError unless it is one with the same data and model."""
    try:
        run = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{folder} is no run of the experiment quantize ({error})") from error
    for name in ("dataset", "model"):
        if run.get(name) != getattr(config, name):
            raise DataError(f"{folder} has {name} {run.get(name)!r}, not {getattr(config, name)!r}; give the same")
    return run


class _Target(NamedTuple):
    """What is attacked: a network as a function of pixels in [0, 1], the one of normalised images, and the images."""

    of_pixels: Callable[[Any, jax.Array], jax.Array]
    of_normalised: Callable[[Any, jax.Array], jax.Array]
    normalise: Callable[[jax.Array], jax.Array]
    images: np.ndarray  # float32 [n, height, width, channels] in [0, 1]
    labels: np.ndarray  # int32 [n]


def _target(config: Config, dataset: data.Dataset, network: quantize.Network) -> _Target:
    largest = int(dataset.train.images.max())  # 255; 16 for the digits
    mean, std = quantize.statistics(dataset)

    def of_pixels(trained: Any, images: jax.Array) -> jax.Array:
        return config.logit_factor * network.apply(*trained, images * np.float32(largest), False)[0]

    def of_normalised(trained: Any, images: jax.Array) -> jax.Array:
        shape = (1,) * (images.ndim - 1) + (-1,)
        mean_, std_ = (np.asarray(value, np.float32).reshape(shape) for value in (mean, std))
        return config.logit_factor * network.apply(*trained, images * std_ + mean_, False)[0]

    normalise = lambda images: data.standardise(images * np.float32(largest), mean, std)
    split = dataset.test
    images = np.minimum(split.images[: config.images].astype(np.float32) / largest, 1)
    return _Target(of_pixels, of_normalised, normalise, images, split.labels[: config.images])


def _attack_network(
    config: Config, target: _Target, trained: Any, method: str, seed: int, case_dir: pathlib.Path
) -> dict[str, Any]:
    """The metrics at the table's radius, and the curve: the accuracies of every attack by radius."""
    del case_dir  # nothing to resume from
    some = jnp.asarray(target.images[:100])
    njs = robustness.network_jacobian_scaling(target.of_normalised, trained, target.normalise(some))
    scalings = {"plain": None, "njs": njs, "hns": robustness.HessianNormScaling()}
    key = jax.random.key(seed)
    clean = _accuracy(
        config, target, lambda images, labels, key: _clean(target.of_pixels, trained, images, labels), key
    )
    masking = robustness.gradient_masking(target.of_pixels, trained, some, jnp.asarray(target.labels[:100]))
    metrics = {
        f"accuracy {method}": clean,
        f"vanished {method}": 100 * float(masking.vanished),
        f"logit_gap {method}": float(jnp.median(masking.logit_gap)),
        f"singular_value {method}": float(1 / njs.scale),
    }
    radii = sorted({*config.epsilons, config.epsilon})
    curve: dict[str, Any] = {"epsilon": radii, "accuracy": clean}
    for attack in config.attacks:
        for scaling, how in scalings.items():
            run = functools.partial(_attack, config, target.of_pixels, trained, attack, how)
            found = [_accuracy(config, target, functools.partial(run, radius), key) for radius in radii]
            curve[f"{attack} {scaling}"] = found
            metrics[_name(method, attack, scaling)] = found[radii.index(config.epsilon)]
        print(
            f"{config.model} {method} seed {seed}  {attack}  "
            + "  ".join(f"{s} {curve[f'{attack} {s}']}" for s in scalings)
        )
    return {"metrics": metrics, "curve": curve}


def _attack(
    config: Config,
    apply: Any,
    trained: Any,
    attack: str,
    scaling: Any,
    radius: float,
    images: Any,
    labels: Any,
    key: Any,
) -> jax.Array:
    """Whether each image survives the attack."""
    if attack == "fgsm":
        result = robustness.fgsm(apply, trained, images, labels, key=key, radius=radius, scaling=scaling)
    else:
        l2 = attack == "pgd_l2"
        radius = radius * _l2_factor(config, images) if l2 else radius
        result = robustness.pgd(
            apply,
            trained,
            images,
            labels,
            key=key,
            radius=radius,
            step_size=max(2.5 * radius / config.steps if l2 else radius / 4, 1e-6),
            num_steps=config.steps,
            norm="l2" if l2 else "linf",
            scaling=scaling,
            num_restarts=config.restarts,
        )
    return ~result.success


def _l2_factor(config: Config, images: np.ndarray) -> float:
    return config.l2_factor or 15 * math.sqrt(math.prod(images.shape[1:]) / 3072)


@functools.partial(jax.jit, static_argnums=0)
def _clean(apply: Any, trained: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.argmax(apply(trained, images), axis=1) == labels


def _accuracy(config: Config, target: _Target, survives: Callable[..., jax.Array], key: jax.Array) -> float:
    """Percent of the images that survive; the last batch is filled up and the filling does not count."""
    count = len(target.images)
    batches = math.ceil(count / config.batch_size)
    right = 0
    for i in range(batches):
        rows = np.arange(i * config.batch_size, (i + 1) * config.batch_size)
        taken = np.minimum(rows, count - 1)
        found = survives(target.images[taken], target.labels[taken], jax.random.fold_in(key, i))
        right += int(np.asarray(found)[rows < count].sum())
    return 100 * right / count


def _figure(config: Config, curves: dict[str, Any], l2_factor: float, workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = len(config.attacks)
    figure, axes = plt.subplots(1, columns, figsize=(4 * columns + 1, 4), layout="constrained", sharey=True)
    axes = np.atleast_1d(axes)
    styles = {"plain": ":", "njs": "--", "hns": "-"}
    for attack, axis in zip(config.attacks, axes, strict=True):
        for i, method in enumerate(config.methods):
            runs = [curves[f"{method} seed {seed}"] for seed in range(config.seeds)]
            for scaling, style in styles.items():
                mean = 100 - np.mean([run[f"{attack} {scaling}"] for run in runs], axis=0)
                axis.plot(runs[0]["epsilon"], mean, style, color=f"C{i}", marker=".", label=f"{method} {scaling}")
        radius = f"epsilon (radius {l2_factor:.3g} epsilon)" if attack == "pgd_l2" else "epsilon"
        axis.set(xlabel=radius, title=attack)
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="misclassified (%)", ylim=(-2, 102))
    axes[-1].legend(fontsize="x-small")
    figure.suptitle(f"{config.model} on {pathlib.Path(config.dataset).stem}")
    figure.savefig(workdir / "success.png", dpi=130)
    plt.close(figure)
