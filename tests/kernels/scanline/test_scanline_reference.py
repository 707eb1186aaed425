"""The reference sweep against brute force in NumPy: messages, indices, ties, weights, diagonals, and its backward."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods.kernels import scanline
from jaxlib_methods.kernels.scanline import Pairwise

POSITIONS, LINES = 5, 6
STATIC = ("edge_probability", "reverse", "with_indices", "step", "num_images")
sweep = jax.jit(scanline.sweep, static_argnames=STATIC)


def potentials(num_labels):
    """One of each kind and code path; integer valued so that float order does not matter."""
    rng = np.random.default_rng(0)
    table = rng.integers(0, 9, (num_labels, num_labels)).astype(np.float32)
    square = np.minimum(np.arange(num_labels + 1) ** 2, 5).astype(np.float32)
    return {
        "potts": Pairwise("potts", jnp.float32(3.0), semimetric=True),
        **{
            f"linear{t}": Pairwise("truncated_linear", jnp.float32(2.0), truncation=t, semimetric=True)
            for t in (1, 2, 3, 5)
        },
        "window": Pairwise("toeplitz", jnp.float32(2.0), profile=jnp.asarray(square[:4]), semimetric=True),
        "window_learned": Pairwise("toeplitz", jnp.float32(1.0), profile=jnp.array([1.0, 0.0, 2.0], jnp.float32)),
        "wide": Pairwise(
            "toeplitz", jnp.float32(1.0), profile=jnp.asarray(np.arange(num_labels, dtype=np.float32) ** 2)
        ),
        "table": Pairwise("table", jnp.float32(2.0), table=jnp.asarray(table)),
    }


NAMES = list(potentials(7))


def brute_force(u, opposite, table, edge_weight, rho, reverse, step=(1, 0), images=1):
    """The recursion, pixel by pixel, with lowest-index ties."""
    positions, _, lines = u.shape
    width = lines // images
    rows, shift = step if not reverse else (-step[0], -step[1])
    m, p, q = np.zeros_like(u), np.zeros(u.shape, int), np.zeros((positions, lines), int)
    reached = np.zeros((positions, lines), bool)
    for i in range(positions)[:: -1 if reverse else 1]:
        for line in range(lines):
            sender, column = i - rows, line % width - shift
            if not (0 <= sender < positions and 0 <= column < width):
                continue
            s = line - shift
            a = rho * (u[sender, :, s] + opposite[sender, :, s] + m[sender, :, s]) - opposite[sender, :, s]
            cost = a[:, None] + edge_weight[i, line] * table
            t = cost.min(0)
            m[i, :, line], p[i, :, line], q[i, line] = t - t.min(), cost.argmin(0), t.argmin()
            reached[i, line] = True
    return m, p, q, reached


def random_costs(key, num_labels, high=12):
    keys = jax.random.split(key, 3)
    draw = lambda k, shape: jax.random.randint(k, shape, 0, high).astype(jnp.float32)
    shape = (POSITIONS, num_labels, LINES)
    weight = 1.0 + jax.random.randint(keys[2], (POSITIONS, LINES), 0, 3).astype(jnp.float32)
    return 2.0 * draw(keys[0], shape), 2.0 * draw(keys[1], shape), weight


@pytest.mark.contract
@pytest.mark.parametrize(("reverse", "rho"), [(False, 1.0), (True, 0.5)])
@pytest.mark.parametrize("name", NAMES)
def test_fast_paths_equal_brute_force_bit_for_bit_on_integer_costs(key, name, reverse, rho):
    pairwise = potentials(7)[name]
    u, opposite, weight = random_costs(key, 7)
    m, p, q = sweep(u, opposite, pairwise, edge_weight=weight, edge_probability=rho, reverse=reverse, with_indices=True)
    table = np.asarray(scanline.dense(pairwise, 7))
    expected, p_expected, q_expected, reached = brute_force(
        np.asarray(u), np.asarray(opposite), table, np.asarray(weight), rho, reverse
    )
    np.testing.assert_array_equal(m, expected)
    where = np.broadcast_to(reached[:, None], u.shape)
    np.testing.assert_array_equal(np.asarray(p)[where], p_expected[where])
    np.testing.assert_array_equal(np.asarray(q)[reached], q_expected[reached])
    assert p.dtype == q.dtype == jnp.uint8
    np.testing.assert_array_equal(
        sweep(u, opposite, pairwise, edge_weight=weight, edge_probability=rho, reverse=reverse), expected
    )


@pytest.mark.parametrize("step", [(1, 1), (1, -2), (2, 1), (2, -1)])
@pytest.mark.parametrize("reverse", [False, True])
def test_diagonals_equal_brute_force_and_do_not_connect_images(key, step, reverse):
    pairwise = potentials(7)["linear2"]
    u, opposite, weight = random_costs(key, 7)
    options = {"edge_probability": 0.5, "reverse": reverse, "step": step, "num_images": 2}
    m, p, _ = sweep(u, opposite, pairwise, edge_weight=weight, with_indices=True, **options)
    table = np.asarray(scanline.dense(pairwise, 7))
    expected, p_expected, _, reached = brute_force(
        np.asarray(u), np.asarray(opposite), table, np.asarray(weight), 0.5, reverse, step, images=2
    )
    np.testing.assert_array_equal(m, expected)
    where = np.broadcast_to(reached[:, None], u.shape)
    np.testing.assert_array_equal(np.asarray(p)[where], p_expected[where])
