"""The keyed permutation: a bijection for every size, and uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods._shuffle import shuffled


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 1797])
def test_shuffle_is_a_bijection(key, size):
    order = jax.jit(shuffled, static_argnames="size")(key, jnp.arange(size), size)
    np.testing.assert_array_equal(np.sort(order), np.arange(size))


def test_shuffle_is_uniform_over_all_permutations_of_four():
    keys = jax.random.split(jax.random.key(0), 24 * 500)
    orders = jax.vmap(lambda key: shuffled(key, jnp.arange(4), 4))(keys)
    _, counts = np.unique(np.asarray(orders), axis=0, return_counts=True)
    assert len(counts) == 24
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 49.7  # 99.9% quantile of 23 degrees of freedom
