"""Logistic regression on the bundled digits: the smallest experiment, private to the tests.

Paper: none
"""

import dataclasses
import functools
from typing import Annotated

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import device_data, loop, plots
from experiments._machinery.options import Count, Options, Range
from experiments._machinery.records import Outcome, Target
from experiments.data import images

SMOKE = {"steps": 40}
SHOWN = ("test_error",)


@dataclasses.dataclass(frozen=True)
class Config(Options):
    data_dir: str = ""  # where TFDS keeps prepared sets
    dataset: str = "digits"
    seeds: Count = 2
    steps: Count = 200
    batch_size: Count = 64  # examples per step
    learning_rate: Annotated[float, Range(0, closed="neither", remedy="try 0.02")] = 0.02
    checkpoint_every: Count = 20


def variants(config):
    return {"logistic": None}


def targets(config):
    return {"logistic": {"test_error": Target(5.0, "made up", "ours")}}


def load(config):
    dataset = images.load(config.dataset, config.data_dir or None)
    mean, std = images.global_statistics(dataset.train.images)

    def logits_fn(params, model_state, images_):
        flat = images.standardise(images_, mean, std).reshape(images_.shape[0], -1)
        return flat @ params["kernel"] + params["bias"][None]

    def loss_fn(params, model_state, batch, key):
        logits = logits_fn(params, model_state, batch.images)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))
        return loss, (model_state + 1, {})

    def augment(batch, key):
        return batch._replace(images=device_data.random_crop(batch.images, key, padding=1))

    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(config.learning_rate, momentum=0.9))
    evaluate = loop.evaluator(loop.classification(logits_fn), dataset.test, batch_size=100)
    fit = functools.partial(
        loop.fit, loss_fn, optimizer, split=dataset.train, batch_size=config.batch_size, steps=config.steps,
        steps_per_call=10, augment=augment, evaluate=evaluate, evaluate_every=100,
        checkpoint_every=config.checkpoint_every,
    )  # fmt: skip
    features, classes = dataset.train.images[0].size, dataset.num_classes
    params = {"kernel": jnp.zeros((features, classes)), "bias": jnp.zeros(classes)}
    initial = lambda key: loop.init_state(params, optimizer, key=key, model_state=jnp.zeros((), jnp.int32))
    return initial, fit


def run(shared, variant, seed, workdir):
    initial, fit = shared
    state, history = fit(state=initial(jax.random.key(seed)), workdir=workdir, label=f"seed {seed}")
    bits = jax.tree.map(lambda leaf: jax.device_get(leaf).tobytes().hex(), state.params)
    curve = [record for record in history if "test_error" in record]
    return Outcome({"test_error": history[-1]["test_error"]}, curve, {"bits": bits})


def figures(shared, cases):
    return {"error": plots.curves(cases, "step", {"test_error": "test error (%)"})}
