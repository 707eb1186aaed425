"""The repair of approximate isometry: one compiled loop over all layers, against a loop over layers in Python.

Cases `repair NETWORK steps=S`: S steps of gradient descent on the sum of ||C^T C - I||_F over the layers of a network
with nine tenths of its weights removed at random; `vgg_c` is VGG-16 for CIFAR-10 in SNIP's variant, `mlp100` a hundred
layers of width 100. "python loop" calls one jitted step for each layer and step, compiled once for every shape, as one
writes it first; "torch" is PyTorch's autograd and SGD on the same sum. `flops` is the work of the products, 4 n k
min(n, k) for each layer and step; the paper takes 10,000 steps.
"""

import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, measure, peer
from jaxlib_methods import models, pruning

HEADLINES = (
    ("repair vgg_c steps=3", "compiled loop", ("python loop", "torch")),
    ("repair mlp100 steps=30", "compiled loop", ("python loop", "torch")),
)
CASES = {"vgg_c": 3, "mlp100": 30}  # network -> steps
Layers = dict[str, jax.Array]


def run(options: Options) -> Iterator[Record]:
    """Yields both cases; with --quick the hundred small layers alone."""
    for network, steps in CASES.items():
        name = f"repair {network} steps={steps}"
        if options.selects(name) and not (options.quick and network == "vgg_c"):
            weights, masks = make(network)
            yield from measure(
                Case(
                    benchmark="signal_propagation",
                    name=name,
                    implementations={
                        "compiled loop": Implementation(jax.jit(compiled_loop(steps)), (weights, masks)),
                        "python loop": Implementation(python_loop(steps), (weights, masks)),
                        "torch": peer("torch", lambda torch: torch_loop(torch, weights, masks, steps)),
                    },
                    reference="python loop",
                    flops=float(steps * sum(4 * n * k * min(n, k) for n, k in map(as_matrix, weights.values()))),
                    seconds=40.0,
                ),
                options,
            )


def make(network: str) -> tuple[Layers, Layers]:
    """Orthogonal weights by name, and masks that keep a tenth of them."""
    if network == "mlp100":
        shapes = {"000": (784, 100), "099": (100, 10)} | {f"{layer:03}": (100, 100) for layer in range(1, 99)}
    else:
        params = nnx.eval_shape(
            lambda: models.create(network, num_classes=10, input_shape=(32, 32, 3), rngs=nnx.Rngs(0))
        )
        leaves = [leaf for leaf in jax.tree.leaves(nnx.state(params, nnx.Param)) if leaf.ndim > 1]
        shapes = {f"{layer:03}": leaf.shape for layer, leaf in enumerate(leaves)}
    zeros = {name: jnp.zeros(shape) for name, shape in shapes.items()}
    weights = pruning.reinitialize(zeros, key=jax.random.key(0), kind="orthogonal")
    return weights, pruning.prune_masks(pruning.scores.random(weights, key=jax.random.key(1)), 0.9)


def as_matrix(weight: jax.Array) -> tuple[int, int]:
    return weight.size // weight.shape[-1], weight.shape[-1]


def compiled_loop(steps: int) -> Callable[[Layers, Layers], Layers]:
    return lambda weights, masks: pruning.repair_isometry(weights, masks, num_steps=steps).params


def python_loop(steps: int) -> Callable[[Layers, Layers], Layers]:
    step = jax.jit(lambda weight, mask: weight - 0.1 * mask * jax.grad(pruning.isometry.isometry_loss)(weight))

    def repair(weights: Layers, masks: Layers) -> Layers:
        repaired = {}
        for name, weight in weights.items():
            mask = masks[name].astype(weight.dtype)
            weight = weight * mask
            for _ in range(steps):
                weight = step(weight, mask)
            repaired[name] = weight
        return repaired

    return repair


def torch_loop(torch: Any, weights: Layers, masks: Layers, steps: int) -> Implementation:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    start = {name: torch.from_numpy(np.array(weight)).reshape(as_matrix(weight)) for name, weight in weights.items()}
    kept = {name: torch.from_numpy(np.array(mask)).reshape(start[name].shape).float() for name, mask in masks.items()}

    def repair() -> Any:
        C = {name: (weight * kept[name]).requires_grad_() for name, weight in start.items()}
        optimizer = torch.optim.SGD(C.values(), lr=0.1)
        for _ in range(steps):
            optimizer.zero_grad()
            masked = [C[name] * kept[name] for name in C]
            residuals = [torch.linalg.norm(M.T @ M - torch.eye(M.shape[1])) for M in masked]
            torch.stack(residuals).sum().backward()
            optimizer.step()
        return C

    numpy = lambda C: {name: C[name].detach().numpy().reshape(weights[name].shape) for name in C}
    return Implementation(repair, (), canonical=numpy)
