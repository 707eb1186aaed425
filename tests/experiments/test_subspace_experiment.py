"""The experiment on subspace networks: a smoke run, equal parameters, and what it refuses."""

import math

import jax
import pytest

from experiments import language_model, runner, subspace


@pytest.fixture(autouse=True)
def optax_promotes():
    with jax.numpy_dtype_promotion("standard"):  # scale_by_adam needs it
        yield


def test_smoke_run_leaves_losses_bytes_and_a_figure(tmp_path):
    config = subspace.Config(**subspace.SMOKE | {"batch_size": 11})
    metrics = runner.run(subspace, config, tmp_path, smoke=True)["metrics"]
    for name in ("top_k", "row_shared"):
        assert 2 < metrics[f"validation_loss {name}"] < math.log(256) + 0.5
    assert (metrics["bytes forward row_shared"], metrics["bytes backward row_shared"]) == (4 * 4 + 1, 4 * 4)
    assert metrics["bytes forward top_k"] == metrics["bytes backward top_k"] == 3 * 5
    assert (tmp_path / "subspace.png").stat().st_size > 10_000


def test_the_subspace_network_has_the_parameters_of_the_dense_one():
    config = subspace.Config()
    dense, constrained = (
        language_model.decoder_parameters(config.model()),
        language_model.decoder_parameters(config.subspace_model()),
    )
    half_a_unit = config.model().layers * 3 * config.width / 2
    assert abs(dense - constrained) <= half_a_unit
    assert constrained != language_model.decoder_parameters(config.subspace_model(300))


def test_steps_ratio_is_read_off_the_curve():
    curve = lambda *losses: {
        "curve": [{"step": 10 * (i + 1), "validation_loss": loss} for i, loss in enumerate(losses)],
        "validation_loss": losses[-1],
    }
    dense, longer = [curve(3.0, 2.0)] * 2, [curve(4.0, 3.0, 2.5, 1.9), curve(4.0, 3.0, 2.5, 2.1)]
    assert subspace.steps_ratio(dense, longer, 20) == [2.0]
    assert subspace.steps_ratio([], longer, 20) == []
    published = subspace.Config(preset="llama_small", layers=8, width=1024, heads=8, rank=160)
    assert subspace.PAPER(published) == {"steps_ratio": pytest.approx(3.12, abs=0.005)} and not subspace.PAPER(
        subspace.Config()
    )


def test_errors_name_the_option():
    for options, message in (
        ({"rank": 97}, "must not exceed width"),
        ({"layers": 1}, "layers must be at least 2"),
        ({"longer": 0}, "longer must be at least 1"),
        ({"learning_rates": ()}, "at least one"),
        ({"preset": "gpt2_small"}, "set tied=False"),
    ):
        with pytest.raises(ValueError, match=message):
            subspace.Config(**options)
