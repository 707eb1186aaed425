"""What malicious workers make of an honest message: pure functions of it."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxlib_methods.parallel.integrity.distances import expand_reference, message_distances
from jaxlib_methods.parallel.integrity.verifiers import VerifierState

__all__ = [
    "adaptive",
    "collude",
    "invisible_noise",
    "random_sign",
    "random_values",
]


def random_values(x: jax.Array, *, key: jax.Array, matched: bool = False) -> jax.Array:
    """Normal numbers: N(0, 1), or with the mean and deviation of the tensor.

    Args:
      x: the honest tensor.
      key: typed key.
      matched: whether to imitate it.

    Returns:
      An array like `x`.

    Example:
      >>> random_values(jnp.zeros((2, 3)), key=jax.random.key(0)).shape
      (2, 3)

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    z = jax.random.normal(key, x.shape, x.dtype)
    return jnp.mean(x) + jnp.std(x) * z if matched else z


def random_sign(x: jax.Array, probability: float | int = 0.5, *, key: jax.Array) -> jax.Array:
    """Flips the sign of each entry with a probability.

    Args:
      x: the honest tensor.
      probability: p.
      key: typed key.

    Returns:
      An array like `x`.

    Example:
      >>> random_sign(jnp.ones(3), 1.0, key=jax.random.key(0)).tolist()
      [-1.0, -1.0, -1.0]

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    return jnp.where(jax.random.bernoulli(key, probability, x.shape), -x, x)


def invisible_noise(x: jax.Array, level: float | int = 0.99) -> jax.Array:
    r"""$a + z\,\mathrm{std}(a)$ with the normal quantile z at the level: a shift within the spread of honest entries.

    Args:
      x: the honest tensor a.
      level: p in (0, 1).

    Returns:
      An array like `x`.

    Example:
      >>> [round(float(y), 3) for y in invisible_noise(jnp.array([-1.0, 1.0]))]
      [1.326, 3.326]

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel], after Baruch et al. (NeurIPS 2019),
    arXiv:1902.06156 [baruch2019little]; the deviation over all entries of the tensor is this library's choice.
    """
    z = jax.scipy.special.ndtri(jnp.asarray(level, jnp.float32)).astype(x.dtype)
    return x + z * jnp.std(x)


def adaptive(
    x: jax.Array,
    verifier: VerifierState,
    *,
    key: jax.Array,
    share: float | int = 0.9,
    reduce_axes: Sequence[int] = (0,),
) -> jax.Array:
    """The reference plus the largest random perturbation that stays within a share of all fences.

    Args:
      x: the honest tensor; only its shape matters.
      verifier: state of the verifier that will test the message.
      key: typed key of the perturbation's direction.
      share: of the fences.
      reduce_axes: the verifier's.

    Returns:
      An array like `x`: one of 40 sizes of the perturbation, from 1e-4 to 1e2 of the reference's root mean square, or
      the bare reference.

    Example:
      >>> from jaxlib_methods.parallel.integrity import VerifierConfig, init_verifier
      >>> state = init_verifier(VerifierConfig(threshold=0.5), 2, (2, 3, 5), key=jax.random.key(0))
      >>> adaptive(jnp.zeros((2, 3, 5)), state, key=jax.random.key(1)).shape
      (2, 3, 5)

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    m = verifier.reference
    sizes = jnp.concatenate([jnp.zeros(1), jnp.geomspace(1e-4, 1e2, 40)]).astype(m.dtype)
    step = jnp.sqrt(jnp.mean(m**2)) * jax.random.normal(key, m.shape, m.dtype)
    candidates = m[None] + sizes[:, None, None] * step[None]
    distances = message_distances(candidates, m, verifier.projections)
    passing = jnp.all(distances <= share * verifier.fences[None], axis=1)
    largest = jnp.max(jnp.where(passing, jnp.arange(len(sizes)), 0))
    return expand_reference(candidates[largest], x.shape, reduce_axes).astype(x.dtype)


def collude(messages: jax.Array, malicious: jax.Array, share: float | int) -> jax.Array:
    """The first `share` of the malicious workers, rounded up, all send what the first of them sends.

    Args:
      messages: (R, ...).
      malicious: bool (R,).
      share: q in [0, 1].

    Returns:
      An array like `messages`.

    Example:
      >>> collude(jnp.array([0.0, 1.0, 2.0, 3.0]), jnp.array([False, True, True, True]), 0.6).tolist()
      [0.0, 1.0, 1.0, 3.0]

    Source: Dolatabadi et al. (2026), arXiv:2603.03592 [dolatabadi2026sentinel].
    """
    nth = jnp.cumsum(malicious.astype(jnp.float32))
    together = malicious & (nth <= jnp.ceil(share * jnp.sum(malicious.astype(jnp.float32))))
    return jnp.where(together.reshape(-1, *(1,) * (messages.ndim - 1)), messages[jnp.argmax(malicious)][None], messages)
