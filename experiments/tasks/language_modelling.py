"""Next-token prediction: text, decoder, loss, evaluation and training by any optimizer.

    @dataclasses.dataclass(frozen=True)
    class Config(language_modelling.Options):
        learning_rate: Positive = 1e-3

    task = language_modelling.load(config)
    optimizer = optax.adamw(language_modelling.warmup_cosine(config.learning_rate, config.steps))
    state, history = task.fit(optimizer, seed, workdir, label="adamw")
    task.evaluate(state)  # {"validation_loss": nats per token}

Parameters are the `nnx.State` of a `jaxlib_methods.models.GPT`, with the paths that its docstring lists. What a run
does depends on its options and its seed alone; it resumes to the bit.
"""

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import device_data, loop, options
from experiments._machinery.log import Record
from experiments._machinery.options import Count, OneOf, Positive
from experiments.data import text
from jaxlib_methods import models

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
    """Options of every language-model experiment; its `Config` adds its own."""

    text: str = "python_docs"  # python_docs, tiny_shakespeare, another TFDS set of texts, or a path to a .txt or .npy
    validation_text: str | None = None  # another text, wholly for validation; None: the set's own, or the text's end
    data_dir: str | None = None  # folder of prepared TFDS sets; None: TFDS's own default
    tokenizer: Literal["byte", "character"] = "byte"
    preset: Annotated[str, OneOf(models.GPT_CONFIGS)] = "llama_tiny"  # a name of jaxlib_methods.models.GPT_CONFIGS
    layers: Count | None = None  # this and the next three: None takes the preset's
    width: Count | None = None
    heads: Count | None = None
    block: Count | None = None  # tokens of a training window
    init_std: Positive | None = None  # of the matrices at the start; None: the preset's
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the computation; parameters are float32
    batch_size: Count = 16  # windows per step
    steps: Count = 500
    seeds: Count = 3
    validation_windows: Count = 128  # at most, spread over the validation text
    evaluate_every: Count = 100

    def __post_init__(self):
        super().__post_init__()
        self.model()

    def model(self, vocab_size: int | None = None) -> models.GPTConfig:
        """The decoder's configuration; the MLP keeps its ratio to the width."""
        preset = models.GPT_CONFIGS[self.preset]
        changes = {
            "layers": self.layers,
            "width": self.width,
            "heads": self.heads,
            "block_size": self.block,
            "init_std": self.init_std,
            "vocab_size": vocab_size,
        }
        changes = {name: value for name, value in changes.items() if value is not None}
        if self.width and preset.mlp_width:
            changes["mlp_width"] = max(1, round(preset.mlp_width * self.width / preset.width))
        if self.heads and preset.kv_heads:
            changes["kv_heads"] = max(1, self.heads * preset.kv_heads // preset.heads)
        return dataclasses.replace(preset, dtype=self.dtype, **changes)


def warmup_cosine(learning_rate: float, steps: int, *, warmup: float = 0.06, final: float = 0.1) -> optax.Schedule:
    """Linear warm-up over the share `warmup` of the steps, then a cosine down to `final` times the learning rate.

    The defaults are AsyncPP's: 3,000 of 50,000 steps, and a tenth.
    """
    return optax.warmup_cosine_decay_schedule(
        learning_rate / max(1, round(warmup * steps)),  # the first step already moves
        learning_rate,
        max(1, round(warmup * steps)),
        steps,
        final * learning_rate,
    )


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log-likelihood of each target in nats, in float32 whatever the logits are: [..., V], [...] -> [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), targets.astype(jnp.int32))


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Everything that runs of the same options share, so that nothing is compiled or loaded twice."""

    options: Options
    config: models.GPTConfig
    text: text.Text
    rows: device_data.OnDevice  # of the training text
    init: Callable[[jax.Array], PyTree]  # key -> parameters
    merge: Callable[[PyTree], models.GPT]  # parameters -> the model that holds them
    apply: Callable[[PyTree, jax.Array], jax.Array]  # (parameters, tokens [B, T]) -> logits [B, T, V]
    loss_fn: loop.LossFn  # of windows [B, T + 1]: mean over all tokens
    window: Callable[[jax.Array, jax.Array], jax.Array]  # (rows [B, ...], key) -> windows [B, T + 1]
    evaluate: Callable[[loop.TrainState], dict[str, float]]

    def start(self, optimizer: optax.GradientTransformation, seed: int) -> loop.TrainState:
        """The state before the first step: every optimizer gets the same parameters and batches from the same seed."""
        init_key, train_key = jax.random.split(jax.random.key(seed))
        return loop.init_state(self.init(init_key), optimizer, key=train_key)

    def fit(
        self,
        optimizer: optax.GradientTransformation,
        seed: int,
        workdir: str | os.PathLike | None,
        *,
        label: str,
        steps: int | None = None,
        state: loop.TrainState | None = None,
        evaluate: Callable[[loop.TrainState], dict[str, float]] | None = None,
        loss_fn: loop.LossFn | None = None,
        **changes: Any,
    ) -> tuple[loop.TrainState, list[Record]]:
        """Trains one model with `fit` of `_machinery.loop`.

        Args:
          optimizer: pass the same object again for another seed, and nothing is compiled twice.
          seed: of the parameters and the batches.
          workdir, label: as for `fit`.
          steps: None takes the options'.
          state: None takes `start(optimizer, seed)`.
          evaluate, loss_fn: None takes the task's.
          changes: other arguments of `fit`.
        """
        defaults = {"steps_per_call": min(25, self.options.evaluate_every), "checkpoint_every": 100}
        return loop.fit(
            loss_fn or self.loss_fn,
            optimizer,
            state or self.start(optimizer, seed),
            self.rows,
            batch_size=self.options.batch_size,
            steps=steps or self.options.steps,
            augment=self.window,
            evaluate=evaluate or self.evaluate,
            evaluate_every=self.options.evaluate_every,
            workdir=workdir,
            mesh=self.rows.mesh,
            label=label,
            **defaults | changes,
        )

    def calibration(self, count: int, seed: int = 0) -> np.ndarray:
        """`count` windows [n, T + 1] of the training text, drawn from the seed, for what is measured on activations."""
        rows = text.training_rows(self.text.train, self.config.block_size)
        chosen = np.random.default_rng(seed).integers(0, len(rows), count)
        return np.asarray(self.window(jnp.asarray(rows[chosen]), jax.random.key(seed)))


def load(options: Options) -> Task:
    """Loads the text and compiles what trains and evaluates the decoder of these options."""
    loaded = text.load(
        options.text, validation=options.validation_text, tokenizer=options.tokenizer, data_dir=options.data_dir
    )
    config = options.model(loaded.vocab_size)
    graph = nnx.graphdef(nnx.eval_shape(lambda: models.GPT(config, rngs=nnx.Rngs(0))))
    init = jax.jit(lambda key: nnx.state(models.GPT(config, rngs=nnx.Rngs(key)), nnx.Param))
    merge = lambda params: nnx.merge(graph, params)
    apply = lambda params, tokens: merge(params)(tokens)

    def per_window(params: PyTree, model_state: PyTree, windows: jax.Array) -> dict[str, jax.Array]:
        del model_state
        return {"loss": cross_entropy(apply(params, windows[:, :-1]), windows[:, 1:]).mean(axis=1)}

    def loss_fn(params: PyTree, model_state: PyTree, windows: jax.Array, key: jax.Array):
        del key
        return per_window(params, model_state, windows)["loss"].mean(), (model_state, {})

    held_out = text.validation_rows(loaded.validation, config.block_size, options.validation_windows)
    return Task(
        options,
        config,
        loaded,
        device_data.put(text.training_rows(loaded.train, config.block_size), device_data.data_mesh(options.batch_size)),
        init,
        merge,
        apply,
        loss_fn,
        functools.partial(text.random_window, block=config.block_size),
        loop.evaluator(per_window, held_out, batch_size=options.batch_size, prefix="validation_"),
    )


def evaluations(history: list[Record]) -> list[dict[str, float]]:
    """Step, training loss and validation loss of the records that hold an evaluation."""
    names = ("step", "loss", "validation_loss")
    return [{name: record[name] for name in names} for record in history if "validation_loss" in record]


def subspace_network(dense: models.GPTConfig, rank: int) -> models.GPTConfig:
    """The subspace network with as many parameters as the dense model, to half a unit of its MLPs."""
    config = dataclasses.replace(dense, subspace=rank)
    hidden = config.mlp_width or 4 * config.width
    wider = lambda units: dataclasses.replace(config, mlp_width=hidden + units)
    missing = decoder_parameters(dense) - decoder_parameters(config)
    return wider(round(missing / (decoder_parameters(wider(1)) - decoder_parameters(config))))


def decoder_parameters(config: models.GPTConfig) -> int:
    """How many parameters a decoder has."""
    return parameter_count(nnx.state(nnx.eval_shape(lambda: models.GPT(config, rngs=nnx.Rngs(0))), nnx.Param))


def parameter_count(params: PyTree) -> int:
    """Numbers in a tree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
