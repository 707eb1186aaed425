"""The classification task: what its parts share, and a network that learns."""

import jax
import numpy as np
import optax
import pytest

from experiments.tasks import classification


def test_a_network_learns_the_digits_and_resumes(tmp_path):
    options = classification.Options(batch_size=64, validation_fraction=0.1)
    task = classification.load(options, classification.network("lenet300"))
    optimizer = optax.sgd(0.1, momentum=0.9)
    evaluate = task.evaluator(task.logits)
    fit = lambda workdir, steps: task.fit(
        optimizer, task.start(optimizer, 0), workdir, steps=steps, label="lenet300", evaluate=evaluate
    )
    state, history = fit(tmp_path, 60)
    assert set(history[-1]) >= {"test_error", "test_loss", "validation_error", "loss"}
    assert history[-1]["test_error"] < 15 < evaluate(task.start(optimizer, 0))["test_error"]
    again, _ = fit(tmp_path, 60)
    for a, b in zip(jax.tree.leaves(state.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_small_images_are_enlarged_for_networks_that_need_it():
    task = classification.load(classification.Options(), classification.network("lenet5"), minimum_side=16)
    assert task.dataset.train.images.shape[1:] == task.dataset.test.images.shape[1:] == (28, 28, 1)
    assert task.dataset.validation is None and task.augment is None
    small = classification.images.load("digits").train.images
    np.testing.assert_array_equal(task.dataset.train.images[:, 2:26:3, 2:26:3], small)


def test_bad_options_are_named():
    with pytest.raises(ValueError, match=r"validation_fraction must lie in \[0, 1\), got 1.0"):
        classification.Options(validation_fraction=1.0)
