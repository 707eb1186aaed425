"""Potentials, energies and the refusal of problems that cannot be solved."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import message_passing as mp
from jaxlib_methods.kernels import scanline

L = 6
d = np.abs(np.arange(L)[:, None] - np.arange(L)[None])


@pytest.mark.parametrize(
    ("pairwise", "expected"),
    [
        (mp.potentials.potts(3.0), 3.0 * (d > 0)),
        (mp.potentials.truncated_linear(2.0, truncation=3), 2.0 * np.minimum(d, 3)),
        (mp.potentials.truncated_linear(2.0, truncation=2.5), 2.0 * np.minimum(d, 2.5)),
        (mp.potentials.linear(2.0, num_labels=L), 2.0 * d),
        (mp.potentials.truncated_quadratic(2.0, truncation=3, truncate="distance"), 2.0 * np.minimum(d**2, 9)),
        (mp.potentials.truncated_quadratic(2.0, truncation=3, truncate="cost"), 2.0 * np.minimum(d**2, 3)),
        (mp.potentials.quadratic(0.5, num_labels=L), 0.5 * d**2),
        (mp.potentials.cauchy(truncation=2.0, num_labels=L), 2.0 * np.log1p((d / 2.0) ** 2)),
        (mp.potentials.huber(truncation=2.0, num_labels=L), np.where(d <= 2, d**2, 4.0 * d - 4.0)),
        (mp.potentials.negative_potts(2.0), -2.0 * (d == 0)),
        (mp.potentials.table(d**3), d**3),
    ],
)
def test_potentials_are_what_they_are_called(pairwise, expected):
    np.testing.assert_allclose(scanline.dense(pairwise, L), expected, rtol=1e-6)
    assert pairwise.semimetric == bool((np.diag(expected) == 0).all() and (expected >= 0).all())


def brute_force_energy(unaries, table, labels, steps, weights):
    height, width = labels.shape
    total = sum(unaries[i, j, labels[i, j]] for i in range(height) for j in range(width))
    for k, (down, right) in enumerate(steps):
        for i in range(height):
            for j in range(width):
                if 0 <= i - down < height and 0 <= j - right < width:
                    total += weights[2 * k, i, j] * table[labels[i - down, j - right], labels[i, j]]
    return total


@pytest.mark.contract
@pytest.mark.parametrize("connectivity", [4, 8, 16])
def test_energy_counts_every_edge_once_and_sees_the_direction_of_a_table(key, connectivity):
    keys = jax.random.split(key, 4)
    shape = (2, 4, 5)
    unaries = jax.random.randint(keys[0], (*shape, L), 0, 9).astype(jnp.float32)
    table = jax.random.randint(keys[1], (L, L), 0, 9).astype(jnp.float32)
    weights = jax.random.randint(keys[2], (connectivity, *shape), 0, 3).astype(jnp.float32)
    labels = jax.random.randint(keys[3], shape, 0, L)
    found = mp.energy(mp.GridMRF(unaries, mp.potentials.table(table), weights), labels, connectivity=connectivity)
    steps = mp.grid.DIRECTIONS[0:connectivity:2]
    for b in range(2):
        arrays = (np.asarray(x) for x in (unaries[b], table, labels[b]))
        assert found[b] == brute_force_energy(*arrays, steps, np.asarray(weights[:, b]))


def test_both_directions_store_one_weight_at_either_end_of_an_edge(key):
    even = jax.random.uniform(key, (8, 4, 5), minval=1.0)
    weights = mp.grid.both_directions(even)
    for k, (down, right) in enumerate(mp.grid.DIRECTIONS):
        assert mp.grid.DIRECTIONS[k ^ 1] == (-down, -right)
    for k, (down, right) in enumerate(mp.grid.DIRECTIONS[::2]):
        for i in range(4):
            for j in range(5):
                if 0 <= i - down < 4 and 0 <= j - right < 5:
                    assert weights[2 * k, i, j] == weights[2 * k + 1, i - down, j - right] == even[k, i, j]
    assert (weights > 0).sum() == 2 * sum((4 - abs(a)) * (5 - abs(b)) for a, b in mp.grid.DIRECTIONS[::2])


UNARIES = jnp.zeros((4, 5, 3))
POTTS = mp.potentials.potts(1.0)


@pytest.mark.parametrize(
    ("mrf", "options", "message"),
    [
        (mp.GridMRF(UNARIES.at[1, 2, 0].set(jnp.nan), POTTS), {}, "NaN"),
        (mp.GridMRF(UNARIES, POTTS, -jnp.ones((4, 4, 5))), {}, "non-negative"),
        (mp.GridMRF(UNARIES, POTTS, jnp.full((4, 4, 5), jnp.nan)), {}, "NaN"),
        (mp.GridMRF(UNARIES, POTTS, jnp.ones((4, 4, 4))), {}, r"edge_weights must be \(4, 4, 5\)"),
        (mp.GridMRF(UNARIES, POTTS, jnp.ones((4, 4, 5))), {"num_directions": 8}, r"for 8 directions"),
        (mp.GridMRF(UNARIES, mp.potentials.table(jnp.ones((4, 4)))), {}, r"table of V must be \(3, 3\)"),
        (mp.GridMRF(jnp.zeros((4, 5)), POTTS), {}, r"\(B, H, W, L\) or \(H, W, L\)"),
        (mp.GridMRF(jnp.zeros((4, 5, 3), jnp.int32), POTTS), {}, "float32 or float64"),
        (mp.GridMRF(jnp.zeros((4, 5, 1)), POTTS), {}, "at least two labels"),
        (mp.GridMRF(jax.ShapeDtypeStruct((4, 5, 65536), jnp.float32), POTTS), {}, "at most 65535 labels"),
        (mp.GridMRF(jnp.zeros((1, 5, 3)), POTTS), {}, "leaves no edge in a grid of 1 rows"),
        (mp.GridMRF(jnp.zeros((2, 5, 3)), POTTS), {"num_directions": 16}, "leaves no edge in a grid of 2 rows"),
        (mp.GridMRF(UNARIES, mp.potentials.toeplitz([0.0, 2.0, 1.0])), {}, None),
        (
            mp.GridMRF(jnp.zeros((4, 5, 9)), mp.potentials.toeplitz([0.0, 2.0, 1.0])),
            {},
            "last entry of a truncated profile",
        ),
        (mp.GridMRF(UNARIES, POTTS), {"num_directions": 5}, "num_directions must be one of 4, 8, 16"),
        (mp.GridMRF(UNARIES, POTTS), {"num_iterations": 0}, "num_iterations must be at least 1"),
        (mp.GridMRF(UNARIES, POTTS), {"edge_probability": 1.5}, r"edge_probability must lie in \(0, 1\]"),
        (mp.GridMRF(UNARIES, POTTS), {"rounding": "best"}, "'argmin', 'sequential', got 'best'"),
        (mp.GridMRF(UNARIES, POTTS), {"rounding": "sequential", "num_directions": 8}, "needs 4 directions"),
        (mp.GridMRF(UNARIES, POTTS), {"tolerance": 0.1}, "needs evaluate_every"),
        (mp.GridMRF(UNARIES, POTTS), {"checkpoint_every": 7}, "must divide"),
        (mp.GridMRF(UNARIES, POTTS), {"messages": (UNARIES,)}, "messages must have the shapes"),
        (mp.GridMRF(UNARIES, POTTS), {"temperature": 1.0, "evaluate_every": 1}, "temperature goes neither"),
        (mp.GridMRF(UNARIES, POTTS), {"implementation": "cuda"}, "implementation must be None or one of"),
    ],
)
def test_what_cannot_be_solved_is_refused_before_computing(mrf, options, message):
    if message is None:
        mp.trwp(mrf, num_iterations=1, **options)
        return
    with pytest.raises(ValueError, match=message):
        mp.trwp(mrf, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mp.potentials.potts(-1.0), "weight must be a non-negative scalar"),
        (lambda: mp.potentials.truncated_linear(truncation=0), "truncation must be positive"),
        (
            lambda: mp.potentials.truncated_quadratic(truncation=2, truncate="square"),
            "truncate must be one of 'distance', 'cost'",
        ),
        (lambda: mp.potentials.quadratic(num_labels=1), "num_labels must be at least 2"),
        (lambda: mp.potentials.toeplitz([1.0]), "profile must be a vector"),
        (lambda: mp.potentials.table(jnp.zeros((2, 3))), "square"),
        (lambda: mp.sgm(mp.GridMRF(UNARIES, POTTS), num_iterations=2), "isgmr iterates it"),
        (lambda: mp.sgm(mp.GridMRF(UNARIES, POTTS), variant="cuda"), "variant must be"),
        (lambda: mp.grid.both_directions([UNARIES, UNARIES, UNARIES]), "2, 4 or 8 arrays"),
        (lambda: mp.energy(mp.GridMRF(UNARIES, POTTS), jnp.zeros((4, 4), jnp.int32)), "labels must be integers of"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_rebuilding_a_problem_never_recompiles(key):
    with jax.log_compiles(False):
        solve = lambda weight, unaries: (
            mp.trwp(mp.GridMRF(unaries, mp.potentials.potts(weight)), num_iterations=2).beliefs
        )
        solve(1.0, UNARIES)
        solve(jnp.float32(2.0), UNARIES)
        from jaxlib_methods.message_passing._programs import _plain

        before = _plain._cache_size()
        for weight in (3.0, 4, np.float32(5.0), jnp.float32(6.0)):
            solve(weight, UNARIES + 1.0)
        assert _plain._cache_size() == before


def test_a_traced_function_may_close_over_a_problem():
    mrf = mp.GridMRF(UNARIES.at[0, 0, 0].set(-1.0), POTTS, jnp.ones((4, 4, 5)))
    assert jax.jit(lambda: mp.sgm(mrf).labels)().sum() == 0
    broken = mrf._replace(unaries=UNARIES.at[1, 2, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="NaN"):
        jax.jit(lambda: mp.sgm(broken).labels)()
