"""The keyed permutation: a bijection for every size, and uniform."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods._core.sampling import shuffled, shuffled_each


@pytest.mark.contract
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


def test_several_ranges_at_once_are_each_of_them_alone():
    sizes = np.array([5, 12, 1], np.int32)
    keys = jax.random.split(jax.random.key(1), 3)
    which = np.repeat(np.arange(3, dtype=np.int32), sizes)
    positions = np.concatenate([np.arange(size, dtype=np.int32) for size in sizes])
    together = shuffled_each(keys, jnp.asarray(which), jnp.asarray(positions), jnp.asarray(sizes))
    alone = [shuffled(key, jnp.arange(size), int(size)) for key, size in zip(keys, sizes, strict=True)]
    np.testing.assert_array_equal(together, np.concatenate(alone))
