"""Sequence classifiers with one recurrent layer."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

__all__ = ["GRUClassifier", "LSTMClassifier"]


class _Classifier(nnx.Module):
    """Linear, one recurrent layer, and a linear read-out of its last state; one bias for each gate."""

    gates: int

    def __init__(self, num_classes: int, *, hidden: int = 128, input_shape: Sequence[int] = (28, 28), rngs: nnx.Rngs):
        if len(input_shape) < 2:
            raise ValueError(f"input_shape must be (steps, features...), got {tuple(input_shape)}")
        self.embed = nnx.Linear(math.prod(input_shape[1:]), hidden, rngs=rngs)
        self.input_gates = nnx.Linear(hidden, self.gates * hidden, rngs=rngs)
        self.hidden_gates = nnx.Linear(hidden, self.gates * hidden, use_bias=False, rngs=rngs)
        self.dense = nnx.Linear(hidden, num_classes, rngs=rngs)

    def _gate_inputs(self, x: jax.Array) -> jax.Array:
        """What the gates get from the input, for all steps in one product: (T, B, gates * hidden)."""
        x = x.reshape(*x.shape[:2], -1)
        return jnp.swapaxes(self.input_gates(self.embed(x)), 0, 1)

    def _zeros(self, gate_inputs: jax.Array) -> jax.Array:
        return jnp.zeros_like(gate_inputs[0, :, : gate_inputs.shape[-1] // self.gates])


class LSTMClassifier(_Classifier):
    """Linear(h), one LSTM layer of h units, and a linear layer on its last state.

    LSTM-s (h = 128) has 136,586 parameters on 28 rows of 28 pixels, LSTM-b (h = 256) 535,306.

    Args:
      num_classes: number of logits.
      hidden: units h.
      input_shape: (steps, features...) of one sequence; an image (H, W, C) is a sequence of its rows.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Raises:
      ValueError: if `input_shape` has no feature dimension.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> LSTMClassifier(10, hidden=4, input_shape=(8, 8), rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8))).shape
      (2, 10)

    Source: Hochreiter, Schmidhuber (Neural Computation, 1997), with forget gates [hochreiter1997long].
    """

    gates = 4

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_inputs = self._gate_inputs(x)
        recurrent = self.hidden_gates.kernel[...]

        def step(carry, gate_input):
            c, h = carry
            i, f, g, o = jnp.split(gate_input + h @ recurrent, 4, axis=-1)
            c = nnx.sigmoid(f) * c + nnx.sigmoid(i) * jnp.tanh(g)
            return (c, nnx.sigmoid(o) * jnp.tanh(c)), None

        zeros = self._zeros(gate_inputs)
        (_, h), _ = jax.lax.scan(step, (zeros, zeros), gate_inputs)
        return self.dense(h)


class GRUClassifier(_Classifier):
    """Linear(h), one GRU layer of h units, and a linear layer on its last state.

    GRU-s (h = 128) has 103,690 parameters on 28 rows of 28 pixels, GRU-b (h = 256) 403,978.

    Args:
      num_classes: number of logits.
      hidden: units h.
      input_shape: (steps, features...) of one sequence; an image (H, W, C) is a sequence of its rows.
      rngs: of the initialisation: kernels from a variance-scaling truncated normal (fan-in), biases zero.

    Raises:
      ValueError: if `input_shape` has no feature dimension.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> GRUClassifier(10, hidden=4, input_shape=(8, 8), rngs=nnx.Rngs(0))(jnp.zeros((2, 8, 8))).shape
      (2, 10)

    Source: Cho et al. (EMNLP 2014), arXiv:1406.1078 [cho2014learning]; the reset gate multiplies the recurrent
    product, as in cuDNN.
    """

    gates = 3

    def __call__(self, x: jax.Array) -> jax.Array:
        gate_inputs = self._gate_inputs(x)
        recurrent = self.hidden_gates.kernel[...]

        def step(h, gate_input):
            r_x, z_x, n_x = jnp.split(gate_input, 3, axis=-1)
            r_h, z_h, n_h = jnp.split(h @ recurrent, 3, axis=-1)
            r, z = nnx.sigmoid(r_x + r_h), nnx.sigmoid(z_x + z_h)
            n = jnp.tanh(n_x + r * n_h)
            return (1 - z) * n + z * h, None

        h, _ = jax.lax.scan(step, self._zeros(gate_inputs), gate_inputs)
        return self.dense(h)
