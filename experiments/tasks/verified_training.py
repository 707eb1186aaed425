"""A pipeline whose workers all run on one device, with verifiers between its stages, and its training."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments.data import text
from experiments.tasks import pipelines
from jaxlib_methods import parallel
from jaxlib_methods.parallel import integrity
from jaxlib_methods.typing import PyTree


class Training:
    """A model cut into stages, its text, and the state after the clean start, of one seed.

    Args:
      config: options of the language model, with `replicas`, `warmup`, `learning_rate`, `collusion` and `verifiers()`,
        which gives the `VerifierConfig` of each direction.
      task: of these options.
      seed: of parameters, batches and attacks.
    """

    def __init__(self, config: Any, task: pipelines.Task, seed: int):
        self.config, self.seed, self.key = config, seed, jax.random.key(seed)
        self.model, self.gpt = task.model, task.config
        as_dicts = nnx.to_pure_dict
        params = jax.jit(task.init)(self.key)
        params = as_dicts(params[0]), [as_dicts(block) for block in params[1]], as_dicts(params[2])
        self.stages = parallel.split_stages(params, self.gpt.layers)
        self.rows = jnp.asarray(text.training_rows(task.text.train, self.gpt.block_size))
        held_out = text.validation_rows(task.text.validation, self.gpt.block_size, config.validation_windows)
        self.held_out = jnp.asarray(held_out)
        self.window = functools.partial(text.random_window, block=self.gpt.block_size)
        schedule = optax.warmup_constant_schedule(0.0, config.learning_rate, max(1, config.warmup // 10))
        self.optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))

    def batch(self, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(inputs, targets), (R, B, T), of a step."""
        config, (row_key, window_key) = self.config, jax.random.split(key)
        chosen = jax.random.randint(row_key, (config.replicas * config.batch_size,), 0, len(self.rows))
        windows = self.window(self.rows[chosen], window_key).astype(jnp.int32)
        windows = windows.reshape(config.replicas, config.batch_size, -1)
        return windows[..., :-1], windows[..., 1:]

    def pipeline(
        self, attacks: tuple[integrity.Attack, ...] = (), protected: bool = True
    ) -> integrity.VerifiedPipeline:
        config = self.config
        verifiers = config.verifiers() if protected else {"forward": None, "backward": None}
        return integrity.VerifiedPipeline(
            self.model, config.replicas, attacks=attacks, collusion=config.collusion, **verifiers
        )

    def fresh(self, pipeline: integrity.VerifiedPipeline, key: jax.Array) -> integrity.simulation.VerifiedState:
        inputs = jax.ShapeDtypeStruct((self.config.batch_size, self.gpt.block_size), jnp.int32)
        return pipeline.init(self.stages, inputs, key=key)

    @functools.cached_property
    def validation_loss(self) -> Any:
        loss = lambda stages, rows: parallel.sequential_loss(self.model, stages, rows[:, :-1], rows[:, 1:])
        return jax.jit(lambda stages: loss(stages, self.held_out.astype(jnp.int32)))

    def run(self, pipeline: integrity.VerifiedPipeline, carry: PyTree, first: int, steps: int) -> tuple[PyTree, PyTree]:
        """Steps first, first + 1, ... of training; (carry, by step: losses, bans and rejections of all workers)."""
        per_call, seen = math.gcd(steps, 50), []
        some = self._compiled(pipeline, per_call)
        for call in range(steps // per_call):
            carry, out = some(carry, jnp.int32(first + call * per_call))
            seen.append(jax.tree.map(np.asarray, out))
        return carry, jax.tree.map(lambda *parts: np.concatenate(parts), *seen)

    @functools.cache  # noqa: B019 - a task lives as long as its run
    def _compiled(self, pipeline: integrity.VerifiedPipeline, steps: int) -> Any:
        def one(carry: PyTree, step: jax.Array) -> tuple[PyTree, PyTree]:
            stages, opt_state, verified = carry
            batch_key, attack_key = jax.random.split(jax.random.fold_in(self.key, step))
            batch = self.batch(batch_key)
            losses, gradients, verified, verdicts = pipeline.value_and_grad(stages, *batch, verified, key=attack_key)
            gradients = jax.tree.map(lambda g: jnp.mean(g, axis=0), tuple(gradients))
            updates, opt_state = self.optimizer.update(gradients, opt_state, stages)
            bans = [jnp.zeros_like(verdicts.forward, jnp.int32) if v is None else v.bans for v in verified[:2]]
            kept = jnp.maximum(jnp.sum(losses > 0), 1)
            seen = {"loss": jnp.sum(losses) / kept, "bans": bans, "rejected": ~jnp.stack(verdicts, axis=1)}
            return (optax.apply_updates(stages, updates), opt_state, verified), seen

        return jax.jit(lambda carry, start: jax.lax.scan(one, carry, start + jnp.arange(steps)))

    @functools.cached_property
    def start(self) -> tuple[PyTree, PyTree]:
        """The carry after the clean start, and what was seen in it."""
        pipeline = self.pipeline()
        verified = self.fresh(pipeline, jax.random.fold_in(self.key, 2**31 - 1))
        return self.run(pipeline, (self.stages, self.optimizer.init(self.stages), verified), 0, self.config.warmup)
