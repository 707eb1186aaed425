# %% [markdown]
# # Write your own score, rule or hook
#
# Nothing has to be registered. A score is a tree, a rule is an optax transformation, a hook is a pair of functions.

# %%
import jax
import jax.numpy as jnp
import optax

from jaxlib_methods import optimizers, parallel, pruning

params = {"w1": jax.random.normal(jax.random.key(0), (8, 16)), "w2": jax.random.normal(jax.random.key(1), (16, 1))}
batch = {"x": jax.random.normal(jax.random.key(2), (64, 8)), "y": jnp.ones((64, 1))}


def loss(params, batch):
    return jnp.mean((jnp.tanh(batch["x"] @ params["w1"]) @ params["w2"] - batch["y"]) ** 2)


# %% [markdown]
# ## A score
#
# Any tree with the shapes of the parameters: larger means more worth keeping, `None` means never pruned. Here a
# weight counts by what it moves, $|w| \, \mathbb{E}|x|$, which needs the inputs of the layer.

# %%
hidden = jnp.tanh(batch["x"] @ params["w1"])
scores = {
    "w1": jnp.abs(params["w1"]) * jnp.abs(batch["x"]).mean(0)[:, None],
    "w2": jnp.abs(params["w2"]) * jnp.abs(hidden).mean(0)[:, None],
}
masks = pruning.prune_masks(scores, sparsity=0.75)
{name: int(mask.sum()) for name, mask in masks.items()}

# %% [markdown]
# ## A rule
#
# An optax transformation, and it composes with those of this library: masks outside, delays around it, weight decay
# after it. State is a `NamedTuple`; what is annealed comes from a counter in it, never from a Python number that
# would force another compilation.

# %%
from typing import NamedTuple


class SignMomentumState(NamedTuple):
    momentum: optax.Updates  # shapes and dtypes of the parameters
    count: jax.Array  # int32 []


def scale_by_sign_momentum(decay_schedule) -> optax.GradientTransformationExtraArgs:
    def init(params):
        return SignMomentumState(jax.tree.map(jnp.zeros_like, params), jnp.zeros((), jnp.int32))

    def update(updates, state, params=None, **extra):
        decay = decay_schedule(state.count)
        momentum = jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, state.momentum, updates)
        return jax.tree.map(jnp.sign, momentum), SignMomentumState(momentum, state.count + 1)

    return optax.GradientTransformationExtraArgs(init, update)


rule = optax.chain(scale_by_sign_momentum(optax.linear_schedule(0.5, 0.95, 50)), optax.scale_by_learning_rate(1e-2))
optimizer = pruning.pruned(rule, masks)

trained, state = pruning.apply_masks(params, masks), optimizer.init(params)
for _ in range(60):
    updates, state = optimizer.update(jax.grad(loss)(trained, batch), state, trained)
    trained = optax.apply_updates(trained, updates)
print(f"loss {loss(pruning.apply_masks(params, masks), batch):.3f} -> {loss(trained, batch):.3f}")

# %% [markdown]
# The same rule with gradients that are three updates old, as in a pipeline of four stages:

# %%
late = optax.chain(optimizers.delays.delay_gradients(3), rule)
late_params, late_state = params, late.init(params)
for _ in range(60):
    updates, late_state = late.update(jax.grad(loss)(late_params, batch), late_state, late_params)
    late_params = optax.apply_updates(late_params, updates)
print(f"loss {loss(late_params, batch):.3f}")

# %% [markdown]
# ## A hook
#
# What crosses a boundary of a pipeline goes through `send` on one side and `receive` on the other, with a state of
# each end. This one rounds to bfloat16 and counts the messages; `parallel.pipelines.chain_hooks` puts it before or
# after others.

# %%
import numpy as np

from jaxlib_methods.parallel import pipelines

half = pipelines.BoundaryHook(
    init=lambda shapes: jnp.zeros((), jnp.int32),
    send=lambda x, count, info: (jax.tree.map(lambda a: a.astype(jnp.bfloat16), x), count + info.active),
    receive=lambda m, count, info: (jax.tree.map(lambda a: a.astype(jnp.float32), m), count),
)
model = parallel.StageModel(
    embed=lambda w, x: x @ w,
    block=lambda w, x: jnp.tanh(x @ w),
    head=lambda w, x, y: jnp.mean((x @ w - y) ** 2),
)
eye = jnp.eye(8)
stages = parallel.split_stages((eye, [eye, eye], jnp.ones((8, 1))), 1)
x, y = np.asarray(batch["x"]).reshape(8, 8, 8), np.ones((8, 8, 1), np.float32)

mesh = parallel.make_mesh(1)  # as many stages as there are devices
pipeline = parallel.asynchronous_pipeline(model, stages, optax.sgd(0.05), mesh, batch=(x[0], y[0]), forward_hook=half)
state, losses = pipeline.step(pipeline.init(stages), *parallel.shard_batch(mesh, (x, y)))
[round(float(loss), 3) for loss in losses.loss]

# %% [markdown]
# `parallel.pipelines.DataHook` is the same for the data axis, and `parallel.boundaries.codecs` makes a hook of an
# encoder and a decoder.
