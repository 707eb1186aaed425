"""flax nnx modules with what they are called with, for the battery in `tests/batteries/test_modules.py`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import nnx

from jaxlib_methods import classifiers, message_passing, models
from tests.registry.functions import array


class Row(NamedTuple):
    """One module."""

    name: str
    make: Callable[[nnx.Rngs], Any]
    inputs: tuple[Any, ...]
    paper: str | None = None  # key of references.bib, if it comes from a paper


ETF = "markou2024guiding"
ROWS = [
    Row("NearestETFHead", lambda rngs: classifiers.NearestETFHead(6, 3), (array(4, 6), jnp.arange(4) % 3), ETF),
    Row("FixedETFHead", lambda rngs: classifiers.FixedETFHead(6, 3), (array(4, 6),), ETF),
    Row("NormalizedHead", lambda rngs: classifiers.NormalizedHead(6, 3, rngs=rngs), (array(4, 6),), ETF),
    Row(
        "MessagePassing",
        lambda rngs: message_passing.MessagePassing(3, num_iterations=2),
        (array(1, 4, 5, 3),),
        "xu2020fast",
    ),
    Row("LeNet300", lambda rngs: models.LeNet300(num_classes=10, rngs=rngs), (array(2, 28, 28, 1),)),
]
