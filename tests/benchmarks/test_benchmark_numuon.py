"""NuMuon's benchmark compares what it says: steps of the rank asked for, and objectives held against the exact SVD."""

import numpy as np
import pytest

from benchmarks.cases import numuon


def results(case):
    return {
        name: implementation.canonical(implementation.function(*implementation.args))
        for name, implementation in case.implementations.items()
    }


def test_steps_have_the_rank_of_their_name():
    case = numuon._step_case(64, 48, 0.25)
    for name, (updates, _) in results(case).items():
        singular = np.linalg.svd(updates["W"], compute_uv=False)
        if name == "newton_schulz":
            assert singular[0] < 1.3 and np.sum(singular > 0.5) > 12
        else:
            np.testing.assert_allclose(singular, np.arange(48) < 12, atol=1e-5)


@pytest.mark.parametrize("spectrum", numuon.SPECTRA)
def test_objectives_are_bounded_by_the_exact_one(spectrum):
    found = results(numuon._objective_case(spectrum, 4, 64, 48))
    for objective in found.values():
        assert 0.9 * found["exact SVD"] < objective < (1 + 1e-5) * found["exact SVD"]
    assert found["ten warm starts"] > (1 - 1e-4) * found["exact SVD"]


def test_the_model_of_the_work():
    m, n, b, k = 3072, 768, 200, 192
    products_with_M = 5 * 2 * m * n * b
    assert products_with_M < numuon.krylov_flops(m, n, k) < 2 * products_with_M
    assert numuon.krylov_flops(m, n, k) < 5 * (4 * m * n**2 + 2 * n**3) / 4
    assert numuon.krylov_bytes(m, n, k) == 6 * 4 * m * n and numuon.krylov_bytes(m, n, 384) == 2 * 4 * m * n
