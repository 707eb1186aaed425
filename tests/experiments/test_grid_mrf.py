"""MAP inference on grids: energies on the host, traces of the solvers, and which instances are solved."""

import jax.numpy as jnp
import numpy as np
import pytest

from experiments.tasks import grid_mrf, grid_solvers
from jaxlib_methods import message_passing as mp


def _instance(kind="linear", truncation=2, weight=3.0, shape=(6, 7, 5)):
    unaries = np.random.default_rng(0).integers(0, 30, shape).astype(np.float32)
    return grid_mrf.make_instance(unaries, grid_mrf.Problem(kind, truncation, weight))


@pytest.mark.parametrize(
    ("kind", "truncation"), [("linear", 2), ("linear", 100), ("linear", None), ("quadratic", 7), ("quadratic", None)]
)
def test_the_energy_on_the_host_is_the_librarys(kind, truncation):
    instance = _instance(kind, truncation)
    labels = np.random.default_rng(1).integers(0, 5, (6, 7))
    distance = np.arange(5.0) if kind == "linear" else np.arange(5.0) ** 2
    expected = 3 * np.minimum(distance, np.inf if truncation is None else truncation)
    reach = len(instance.profile) - 1
    np.testing.assert_array_equal(instance.profile[np.minimum(np.arange(5), reach)], expected)
    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    assert grid_solvers.energy(instance, labels) == float(mp.energy(mrf, jnp.asarray(labels, jnp.int32)))


def test_traces_are_those_of_one_long_run(tmp_path):
    instance = _instance()
    metrics, curve, _ = grid_solvers.solve(instance, "trwp-4", 12, tmp_path / "trwp", evaluate_every=5)
    assert [point["iteration"] for point in curve] == [1, 5, 10, 12]
    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    solution = mp.trwp(mrf, num_iterations=12)
    labels, rounded = grid_solvers.labels_of(tmp_path / "trwp")
    np.testing.assert_array_equal(labels, np.asarray(solution.labels))
    np.testing.assert_array_equal(rounded, np.asarray(mp.bounds.sequential_rounding(mrf, solution.messages)))
    assert curve[-1]["energy"] == grid_solvers.energy(instance, labels)
    assert curve[-1]["sequential"] == grid_solvers.energy(instance, rounded)
    bounds = [point["bound"] for point in curve]
    assert bounds == sorted(bounds)
    assert bounds[-1] <= min(min(point["energy"], point["sequential"]) for point in curve) + 1e-3
    assert metrics["energy@10"] == curve[2]["energy"] and metrics["ms_per_iteration"] > 0
    assert "energy@5" not in metrics


def test_solvers_without_messages_are_run_afresh_for_each_number_of_iterations(tmp_path):
    instance = _instance()
    _, curve, _ = grid_solvers.solve(instance, "mean_field-4", 5, tmp_path)
    mrf = mp.GridMRF(jnp.asarray(instance.unaries), instance.pairwise)
    assert [point["iteration"] for point in curve] == [1, 2, 3, 5]
    labels = np.asarray(mp.mean_field(mrf, num_iterations=5).labels)
    assert curve[-1] == {"iteration": 5, "energy": grid_solvers.energy(instance, labels)}


def test_instances_are_the_users_own_the_prepared_or_the_embedded_one():
    chosen = lambda own=False, **options: grid_mrf.Options(**options).chosen(("a", "b"), "e", own=own, folder="x/{}")
    assert chosen() == ("e",) and chosen(data_dir="d") == ("a", "b") and chosen(own=True) == ("own",)
    assert chosen(data_dir="d", instances=("b",)) == ("b",)
    with pytest.raises(ValueError, match="'b' needs --data-dir, the folder that holds x/b"):
        chosen(instances=("b",))
    with pytest.raises(ValueError, match="your own instance is solved alone"):
        chosen(own=True, data_dir="d")
