"""A GPT whose boundaries can be transformed: its parts, its transforms, and training with transforms in between."""

import dataclasses
import functools
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data import text
from experiments.tasks import language_modelling
from jaxlib_methods import models, trees
from jaxlib_methods.parallel import unextractable
from jaxlib_methods.parallel.unextractable import gpt
from jaxlib_methods.typing import PyTree


class Decoder:
    """A GPT with matrices for transforms, its text, optimizer and loss, of one seed."""

    def __init__(self, task: language_modelling.Task, seed: int):
        self.options, self.gpt, self.key = task.options, task.config, jax.random.key(seed)
        self.rows = jnp.asarray(text.training_rows(task.text.train, self.gpt.block_size))
        held_out = text.validation_rows(task.text.validation, self.gpt.block_size, self.options.validation_windows)
        self.held_out = jnp.asarray(held_out.astype(np.int32))
        self.rules = gpt.gpt_transform_rules(self.gpt.layers)
        blocks = range(self.gpt.layers)
        self.names = [("boundary", i) for i in (*blocks, self.gpt.layers)] + [("middle", i) for i in blocks]

    @functools.cache  # noqa: B019 - a decoder lives as long as its run
    def start(self) -> PyTree:
        """Parameters before training."""
        init = lambda key: nnx.to_pure_dict(nnx.state(models.GPT(self.gpt, rngs=nnx.Rngs(key)), nnx.Param))
        params = models.split_gpt_params(self.gpt, jax.jit(init)(self.key))
        rotations = [
            unextractable.draw_transform(self.gpt.width, key=jax.random.fold_in(self.key, i)).matrix
            for i in range(2 * self.gpt.layers + 1)
        ]
        return gpt.transformable_gpt_params(self.gpt, params, rotations)

    def transforms(self, time: int, spread: float | None = None) -> dict[Any, unextractable.Transform]:
        key = jax.random.fold_in(self.key, 10**6 + time)
        return unextractable.draw_transforms(self.names, self.gpt.width, key=key, spread=spread)

    @functools.cache  # noqa: B019 - a decoder lives as long as its run
    def forward(self, dtype: str = "float32", blocks: int | None = None) -> Any:
        """Jitted (parameters, tokens) -> logits, or the activations behind so many blocks."""
        parts = gpt.transformable_gpt_stages(dataclasses.replace(self.gpt, dtype=dtype))

        def function(params: PyTree, tokens: jax.Array) -> jax.Array:
            embed, layers, head = params
            x = parts.embed(embed, tokens)
            for layer in layers[:blocks]:
                x = parts.block(layer, x)
            return parts.head(head, x) if blocks is None else x

        return jax.jit(function)

    def loss(self, params: PyTree, windows: jax.Array) -> jax.Array:
        return language_modelling.cross_entropy(self.forward()(params, windows[:, :-1]), windows[:, 1:]).mean()

    def validation_loss(self, params: PyTree) -> float:
        loss = float(self._loss(params, self.held_out))
        return loss if math.isfinite(loss) else 1e3

    @functools.cached_property
    def _loss(self) -> Any:
        return jax.jit(self.loss)

    @functools.cache  # noqa: B019
    def optimizer(self, factor: float = 1.0) -> optax.GradientTransformation:
        config = self.options
        rate = lambda peak: language_modelling.warmup_cosine(factor * peak, config.steps)
        rules = [("transforms/", "fixed"), ("embedding", "embed"), ("logits/|scale", "adamw"), ("kernel", "muon")]
        return optax.partition(
            {
                "muon": optax.contrib.muon(rate(config.learning_rate)),
                "embed": optax.sgd(rate(config.embed_learning_rate), momentum=0.9),
                "adamw": optax.adamw(rate(config.head_learning_rate)),
                "fixed": optax.set_to_zero(),
            },
            lambda params: trees.label_tree(params, rules),
        )

    @functools.cache  # noqa: B019
    def steps(self, factor: float, count: int) -> Any:
        """Jitted (parameters, optimizer state, first step) -> the same after `count` steps."""
        optimizer, config = self.optimizer(factor), self.options

        def one(carry: PyTree, step: jax.Array) -> tuple[PyTree, None]:
            params, opt_state = carry
            row_key, window_key = jax.random.split(jax.random.fold_in(self.key, step))
            rows = self.rows[jax.random.randint(row_key, (config.batch_size,), 0, len(self.rows))]
            windows = text.random_window(rows, window_key, block=self.gpt.block_size).astype(jnp.int32)
            updates, opt_state = optimizer.update(jax.grad(self.loss)(params, windows), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.jit(lambda carry, first: jax.lax.scan(one, carry, first + jnp.arange(count))[0])

    def fit(
        self, params: PyTree, *, factor: float = 1.0, morph: bool = False, spread: float | None = None, first: int = 0
    ) -> tuple[PyTree, list[float]]:
        """Trained parameters, and the validation loss every `evaluate_every` steps, from the start on."""
        config, carry = self.options, (params, self.optimizer(factor).init(params))
        count = math.gcd(config.evaluate_every, config.morph_every) if morph else config.evaluate_every
        losses = [self.validation_loss(params)]
        for step in range(count, config.steps + 1, count):
            carry = self.steps(factor, count)(carry, jnp.int32(first + step - count))
            if step % config.evaluate_every == 0:
                losses.append(self.validation_loss(carry[0]))
            if morph and step % config.morph_every == 0:
                params, opt_state = carry
                transforms = self.transforms(step, spread)
                opt_state = unextractable.transform_momentum(opt_state, params, transforms, self.rules)
                carry = unextractable.morph(params, transforms, self.rules), opt_state
        return carry[0], losses

    def save(self, folder: pathlib.Path, params: PyTree) -> None:
        np.savez(folder / "params.npz", *jax.tree.leaves(params))

    def load(self, folder: pathlib.Path) -> PyTree:
        with np.load(folder / "params.npz") as saved:
            return jax.tree.unflatten(jax.tree.structure(self.start()), list(saved.values()))
