"""What the async_mesh experiment refuses."""

import pytest

from experiments.methods import async_mesh


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": 3}, "stages must divide the 8 blocks, got 3"),
        ({"replicas": 1}, "replicas must be at least 2, got 1"),
        ({"replicas": 3}, "replicas must divide the batch size 8, got 3"),
        ({"methods": ()}, "methods is empty"),
        ({"fraction": 1.5}, r"fraction must lie in \(0, 1\], got 1.5"),
        ({"tau": -1}, "tau must not be negative, got -1"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
    ],
)
def test_mistakes_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        async_mesh.Config(**options)
