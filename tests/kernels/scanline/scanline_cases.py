"""Small integer-valued problems for the kernels, and what the reference makes of them (once per process)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from jaxlib_methods.kernels.scanline import ARG_SPECS, Pairwise, reference
from jaxlib_methods.kernels.scanline.request import Backward, Sweep

POSITIONS, NUM_LABELS, LINES = 5, 12, 136
RHO = 0.5  # exact in binary, so integer costs stay exact
BY_NAME = {spec.name: spec for spec in ARG_SPECS}


def _case(kind, weight, **options):
    arrays = {k: jnp.asarray(v, jnp.float32) for k, v in options.items() if k in ("profile", "table")}
    static = {k: v for k, v in options.items() if k not in arrays}
    return Pairwise(kind, jnp.float32(weight), **arrays, **static)


PAIRWISE = {
    "potts": _case("potts", 3, semimetric=True),
    "linear_window": _case("truncated_linear", 2, truncation=3, semimetric=True),
    "linear_doubling": _case("truncated_linear", 2, truncation=7, semimetric=True),
    "linear_general": _case("truncated_linear", 2, truncation=2),
    "window": _case("toeplitz", 2, profile=[0, 1, 4, 9], semimetric=True),
    "window_learned": _case("toeplitz", 2, profile=[1, 0, 2]),
    "wide": _case("toeplitz", 1, profile=np.arange(33) ** 2, semimetric=True),
    "table": _case("table", 2, table=np.random.default_rng(5).integers(-3, 9, (NUM_LABELS, NUM_LABELS))),
}


def integers(seed, low, high, *shape):
    return jnp.asarray(np.random.default_rng(seed).integers(low, high, shape), jnp.float32)


def forward(module, static, **options):
    """`module.sweep` as a jitted function of (u, opposite, pairwise, edge_weight), all results wanted."""
    return jax.jit(
        lambda u, opposite, pairwise, edge_weight=None: module.sweep(
            Sweep(
                u=u, opposite=opposite, pairwise=pairwise, edge_weight=edge_weight, **({"with_indices": True} | static)
            ),
            **options,
        )
    )


def backward(module, static, **options):
    """`module.sweep_backward` as a jitted function of (dm, opposite_ds, p, q, pairwise, edge_weight)."""
    return jax.jit(
        lambda dm, opposite_ds, p, q, pairwise, edge_weight=None: module.sweep_backward(
            Backward(dm=dm, opposite_ds=opposite_ds, p=p, q=q, pairwise=pairwise, edge_weight=edge_weight, **static),
            **options,
        )
    )


@functools.cache
def problem(name, *, reverse, opposite, weighted, num_labels=NUM_LABELS, lines=LINES):
    """(arguments, options, results) of the reference's sweep."""
    shape = POSITIONS, num_labels, lines
    arguments = (
        integers(0, 0, 9, *shape),
        integers(1, 0, 5, *shape) if opposite else None,
        PAIRWISE[name],
        integers(2, 0, 3, POSITIONS, lines) if weighted else None,
    )
    options = {"edge_probability": RHO, "reverse": reverse}
    return arguments, options, forward(reference, options)(*arguments)


@functools.cache
def backward_problem(name, *, reverse, opposite, weighted, lines=LINES):
    """(arguments, options, results) of the reference's backward sweep over integer gradients."""
    (u, _, pairwise, edge_weight), options, (_, p, q) = problem(
        name, reverse=reverse, opposite=opposite, weighted=weighted, lines=lines
    )
    arguments = (
        integers(3, -4, 5, *u.shape),
        integers(4, -4, 5, *u.shape) if opposite else None,
        p,
        q,
        pairwise,
        edge_weight,
    )
    return arguments, options, backward(reference, options)(*arguments)


def assert_same_sweep(found, expected, reverse):
    """Bitwise, but for the indices of the first position, which are unspecified."""
    reached = slice(None, -1) if reverse else slice(1, None)
    np.testing.assert_array_equal(found[0], expected[0])
    for ours, theirs in zip(found[1:], expected[1:], strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours[reached], theirs[reached])


def assert_same_backward(found, expected):
    """Bitwise, but for V's diagonal where `semimetric` promises that it is a constant zero."""
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            np.testing.assert_array_equal(ours, theirs)
    ours, theirs = found[2], expected[2]
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    np.testing.assert_array_equal(ours.weight, theirs.weight)
    if theirs.profile is not None:
        free = slice(int(theirs.semimetric), None)
        np.testing.assert_array_equal(ours.profile[free], theirs.profile[free])
    if theirs.table is not None:
        np.testing.assert_array_equal(ours.table, theirs.table)
