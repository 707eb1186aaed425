# %% [markdown]
# # With flax nnx, linen, equinox, plain dicts
#
# The library works on pytrees of arrays and on two functions, `loss_fn(params, batch)` and `apply_fn(params,
# inputs)`. Every framework gives both. This page defines one small network in four of them and runs each family on
# each.

# %%
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx

key = jax.random.key(0)
x = jax.random.uniform(jax.random.key(1), (32, 8))
y = jax.random.randint(jax.random.key(2), (32,), 0, 4)

networks = {}

# %% [markdown]
# **Plain dicts.** The parameters are what you say.

# %%
draw = jax.nn.initializers.he_normal()
params = {"up": {"kernel": draw(key, (8, 16))}, "down": {"kernel": draw(key, (16, 4))}}
networks["dict"] = (lambda p, x: jax.nn.relu(x @ p["up"]["kernel"]) @ p["down"]["kernel"]), params

# %% [markdown]
# **flax nnx.** `nnx.split` separates the parameters from everything else, once, outside of the loss.


# %%
class Network(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(8, 16, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(16, 4, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(jax.nn.relu(self.up(x)))


graph, state = nnx.split(Network(nnx.Rngs(0)))
networks["nnx"] = (lambda p, x: nnx.merge(graph, p)(x)), state

# %% [markdown]
# **flax linen.** The collection `params` is the tree; other collections are passed beside it.


# %%
class LinenNetwork(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4, use_bias=False, name="down")(jax.nn.relu(linen.Dense(16, use_bias=False, name="up")(x)))


module = LinenNetwork()
networks["linen"] = (lambda p, x: module.apply({"params": p}, x)), module.init(key, x)["params"]

# %% [markdown]
# **equinox.** `eqx.partition` separates arrays from the rest. Its kernels are `(outputs, inputs)`, the others'
# `(inputs, outputs)`: what treats the two sides of a matrix differently (fan-in at initialisation, input statistics
# of `low_rank`) must be told or be given transposed kernels.

# %%
k1, k2 = jax.random.split(key)
layers = {"up": eqx.nn.Linear(8, 16, use_bias=False, key=k1), "down": eqx.nn.Linear(16, 4, use_bias=False, key=k2)}
arrays, rest = eqx.partition(layers, eqx.is_array)


def equinox_apply(p, x):
    layers = eqx.combine(p, rest)
    return jax.vmap(lambda row: layers["down"](jax.nn.relu(layers["up"](row))))(x)


networks["equinox"] = equinox_apply, arrays
# %% [markdown]
# ## Every family on each of them
#
# Paths are the same in all four, so that one pattern names a layer everywhere: `trees.path_names`.

# %%
from jaxlib_methods import (
    classifiers,
    low_rank,
    optimizers,
    pruning,
    quantization,
    robustness,
    training_dynamics,
    trees,
)


def loss_of(apply_fn):
    return lambda params, batch: optax.softmax_cross_entropy_with_integer_labels(
        apply_fn(params, batch[0]), batch[1]
    ).mean()


for name, (_, params) in networks.items():
    print(f"{name:8}", sorted(jax.tree.leaves(trees.path_names(params))))

# %% [markdown]
# **Pruning**: scores and masks are trees of the same structure.

# %%
for name, (apply_fn, params) in networks.items():
    masks = pruning.prune_masks(pruning.connection_sensitivity(loss_of(apply_fn), params, (x, y)), sparsity=0.75)
    optimizer = pruning.pruned(optax.sgd(0.1, 0.9), masks)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    print(f"{name:8}", sum(int((u != 0).sum()) for u in jax.tree.leaves(updates)), "of 192 weights move")

# %% [markdown]
# **Quantization**: auxiliary variables in the place of the weights; the network sees their projection.

# %%
lattice = quantization.Lattice(labels=(-1, 1), projection="tanh")
for name, (apply_fn, params) in networks.items():
    aux = quantization.init_auxiliary(params, lattice, key=key)
    soft = apply_fn(quantization.project(aux, lattice, 2.0), x)
    packed = quantization.pack(quantization.quantize(aux, lattice), lattice)
    print(f"{name:8}", soft.shape, quantization.packing.packed_bytes(packed), "bytes")

# %% [markdown]
# **Optimizers** are optax transformations, and so are all corrections of delays.

# %%
for name, (apply_fn, params) in networks.items():
    grads = jax.grad(loss_of(apply_fn))(params, (x, y))
    optimizer = optax.chain(optimizers.delays.delay_gradients(2), optimizers.nadam(1e-2))
    updates, _ = optimizer.update(grads, optimizer.init(params), params)
    print(f"{name:8}", jax.tree.structure(updates) == jax.tree.structure(params))

# %% [markdown]
# **Low rank**: kernels by path. **Training dynamics**: a function from parameters to gradients.

# %%
for name, (apply_fn, params) in networks.items():
    small = low_rank.compress_kernels(params, "up", removal=0.5, method="svd")
    gradient = jax.grad(loss_of(apply_fn))
    change = training_dynamics.local_lipschitz(lambda p: gradient(p, (x, y)), params, small, fractions=(0.5, 1.0))
    ranks = [int(jnp.linalg.matrix_rank(leaf, rtol=1e-5)) for leaf in jax.tree.leaves(small)]
    print(f"{name:8} ranks {sorted(ranks)}, the gradient changes by {float(change):.2f} per unit")

# %% [markdown]
# **Robustness**: `apply_fn` and its parameters, never a module.

# %%
for name, (apply_fn, params) in networks.items():
    attack = robustness.fgsm(apply_fn, params, x, y, key=key, radius=0.1)
    print(f"{name:8}", attack.images.shape)

# %% [markdown]
# **Classifiers**: the heads are nnx modules, the frame and the losses are functions of features. **Message
# passing** takes what a network returns as costs; **normalisation** and **parallel** take functions of parameters,
# as above.

# %%
from jaxlib_methods import message_passing as mp, parallel

frame = jnp.eye(4)
for name, (apply_fn, params) in networks.items():
    features = apply_fn(params, x)
    loss = classifiers.dot_regression_loss(features @ classifiers.etf_weights(frame).T, y).mean()
    costs = -features.reshape(1, 8, 4, 4)
    labels = mp.trwp(mp.GridMRF(costs, mp.potts(0.1)), num_iterations=5).labels
    model = parallel.StageModel(
        embed=lambda p, x: x, block=lambda p, x: x, head=lambda p, x, y, apply_fn=apply_fn: loss_of(apply_fn)(p, (x, y))
    )
    stage = {"embed": (), "blocks": ((),), "head": params}
    print(f"{name:8} {float(loss):.2f} {labels.shape} {float(parallel.sequential_loss(model, (stage,), x, y)):.2f}")

# %% [markdown]
# ## nnx modules with batch norm or dropout
#
# Such a module changes when it is called. A loss that closes over it changes it from inside of a trace, which nnx
# forbids:


# %%
class Noisy(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)

    def __call__(self, x):
        return self.dropout(self.norm(self.dense(x)))


model = Noisy(nnx.Rngs(0))
graph, params, rest = nnx.split(model, nnx.Param, ...)


def naive(params, batch):
    nnx.update(model, params)
    return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()


try:
    pruning.connection_sensitivity(naive, params, (x, y))
except Exception as error:
    print(type(error).__name__)

# %% [markdown]
# Merge inside of the loss instead: the copy may change, the module does not. What a method needs is the loss alone,
# so that new running means are dropped here; the same pattern with one batch is how every score, attack and
# measurement reads such a network.


# %%
def loss_fn(params, batch):
    copy = nnx.merge(graph, params, rest, copy=True)
    return optax.softmax_cross_entropy_with_integer_labels(copy(batch[0]), batch[1]).mean()


scores = pruning.connection_sensitivity(loss_fn, params, (x, y))
print(sorted(jax.tree.leaves(trees.path_names(scores))))

# %% [markdown]
# In training, what is not a parameter comes back as the loss's second result, and goes in again with the next step.
# Dropout's keys are part of it, so that each step has new noise.


# %%
def training_loss(params, rest, batch):
    copy = nnx.merge(graph, params, rest, copy=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(copy(batch[0]), batch[1]).mean()
    return loss, nnx.split(copy, nnx.Param, ...)[2]


@jax.jit
def step(params, opt_state, rest):
    grads, rest = jax.grad(training_loss, has_aux=True)(params, rest, (x, y))
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, rest


optimizer = pruning.pruned(optax.adam(1e-2), pruning.prune_masks(scores, sparsity=0.5))
opt_state = optimizer.init(params)
for _ in range(3):
    params, opt_state, rest = step(params, opt_state, rest)
nnx.update(model, params, rest)  # back into the module
print(model.norm.mean[...])
