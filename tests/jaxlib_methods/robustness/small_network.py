"""A small piecewise linear classifier, as a pure function and in NumPy, for the tests of attacks on it."""

import jax
import jax.numpy as jnp
import numpy as np

SHAPE = (4, 4, 1)


def network(seed=0, hidden=24, classes=5, scale=1.0):
    """Weights of a network with one hidden layer of ReLU units; `scale` multiplies the last layer."""
    first, second, bias = jax.random.split(jax.random.key(seed), 3)
    return {
        "first": jax.random.normal(first, (16, hidden)) / 2,
        "bias": jax.random.normal(bias, (hidden,)) / 4,
        "second": scale * jax.random.normal(second, (hidden, classes)),
    }


def apply(params, images):
    x = images.reshape(len(images), -1)
    return jax.nn.relu(x @ params["first"] + params["bias"][None]) @ params["second"]


def linear(weights, images):
    return images.reshape(len(images), -1) @ weights


def batch(count=32, seed=7, params=None):
    """Images in [0, 1] and, as labels, what the network says of them."""
    images = jax.random.uniform(jax.random.key(seed), (count, *SHAPE))
    return images, jnp.argmax(apply(network() if params is None else params, images), axis=1)


def numpy_logits_and_jacobian(params, image):
    """Logits [d] and Jacobian [d, 16] of one image in float64."""
    first, bias, second = (np.asarray(params[name], np.float64) for name in ("first", "bias", "second"))
    before = np.asarray(image, np.float64).reshape(-1) @ first + bias
    return np.maximum(before, 0) @ second, (second.T * (before > 0)) @ first.T


def numpy_softmax(a):
    e = np.exp(a - a.max())
    return e / e.sum()
