"""Messages from coarser grids: the coarse problem has the energies of the fine one, and starting from it saves work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlib_methods import message_passing as mp
from jaxlib_methods.message_passing import _coarse, _lines
from jaxlib_methods.message_passing._problem import Problem, Schedule


def weighted(key, shape):
    keys = jax.random.split(key, 2)
    return mp.grid.both_directions([jax.random.randint(k, shape, 0, 4).astype(jnp.float32) for k in keys])


@pytest.mark.contract
@pytest.mark.parametrize(("height", "width", "with_weights"), [(6, 8, False), (6, 8, True), (5, 7, True)])
def test_labellings_constant_on_blocks_have_the_same_energy_on_both_grids(key, height, width, with_weights):
    unaries = jax.random.randint(key, (2, height, width, 5), 0, 20).astype(jnp.float32)
    weights = weighted(key, (2, height, width)) if with_weights else None
    mrf = mp.GridMRF(unaries, mp.potentials.truncated_linear(3.0, truncation=2), weights)
    problem = _coarse.coarser(Problem.of(mrf, Schedule(4, 0.5, False)))
    coarse = mp.GridMRF(problem.unaries, problem.pairwise, problem.weights)
    labels = jax.random.randint(key, coarse.unaries.shape[:3], 0, 5)
    fine = jnp.repeat(jnp.repeat(labels, 2, 1), 2, 2)[:, :height, :width]
    np.testing.assert_array_equal(mp.energy(coarse, labels), mp.energy(mrf, fine))
    if with_weights:  # w[d] and w[d^1] describe the same edges
        np.testing.assert_array_equal(coarse.edge_weights, mp.grid.both_directions(coarse.edge_weights[::2]))


def test_a_fine_message_is_half_of_that_of_its_block():
    wide = jnp.arange(3 * 2 * 4, dtype=jnp.float32).reshape(3, 2, 4)  # W' = 3, two labels, two images of H' = 2
    tall = jnp.arange(2 * 2 * 6, dtype=jnp.float32).reshape(2, 2, 6)
    fine = _coarse.finer((wide, wide, tall, tall), (2, 3, 5, 2))
    assert [m.shape for m in fine] == [(5, 2, 6)] * 2 + [(3, 2, 10)] * 2
    for position, image, line in ((0, 0, 0), (4, 1, 2), (3, 1, 1)):
        np.testing.assert_array_equal(
            fine[0][position, :, 3 * image + line], 0.5 * wide[position // 2, :, 2 * image + line // 2]
        )
    for position, image, line in ((0, 0, 4), (2, 1, 3)):
        np.testing.assert_array_equal(
            fine[2][position, :, 5 * image + line], 0.5 * tall[position // 2, :, 3 * image + line // 2]
        )


def test_a_start_from_coarser_grids_saves_iterations_and_bounds_stay_valid(key):
    # Shifted noise: what a pixel wants shows only in large regions.
    noise = jax.random.normal(key, (40, 48, 6))
    truth = jax.nn.one_hot(jnp.arange(48) // 8, 6)[None]
    mrf = mp.GridMRF(jnp.round(10 * noise - 6 * truth), mp.potentials.truncated_linear(10.0, truncation=2))
    start = mp.coarse_to_fine(mrf, num_levels=2, num_iterations=5)
    options = {"num_iterations": 3, "rounding": "sequential", "evaluate_every": 1}
    plain, coarse = (mp.trwp(mrf, messages=m, **options) for m in (None, start))
    assert coarse.energies[0] < plain.energies[0] and coarse.energies[-1] < plain.energies[-1]
    assert plain.bounds[-1] <= coarse.bounds[-1] <= coarse.energies.min()


def test_a_batch_is_its_images_one_by_one(key):
    unaries = jax.random.randint(key, (2, 5, 6, 4), 0, 20).astype(jnp.float32)
    weights = weighted(key, (2, 5, 6))
    pairwise = mp.potentials.potts(3.0)
    together = mp.coarse_to_fine(mp.GridMRF(unaries, pairwise, weights), num_levels=1, num_iterations=2)
    for image in range(2):
        alone = mp.coarse_to_fine(
            mp.GridMRF(unaries[image], pairwise, weights[:, image]), num_levels=1, num_iterations=2
        )
        for ours, theirs in zip(together, alone, strict=True):
            lines = theirs.shape[2]
            np.testing.assert_array_equal(ours[..., image * lines : (image + 1) * lines], theirs)


def test_bad_options_are_named():
    mrf = mp.GridMRF(jnp.zeros((6, 9, 3)), mp.potentials.potts(1.0))
    with pytest.raises(ValueError, match="num_levels=3 leaves fewer than two rows or columns of 6 x 9 pixels"):
        mp.coarse_to_fine(mrf, num_levels=3)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        mp.coarse_to_fine(mrf, num_iterations=0)


@pytest.mark.parametrize("batch", [1, 2])
def test_turning_label_by_label_is_turning(key, batch, monkeypatch):
    keys = jax.random.split(key, 3)
    x, y = (jax.random.normal(k, (4, 3, batch * 5)) for k in keys[:2])
    base = jax.random.normal(keys[2], (5, 3, batch * 4))
    run = lambda *arrays: jax.value_and_grad(lambda a: (_lines.plus_turned(*a, batch) ** 2).sum())(arrays)
    whole = _lines.plus_turned(base, x, y, batch), run(base, x, y)
    monkeypatch.setattr(_lines, "CPU_TURN_BYTES", 0)
    by_label = _lines.plus_turned(base, x, y, batch), run(base, x, y)
    np.testing.assert_array_equal(by_label[0], whole[0])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), by_label[1], whole[1])
