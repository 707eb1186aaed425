"""Which channels of a network are the same channel: found by following every axis of every array through its jaxpr.

Each index along an axis of a parameter gets an identity. An addition makes the identities of its operands equal, a
product with a kernel makes those of the kernel's inputs equal to those of the features it reads, a concatenation
strings them together, a reshape repeats them. What is equal in the end is removed or kept together. An operation
without a rule, and one that mixes the channels of an axis, blocks the channels that enter it.

An axis that holds no channels has instead a string, which says what it is; `None` is an axis along which an array is
constant (broadcast), which follows any length.
"""

from typing import Any, NamedTuple

import numpy as np

Axis = np.ndarray | str | None  # identities [length], what else it is, or broadcast

INPUT = "the network's input"
SPATIAL = "an axis that holds no channels"
CONSTANT = "an array of fixed size"


class Value(NamedTuple):
    """What is known of an array while the jaxpr is followed."""

    axes: tuple[Axis, ...]
    leaves: frozenset[int] = frozenset()  # the parameters it is computed from
    live: bool = False  # whether it depends on the network's input
    total_of: Any = None  # the variable whose sum over an axis it is


class Product(NamedTuple):
    """A convolution or matrix product of features with a kernel."""

    leaves: frozenset[int]  # of the kernel
    outputs: np.ndarray | None  # identities of its output channels; None: more than one axis of them
    inputs: Axis  # of the features it reads
    groups: int
    elements: int  # of the output
    kernel_macs: int  # multiply-accumulates for each of them
    linear: bool  # a matrix product


class Applied(NamedTuple):
    """An operation that the profiler counts beside the products."""

    kind: str  # "norm", "activation", "pool", "mean pool" or "softmax"
    leaves: frozenset[int]
    elements: int  # of the output
    window: int = 0  # elements of a pooling window


class Channels:
    """Identities of channels as a union-find, and what following the jaxpr found out about them."""

    def __init__(self) -> None:
        self._parent = np.zeros(0, np.int64)
        self.fixed: list[np.ndarray] = []  # identities that stay because the network's input or output has them
        self.blocked: list[tuple[np.ndarray, str]] = []  # identities that cannot be removed, and why
        self.products: list[Product] = []
        self.events: list[Product | Applied] = []  # in the order of execution

    def fresh(self, length: int) -> np.ndarray:
        start = len(self._parent)
        self._parent = np.concatenate([self._parent, np.arange(start, start + length)])
        return np.arange(start, start + length)

    def roots(self, identities: np.ndarray) -> np.ndarray:
        found = self._parent[identities]
        while not np.array_equal(found, above := self._parent[found]):
            found = above
        return found

    def unite(self, a: Axis, b: Axis, what: str = "") -> Axis:
        """Makes two axes of equal length the same and returns it."""
        if a is None or b is None:
            return b if a is None else a
        if isinstance(a, str) or isinstance(b, str):
            if not isinstance(a, str):
                a, b = b, a
            if not isinstance(b, str):
                self.block(b, a, what)
            return b
        different = (ra := self.roots(a)) != (rb := self.roots(b))
        for x, y in zip(ra[different].tolist(), rb[different].tolist(), strict=True):
            x, y = self._root(x), self._root(y)  # roots before this loop
            self._parent[max(x, y)] = min(x, y)
        return a

    def _root(self, identity: int) -> int:
        while (above := int(self._parent[identity])) != identity:
            identity = above
        return identity

    def block(self, axis: Axis, reason: str, what: str = "") -> None:
        if isinstance(axis, np.ndarray):
            if reason == INPUT:
                self.fixed.append(axis)
            else:
                self.blocked.append((axis, f"{what} ties them to {reason}" if what else reason))
