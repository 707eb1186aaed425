"""Networks whose every weight is one of a few labels: proximal mean-field, mirror descent and their rivals.

Paper: Ajanthan, Dokania, Hartley, Torr, "Proximal Mean-field for Neural Network Quantization", ICCV 2019; Ajanthan,
Gupta, Torr, Hartley, Dokania, "Mirror Descent View for Neural Network Quantization", AISTATS 2021

    python -m experiments run quantize                        # LeNet-300-100 on the embedded digits: minutes, 2 cores
    python -m experiments run quantize --data-dir DIR --dataset mnist --steps 3000                        # minutes
    python -m experiments run quantize --data-dir DIR --dataset cifar10 --model resnet8_strided --final-beta 1e4
    python -m experiments run quantize --data-dir DIR --dataset cifar10 --model resnet18 --recipe paper   # for a GPU
    python -m experiments run quantize --data-dir DIR --dataset cifar10 --model vgg_d --recipe paper

Every method trains the same network from the same draw (`tasks/quantized_networks.py`); the test error is that of the
quantized network, in which weights and biases of all layers, the first and the last too, are labels. `float` is the
same network with ordinary weights. The paper keeps the checkpoint that is best on validation data; here the last one
counts. A case leaves its network in `network.npz`, for the experiment attack_quantized.
Figures: inverse temperature and share of weights within 1e-3 of a label by step; test error by step.
"""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

import jax

from experiments._machinery import plots
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Target, Targets
from experiments.tasks import quantized_networks
from experiments.tasks.quantized_networks import Name, Networks
from jaxlib_methods import quantization

# Test error in percent. The mirror-descent paper's, but for PMF: the re-tuned number of its repository's README.
PUBLISHED = {
    "cifar10/vgg_d": {
        "float": 6.67, "bc": 10.96, "pmf": 8.60, "gd_tanh": 8.53, "md_softmax": 9.53, "md_tanh": 8.36,
        "md_softmax_s": 8.70, "md_tanh_s": 8.47,
    },
    "cifar10/resnet18": {
        "float": 5.16, "bc": 8.36, "pmf": 6.76, "gd_tanh": 7.73, "md_softmax": 8.72, "md_tanh": 7.03,
        "md_softmax_s": 6.72, "md_tanh_s": 6.82,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Config(quantized_networks.Options):
    """Every combination of method and seed is one case; each is resumable."""

    methods: tuple[Name, ...] = (
        "float", "bc", "picm", "pgd", "pmf", "md_softmax", "md_tanh", "md_softmax_s", "md_tanh_s",
    )  # fmt: skip
    labels: tuple[float, ...] = (-1.0, 1.0)  # md_tanh and picm are defined for two
    keep_float: tuple[str, ...] | None = None  # regular expressions on paths of leaves to leave out, as the batch norm
    jacobian: Literal["double", "single", "exact"] = "double"  # of PMF
    steps: Count | None = None  # None: the recipe's, 1,500 or 100,000
    batch_size: Count | None = None  # None: 100, or 128 with the paper's recipe
    learning_rate: Positive | None = None  # of all methods; None: each method's own
    final_beta: Annotated[float, Range(1, remedy="beta grows from 1")] | None = None  # of the short recipe
    evaluate_every: Count | None = None  # None: ten times in a run

    def __post_init__(self):
        super().__post_init__()
        for method in set(self.methods) & {"md_tanh", "picm"}:
            if len(self.labels) != 2:
                raise ValueError(f"{method} is defined for two labels, got {self.labels}; leave it out of methods")


SMOKE = {"methods": ("float", "pmf", "md_tanh", "md_tanh_s"), "steps": 100}
SHOWN = ("test_error", "label_share")


def targets(config: Config) -> Targets:
    """Published errors of binary networks."""
    published = PUBLISHED.get(f"{config.dataset}/{config.model}", {}) if len(config.labels) == 2 else {}
    paper = ("Ajanthan et al. 2021 (mirror descent), as remembered, not checked against its text", "paper")
    sources = {"pmf": ("README of the PMF repository, re-tuned", "authors' code")}
    return {
        name: {"test_error": Target(error, *sources.get(name, paper))}
        for name, error in published.items()
        if name in config.methods
    }


def variants(config: Config) -> dict[str, str]:
    return {name: name for name in config.methods}


def load(config: Config) -> Networks:
    settings = {name: getattr(config, name) for name in quantized_networks.Settings._fields}
    settings["keep_float"] = config.keep_float or ()
    return quantized_networks.load(config, quantized_networks.Settings(**settings))


def run(networks: Networks, variant: str, seed: int, workdir: pathlib.Path) -> Outcome:
    """Trains one network; its errors in percent, and what it takes in bits."""
    trained = networks.train(variant, seed, workdir)
    if jax.process_index() == 0:
        quantized_networks.save(workdir, trained)
    kept = ("step", "loss", "beta", "test_error", "validation_error", "label_share")
    curve = [{name: record[name] for name in kept if name in record} for record in trained.history]
    details = {}
    if trained.lattice is not None:
        size = quantization.packing.packed_bytes
        packed = size(quantization.pack(trained.variables[0], trained.lattice))
        details = {"packed_bytes": packed, "times_smaller": size(trained.variables[0]) / packed}
    metrics = {name: curve[-1][name] for name in ("test_error", "label_share") if name in curve[-1]}
    return Outcome(metrics, curve, details)


def figures(networks: Networks, cases: list[Case]) -> dict[str, Any]:
    options = networks.options
    title = f"{options.model} on {pathlib.Path(options.dataset).stem}"
    annealing = plots.curves(
        [case for case in cases if case.variant != "float"],
        "step",
        {"beta": "inverse temperature", "label_share": "share of weights within 1e-3 of a label"},
        title=title,
    )
    annealing.axes[0].set_yscale("log")
    error = {"test_error": "test error of the quantized network (%)"}
    return {"annealing": annealing, "training": plots.curves(cases, "step", error, title=title, yscale="log")}
