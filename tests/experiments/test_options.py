"""Options say by their annotations what they take; a refusal names the option, the value and the remedy."""

import dataclasses
from typing import Annotated, Literal

import pytest

from experiments._machinery.options import Count, OneOf, Options, Positive, Range, Share


@dataclasses.dataclass(frozen=True)
class Config(Options):
    sparsity: tuple[Annotated[float, Range(0, 1, closed="left", remedy="0.98 removes 98 of 100")], ...] = (0.9,)
    steps: Count | None = None
    rate: Positive = 0.1
    share: Share = 1.0
    model: Annotated[str, OneOf(("mlp", "cnn"))] = "mlp"
    scores: tuple[Literal["snip", "random"], ...] = ("snip",)
    ends: tuple[float, Annotated[float, Range(0)]] = (0.0, 1.0)
    above: Annotated[float, Range(1, closed="neither")] = 2.0


def test_what_lies_within_is_taken():
    Config(sparsity=(0.0, 0.99), steps=1, share=0.0, scores=("random", "snip"), above=1.5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": (0.5, 1.0)}, "sparsity must lie in [0, 1), got 1.0; 0.98 removes 98 of 100"),
        ({"sparsity": ()}, "sparsity is empty; name at least one"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"rate": 0.0}, "rate must be positive, got 0.0"),
        ({"share": 1.5}, "share must lie in [0, 1], got 1.5"),
        ({"model": "rnn"}, "model must be one of mlp, cnn, got 'rnn'"),
        ({"scores": ("grasp",)}, "scores must be one of 'snip', 'random', got 'grasp'"),
        ({"ends": (0.0, -1.0)}, "ends must not be negative, got -1.0"),
        ({"above": 1.0}, "above must be above 1, got 1.0"),
        ({"rate": float("nan")}, "rate must be positive, got nan"),
    ],
)
def test_what_does_not_is_named(options, message):
    with pytest.raises(ValueError) as caught:
        Config(**options)
    assert str(caught.value) == message
