"""What an attack checks before it starts: the images, their labels, and amounts in the units of the images."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

Bounds = tuple[jax.typing.ArrayLike, jax.typing.ArrayLike] | None


def check_arrays(images: jax.Array, labels: jax.Array) -> None:
    """Raises TypeError or ValueError for types and shapes that no attack takes."""
    if images.dtype not in (jnp.float32, jnp.float64):
        raise TypeError(
            f"images must be float32 or float64, got {images.dtype}; divide integers by 255, or cast inside apply"
        )
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if images.ndim < 2 or labels.shape != images.shape[:1] or not images.size:
        raise ValueError(f"images must be [batch, ...] and labels [batch], got {images.shape} and {labels.shape}")


def amount_of(name: str, value: jax.typing.ArrayLike, images: jax.Array, *, scalar: bool) -> jax.Array:
    """An argument in the units of the images, as an array that broadcasts to them."""
    value = jnp.asarray(value, images.dtype)
    if scalar and value.ndim:
        raise ValueError(f"{name} of an L2 norm must be a number, got an array of shape {value.shape}")
    try:
        fits = np.broadcast_shapes(value.shape, images.shape) == images.shape
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(f"{name} must broadcast to the images {images.shape}, got shape {value.shape}")
    return value


@functools.partial(jax.jit, static_argnames="classes")
def look_at(images: jax.Array, labels: jax.Array, low: jax.Array, high: jax.Array, classes: int) -> jax.Array:
    """Whether all values lie in the box, and whether all labels are classes: bool [2]."""
    low, high = (jnp.broadcast_to(value, images.shape) for value in (low, high))
    in_box = ((images >= low) & (images <= high)).all()
    return jnp.stack([in_box, ((labels >= 0) & (labels < classes)).all()])


def raise_for(looked: jax.Array, classes: int, bounds: Bounds) -> None:
    """Raises ValueError for what `look_at` found; traced values are not looked at."""
    if isinstance(looked, jax.core.Tracer):
        return
    in_box, known = np.asarray(looked)
    if not in_box:
        raise ValueError(f"images must lie in the box {bounds}; give the bounds of what apply_fn is given")
    if not known:
        raise ValueError(f"labels must lie in [0, {classes - 1}], the classes of the logits")
