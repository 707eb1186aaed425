"""Every optax transformation of the library, for the battery in `test_optax_battery.py`. Add yours to `ENTRIES`.

Entry("scale_by_x", scale_by_x, {"b1": 0.9}, as_optimizer=lambda rule: optax.chain(rule, optax.scale(-0.1)))
Entry("x", x, {"learning_rate": 0.1})
Entry("pruned", pruned, {"inner": optax.sgd(0.1)}, for_params=lambda params: {"masks": half_masks(params)},
      constrain=lambda params: params * half_masks(params), opt_outs={"rosenbrock": "half of it is pruned"})
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods import optimizers, pruning
from jaxlib_methods.normalization import orthogonal_retraction
from jaxlib_methods.optimizers import agd, geoprec_gd, scale_by_agd, scale_by_pullback_metric


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

NUMUON_STATIC = ("rank_schedule", "rank_buckets", "ns_coeffs", "ns_steps", "key", "iterations", "oversampling")

SLOW_VALLEY = {"rosenbrock": "plain momentum at a step that is stable everywhere creeps along the valley"}

RING = {"tree_map_params": "a history has one axis more than the parameters, and is mapped all the same"}

HALF_PRUNED = {"rosenbrock": "its minimum needs the entry that is pruned"}

ENTRIES: list[Entry] = [
    # optax's own, as controls of the battery itself
    Entry("optax.sgd", optax.sgd, {"learning_rate": 1e-3, "momentum": 0.9}),
    Entry("optax.adam", optax.adam, {"learning_rate": 1e-2}, promotion="standard"),
    Entry(
        "optax.scale_by_adam",
        optax.scale_by_adam,
        {"b1": 0.9},
        as_optimizer=lambda rule: optax.chain(rule, optax.scale(-1e-2)),
        opt_outs={"unknown_extra_args": "optax leaves it to chain; this library's rules take them"},
        promotion="standard",
    ),
    Entry(
        "optax.masked",
        optax.masked,
        {"inner": optax.sgd(1e-3, momentum=0.9)},
        for_params=lambda params: {"mask": jax.tree.map(lambda _: True, params)},
        static_args=("inner", "mask"),
    ),
    Entry(
        "scale_by_agd",
        scale_by_agd,
        as_optimizer=lambda rule: optax.chain(rule, optax.scale(-0.3)),
        example=two_kernels,
        opt_outs=WEIGHTS_ONLY,
    ),
    Entry("agd", agd, {"gain": 0.3}, example=two_kernels, opt_outs=WEIGHTS_ONLY),
    Entry(
        "scale_by_pullback_metric",
        scale_by_pullback_metric,
        {"psi": lambda x1: jax.tree.map(jnp.sin, x1), "solver": "cg"},
        as_optimizer=lambda rule: optax.chain(rule, optax.sgd(1e-3, momentum=0.9)),
        static_args=("psi", "solver", "tol", "max_iterations"),
    ),
    Entry(
        "geoprec_gd",
        geoprec_gd,
        {"learning_rate": 1e-3, "psi": lambda x1: [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(x1)]},
        static_args=("psi", "solver", "tol", "max_iterations", "mask"),
        steps=20_000,
    ),
    Entry(
        "orthogonal_retraction",
        orthogonal_retraction,
        {"inner": optax.sgd(1e-3, momentum=0.9)},
        example=lambda dtype=jnp.float32: orthonormal(default_example(dtype)),
        static_args=("inner", "method"),
        constrain=orthonormal,
        opt_outs={"mixed_ranks": "its target is a reflection, and no path on the manifold leads there from a rotation"},
    ),
    Entry(
        "pruned",
        pruning.pruned,
        {"inner": optax.sgd(1e-3, momentum=0.9)},
        for_params=lambda params: {"masks": half_masks(params)},
        constrain=lambda params: pruning.apply_masks(params, half_masks(params)),
        static_args=("inner", "masks"),
        opt_outs=HALF_PRUNED,
    ),
    Entry(
        "pruned, packed",
        pruning.pruned,
        {"inner": optax.sgd(1e-3, momentum=0.9), "packed": True},
        for_params=lambda params: {"masks": half_masks(params)},
        constrain=lambda params: pruning.apply_masks(params, half_masks(params)),
        static_args=("inner", "masks", "packed"),
        opt_outs=HALF_PRUNED,
    ),
    Entry(
        "mask_updates",
        pruning.mask_updates,
        as_optimizer=lambda link: optax.chain(optax.sgd(1e-3, momentum=0.9), link),
        for_params=lambda params: {"masks": half_masks(params)},
        constrain=lambda params: pruning.apply_masks(params, half_masks(params)),
        static_args=("masks",),
        opt_outs=HALF_PRUNED,
    ),
    Entry(
        "scale_by_numuon",
        optimizers.scale_by_numuon,
        {"rank_schedule": optimizers.cosine_rank_schedule(2), "rank_buckets": (0.5, 1.0), "key": jax.random.key(0)},
        as_optimizer=lambda rule: optax.chain(rule, optax.scale(-1e-2)),
        example=two_kernels,
        static_args=NUMUON_STATIC,
        opt_outs=MATRICES_ONLY,
    ),
    Entry(
        "numuon",
        optimizers.numuon,
        {"learning_rate": 1e-2, "rank_schedule": 0.5, "weight_decay": 0.0, "key": jax.random.key(0)},
        static_args=(*NUMUON_STATIC, "adam_paths"),
        promotion="standard",
    ),
    Entry("scale_by_nadam", optimizers.scale_by_nadam, as_optimizer=lambda rule: optax.chain(rule, optax.scale(-1e-2))),
    Entry("nadam", optimizers.nadam, {"learning_rate": 1e-2}),
    Entry("delayed_nesterov", optimizers.delayed_nesterov, {"learning_rate": 1e-2, "weight_decay": 0.0}),
    Entry(
        "scale_by_discounted_nesterov",
        optimizers.scale_by_discounted_nesterov,
        {"gamma": 0.9},
        as_optimizer=lambda rule: optax.chain(rule, optax.scale(-1e-2)),
        static_args=("discount",),
        opt_outs=SLOW_VALLEY,
    ),
    Entry(
        "discounted_nesterov",
        optimizers.discounted_nesterov,
        {"learning_rate": 1e-3, "gamma": 0.9, "discount": False},
        static_args=("discount",),
    ),
    Entry(
        "keep_param_history",
        optimizers.keep_param_history,
        {"tau": 2},
        as_optimizer=lambda link: optax.chain(link, optax.sgd(1e-3, momentum=0.9)),
        static_args=("tau",),
        opt_outs=RING,
    ),
    Entry(
        "delay_gradients",
        optimizers.delay_gradients,
        {"tau": 2},
        as_optimizer=lambda link: optax.chain(link, optimizers.nadam(1e-2)),
        static_args=("tau",),
        opt_outs=RING | {"rosenbrock": "late momentum swings across the valley"},
    ),
    Entry(
        "clip_by_group_norm",
        optimizers.clip_by_group_norm,
        {"max_norm": 100.0, "groups": (("", "all"),)},
        as_optimizer=lambda link: optax.chain(link, optax.sgd(1e-3, momentum=0.9)),
        static_args=("max_norm", "groups"),
    ),
]
