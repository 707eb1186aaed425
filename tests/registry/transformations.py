"""Every optax transformation of the library, for `tests/batteries/test_transformations.py`. Add yours to `ENTRIES`.

Entry("scale_by_x", scale_by_x, {"b1": 0.9}, as_optimizer=by_rate(0.1))
Entry("x", x, {"learning_rate": 0.1})
Entry("pruned", pruned, {"inner": SGD}, for_params=lambda params: {"masks": half_masks(params)},
      constrain=lambda params: params * half_masks(params), opt_outs={"rosenbrock": "half of it is pruned"})
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods import low_rank, optimizers, pruning, quantization
from jaxlib_methods.normalization import orthogonal_retraction
from jaxlib_methods.optimizers import agd, geoprec_gd, scale_by_agd
from jaxlib_methods.optimizers.geoprec import scale_by_pullback_metric


def half_masks(params: Any) -> Any:
    """Every other entry of every leaf."""
    return jax.tree.map(lambda p: jnp.arange(p.size).reshape(p.shape) % 2 == 0, params)


def default_example(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """A kernel and a bias, divisible over the 4 x 2 fake devices of the sharding checks."""
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in [("bias", (4,)), ("kernel", (8, 4))]}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One transformation and what the battery has to know about it."""

    name: str
    factory: Callable[..., Any]  # the public function; always called by keyword
    hyperparams: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # that make it converge
    _: dataclasses.KW_ONLY
    static_args: tuple[str, ...] = ()  # hyperparameters that inject_hyperparams must leave alone
    for_params: Callable[[Any], dict] = lambda params: {}  # arguments with the structure of params, such as masks
    as_optimizer: Callable[[Any], Any] = lambda transformation: transformation  # how a rule becomes a descent
    example: Callable[..., Any] = default_example  # dtype -> params that it accepts
    extra_args: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # that `update` cannot do without
    constrain: Callable[[Any], Any] = lambda params: params  # onto the points that it can reach
    steps: int = 5000  # until it has converged
    opt_outs: Mapping[str, str] = dataclasses.field(default_factory=dict)  # check -> reason why it cannot hold
    promotion: str = "strict"  # "standard" only where an optax part breaks under strict promotion, as optax.adam does

    def make(self, params: Any) -> Any:
        return self.factory(**self.hyperparams, **self.for_params(params))


def two_kernels(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Weights alone, for rules that take nothing else; divisible over the same devices."""
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in [("first", (8, 4)), ("second", (4, 8))]}


def orthonormal(params: Any) -> Any:
    """Every matrix by its polar factor."""

    def nearest(leaf: jax.Array) -> jax.Array:
        Q, _, Vt = np.linalg.svd(np.asarray(leaf, np.float64), full_matrices=False)
        return jnp.asarray(Q @ Vt, leaf.dtype)

    return jax.tree.map(lambda leaf: nearest(leaf) if leaf.ndim >= 2 else leaf, params)


WEIGHTS_ONLY = dict.fromkeys(("parabola", "rosenbrock", "mixed_ranks"), "AGD refuses vectors and scalars")

MATRICES_ONLY = dict.fromkeys(("parabola", "rosenbrock", "mixed_ranks"), "scale_by_numuon refuses vectors and scalars")

NUMUON_STATIC = ("rank_schedule", "key", "newton_schulz", "decomposition")

SLOW_VALLEY = {"rosenbrock": "plain momentum at a step that is stable everywhere creeps along the valley"}

RING = {"tree_map_params": "a history has one axis more than the parameters, and is mapped all the same"}

HALF_PRUNED = {"rosenbrock": "its minimum needs the entry that is pruned"}

SOFTMAX, SPARSEMAX, ARGMAX, TANH, ROUND = (
    quantization.Lattice(projection=name) for name in ("softmax", "sparsemax", "argmax", "tanh", "round")
)
# Gradients of these rules are with respect to u or w, not to the parameters, the auxiliary variables.
AUXILIARY = dict.fromkeys(
    ("parabola", "rosenbrock", "matrix", "mixed_ranks"), "its parameters project to the labels; it descends in those"
)


def two_labels(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    """Auxiliary variables [2, ...] of a kernel and a bias."""
    return jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), default_example(dtype))


def within(limit: float) -> Callable[[Any], Any]:
    """Clips every entry to [-limit, limit]."""
    return lambda params: jax.tree.map(lambda p: jnp.clip(p, -limit, limit), params)


SGD = optax.sgd(1e-3, momentum=0.9)


def before_sgd(link: Any) -> Any:
    """The descent of a link that changes gradients."""
    return optax.chain(link, SGD)


def after_sgd(link: Any) -> Any:
    """The descent of a link that changes updates."""
    return optax.chain(SGD, link)


def by_rate(learning_rate: float) -> Callable[[Any], Any]:
    """The descent of a rule whose updates need a learning rate alone."""
    return lambda rule: optax.chain(rule, optax.scale(-learning_rate))


def quantized(factory: Callable[..., Any], lattice: quantization.Lattice, **hyperparams: Any) -> Entry:
    """A rule or an optimizer whose parameters are auxiliary variables."""
    return Entry(factory.__name__, factory, {"lattice": lattice, **hyperparams}, example=two_labels, opt_outs=AUXILIARY)


def masked(name: str, factory: Callable[..., Any], **options: Any) -> Entry:
    """An optimizer of a network of which every other weight is pruned."""
    return Entry(
        name,
        factory,
        for_params=lambda params: {"masks": half_masks(params)},
        constrain=lambda params: pruning.apply_masks(params, half_masks(params)),
        opt_outs=HALF_PRUNED,
        **options,
    )


ENTRIES: list[Entry] = [
    # optax's own, as controls of the battery itself
    Entry("optax.sgd", optax.sgd, {"learning_rate": 1e-3, "momentum": 0.9}),
    Entry("optax.adam", optax.adam, {"learning_rate": 1e-2}, promotion="standard"),
    Entry(
        "optax.scale_by_adam",
        optax.scale_by_adam,
        {"b1": 0.9},
        as_optimizer=by_rate(1e-2),
        opt_outs={"unknown_extra_args": "optax leaves it to chain; this library's rules take them"},
        promotion="standard",
    ),
    Entry(
        "optax.masked",
        optax.masked,
        {"inner": SGD},
        for_params=lambda params: {"mask": jax.tree.map(lambda _: True, params)},
        static_args=("inner", "mask"),
    ),
    Entry(
        "scale_by_agd",
        scale_by_agd,
        as_optimizer=by_rate(0.3),
        example=two_kernels,
        opt_outs=WEIGHTS_ONLY,
    ),
    Entry("agd", agd, {"gain": 0.3}, example=two_kernels, opt_outs=WEIGHTS_ONLY),
    Entry(
        "scale_by_pullback_metric",
        scale_by_pullback_metric,
        {"mapping": lambda x1: jax.tree.map(jnp.sin, x1), "solver": "cg"},
        as_optimizer=before_sgd,
        static_args=("mapping", "solver", "tolerance", "max_iterations"),
    ),
    Entry(
        "geoprec_gd",
        geoprec_gd,
        {"learning_rate": 1e-3, "mapping": lambda x1: [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(x1)]},
        static_args=("mapping", "solver", "tolerance", "max_iterations", "mask"),
        steps=20_000,
    ),
    Entry(
        "orthogonal_retraction",
        orthogonal_retraction,
        {"inner": SGD},
        example=lambda dtype=jnp.float32: orthonormal(default_example(dtype)),
        static_args=("inner", "method"),
        constrain=orthonormal,
        opt_outs={"mixed_ranks": "its target is a reflection, and no path on the manifold leads there from a rotation"},
    ),
    Entry("scale_by_row_shared_adam", optimizers.row_shared.scale_by_row_shared_adam, as_optimizer=by_rate(1e-2)),
    Entry("row_shared_adamw", optimizers.row_shared_adamw, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    Entry(
        "project_rows",
        optimizers.row_shared.project_rows,
        {"U": jnp.eye(4), "constrained": lambda params: jax.tree.map(lambda p: p.shape[-1:] == (4,), params)},
        as_optimizer=before_sgd,
        static_args=("U", "constrained", "project_weights"),
    ),
    masked("pruned", pruning.pruned, hyperparams={"inner": SGD}, static_args=("inner", "masks")),
    masked(
        "pruned, packed",
        pruning.pruned,
        hyperparams={"inner": SGD, "packed": True},
        static_args=("inner", "masks", "packed"),
    ),
    masked("mask_updates", pruning.masks.mask_updates, as_optimizer=after_sgd, static_args=("masks",)),
    Entry(
        "scale_by_numuon",
        optimizers.scale_by_numuon,
        {
            "rank_schedule": optimizers.schedules.cosine_rank_schedule(2),
            "decomposition": optimizers.BlockKrylovConfig(rank_buckets=(0.5, 1.0)),
            "key": jax.random.key(0),
        },
        as_optimizer=by_rate(1e-2),
        example=two_kernels,
        static_args=NUMUON_STATIC,
        opt_outs=MATRICES_ONLY,
    ),
    Entry(
        "numuon",
        optimizers.numuon,
        {"learning_rate": 1e-2, "rank_schedule": 0.5, "weight_decay": 0.0, "key": jax.random.key(0)},
        static_args=(*NUMUON_STATIC, "adam", "shape_scaling"),
        promotion="standard",
    ),
    Entry("scale_by_nadam", optimizers.nesterov.scale_by_nadam, as_optimizer=by_rate(1e-2)),
    Entry("nadam", optimizers.nadam, {"learning_rate": 1e-2}),
    Entry("delayed_nesterov", optimizers.delayed_nesterov, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    Entry(
        "scale_by_discounted_nesterov",
        optimizers.discounted.scale_by_discounted_nesterov,
        {"momentum": 0.9},
        as_optimizer=by_rate(1e-2),
        static_args=("discounted",),
        opt_outs=SLOW_VALLEY,
    ),
    Entry(
        "discounted_nesterov",
        optimizers.discounted.discounted_nesterov,
        {"learning_rate": 1e-3, "momentum": 0.9, "discounted": False},
        static_args=("discounted",),
    ),
    Entry(
        "scale_by_delay",
        optimizers.no_stash.scale_by_delay,
        {"delay": 2, "anneal_steps": 100},
        as_optimizer=after_sgd,
        static_args=("delay", "anneal_steps"),
    ),
    Entry(
        "delay_compensation",
        optimizers.delay_corrections.delay_compensation,
        {"delay": 2, "strength": 1e-4},
        as_optimizer=before_sgd,
        static_args=("delay", "decay", "eps"),
        opt_outs=RING,
    ),
    Entry(
        "delay_compensation, adaptive",
        optimizers.delay_corrections.delay_compensation,
        {"delay": 2, "strength": 1e-4, "decay": 0.95},
        as_optimizer=before_sgd,
        static_args=("delay", "decay", "eps"),
        opt_outs=RING,
    ),
    Entry(
        "forecast_gradients",
        optimizers.delay_corrections.forecast_gradients,
        {"delay": 1},
        as_optimizer=lambda link: optax.chain(link, optax.sgd(1e-3)),
        static_args=("delay", "length", "order"),
        opt_outs=RING | {"rosenbrock": "plain descent at a step that survives the forecast creeps along the valley"},
    ),
    Entry(
        "discrepancy_correction",
        optimizers.no_stash.discrepancy_correction,
        {"delay": 2},
        as_optimizer=after_sgd,
        static_args=("delay", "decay"),
    ),
    Entry(
        "pipemare",
        optimizers.pipemare,
        {"inner": SGD, "delay": 2, "anneal_steps": 100},
        static_args=("inner", "delay", "anneal_steps", "decay"),
    ),
    Entry(
        "no_stash_nesterov",
        optimizers.no_stash_nesterov,
        {"learning_rate": 1e-2, "delay": 2, "num_stages": 4, "anneal_steps": 100, "weight_decay": 0.0},
        static_args=("delay", "num_stages", "anneal_steps"),
    ),
    Entry(
        "keep_param_history",
        optimizers.delays.keep_param_history,
        {"delay": 2},
        as_optimizer=before_sgd,
        static_args=("delay",),
        opt_outs=RING,
    ),
    Entry(
        "delay_gradients",
        optimizers.delays.delay_gradients,
        {"delay": 2},
        as_optimizer=lambda link: optax.chain(link, optimizers.nadam(1e-2)),
        static_args=("delay",),
        opt_outs=RING | {"rosenbrock": "late momentum swings across the valley"},
    ),
    Entry(
        "clip_by_group_norm",
        optimizers.delays.clip_by_group_norm,
        {"max_norm": 100.0, "groups": (("", "all"),)},
        as_optimizer=before_sgd,
        static_args=("max_norm", "groups"),
    ),
    quantized(quantization.rules.scale_by_proximal_mean_field, SOFTMAX, inverse_temperature=2.0),
    quantized(
        quantization.proximal_mean_field, SOFTMAX, learning_rate=1e-2, inverse_temperature=2.0, weight_decay=1e-4
    ),
    quantized(quantization.rules.scale_by_projected_gradient, SPARSEMAX, inverse_temperature=2.0),
    quantized(quantization.projected_gradient, SPARSEMAX, learning_rate=1e-2, inverse_temperature=2.0),
    quantized(quantization.rules.scale_by_icm, ARGMAX),
    quantized(quantization.icm, ARGMAX, learning_rate=1e-2),
    quantized(quantization.rules.lift_gradients, SOFTMAX),
    Entry(
        "scale_by_stable_mirror_descent",
        quantization.rules.scale_by_stable_mirror_descent,
        {"lattice": TANH, "inverse_temperature": 2.0},
        as_optimizer=before_sgd,
    ),
    Entry(
        "stable_mirror_descent",
        quantization.stable_mirror_descent,
        {"learning_rate": 1e-2, "lattice": TANH, "inverse_temperature": 2.0},
    ),
    Entry(
        "scale_by_mirror_descent",
        quantization.rules.scale_by_mirror_descent,
        {"lattice": TANH, "inverse_temperature": 2.0},
        as_optimizer=after_sgd,
        constrain=within(0.98),
    ),
    Entry(
        "mirror_descent",
        quantization.mirror_descent,
        {"learning_rate": 1e-2, "lattice": TANH, "inverse_temperature": 2.0},
        constrain=within(0.98),
    ),
    Entry(
        "mirror_descent, softmax",
        quantization.mirror_descent,
        {"learning_rate": 1e-2, "lattice": SOFTMAX, "inverse_temperature": 2.0},
        example=lambda dtype=jnp.float32: jax.tree.map(lambda leaf: jax.nn.softmax(leaf, axis=0), two_labels(dtype)),
        opt_outs=AUXILIARY
        | dict.fromkeys(
            ("injected_hyperparams", "scheduled_learning_rate"), "u' - u has the rounding of u, beyond the tolerance"
        ),
    ),
    Entry(
        "scale_by_straight_through",
        quantization.rules.scale_by_straight_through,
        {"lattice": ROUND, "clip": False},
        as_optimizer=before_sgd,
        static_args=("clip",),
    ),
    Entry(
        "straight_through",
        quantization.straight_through,
        {"learning_rate": 1e-2, "lattice": ROUND, "clip": False},
        static_args=("clip",),
    ),
    Entry(
        "clip_to_labels",
        quantization.rules.clip_to_labels,
        {"lattice": ROUND},
        as_optimizer=after_sgd,
        constrain=within(1.0),
    ),
    Entry(
        "binary_connect",
        quantization.binary_connect,
        {"learning_rate": 1e-2, "lattice": ROUND},
        constrain=within(1.0),
    ),
    Entry(
        "keep_rank",
        low_rank.keep_rank,
        {"rank": 4, "every": 2},  # the full rank of the examples: it converges like what stands before it
        static_args=("rank", "every"),
        as_optimizer=lambda transformation: optax.chain(optax.sgd(1e-2, momentum=0.9), transformation),
        example=two_kernels,
        opt_outs=dict.fromkeys(("parabola", "rosenbrock", "mixed_ranks"), "keep_rank refuses vectors and scalars"),
    ),
]
