"""Checks of ISGMR, TRWP, SGM, the chain bound and the roundings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxlib_methods import message_passing as mp
from jaxlib_methods.kernels import scanline
from jaxlib_methods.message_passing import _lines


def chain(unaries, pairwise):
    """A problem whose rows are chains: vertical edges weigh nothing."""
    weights = jnp.zeros((4, *unaries.shape[:2])).at[:2].set(1.0)
    return mp.GridMRF(unaries, pairwise, weights)


def test_worked_chain():
    theta = jnp.array([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    potts = mp.potentials.potts(1.0)
    u = theta[:, :, None]
    forward = scanline.sweep(u, None, potts, edge_probability=1.0)[..., 0]
    backward = scanline.sweep(u, None, potts, edge_probability=1.0, reverse=True)[..., 0]
    np.testing.assert_array_equal(forward, [[0, 0], [0, 1], [0, 0]])
    np.testing.assert_array_equal(backward, [[1, 0], [1, 0], [0, 0]])
    beliefs = theta + forward + backward
    np.testing.assert_array_equal(beliefs, [[1, 2], [2, 1], [3, 0]])
    solution = mp.isgmr(chain(jnp.stack([theta, theta]), potts), num_iterations=1)
    np.testing.assert_array_equal(solution.beliefs[1], beliefs)
    np.testing.assert_array_equal(solution.labels[1], [0, 1, 1])
    assert mp.energy(chain(jnp.stack([theta, theta]), potts), solution.labels) == 2 * 1.0


@pytest.mark.contract
@pytest.mark.parametrize("method", ["sgm", "isgmr", "trwp"])
def test_beliefs_of_chains_are_exact_min_marginals(key, method):
    unaries = jax.random.uniform(key, (2, 6, 4), maxval=5.0)
    table = jax.random.uniform(jax.random.fold_in(key, 1), (4, 4), maxval=3.0)
    mrf = chain(unaries, mp.potentials.table(table))
    if method == "sgm":
        beliefs = mp.isgmr(mrf, num_iterations=1).beliefs
    else:
        beliefs = (
            mp.isgmr(mrf, num_iterations=3)
            if method == "isgmr"
            else mp.trwp(mrf, num_iterations=3, edge_probability=1.0)
        ).beliefs
    for row in range(2):
        exact = mp.exact.chain_min_marginals(np.asarray(unaries[row]), np.asarray(table))
        exact = exact - exact.min(-1, keepdims=True)
        np.testing.assert_allclose(beliefs[row] - beliefs[row].min(-1, keepdims=True), exact, atol=2e-6)


def integer_problem(key, shape=(2, 5, 7, 6), pairwise=None):
    unaries = jax.random.randint(key, shape, 0, 20).astype(jnp.float32)
    return mp.GridMRF(unaries, mp.potentials.truncated_linear(3.0, truncation=2) if pairwise is None else pairwise)


def on_grid(messages, batch):
    return [np.asarray(_lines.from_lines(m, d < 2, batch)) for d, m in enumerate(messages)]


def test_messages_lie_between_zero_and_the_largest_cost_and_isgmr_keeps_integers(key):
    mrf = integer_problem(key)
    for messages in (
        mp.isgmr(mrf, num_iterations=4, num_directions=8).messages,
        mp.trwp(mrf, num_iterations=4).messages,
    ):
        for d, m in enumerate(on_grid(messages, 2)):
            assert m.min() >= 0 and m.max() <= 6
            np.testing.assert_array_equal(m.min(-1), 0)
            down, right = mp.grid.DIRECTIONS[d]
            if down == 1:
                assert (m[:, 0] == 0).all()
            if right == -1:
                assert (m[:, :, -1] == 0).all()
    for m in mp.isgmr(mrf, num_iterations=4, num_directions=8).messages:
        np.testing.assert_array_equal(m, jnp.round(m))


def random_messages(key, mrf):
    """Arbitrary numbers on every edge, zero where a pixel has no sender."""
    shape = mrf.unaries.shape
    messages = []
    for d, (down, right) in enumerate(mp.grid.DIRECTIONS[:4]):
        m = jax.random.normal(jax.random.fold_in(key, d), shape)
        row = jnp.arange(shape[1]) - down
        column = jnp.arange(shape[2]) - right
        inside = ((row >= 0) & (row < shape[1]))[:, None] & ((column >= 0) & (column < shape[2]))[None]
        m = jnp.where(jnp.broadcast_to(inside[None, :, :, None], shape), m, 0.0)
        messages.append(_lines.to_lines(m, d < 2))
    return tuple(messages)


def test_messages_are_a_reparametrisation_and_the_bound_is_the_best_of_its_chains(key):
    table = jax.random.uniform(key, (3, 3), maxval=4.0)
    mrf = integer_problem(key, (2, 2, 3, 3), mp.potentials.table(table))
    messages = random_messages(key, mrf)
    right, left, down, up = on_grid(messages, 2)
    b = np.asarray(mrf.unaries) + right + left + down + up
    table = np.asarray(table)
    every = np.stack(np.meshgrid(*[np.arange(3)] * 6, indexing="ij"), -1).reshape(-1, 2, 3)
    bound = mp.bounds.chain_lower_bound(mrf, messages)
    for n in range(2):
        pick = lambda x: np.take_along_axis(np.broadcast_to(x[n], (len(every), 2, 3, 3)), every[..., None], -1)[..., 0]
        half = 0.5 * pick(b).sum((1, 2))
        v = lambda x, y: table[x, y].sum(tuple(range(1, x.ndim)))
        rows = half + v(every[:, :, :-1], every[:, :, 1:]) - pick(right).sum((1, 2)) - pick(left).sum((1, 2))
        columns = half + v(every[:, :-1], every[:, 1:]) - pick(down).sum((1, 2)) - pick(up).sum((1, 2))
        energies = mp.energy(
            mp.GridMRF(jnp.broadcast_to(mrf.unaries[n], (len(every), 2, 3, 3)), mrf.pairwise), jnp.asarray(every)
        )
        np.testing.assert_allclose(rows + columns, energies, rtol=1e-5)
        np.testing.assert_allclose(bound[n], rows.min() + columns.min(), rtol=1e-5)
        assert bound[n] <= energies.min()


def test_bound_stays_below_the_energy_in_every_iteration_of_trwp(key):
    weights = mp.grid.both_directions(jax.random.uniform(key, (2, 2, 6, 7), maxval=2.0))
    mrf = integer_problem(key, (2, 6, 7, 5), mp.potentials.truncated_quadratic(2.0, truncation=3, truncate="cost"))
    mrf = mrf._replace(edge_weights=weights)
    solution = mp.trwp(mrf, num_iterations=30, evaluate_every=1, rounding="sequential")
    best = solution.energies.min(0)
    assert (solution.bounds <= best[None] * (1.0 + 1e-6)).all()
    assert (jnp.diff(solution.bounds, axis=0) >= 0).all()
    np.testing.assert_allclose(mp.energy(mrf, solution.labels), best, rtol=1e-6)
    np.testing.assert_allclose(solution.bounds[-1], best, rtol=2e-2)


def test_sequential_rounding_is_the_raster_scan(key):
    table = jax.random.randint(key, (5, 5), 0, 9).astype(jnp.float32)
    weights = mp.grid.both_directions(jax.random.randint(key, (2, 2, 4, 6), 0, 3).astype(jnp.float32))
    mrf = integer_problem(key, (2, 4, 6, 5), mp.potentials.table(table))._replace(edge_weights=weights)
    messages = mp.isgmr(mrf, num_iterations=2).messages
    _, left, _, up = on_grid(messages, 2)
    theta, v, w = np.asarray(mrf.unaries), np.asarray(table), np.asarray(weights)
    x = np.zeros((2, 4, 6), int)
    for n in range(2):
        for i in range(4):
            for j in range(6):
                cost = theta[n, i, j] + left[n, i, j] + up[n, i, j]
                cost = cost + (w[0, n, i, j] * v[x[n, i, j - 1]] if j else 0)
                x[n, i, j] = (cost + (w[2, n, i, j] * v[x[n, i - 1, j]] if i else 0)).argmin()
    np.testing.assert_array_equal(mp.bounds.sequential_rounding(mrf, messages), x)


@pytest.fixture(scope="module")
def toy(request):
    """The 10 x 10 instance of memf: 180 weighted edges, optimum 446 for each of three costs."""
    folder = request.getfixturevalue("shared_data") / "toy_mrf"
    unaries = np.zeros((100, 5), np.float32)
    for pixel, label, cost in np.loadtxt(folder / "toy_unary_10_10_5.txt", delimiter=",", dtype=int):
        unaries[pixel, label] = cost
    right, down = np.zeros((100,), np.float32), np.zeros((100,), np.float32)
    for i, j, weight in np.loadtxt(folder / "toy_binary_4_10_10.txt", delimiter=",", dtype=int):
        (right if j == i + 1 else down)[j] = weight
    weights = mp.grid.both_directions([jnp.asarray(x.reshape(10, 10)) for x in (right, down)])
    return jnp.asarray(unaries.reshape(10, 10, 5)), weights


@pytest.mark.parametrize(
    "pairwise",
    [
        mp.potentials.linear(num_labels=5),
        mp.potentials.quadratic(num_labels=5),
        mp.potentials.truncated_quadratic(truncation=2, truncate="distance"),
    ],
)
def test_toy_instance_is_solved_and_certified_by_trwp_and_not_by_isgmr(toy, pairwise):
    mrf = mp.GridMRF(toy[0], pairwise, toy[1])
    solution = mp.trwp(mrf, num_iterations=50, evaluate_every=1, tolerance=1e-6)
    assert mp.energy(mrf, solution.labels) == 446
    np.testing.assert_allclose(jnp.nanmax(solution.bounds), 446, rtol=1e-6)
    assert solution.iterations < 50
    assert 446 <= mp.energy(mrf, mp.isgmr(mrf, num_iterations=50).labels) <= 503


@pytest.fixture(scope="module")
def tsukuba(request):
    folder = request.getfixturevalue("shared_data") / "stereo" / "tsukuba"
    left, right = (np.asarray(Image.open(next(folder.glob(f"*{side}*")))) for side in ("left", "right"))
    unaries = mp.costs.birchfield_tomasi(left, right, 16)
    assert float(np.asarray(unaries, np.float64).sum()) == 78196440
    return mp.GridMRF(unaries, mp.potentials.truncated_linear(20.0, truncation=2))


def test_tsukuba_isgmr_energies_are_exact(tsukuba):
    energies = mp.isgmr(tsukuba, num_iterations=50, evaluate_every=1).energies
    assert [int(energies[i]) for i in (0, 9, 49)] == [824694, 621409, 637996]
    assert int(energies[1]) == int(energies.min()) == 497974


def test_tsukuba_trwp_energies_bound_and_rounding(tsukuba):
    solution = mp.trwp(tsukuba, num_iterations=50, evaluate_every=1)
    energies = [int(solution.energies[i]) for i in (0, 9, 49)]
    assert energies[0] == 869363
    np.testing.assert_allclose(energies[1:], [339460, 314037], rtol=5e-4)
    np.testing.assert_allclose(solution.bounds[-1], 313315.57, rtol=1e-6)
    rounded = mp.bounds.sequential_rounding(tsukuba, solution.messages)
    np.testing.assert_allclose(mp.energy(tsukuba, rounded), 313699, rtol=5e-4)


def test_tsukuba_sgm_energies_of_both_variants_are_exact(tsukuba):
    energy = lambda **options: int(mp.energy(tsukuba, mp.sgm(tsukuba, **options).labels))
    assert energy() == 894033
    assert energy(num_directions=8) == 789651
    assert energy(variant="path_costs") == 873777
    assert energy(variant="path_costs", num_iterations=50) == 644840


@pytest.mark.slow
def test_tsukuba_with_eight_directions(tsukuba):
    isgmr = mp.isgmr(tsukuba, num_directions=8, num_iterations=50, evaluate_every=1)
    assert [int(isgmr.energies[i]) for i in (0, 49)] == [684185, 340347]
    trwp = mp.trwp(tsukuba, num_directions=8, num_iterations=50, evaluate_every=1)
    assert int(trwp.energies[0]) == 496727
    np.testing.assert_allclose(trwp.energies[49], 348483, rtol=5e-4)
    sgm = mp.sgm(tsukuba, num_directions=8, variant="path_costs")
    assert int(mp.energy(tsukuba, sgm.labels)) == 776706


@pytest.mark.slow
def test_tsukuba_with_sixteen_directions(tsukuba):
    isgmr = mp.isgmr(tsukuba, num_directions=16, num_iterations=1)
    assert int(mp.energy(tsukuba, isgmr.labels)) == 591554


@pytest.mark.parametrize("directions", [4, 8, 16])
def test_flipping_the_image_flips_isgmr(key, directions):
    mrf = integer_problem(key)
    flipped = mrf._replace(unaries=mrf.unaries[:, :, ::-1])
    solve = lambda problem: mp.isgmr(problem, num_directions=directions, num_iterations=3).beliefs
    np.testing.assert_array_equal(solve(flipped)[:, :, ::-1], solve(mrf))


def test_constants_per_pixel_change_nothing_and_scale_goes_through(key):
    mrf = integer_problem(key)
    constant = jax.random.randint(jax.random.fold_in(key, 1), (2, 5, 7, 1), 0, 50).astype(jnp.float32)
    shifted = mrf._replace(unaries=mrf.unaries + jnp.broadcast_to(constant, mrf.unaries.shape))
    scaled = mp.GridMRF(4.0 * mrf.unaries, mp.potentials.truncated_linear(12.0, truncation=2))
    solve = lambda problem: mp.trwp(problem, num_iterations=3)
    for a, b, c in zip(*(solve(m).messages for m in (mrf, shifted, scaled)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
        np.testing.assert_allclose(4.0 * a, c, atol=1e-4)


def test_a_batch_is_its_images_one_by_one(key):
    mrf = integer_problem(key, (3, 5, 7, 6))
    weights = mp.grid.both_directions(jax.random.uniform(key, (4, 3, 5, 7)))
    mrf = mrf._replace(edge_weights=weights)
    together = mp.trwp(mrf, num_iterations=4, num_directions=8)
    for b in (0, 2):
        alone = mp.trwp(mp.GridMRF(mrf.unaries[b], mrf.pairwise, weights[:, b]), num_iterations=4, num_directions=8)
        np.testing.assert_allclose(together.beliefs[b], alone.beliefs, atol=1e-4)
        assert alone.labels.shape == (5, 7)


def test_a_restart_goes_on_where_the_messages_stopped(key):
    mrf = integer_problem(key)
    half = mp.trwp(mrf, num_iterations=2)
    resumed = mp.trwp(mrf, num_iterations=2, messages=half.messages)
    np.testing.assert_allclose(resumed.beliefs, mp.trwp(mrf, num_iterations=4).beliefs, atol=1e-4)


def test_a_batch_stops_when_its_last_image_is_certified(toy):
    """The toy instance beside one without any conflict, which is solved at once."""
    easy = jnp.full((10, 10, 5), 9.0).at[..., 2].set(0.0)
    weights = jnp.stack([toy[1], toy[1]], axis=1)
    mrf = mp.GridMRF(jnp.stack([toy[0], easy]), mp.potentials.linear(num_labels=5), weights)
    solution = mp.trwp(mrf, num_iterations=50, evaluate_every=1, tolerance=1e-6)
    np.testing.assert_allclose(mp.energy(mrf, solution.labels), [446, 0])
    assert 1 < solution.iterations < 50
    assert jnp.isnan(solution.energies[solution.iterations :]).all()


def test_labels_above_256_take_uint16_indices(key):
    unaries = jax.random.uniform(key, (2, 3, 300), maxval=100.0)
    mrf = mp.GridMRF(unaries, mp.potentials.truncated_linear(1.0, truncation=4))
    loss = lambda u: mp.trwp(mrf._replace(unaries=u), num_iterations=2).beliefs[..., 280].sum()
    gradient = jax.grad(loss)(unaries)
    np.testing.assert_allclose(gradient.sum(-1), 1.0, atol=1e-5)
    assert (gradient != 0).sum() > 6
