# %% [markdown]
# # A pipeline on eight fake devices
#
# The same program runs on one device, on eight fake ones of a CPU, on a host of accelerators and on several hosts.

# %%
import jax

jax.config.update("jax_num_cpu_devices", 8)  # before JAX computes anything

import jax.numpy as jnp
import numpy as np
import optax

from jaxlib_methods import parallel

num_stages, num_replicas = 4, 2
mesh = parallel.make_mesh(num_stages, num_replicas)
print(dict(mesh.shape))

# %% [markdown]
# A model is three pure functions: what comes before the blocks, a block, and the loss at the end. Here a small
# network that predicts the next token of a sequence in which $t_{i+1} = 3 t_i + 1 \bmod 31$; `models.gpt_stages`
# gives the same three of a GPT.

# %%
width, vocabulary = 32, 31
model = parallel.StageModel(
    embed=lambda table, tokens: table[tokens],
    block=lambda w, x: x + jnp.tanh(x @ w),
    head=lambda w, x, targets: optax.softmax_cross_entropy_with_integer_labels(x @ w, targets).mean(),
)
keys = jax.random.split(jax.random.key(0), 6)
draw = lambda key, *shape: jax.random.normal(key, shape) / np.sqrt(shape[0])
params = (
    np.sqrt(vocabulary) * draw(keys[0], vocabulary, width),
    [draw(key, width, width) for key in keys[1:5]],
    draw(keys[5], width, vocabulary),
)
stages = parallel.split_stages(params, num_stages)  # a block for each; the first has the table too, the last the head

# %% [markdown]
# `step` of the asynchronous pipeline takes many microbatches. Each stage updates its weights after every one of
# them, while the next are on their way: no stage waits, and stage $j$'s gradients are $P - 1 - j$ updates old.

# %%
num_microbatches, batch_size, length = 200, 16, 8
rng = np.random.default_rng(0)
tokens = rng.integers(vocabulary, size=(num_microbatches, batch_size, 1))
for _ in range(length):
    tokens = np.concatenate([tokens, (3 * tokens[..., -1:] + 1) % vocabulary], axis=-1)
inputs, targets = tokens[..., :-1].astype(np.int32), tokens[..., 1:].astype(np.int32)

one = (inputs[0], targets[0])
pipeline = parallel.asynchronous_pipeline(model, stages, optax.adam(3e-3), mesh, batch=one)
state, losses = pipeline.step(pipeline.init(stages), *parallel.shard_batch(mesh, (inputs, targets)))
print(
    "loss of microbatches 4, 8, 16, 32, 64, 128:",
    [round(float(loss), 2) for loss in losses.loss[jnp.array([4, 8, 16, 32, 64, 128])]],
)

# %% [markdown]
# GPipe and 1F1B make one update from all microbatches of a step. Their stages wait for one another at its ends, and
# their gradients are those of the model without a pipeline.

# %%
from jaxlib_methods.parallel.pipelines import schedules

for schedule in ("gpipe", "1f1b"):
    idle = [schedules.bubble_fraction(schedule, num_stages, n) for n in (4, 16, 64)]
    print(f"{schedule:6} idle with 4, 16, 64 microbatches:", [f"{float(share):.0%}" for share in idle])

# %% [markdown]
# What to do about slow links, and about replicas that need not agree after every update: [pipelines and data
# parallelism](../choose/parallel.md).
