r"""Unconstrained feature model: free feature vectors trained under a learned, a fixed and the nearest-ETF classifier.

Paper: Markou, Ajanthan, Gould, "Guiding Neural Collapse: Optimising Towards the Nearest Simplex ETF", NeurIPS 2024

    python -m experiments run unconstrained_features                                  # K = 10, 100: minutes, 2 cores
    python -m experiments run unconstrained_features --classes 1000 --num-features 1000 --per-class 4 --steps 150 \
        --evaluations 8                                                               # minutes on one core
    python -m experiments run unconstrained_features --classes 10 100 200 1000 --steps 200

The features themselves are the parameters: N vectors of R^d, N(0, 1) at the start, all in every batch, gradient
descent with momentum on the mean cross-entropy. What remains is how the classifier leads them to collapse. UFM-10 is
the paper's: 1000 vectors, d = 512. The sizes of the larger ones are not confirmed; here each class has `per_class`
vectors (fewer where that makes more than 10,000 in all, at least two) and d = max(512, K).
Figures: for every K, NC1, NC3, cosine margin and distance of the class means to the nearest ETF by step, side by side.
"""

import dataclasses
import functools
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases
from jaxlib_methods.classifiers import FixedETFHead, NearestETFHead, NormalizedHead, neural_collapse

PyTree = Any
Method = Literal["standard", "fixed", "implicit", "implicit_no_gradient"]
SHOWN = ("loss", "train_error", "nc1", "nc2", "nc3", "cosine_margin", "etf_distance_means")


@dataclasses.dataclass(frozen=True)
class Config:
    """Every combination of K, method and seed is one case."""

    classes: tuple[int, ...] = (10, 100)  # K; the paper's are 10, 100, 200, 1000
    per_class: int = 100  # feature vectors of a class, fewer where that makes more than 10,000
    num_features: int = 512  # d, or K where that is more
    methods: tuple[Method, ...] = ("standard", "fixed", "implicit", "implicit_no_gradient")
    seeds: int = 1
    steps: int = 200
    learning_rate: float = 20.0  # of the features, times K: the mean over classes divides their gradient
    momentum: float = 0.9
    temperature: float = 5.0  # tau, the norm of the features
    delta: float = 1e-3  # proximal weight of the inner problem
    evaluations: int = 12  # measurements over the run, spread evenly on a square-root scale

    def __post_init__(self):
        for name in (
            "per_class",
            "num_features",
            "seeds",
            "steps",
            "learning_rate",
            "temperature",
            "delta",
            "evaluations",
        ):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("classes", "methods"):
            if not getattr(self, name):
                raise ValueError(f"{name} is empty; name at least one")
        if min(self.classes) < 2:
            raise ValueError(f"classes must be at least 2, got {min(self.classes)}")


SMOKE = {
    "classes": (10,),
    "per_class": 10,
    "num_features": 16,
    "steps": 40,
    "evaluations": 4,
    "methods": ("fixed", "implicit"),
}
PAPER: dict[str, float] = {}  # the paper shows curves; no number is confirmed


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figures and returns the last measurements, one per seed."""
    metrics: dict[str, list[float]] = {}
    for K in config.classes:
        curves: dict[str, list[list[dict[str, float]]]] = {}
        for method in config.methods:
            for seed in range(config.seeds):
                run_case = functools.partial(_run_case, config, K, method, seed)
                result = cases.run_or_load(workdir / "cases" / f"K{K}-{method}-seed{seed}", run_case)
                curves.setdefault(method, []).append(result["curve"])
                for name in SHOWN:
                    metrics.setdefault(f"{name} {method} K={K}", []).append(result["curve"][-1][name])
        if jax.process_index() == 0:
            _figure(config, K, curves, workdir)
    return metrics


def _run_case(config: Config, K: int, method: str, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
    """Trains the features under one classifier and measures their collapse."""
    del case_dir  # a case is short: nothing to resume
    d, tau = max(config.num_features, K), config.temperature
    per_class = max(2, min(config.per_class, 10_000 // K))
    labels = jnp.repeat(jnp.arange(K, dtype=jnp.int32), per_class)
    feature_key, head_key = jax.random.split(jax.random.key(seed))
    features = jax.random.normal(feature_key, (len(labels), d))
    if method == "standard":
        head = NormalizedHead(d, K, temperature=tau, rngs=nnx.Rngs(params=head_key))
    elif method == "fixed":
        head = FixedETFHead(d, K, temperature=tau)
    else:
        gradient = method == "implicit"
        head = NearestETFHead(d, K, temperature=tau, proximal_weight=config.delta, implicit_gradient=gradient)
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
    return {"curve": curve}


def _figure(config: Config, K: int, curves: dict[str, list[list[dict[str, float]]]], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "training accuracy (%)": ("train_error", lambda v: 100 - v, "linear"),
        "NC1: within / between scatter": ("nc1", lambda v: v, "log"),
        "NC3: classifier and means to ETF": ("nc3", lambda v: v, "log"),
        "class means to nearest ETF": ("etf_distance_means", lambda v: np.maximum(v, 1e-8), "log"),
        "cosine margin": ("cosine_margin", lambda v: v, "linear"),
    }
    figure, axes = plt.subplots(1, 5, figsize=(19, 3.8), layout="constrained")
    for axis, (title, (name, shown, scale)) in zip(axes, panels.items(), strict=True):
        for method, of_seeds in curves.items():
            steps = [point["step"] for point in of_seeds[0]]
            values = shown(np.array([[point[name] for point in curve] for curve in of_seeds]))
            dashes = ":" if method == "implicit_no_gradient" else "-"
            (line,) = axis.plot(steps, np.median(values, axis=0), dashes, label=method.replace("_", " "))
            low, high = values.min(axis=0), values.max(axis=0)
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="step", yscale=scale)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle(f"unconstrained features, K = {K}, d = {max(config.num_features, K)}, {config.seeds} seed(s)")
    figure.savefig(workdir / f"collapse_K{K}.png", dpi=120)
    plt.close(figure)
