# %% [markdown]
# # Stereo by message passing
#
# Two cameras see the same scene; a point at disparity $d$ is $d$ pixels further to the left in the right image. A
# Markov random field on the pixel grid, $E(x) = \sum_i \theta_i(x_i) + \sum_{ij} w_{ij} V(x_i, x_j)$, asks for
# disparities that explain the images and are smooth. Here the scene is made, so that the truth is known.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt

from jaxlib_methods import message_passing as mp

height, width = 48, 64
rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
truth = jnp.where((rows - 24) ** 2 + (columns - 36) ** 2 < 196, 6, 2)  # a disc before a wall
texture = jax.random.uniform(jax.random.key(0), (height, width + 8))
right = texture[:, 8:]
left = jnp.take_along_axis(texture, columns + 8 - truth, axis=1)
left += 0.05 * jax.random.normal(jax.random.key(1), left.shape)

# %% [markdown]
# Costs from the images, a potential, a solver. The lower bound says how far from the best energy the labels can be.

# %%
mrf = mp.GridMRF(mp.birchfield_tomasi(left, right, 8, outside_cost=0.5), mp.truncated_linear(0.05, truncation=2))
alone = mrf.unaries.argmin(-1)
solution = mp.trwp(mrf, rounding="sequential", evaluate_every=5, tolerance=1e-4)
wrong = lambda labels: float((labels != truth)[:, 8:].mean())
print(f"wrong pixels: costs alone {wrong(alone):.1%}, TRWP {wrong(solution.labels):.1%}")

# %%
figure, axes = plt.subplots(1, 4, figsize=(11, 2.4))
for axis, (title, image) in zip(
    axes, {"left": left, "truth": truth, "costs alone": alone, "TRWP": solution.labels}.items(), strict=True
):
    axis.imshow(image)
    axis.set(title=title, xticks=[], yticks=[])

# %% [markdown]
# The solvers differ in energy and in cost; on problems this small the exact ones say what is best.

# %%
solvers = {
    "SGM": mp.sgm(mrf),
    "ISGMR": mp.isgmr(mrf),
    "mean field": mp.mean_field(mrf),
    "TRWP": solution,
}
for name, found in solvers.items():
    print(f"{name:10} energy {float(mp.energy(mrf, found.labels)):8.2f}   wrong {wrong(found.labels):5.1%}")

# %% [markdown]
# Everything is differentiable: the gradient of a loss of the beliefs with respect to costs and potential is exact
# for the labels that the sweeps chose, and costs about two forward passes. Here the weight of the potential learns
# from the truth.


# %%
def loss(log_weight):
    found = mp.trwp(mrf._replace(pairwise=mp.truncated_linear(jnp.exp(log_weight), truncation=2)))
    log_p = jax.nn.log_softmax(-found.beliefs / 0.1)
    return -jnp.take_along_axis(log_p, truth[..., None], axis=-1)[:, 8:].mean()


gradient = jax.jit(jax.value_and_grad(loss))
log_weight = jnp.log(0.01)
for step in range(8):
    value, slope = gradient(log_weight)
    log_weight -= 0.5 * slope
    if step % 3 == 0:
        print(f"step {step}: loss {value:.3f}, weight {jnp.exp(log_weight):.3f}")
