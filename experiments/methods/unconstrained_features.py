"""Unconstrained feature model: free feature vectors trained under a learned, a fixed and the nearest-ETF classifier.

Paper: Markou, Ajanthan, Gould, "Guiding Neural Collapse: Optimising Towards the Nearest Simplex ETF", NeurIPS 2024

    python -m experiments run unconstrained_features                                  # K = 10, 100: minutes, 2 cores
    python -m experiments run unconstrained_features --classes 1000 --num-features 1000 --per-class 4 --steps 150 \
        --evaluations 8                                                               # minutes on one core
    python -m experiments run unconstrained_features --classes 10 100 200 1000 --steps 200

The features themselves are the parameters: N vectors of R^d, N(0, 1) at the start, all in every batch, gradient
descent with momentum on the mean cross-entropy. What remains is how the classifier, one of the heads of
`experiments.tasks.collapse`, leads them to collapse. UFM-10 is the paper's: 1000 vectors, d = 512. The sizes of the
larger ones are not confirmed; here each class has `per_class` vectors (fewer where that makes more than 10,000 in all,
at least two) and d = max(512, K).
Figures: for every K, NC1, NC3, cosine margin and distance of the class means to the nearest ETF by step, side by side.
"""

import dataclasses
import math
import pathlib
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments._machinery import plots
from experiments._machinery.options import Count, Positive, Range
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import collapse
from jaxlib_methods.classifiers import neural_collapse

PyTree = Any
MEASURED = ("loss", "train_error", "nc1", "nc2", "nc3", "cosine_margin", "etf_distance_means")


@dataclasses.dataclass(frozen=True)
class Config(collapse.HeadOptions):
    """Every combination of K, method and seed is one case."""

    classes: tuple[Annotated[int, Range(2)], ...] = (10, 100)  # K; the paper's are 10, 100, 200, 1000
    per_class: Count = 100  # feature vectors of a class, fewer where that makes more than 10,000
    num_features: Count = 512  # d, or K where that is more
    seeds: Count = 1
    steps: Count = 200
    learning_rate: Positive = 20.0  # of the features, times K: the mean over classes divides their gradient
    momentum: float = 0.9
    evaluations: Count = 12  # measurements over the run, spread evenly on a square-root scale


SMOKE: dict[str, Any] = {
    "classes": (10,), "per_class": 10, "num_features": 16, "steps": 40, "evaluations": 4,
    "methods": ("fixed", "implicit"),
}  # fmt: skip
SHOWN = ("loss", "nc1", "nc2", "nc3", "cosine_margin")


class Row(NamedTuple):
    num_classes: int
    method: collapse.Method


def targets(config: Config) -> Targets:
    """None: the paper shows curves; no number is confirmed."""
    del config
    return {}


def variants(config: Config) -> dict[str, Row]:
    return {f"{method} K={K}": Row(K, method) for K in config.classes for method in config.methods}


def run(config: Config, row: Row, seed: int, workdir: pathlib.Path) -> Outcome:
    """Trains the features under one classifier and measures their collapse."""
    del workdir  # a case is short: nothing to resume
    K, method = row
    d = max(config.num_features, K)
    per_class = max(2, min(config.per_class, 10_000 // K))
    labels = jnp.repeat(jnp.arange(K, dtype=jnp.int32), per_class)
    feature_key, head_key = jax.random.split(jax.random.key(seed))
    features = jax.random.normal(feature_key, (len(labels), d))
    head = collapse.make_head(config, method, d, K, rngs=nnx.Rngs(params=head_key))
    graph, weights, head_state = nnx.split(head, nnx.Param, ...)
    # The mean divides a vector's gradient by their number; the classifier's gradient is of order one as it stands.
    tx = optax.partition(
        {
            "features": optax.sgd(config.learning_rate * K, config.momentum),
            "weights": optax.sgd(config.learning_rate / 20, config.momentum),
        },
        {"features": "features", "weights": "weights"},
    )

    def loss_fn(params: PyTree, head_state: PyTree) -> tuple[jax.Array, PyTree]:
        head = nnx.merge(graph, params["weights"], head_state, copy=True)
        logits = head(params["features"], labels)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        wrong = 100.0 * jnp.mean((jnp.argmax(logits, axis=1) != labels).astype(jnp.float32))
        return loss, (nnx.split(head, nnx.Param, ...)[2], wrong)

    @jax.jit
    def step(carry: PyTree) -> tuple[PyTree, tuple[jax.Array, jax.Array]]:
        params, head_state, opt_state = carry
        (loss, (head_state, wrong)), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, head_state)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        if method == "standard":
            head = nnx.merge(graph, params["weights"], head_state, copy=True)
            head.renormalize()
            params["weights"] = nnx.split(head, nnx.Param, ...)[1]
        return (params, head_state, opt_state), (loss, wrong)

    def measure(params: PyTree, head_state: PyTree) -> dict[str, float]:
        head = nnx.merge(graph, params["weights"], head_state, copy=True)
        f = head.normalized(params["features"])
        kernel = head.kernel[...]
        bias = None if method == "standard" else -jnp.mean(f, axis=0) @ kernel
        return neural_collapse([(f, labels)], kernel, bias)

    params = {"features": features, "weights": weights}
    carry = (params, head_state, tx.init(params))
    at = {round(config.steps * (i / config.evaluations) ** 2) or 1 for i in range(1, config.evaluations + 1)}
    curve = []
    for t in range(1, config.steps + 1):
        carry, (loss, wrong) = step(carry)
        if t in at:
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {t} is {float(loss)}; lower the learning rate")
            measured = measure(carry[0], carry[1])
            curve.append({"step": t, "loss": float(loss), "train_error": float(wrong), **measured})
    return Outcome({name: curve[-1][name] for name in MEASURED}, curve)


def figures(config: Config, cases: list[Case]) -> dict[str, Any]:
    """Collapse by step, one figure for each K."""
    names = ("train_error", "nc1", "nc3", "etf_distance_means", "cosine_margin")
    found = {}
    for K, of_classes in plots.by_name(cases, lambda case: str(case.variant.num_classes)).items():
        title = f"unconstrained features, K = {K}, d = {max(config.num_features, int(K))}, {config.seeds} seed(s)"
        found[f"collapse_K{K}"] = collapse.figure(of_classes, "step", names, title=title)
    return found
