"""Bidirectionally self-normalising networks: plain networks of up to 200 layers whose signal norms stay flat.

Paper: Lu, Gould, Ajanthan, "Bidirectionally Self-Normalizing Neural Networks", Neural Networks 2023

    python -m experiments run bsn                                     # digits, width 100: minutes, 2 cores
    python -m experiments run bsn --data-dir DIR --dataset mnist --learning-rates 0.4 1.5 6 24 --steps 300
    python -m experiments run bsn --data-dir DIR --dataset mnist --width 500 --steps 3000    # the paper's size: a GPU

Cases: depth x activation x with and without Gauss-Poincare normalisation (gpn, raw). Weights are Haar-orthogonal and
stay orthogonal: Riemannian SGD with two Bjorck steps as retraction. Inputs are standardised and put on the sphere of
radius sqrt(n). The default root of each activation is the one whose norms do not drift. With several learning rates
every network is trained with each of them on its first seed and keeps the one with the smallest error on a tenth of
the training set that is held out: raw and normalised networks get the same chance.
Figures: forward and backward signal norms by layer before and after training, side by side; training accuracy by depth.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import cases, device_data, loop as training
from experiments._machinery.errors import ExperimentError, NonFiniteLossError
from experiments.data import images as data
from jaxlib_methods.normalization import (
    BSNParams,
    apply_bsn,
    gpn,
    init_bsn,
    orthogonal_retraction,
    orthogonality_error,
    rescale_inputs,
    signal_norms,
)

PyTree = Any
Activation = Literal["tanh", "relu", "leaky_relu", "elu", "selu", "gelu"]
ACTIVATIONS = {
    "tanh": jnp.tanh,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "elu": jax.nn.elu,
    "selu": jax.nn.selu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of depth, activation, normalisation and seed is one case; each is resumable."""

    dataset: str = "digits"  # digits, mnist, cifar10, another TFDS set, or a path to an .npz
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    depths: tuple[int, ...] = (10, 50, 200)  # hidden layers
    width: int = 100  # the paper's networks are about 500 wide
    activations: tuple[Activation, ...] = ("tanh", "relu")
    normalisations: tuple[Literal["gpn", "raw"], ...] = ("gpn", "raw")
    root: Literal["minus", "plus"] = "minus"  # of the GPN shift
    retraction: Literal["bjorck", "qr"] = "bjorck"
    seeds: int = 1
    steps: int = 1000
    batch_size: int = 128
    # Of SGD, divided by depth^1.5: what every layer turns adds up, and flat norms spread it.
    learning_rates: tuple[float, ...] = (1.5,)

    def __post_init__(self):
        for name in ("width", "seeds", "steps", "batch_size"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("depths", "activations", "normalisations", "learning_rates"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        if not min(self.learning_rates) > 0:
            raise ValueError(f"learning_rates must be positive, got {min(self.learning_rates)}")
        if min(self.depths) < 1:
            raise ValueError(f"depths must be at least 1, got {min(self.depths)}")


SMOKE = {"depths": (8,), "width": 32, "activations": ("tanh",), "steps": 30}
PAPER: dict[str, float] = {}  # no number of the paper is confirmed


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns the last measurements, one per seed."""
    tuned = len(config.learning_rates) > 1
    dataset = data.load(config.dataset, config.data_dir, validation_fraction=0.1 if tuned else 0.0)
    metrics: dict[str, list[float]] = {}
    results: dict[tuple[str, str, int], dict[str, Any]] = {}
    for depth, activation, normalisation in itertools.product(config.depths, config.activations, config.normalisations):
        task = _task(config, dataset, depth, activation, normalisation)

        def run(seed: int, rate: float, task: dict[str, Any] = task) -> dict[str, Any]:
            name = f"{task['label'].replace(' ', '-')}-seed{seed}" + (f"-rate{rate:g}" if tuned else "")
            return cases.run_or_load(workdir / "cases" / name, functools.partial(_run_case, task, seed, rate))

        network = f"{activation} {normalisation} L={depth}"
        tried = {rate: result for rate in config.learning_rates if "diverged" not in (result := run(0, rate))}
        if not tried:
            raise ExperimentError(
                f"{network} diverged with every learning rate of {config.learning_rates}; add smaller"
            )
        best = min(tried, key=lambda rate: tried[rate]["metrics"].get("validation_error", 0.0))
        results[activation, normalisation, depth] = tried[best]
        for seed in range(config.seeds):
            for key, value in (run(seed, best)["metrics"] | ({"learning_rate": best} if tuned else {})).items():
                metrics.setdefault(f"{key} {network}", []).append(value)
    if jax.process_index() == 0:
        _figures(config, results, workdir)
    return metrics


def _task(config: Config, dataset: data.Dataset, depth: int, activation: str, normalisation: str) -> dict[str, Any]:
    """What all seeds of a network share."""
    f = ACTIVATIONS[activation]
    phi = gpn(f, root=config.root) if normalisation == "gpn" else f
    images = dataset.train.images
    mean, std = images.mean(axis=0, dtype=np.float64), images.std(axis=0, dtype=np.float64)
    mean, std = mean.astype(np.float32).ravel(), np.maximum(std, 1.0).astype(np.float32).ravel()  # one grey level

    def inputs(images: jax.Array) -> jax.Array:
        x = images.reshape(images.shape[0], -1).astype(jnp.float32)
        return rescale_inputs((x - mean[None, :]) / std[None, :])

    def logits_fn(params: BSNParams, model_state: PyTree, images: jax.Array) -> jax.Array:
        del model_state
        return apply_bsn(params, inputs(images), phi)

    def loss_fn(params: BSNParams, model_state: PyTree, batch: data.Split, key: jax.Array):
        del key
        logits = logits_fn(params, model_state, batch.images)
        wrong = 100.0 * (jnp.argmax(logits, axis=1) != batch.labels).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return loss.mean(), (model_state, {"train_error": wrong.mean()})

    few, labels = jnp.asarray(images[:64]), jnp.asarray(dataset.train.labels[:64])

    @jax.jit
    def norms(params: BSNParams) -> tuple[jax.Array, jax.Array]:
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return signal_norms(params, inputs(few), lambda logits: cross_entropy(logits, labels).mean(), phi)

    sgd = optax.inject_hyperparams(optax.sgd)(config.learning_rates[0])  # one program for all learning rates
    per_example = training.classification(logits_fn)
    evaluators = [training.evaluator(per_example, dataset.test)]
    if dataset.validation is not None:
        evaluators.append(training.evaluator(per_example, dataset.validation, prefix="validation_"))

    def evaluate(state: training.TrainState) -> dict[str, float]:
        return {name: value for evaluator in evaluators for name, value in evaluator(state).items()}

    return {
        "config": config,
        "depth": depth,
        "label": f"{activation} {normalisation} L={depth}",
        "split": device_data.put(dataset.train, device_data.data_mesh(config.batch_size)),
        "init": functools.partial(
            init_bsn, depth=depth, width=config.width, num_inputs=images[0].size, num_outputs=dataset.num_classes
        ),
        "loss_fn": loss_fn,
        "optimizer": orthogonal_retraction(sgd, method=config.retraction),
        "evaluate": evaluate,
        "norms": norms,
    }


def _run_case(task: dict[str, Any], seed: int, rate: float, case_dir: pathlib.Path) -> dict[str, Any]:
    """Trains one network; returns its errors, its learning curve and its signal norms before and after."""
    config = task["config"]
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params = task["init"](init_key)
    before = jax.device_get(task["norms"](params))
    initial = training.init_state(params, task["optimizer"], key=train_key)
    initial.opt_state.hyperparams["learning_rate"] = jnp.float32(rate / task["depth"] ** 1.5)
    try:
        state, history = training.fit(
            task["loss_fn"],
            task["optimizer"],
            initial,
            task["split"],
            batch_size=config.batch_size,
            steps=config.steps,
            steps_per_call=max(1, config.steps // 20),
            evaluate=task["evaluate"],
            workdir=case_dir,
            checkpoint_every=0,
            mesh=task["split"].mesh,
            label=f"{task['label']} rate {rate:g}",
        )
    except NonFiniteLossError as error:
        return {"diverged": str(error)}
    after = jax.device_get(task["norms"](jax.device_get(state.params)))
    curve = [{name: record[name] for name in ("step", "loss", "train_error")} for record in history]
    safe_log = lambda ratio: float(np.log10(np.maximum(ratio, 1e-300)))
    return {
        "metrics": {
            "train_error": curve[-1]["train_error"],
            **{name: history[-1][name] for name in ("test_error", "validation_error") if name in history[-1]},
            "log10 forward ratio": safe_log(np.float64(before.forward[-1]) / before.forward[0]),
            "log10 backward ratio": safe_log(np.float64(before.backward[0]) / np.maximum(before.backward[-1], 1e-300)),
            "orthogonality_error": float(jnp.max(orthogonality_error(state.params.hidden), initial=0.0)),
        },
        "curve": curve,
        "before": {name: np.asarray(value, np.float64).tolist() for name, value in before._asdict().items()},
        "after": {name: np.asarray(value, np.float64).tolist() for name, value in after._asdict().items()},
    }


def _figures(config: Config, results: dict[tuple[str, str, int], dict[str, Any]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    deepest = max(config.depths)
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharex=True)
    for (activation, normalisation, depth), result in results.items():
        if depth != deepest:
            continue
        layers = np.arange(1, depth + 1)
        for when, dashes in (("before", "-"), ("after", ":")):
            label = f"{activation} {normalisation}, {when} training"
            backward = np.array(result[when]["backward"])
            floor = lambda v: np.maximum(v, 1e-30)  # what has vanished stays on the paper
            (line,) = axes[0].plot(layers, floor(np.array(result[when]["forward"])), dashes, label=label)
            axes[1].plot(layers, floor(backward / max(backward[-1], 1e-300)), dashes, color=line.get_color())
    axes[0].set(yscale="log", xlabel="layer", title="forward: ||x||² / n")
    axes[1].set(yscale="log", xlabel="layer", title="backward: ||dE/dh|| relative to the last layer")
    axes[0].legend(fontsize="x-small")
    figure.suptitle(f"{deepest} layers of {config.width} units on {pathlib.Path(config.dataset).stem}")
    figure.savefig(workdir / "signal_norms.png", dpi=130)
    plt.close(figure)

    figure, axes = plt.subplots(1, len(config.depths), figsize=(4.2 * len(config.depths), 3.8), layout="constrained")
    for axis, depth in zip(np.atleast_1d(axes), config.depths, strict=True):
        for (activation, normalisation, at), result in results.items():
            if at == depth:
                steps = [point["step"] for point in result["curve"]]
                accuracy = [100 - point["train_error"] for point in result["curve"]]
                axis.plot(
                    steps, accuracy, "-" if normalisation == "gpn" else ":", label=f"{activation} {normalisation}"
                )
        axis.set(title=f"{depth} layers", xlabel="step", ylim=(0, 101), ylabel="training accuracy (%)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.savefig(workdir / "training.png", dpi=130)
    plt.close(figure)
