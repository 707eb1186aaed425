"""Attacks on networks with binary weights: plain, and with a factor on the logits that gives the gradients back.

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

The numbers of the attacks are adversarial accuracies over all attacked images, in percent at `epsilon`: lower means a
stronger attack. A network whose adversarial accuracy falls from the plain to the ++ attack only hid its gradients.
`vanished` is the share of images, in percent, whose input gradient is exactly zero in float32; `logit_gap` the median
distance of the two largest logits; `singular_value` the mean one of the logits' Jacobian. A case's curve has all radii.
`--logit-factor 50` multiplies all logits, which changes no prediction: a control in which gradients are hidden on
purpose.
Figure: success by epsilon.
"""

import dataclasses
import functools
import json
import math
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments._machinery import plots
from experiments._machinery.errors import DataError
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Target, Targets
from experiments.tasks import quantized_networks
from experiments.tasks.quantized_networks import Name, Networks, Settings
from jaxlib_methods import robustness

SCALINGS = ("plain", "njs", "hns")
# Adversarial accuracy at epsilon = 8/255 (L2: 120/255), plain and with the two scalings.
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
class Config(quantized_networks.Options):
    """All attacks on one network are one case."""

    methods: tuple[Name, ...] = ("float", "bc", "pmf", "md_tanh_s")
    attacks: tuple[Literal["fgsm", "pgd", "pgd_l2"], ...] = ("fgsm", "pgd", "pgd_l2")
    networks: str | None = None  # folder of a finished quantize run; None: train them here
    training_steps: Count | None = None  # None: the recipe's
    epsilon: Positive = 0.1  # of the table; added to the radii of the figure
    epsilons: tuple[Annotated[float, Range(0)], ...] = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
    logit_factor: Positive = 1.0  # multiplies the logits of every network
    l2_factor: Positive | None = None  # radius of the L2 ball over epsilon; None: the paper's 15, scaled to the images
    steps: Count = 20  # of PGD
    restarts: Count = 1
    images: Count = 1000  # of the test set, from its start
    batch_size: Count = 250  # of the attacks


SMOKE = {
    "methods": ("float", "md_tanh_s"), "attacks": ("pgd",), "training_steps": 60, "epsilons": (0.05,), "steps": 4,
    "images": 100, "batch_size": 100,
}  # fmt: skip


def targets(config: Config) -> Targets:
    """Published accuracies, where the radii and the logits are the paper's."""
    same = math.isclose(config.epsilon, 8 / 255, rel_tol=1e-3) and config.l2_factor in (None, 15)
    published = PUBLISHED.get(f"{config.dataset}/{config.model}", {}) if same and config.logit_factor == 1 else {}
    source = "Gupta and Ajanthan, ICLR 2021 submission, as remembered"
    return {
        method: {
            _metric(attack, scaling): Target(value, source, "paper")
            for attack, values in attacks.items()
            for scaling, value in zip(SCALINGS, values, strict=True)
            if value is not None and attack in config.attacks
        }
        for method, attacks in published.items()
        if method in config.methods
    }


def _metric(attack: str, scaling: str) -> str:
    return attack if scaling == "plain" else f"{attack}++ {scaling}"


def variants(config: Config) -> dict[str, str]:
    return {name: name for name in config.methods}


class Shared(NamedTuple):
    """What is attacked: a network as a function of pixels in [0, 1], the one of normalised images, and the images."""

    config: Config
    networks: Networks
    of_pixels: Callable[[Any, jax.Array], jax.Array]
    of_normalised: Callable[[Any, jax.Array], jax.Array]
    normalise: Callable[[jax.Array], jax.Array]
    images: np.ndarray  # float32 [n, height, width, channels] in [0, 1]
    labels: np.ndarray  # int32 [n]


def load(config: Config) -> Shared:
    options = config
    if config.networks is not None:  # images are normalised by the training part of that run
        fraction = _run_of(pathlib.Path(config.networks), config)["validation_fraction"]
        options = dataclasses.replace(config, validation_fraction=fraction)
    networks = quantized_networks.load(options, Settings(steps=config.training_steps))
    task, split = networks.task, networks.task.dataset.test
    largest = np.float32(task.dataset.train.images.max())  # 255; 16 for the digits
    return Shared(
        config,
        networks,
        lambda trained, images: config.logit_factor * task.apply(*trained, images * largest, False)[0],
        lambda trained, images: config.logit_factor * task.forward(*trained, images, False)[0],
        lambda images: task.standardise(images * largest),
        np.minimum(split.images[: config.images].astype(np.float32) / largest, 1),
        split.labels[: config.images],
    )


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


def run(shared: Shared, variant: str, seed: int, workdir: pathlib.Path) -> Outcome:
    """The metrics at the table's radius, and the accuracies of every attack by radius."""
    config, key = shared.config, jax.random.key(seed)
    if config.networks is None:
        trained = shared.networks.train(variant, seed, workdir).variables
    else:
        trained = shared.networks.read(pathlib.Path(config.networks), variant, seed)
    some = jnp.asarray(shared.images[:100])
    njs = robustness.network_jacobian_scaling(shared.of_normalised, trained, shared.normalise(some))
    scalings = {"plain": None, "njs": njs, "hns": robustness.HessianNormScaling()}
    masking = robustness.gradient_masking(shared.of_pixels, trained, some, jnp.asarray(shared.labels[:100]))
    survives = lambda images, labels, key: _is_right(shared.of_pixels, trained, images, labels)
    metrics = {
        "accuracy": _accuracy(shared, survives, key),
        "vanished": 100 * float(masking.vanished),
        "logit_gap": float(jnp.median(masking.logit_gap)),
        "singular_value": float(1 / njs.scale),
    }
    curve = [{"epsilon": epsilon} for epsilon in sorted({*config.epsilons, config.epsilon})]
    for attack in config.attacks:
        for scaling, how in scalings.items():
            metric = _metric(attack, scaling)
            for point in curve:
                survives = functools.partial(_survives, shared, trained, attack, how, point["epsilon"])
                point[metric] = _accuracy(shared, survives, key)
                if point["epsilon"] == config.epsilon:
                    metrics[metric] = point[metric]
            print(f"{config.model} {variant} seed {seed}  {metric}  {[point[metric] for point in curve]}")
    return Outcome(metrics, curve)


def _survives(
    shared: Shared, trained: Any, attack: str, scaling: Any, radius: float, images: Any, labels: Any, key: jax.Array
) -> jax.Array:
    """Whether each image survives the attack."""
    config, options = shared.config, {"key": key, "scaling": scaling}
    if attack == "fgsm":
        return ~robustness.fgsm(shared.of_pixels, trained, images, labels, radius=radius, **options).success
    l2 = attack == "pgd_l2"
    radius = radius * _l2_factor(shared) if l2 else radius
    options |= {"num_steps": config.steps, "num_restarts": config.restarts, "norm": "l2" if l2 else "linf"}
    step = max(2.5 * radius / config.steps if l2 else radius / 4, 1e-6)
    return ~robustness.pgd(shared.of_pixels, trained, images, labels, radius=radius, step_size=step, **options).success


def _l2_factor(shared: Shared) -> float:
    return shared.config.l2_factor or 15 * math.sqrt(math.prod(shared.images.shape[1:]) / 3072)


@functools.partial(jax.jit, static_argnums=0)
def _is_right(apply: Any, trained: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.argmax(apply(trained, images), axis=1) == labels


def _accuracy(shared: Shared, survives: Callable[..., jax.Array], key: jax.Array) -> float:
    """Percent of the images that survive; the last batch is filled up and the filling does not count."""
    count, size = len(shared.images), shared.config.batch_size
    right = 0
    for i in range(math.ceil(count / size)):
        rows = np.arange(i * size, (i + 1) * size)
        taken = np.minimum(rows, count - 1)
        found = survives(shared.images[taken], shared.labels[taken], jax.random.fold_in(key, i))
        right += int(np.asarray(found)[rows < count].sum())
    return 100 * right / count


def figures(shared: Shared, cases: list[Case]) -> dict[str, Any]:
    config = shared.config
    figure, axes = plots.axes(1, len(config.attacks), sharey=True)
    for attack, axis in zip(config.attacks, axes[0], strict=True):
        for i, (method, of_seeds) in enumerate(plots.by_name(cases).items()):
            for scaling, style in zip(SCALINGS, (":", "--", "-"), strict=True):
                values = [[100 - point[_metric(attack, scaling)] for point in case.curve] for case in of_seeds]
                at = [point["epsilon"] for point in of_seeds[0].curve]
                label = f"{method} {scaling}"
                axis.plot(at, np.mean(values, axis=0), style, color=f"C{i}", marker=".", label=label)
        radius = f"epsilon (radius {_l2_factor(shared):.3g} epsilon)" if attack == "pgd_l2" else "epsilon"
        axis.set(xlabel=radius, title=attack)
        axis.grid(alpha=0.3)
    axes[0, 0].set(ylabel="misclassified (%)", ylim=(-2, 102))
    axes[0, -1].legend(fontsize="x-small")
    figure.suptitle(f"{config.model} on {pathlib.Path(config.dataset).stem}")
    return {"success": figure}
