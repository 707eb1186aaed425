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
Figures: forward and backward signal norms by layer before and after training, side by side; training error by depth.
"""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments._machinery import loop, plots
from experiments._machinery.errors import NonFiniteLossError
from experiments._machinery.options import Count, Positive, Share
from experiments._machinery.records import Case, Outcome, Targets
from experiments.data import images
from experiments.tasks import classification
from jaxlib_methods import normalization

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
class Config(classification.Options):
    """Every combination of depth, activation, normalisation and seed is one case; each is resumable."""

    batch_size: Count = 128
    validation_fraction: Share = 0.1  # of the training set; set aside where there are several learning rates
    depths: tuple[Count, ...] = (10, 50, 200)  # hidden layers
    width: Count = 100  # the paper's networks are about 500 wide
    activations: tuple[Activation, ...] = ("tanh", "relu")
    normalisations: tuple[Literal["gpn", "raw"], ...] = ("gpn", "raw")
    root: Literal["minus", "plus"] = "minus"  # of the GPN shift
    retraction: Literal["bjorck", "qr"] = "bjorck"
    steps: Count = 1000
    # Of SGD, divided by depth^1.5: what every layer turns adds up, and flat norms spread it.
    learning_rates: tuple[Positive, ...] = (1.5,)


SMOKE: dict[str, Any] = {"depths": (8,), "width": 32, "activations": ("tanh",), "steps": 30}
SHOWN = ("train_error", "test_error", "log10 forward ratio", "log10 backward ratio", "learning_rate")
TUNED_BY = "validation_error"


class Row(NamedTuple):
    depth: int
    activation: str
    normalisation: str


def targets(config: Config) -> Targets:
    """None: no number of the paper is confirmed."""
    del config
    return {}


def variants(config: Config) -> dict[str, Row]:
    rows = itertools.starmap(Row, itertools.product(config.depths, config.activations, config.normalisations))
    return {f"{row.activation} {row.normalisation} L={row.depth}": row for row in rows}


def candidates(config: Config, name: str, chosen: dict[str, float]) -> tuple[float, ...]:
    """Learning rates, the same ones for every network."""
    del name, chosen
    return config.learning_rates


def load(config: Config) -> classification.Data:
    held_out = config.validation_fraction if len(config.learning_rates) > 1 else 0.0
    return classification.load_data(dataclasses.replace(config, validation_fraction=held_out))


class Network(NamedTuple):
    """What all seeds and learning rates of a network share."""

    init: Callable[[jax.Array], normalization.bsn.BSNParams]
    loss_fn: loop.LossFn
    optimizer: optax.GradientTransformation
    evaluate: Callable[[loop.TrainState], dict[str, float]]
    norms: Callable[[normalization.bsn.BSNParams], normalization.bsn.SignalNorms]  # on the first 64 images


@functools.lru_cache(maxsize=1)  # a network's cases follow one another
def make_network(data: classification.Data, row: Row) -> Network:
    """Compiles a network of the data's options."""
    config, train = data.options, data.dataset.train
    f = ACTIVATIONS[row.activation]
    phi = normalization.gpn(f, root=config.root) if row.normalisation == "gpn" else f
    mean, std = train.images.mean(axis=0, dtype=np.float64), train.images.std(axis=0, dtype=np.float64)
    mean, std = mean.astype(np.float32).ravel(), np.maximum(std, 1.0).astype(np.float32).ravel()  # one grey level

    def inputs(pixels: jax.Array) -> jax.Array:
        x = pixels.reshape(pixels.shape[0], -1).astype(jnp.float32)
        return normalization.rescale_inputs((x - mean[None, :]) / std[None, :])

    def logits_fn(params: normalization.bsn.BSNParams, model_state: PyTree, pixels: jax.Array) -> jax.Array:
        del model_state
        return normalization.apply_bsn(params, inputs(pixels), phi)

    def loss_fn(params: normalization.bsn.BSNParams, model_state: PyTree, batch: images.Split, key: jax.Array):
        del key
        logits = logits_fn(params, model_state, batch.images)
        wrong = 100.0 * (jnp.argmax(logits, axis=1) != batch.labels).astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
        return loss.mean(), (model_state, {"train_error": wrong.mean()})

    few, labels = jnp.asarray(train.images[:64]), jnp.asarray(train.labels[:64])
    cross_entropy = lambda logits: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    sgd = optax.inject_hyperparams(optax.sgd)(config.learning_rates[0])  # one program for all learning rates
    return Network(
        lambda key: normalization.init_bsn(
            key=key,
            depth=row.depth,
            width=config.width,
            num_inputs=train.images[0].size,
            num_outputs=data.dataset.num_classes,
        ),
        loss_fn,
        normalization.orthogonal_retraction(sgd, method=config.retraction),
        data.evaluator(logits_fn),
        jax.jit(lambda params: normalization.signal_norms(params, inputs(few), cross_entropy, phi)),
    )


def run(data: classification.Data, row: Row, seed: int, workdir: pathlib.Path, rate: float) -> Outcome:
    """Errors, learning curve, and signal norms before and after training."""
    network, steps = make_network(data, row), data.options.steps
    init_key, train_key = jax.random.split(jax.random.key(seed))
    params = network.init(init_key)
    before = jax.device_get(network.norms(params))
    initial = loop.init_state(params, network.optimizer, key=train_key)
    initial.opt_state.hyperparams["learning_rate"] = jnp.float32(rate / row.depth**1.5)
    try:
        state, history = data.fit(
            network.optimizer,
            initial,
            workdir,
            steps=steps,
            label=f"{row.activation} {row.normalisation} L={row.depth} rate {rate:g}",
            evaluate=network.evaluate,
            loss_fn=network.loss_fn,
            augment=None,
            steps_per_call=max(1, steps // 20),
            checkpoint_every=0,
        )
    except NonFiniteLossError as error:
        print(f"diverged: {error}", flush=True)
        return Outcome({"diverged": 1.0})
    after = jax.device_get(network.norms(jax.device_get(state.params)))
    last = history[-1]
    safe_log = lambda ratio: float(np.log10(np.maximum(ratio, 1e-300)))
    metrics = {
        "train_error": last["train_error"],
        **{name: last[name] for name in ("test_error", "validation_error") if name in last},
        "log10 forward ratio": safe_log(np.float64(before.forward[-1]) / before.forward[0]),
        "log10 backward ratio": safe_log(np.float64(before.backward[0]) / np.maximum(before.backward[-1], 1e-300)),
        "orthogonality_error": float(
            jnp.max(normalization.orthogonal.orthogonality_error(state.params.hidden), initial=0.0)
        ),
        "learning_rate": rate,
    }
    as_lists = lambda norms: {name: np.asarray(x, np.float64).tolist() for name, x in norms._asdict().items()}
    curve = [{name: record[name] for name in ("step", "loss", "train_error")} for record in history]
    return Outcome(metrics, curve, {"before": as_lists(before), "after": as_lists(after)})


def figures(data: classification.Data, cases: list[Case]) -> dict[str, Any]:
    """Signal norms of the deepest networks, and the training error of all."""
    config = data.options
    deepest = max(config.depths)
    norms, panels = plots.axes(1, 2, sharex=True)
    for name, (case, *_) in plots.by_name(cases).items():
        if case.variant.depth != deepest or not case.details:
            continue
        for when, dashes in (("before", "-"), ("after", ":")):
            forward, backward = (np.array(case.details[when][kind]) for kind in ("forward", "backward"))
            floor = lambda values: np.maximum(values, 1e-30)  # what has vanished stays on the paper
            layers = np.arange(1, deepest + 1)
            (line,) = panels[0, 0].plot(layers, floor(forward), dashes, label=f"{name}, {when} training")
            relative = floor(backward / max(backward[-1], 1e-300))
            panels[0, 1].plot(layers, relative, dashes, color=line.get_color())
    panels[0, 0].set(yscale="log", xlabel="layer", title="forward: ||x||² / n")
    panels[0, 1].set(yscale="log", xlabel="layer", title="backward: ||dE/dh|| relative to the last layer")
    panels[0, 0].legend(fontsize="x-small")
    norms.suptitle(f"{deepest} layers of {config.width} units on {pathlib.Path(config.dataset).stem}")
    training = plots.curves(
        cases,
        "step",
        {"train_error": "training error (%)"},
        label=lambda case: f"{case.variant.activation} {case.variant.normalisation}",
        panel=lambda case: f"{case.variant.depth} layers",
        ylim=(-1, 101),
    )
    return {"signal_norms": norms, "training": training}
