# %% [markdown]
# # Weights in one bit
#
# Proximal mean-field and mirror descent train weights in $\{-1, 1\}$ through soft ones. An auxiliary variable $x$
# stands for a weight $w = \tanh(\beta x)$; as $\beta$ grows, the weights become binary by themselves, and rounding
# in the end changes nothing.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import optax
from sklearn.datasets import load_digits

from jaxlib_methods import quantization as q

images, labels = load_digits(return_X_y=True)
images = images.astype("float32") / 16
train, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])


def logits(weights, x):
    h = x @ weights["w1"]
    h = (h - h.mean(0)) / (h.std(0) + 1e-3)  # normalised over the batch: binary weights have no scale of their own
    return jax.nn.relu(h) @ weights["w2"] * weights["scale"]


def loss(weights, batch):
    x, y = batch
    return optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), y).mean()


params = {"w1": jnp.zeros((64, 256)), "w2": jnp.zeros((256, 10)), "scale": jnp.full((), 0.05)}

# %% [markdown]
# A `quantization.Lattice` says what is quantized and to which labels; here all but the scale. The optimizer holds
# the schedule of $\beta$ in its state, so that nothing is compiled again while it grows.

# %%
lattice = q.Lattice(labels=(-1, 1), projection="tanh", rules=(("scale", None),))
schedule = q.inverse_temperature_schedule(1.3, 10, maximum=1e35)
optimizer = q.stable_mirror_descent(1e-2, lattice, inverse_temperature=schedule)
aux = q.init_auxiliary(params, lattice, key=jax.random.key(0))
state = optimizer.init(aux)


@jax.jit
def step(aux, state):
    weights = q.project(aux, lattice, q.read_inverse_temperature(state))
    value, grads = jax.value_and_grad(loss)(weights, train)  # with respect to what the network saw
    updates, state = optimizer.update(grads, state, aux)
    return optax.apply_updates(aux, updates), state, value


curve, soft = [], []
for _ in range(300):
    weights = q.project(aux, lattice, q.read_inverse_temperature(state))
    soft.append(jnp.mean(jnp.abs(weights["w1"]) < 0.99))
    aux, state, value = step(aux, state)
    curve.append(value)

figure, (left, right) = plt.subplots(1, 2, figsize=(8, 2.6))
left.plot(curve)
left.set(xlabel="step", ylabel="training loss")
right.plot(soft)
right.set(xlabel="step", ylabel="share of soft weights")
figure.tight_layout()

# %% [markdown]
# `quantization.quantize` checks that every weight is exactly one of its labels. `quantization.pack` stores one bit
# a weight.

# %%
network = q.quantize(aux, lattice)
packed = q.pack(network, lattice)
print(f"accuracy {(logits(network, test[0]).argmax(-1) == test[1]).mean():.1%}")
print(f"bytes    {q.packing.packed_bytes(params)} -> {q.packing.packed_bytes(packed)}")
assert all((a == b).all() for a, b in zip(jax.tree.leaves(q.unpack(packed)), jax.tree.leaves(network), strict=True))

# %% [markdown]
# Training costs what float training costs: the bits are simulated until `quantization.pack`. Which method when:
# [quantization](../choose/quantization.md).
