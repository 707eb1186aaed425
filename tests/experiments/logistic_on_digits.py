"""Logistic regression on the bundled digits: the smallest experiment, private to the tests.

Paper: none
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax

from experiments._machinery import cases, device_data, loop as training
from experiments.data import images as data

SMOKE = {"steps": 40}
PAPER = {"test_error": 5.0}


@dataclasses.dataclass(frozen=True)
class Config:
    data_dir: str = ""  # where TFDS keeps prepared sets
    dataset: str = "digits"
    seeds: int = 2
    steps: int = 200
    batch_size: int = 64  # examples per step
    learning_rate: float = 0.02
    checkpoint_every: int = 20

    def __post_init__(self):
        if self.learning_rate <= 0:
            raise ValueError(f"learning_rate must be positive, got {self.learning_rate}; try 0.02")


def train(config, workdir):
    dataset = data.load(config.dataset, config.data_dir or None)
    mean, std = data.global_statistics(dataset.train.images)

    def logits_fn(params, model_state, images):
        flat = data.standardise(images, mean, std).reshape(images.shape[0], -1)
        return flat @ params["kernel"] + params["bias"][None]

    def loss_fn(params, model_state, batch, key):
        logits = logits_fn(params, model_state, batch.images)
        loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels))
        return loss, (model_state + 1, {})

    def augment(batch, key):
        return batch._replace(images=device_data.random_crop(batch.images, key, padding=1))

    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(config.learning_rate, momentum=0.9))
    features, classes = dataset.train.images[0].size, dataset.num_classes
    evaluate = training.evaluator(training.classification(logits_fn), dataset.test, batch_size=100)

    def one(seed, case_dir):
        params = {"kernel": jnp.zeros((features, classes)), "bias": jnp.zeros(classes)}
        state = training.init_state(params, optimizer, key=jax.random.key(seed), model_state=jnp.zeros((), jnp.int32))
        state, history = training.fit(
            loss_fn, optimizer, state, dataset.train, batch_size=config.batch_size, steps=config.steps,
            steps_per_call=10, augment=augment, evaluate=evaluate, evaluate_every=100, workdir=case_dir,
            checkpoint_every=config.checkpoint_every, label=f"seed {seed}",
        )  # fmt: skip
        bits = jax.tree.map(lambda leaf: jax.device_get(leaf).tobytes().hex(), state.params)
        return {"test_error": history[-1]["test_error"], "bits": bits}

    runs = [cases.run_or_load(workdir / f"seed-{s}", functools.partial(one, s)) for s in range(config.seeds)]
    return {"test_error": [run["test_error"] for run in runs]}
