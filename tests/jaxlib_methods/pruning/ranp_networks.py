"""Small networks with every kind of wiring that the removal of neurons has to follow."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


def abstract(shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def filled(build, seed=0):
    """The module with random numbers in it, drawn by NumPy: nothing is compiled."""
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(build))
    draw = lambda leaf: jnp.asarray(rng.uniform(0.2, 1.0, leaf.shape) * rng.choice([-1, 1], leaf.shape), leaf.dtype)
    net = nnx.merge(graph, jax.tree.map(draw, state))
    for _, module in nnx.iter_modules(net):
        if isinstance(module, nnx.BatchNorm):
            module.var[...] = jnp.abs(module.var[...])
        if isinstance(module, nnx.Conv):
            module.conv_general_dilated = jax.lax.conv_general_dilated  # compiles faster than patches
    return net


def mean_pool(x, window):
    """Not flax's, which divides by an integer: the tests run without implicit promotion."""
    window = (1, *window, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / float(np.prod(window))


class Plain(nnx.Module):
    """Two volume convolutions, the first with a bias, and a linear head on flattened features."""

    def __init__(self, widths=(4, 3), *, norm=False, rngs):
        a, b = widths
        self.conv1 = nnx.Conv(1, a, (3, 3, 3), use_bias=not norm, rngs=rngs)
        self.bn = nnx.BatchNorm(a, rngs=rngs) if norm else None
        self.conv2 = nnx.Conv(a, b, (3, 3, 3), rngs=rngs)
        self.head = nnx.Linear(8 * b, 2, rngs=rngs)

    def __call__(self, x):
        x = self.conv1(x)
        x = nnx.relu(x if self.bn is None else self.bn(x))
        x = nnx.max_pool(nnx.relu(self.conv2(x)), (2, 2, 2), strides=(2, 2, 2))
        return self.head(x.reshape(x.shape[0], -1))


class Zoo(nnx.Module):
    """Residual sum, depthwise and grouped convolutions, gates, concatenation, transposed convolution, flattening."""

    def __init__(self, *, rngs):
        conv = lambda m, n, window=3, **options: nnx.Conv(m, n, (window,) * 3, rngs=rngs, **options)
        self.stem, self.stem_bn = conv(2, 6), nnx.BatchNorm(6, rngs=rngs)
        self.expand, self.depthwise = conv(6, 8, 1), conv(8, 16, feature_group_count=8)
        self.depthwise_bn, self.project = nnx.BatchNorm(16, rngs=rngs), conv(16, 6, 1)
        self.squeeze, self.excite = nnx.Linear(6, 3, rngs=rngs), nnx.Linear(3, 6, rngs=rngs)
        self.grouped = conv(8, 4, feature_group_count=2)
        self.side = conv(2, 8, 1)
        self.up = nnx.ConvTranspose(10, 5, (2, 2, 2), strides=(2, 2, 2), rngs=rngs)
        self.shift = nnx.Param(jax.random.normal(rngs.params(), (5,)))
        self.head = nnx.Linear(8 * 5, 3, rngs=rngs)

    def __call__(self, x):
        a = nnx.relu(self.stem_bn(self.stem(x)))
        a = a + self.project(nnx.relu6(self.depthwise_bn(self.depthwise(nnx.silu(self.expand(a))))))
        gate = nnx.sigmoid(self.excite(nnx.relu(self.squeeze(a.mean((1, 2, 3))))))
        a = a * gate[:, None, None, None, :]
        b = self.grouped(nnx.tanh(self.side(x)))
        x = jnp.concatenate([a, b], axis=-1)  # the order counts: six channels, then four
        x = nnx.relu(self.up(x)) + self.shift[None, None, None, None, :]
        x = mean_pool(x, (2, 4, 4))
        return self.head(jnp.moveaxis(x, -1, 1).reshape(x.shape[0], -1))


class Around(nnx.Module):
    """conv1, then whatever is given, then conv2: for what cannot be reduced."""

    def __init__(self, between, *, norm=None, rngs):
        self.conv1 = nnx.Conv(1, 4, (3, 3), rngs=rngs)
        self.norm = None if norm is None else norm(4, rngs=rngs)
        self.between = between
        self.conv2 = nnx.Conv(4, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = self.conv1(x)
        x = x if self.norm is None else self.norm(x)
        return self.conv2(self.between(x))
