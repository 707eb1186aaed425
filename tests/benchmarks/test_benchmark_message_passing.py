"""The benchmark message_passing: its plain scan solves the same problem, and its figure is drawn."""

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks._machinery import grids
from benchmarks.cases import message_passing as benchmark
from jaxlib_methods import message_passing as mp
from jaxlib_methods.kernels.scanline import dense
from peers import trwp


def test_the_scan_a_user_would_write_is_trwp(key):
    unaries = jax.random.uniform(key, (6, 7, 4), maxval=50.0)
    distance = np.abs(np.subtract.outer(np.arange(4), np.arange(4)))
    table = jnp.asarray(20.0 * np.minimum(distance, 2), jnp.float32)
    found = trwp.naive(unaries, table, iterations=3)
    mrf = mp.GridMRF(unaries, grids.PROBLEMS["tsukuba"].pairwise)
    np.testing.assert_allclose(found, mp.trwp(mrf, num_iterations=3).beliefs, atol=1e-3)


def test_profiles_for_the_peer_are_the_pairwise_costs():
    for problem in grids.PROBLEMS.values():
        distance = np.abs(np.subtract.outer(np.arange(problem.labels), np.arange(problem.labels)))
        expected = problem.weight * problem.profile[np.minimum(distance, len(problem.profile) - 1)]

        np.testing.assert_allclose(dense(problem.pairwise, problem.labels), expected, rtol=1e-6)


def test_growth_figure(tmp_path):
    records = [
        {"case": f"growth {axis}={size}", "median_ms": float(size)}
        for axis, sizes in benchmark.GROWTH.items()
        for size in sizes
    ]
    benchmark.draw_growth(records, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
