"""Tiny models on the tests' eight fake devices, and the single-device references of pipelines."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxlib_methods.models import GPT, GPTConfig, gpt_stages, split_gpt_params
from jaxlib_methods.optimizers import delayed_nesterov
from jaxlib_methods.parallel import StageModel, sequential_loss
from jaxlib_methods.parallel.pipelines._engine import update_stage
from jaxlib_methods.parallel.pipelines.stages import run_stage, stage_vjp

CONFIG = GPTConfig(vocab_size=64, block_size=16, layers=4, width=32, heads=2)


def gpt(config=CONFIG):
    """(model, parameters by part) of a GPT."""
    functions = gpt_stages(config)

    def head(params, x, targets):
        return optax.softmax_cross_entropy_with_integer_labels(functions.head(params, x), targets).mean()

    params = split_gpt_params(config, nnx.state(GPT(config, rngs=nnx.Rngs(0)), nnx.Param))
    return StageModel(functions.embed, functions.block, head), params


def chain(layers=4, width=8, vocab=11):
    """(model, parameters by part) of a chain of tanh layers between an embedding and logits."""
    rng = np.random.default_rng(3)
    leaf = lambda *shape: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32)

    def head(params, x, targets):
        return optax.softmax_cross_entropy_with_integer_labels(x @ params["kernel"], targets).mean()

    block = lambda params, x: x + jnp.tanh(x @ params["kernel"] + params["bias"][None, None])
    model = StageModel(lambda table, ids: table[ids], block, head)
    blocks = [{"kernel": leaf(width, width), "bias": leaf(width)} for _ in range(layers)]
    return model, (leaf(vocab, width), blocks, {"kernel": leaf(width, vocab)})


def tokens(count, examples=2, length=3, vocab=11, seed=1):
    """Random micro-batches for `chain`: (inputs, targets), int32 (count, examples, length)."""
    ids = np.random.default_rng(seed).integers(vocab, size=(2, count, examples, length)).astype(np.int32)
    return ids[0], ids[1]


def text(count, examples=2, config=CONFIG, seed=0):
    """Micro-batches of a sequence that can be learned: (inputs, targets), int32 (count, examples, T)."""
    rng = np.random.default_rng(seed)
    start = rng.integers(config.vocab_size, size=(count, examples, 1))
    ids = (start + 3 * np.arange(config.block_size + 1)) % config.vocab_size
    noisy = np.where(rng.random(ids.shape) < 0.1, rng.integers(config.vocab_size, size=ids.shape), ids)
    return noisy[..., :-1].astype(np.int32), noisy[..., 1:].astype(np.int32)


def optimizer():
    return optax.chain(optax.clip_by_global_norm(0.5), delayed_nesterov(3e-3))


@functools.partial(jax.jit, static_argnums=(0, 4))
def value_and_grad(model, stages, inputs, targets, repeats=1):
    return jax.value_and_grad(lambda stages: sequential_loss(model, stages, inputs, targets, num_rounds=repeats))(
        stages
    )


def run_slots(model, stages, optimizer_of, inputs, targets, *, stash=True, predict_backward=None, cross=None):
    """Asynchronous 1F1B one slot after the other, with queues: trees of the stages after all updates, and losses.

    F of micro-batch m on stage j is in slot 2 m + j, B and the stage's update in slot 2 m + 2 P - 1 - j.
    `cross` are functions of what crosses a boundary forward and backward.
    """
    over, back = cross or (lambda x: x, lambda x: x)
    P, count = len(stages), len(inputs)
    forward = jax.jit(functools.partial(run_stage, model))
    backward = jax.jit(functools.partial(stage_vjp, model))
    params, losses = list(stages), {}
    optimizers = [optimizer_of(P - 1 - j) for j in range(P)]
    opt_states = [opt.init(tree) for opt, tree in zip(optimizers, stages, strict=True)]
    updates = [jax.jit(functools.partial(update_stage, opt)) for opt in optimizers]
    activations, cotangents, kept = {}, {}, {}
    for slot in range(2 * count + 2 * P):
        for j in range(P):
            m, odd = divmod(slot - j, 2)
            if not odd and 0 <= m < count:
                x = inputs[m] if j == 0 else activations.pop((m, j))
                kept[m, j] = x, params[j]
                if j < P - 1:
                    activations[m, j + 1] = over(forward(params[j], x))
            m, odd = divmod(slot - (2 * P - 1 - j), 2)
            if not odd and 0 <= m < count:
                x, version = kept.pop((m, j))
                if not stash:
                    version = params[j] if predict_backward is None else predict_backward(opt_states[j], params[j])
                target = targets[m] if j == P - 1 else None
                loss, grads, sent = backward(version, x, target, cotangents.pop((m, j), None))
                cotangents[m, j - 1] = [back(leaf) for leaf in sent]
                params[j], opt_states[j] = updates[j](params[j], opt_states[j], grads)
                losses[m] = losses.get(m, 0) + loss
    return params, np.array([losses[m] for m in range(count)])


def assert_trees_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_trees_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), a, b)


def to_numpy(tree):
    return jax.tree.map(np.asarray, tree)
