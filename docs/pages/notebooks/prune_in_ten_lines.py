# %% [markdown]
# # Prune in ten lines
#
# SNIP removes weights before training: one batch, one gradient. The score of a weight is what the loss would change
# if it were removed, $|\partial L / \partial c_j|$ for the mask $c$, normalised over the network.

# %%
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

from jaxlib_methods import pruning

images, labels = load_digits(return_X_y=True)
images = images.astype("float32") / 16
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def logits(params, x):
    return jax.nn.relu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss(params, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()


k1, k2 = jax.random.split(jax.random.key(0))
params = {
    "w1": jax.nn.initializers.he_normal()(k1, (64, 300)),
    "b1": jnp.zeros(300),
    "w2": jax.nn.initializers.he_normal()(k2, (300, 10)),
    "b2": jnp.zeros(10),
}


# %% [markdown]
# Score, cut, mask. `pruning.prune_masks` keeps the largest scores of the whole network. Zero biases have the score
# 0 and are removed, as in the authors' code; `pruning.mark_prunable` says which parameters are candidates, where
# another choice is wanted.

# %%
scores = pruning.connection_sensitivity(loss, params, (train[0][:100], train[1][:100]))
masks = pruning.prune_masks(scores, sparsity=0.95)
sparse = pruning.apply_masks(params, masks)
{name: f"{mask.mean():.1%} kept" for name, mask in masks.items()}

# %% [markdown]
# `pruning.pruned` wraps any optax chain. It masks the gradients before the chain and the updates after it, so that
# momentum and weight decay cannot bring a weight back.


# %%
def fit(params, optimizer, num_steps=300):
    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params, train), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), length=num_steps)
    return params


def accuracy(params):
    return float((logits(params, test[0]).argmax(-1) == test[1]).mean())


adam = optax.adamw(3e-3)
dense, trained = fit(params, adam), fit(sparse, pruning.pruned(adam, masks))
print(f"dense  {accuracy(dense):.1%}")
print(f"5 %    {accuracy(trained):.1%}")

# %% [markdown]
# Every weight that was removed is still zero. This only simulates sparsity: the matrices have their old sizes and cost
# what they did. `pruning.remove_neurons` makes a network smaller for good.

# %%
assert all((trained[name] * ~mask == 0).all() for name, mask in masks.items())

# %% [markdown]
# The other scores have the same form, a tree like the parameters. Random ones are the control.

# %%
masks = pruning.prune_masks(pruning.scores.random(params, key=jax.random.key(1)), sparsity=0.95)
print(f"random {accuracy(fit(pruning.apply_masks(params, masks), pruning.pruned(adam, masks))):.1%}")
