"""Adversarial images by projected gradient descent, against Foolbox and a loop in Python.

Cases `pgd NETWORK batch=B`: 20 steps in the L-infinity ball from a random start, on random images, with the check of
what was reached; throughput is B / median. `njs` and `hns` are the ++ attacks: the price of their temperatures (hns:
ten backward passes at the start). `python loop` is one jitted step called 20 times, as one writes it in JAX. Foolbox
runs in PyTorch with the same weights and makes the same check. `error` is the relative difference of the success rates,
from other random starts.

Model of the work: a forward pass and a backward pass to the image alone for every step, and one forward pass more.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, measure, peer
from jaxlib_methods import models, robustness

HEADLINES = (
    ("pgd lenet300 batch=250", "ours", ("foolbox", "python loop")),
    ("pgd lenet5 batch=100", "ours", ("foolbox", "python loop")),
)
# Batch, and multiply-adds of a forward pass of one image.
NETWORKS = {"lenet300": (250, 784 * 300 + 300 * 100 + 1000), "lenet5": (100, 576 * 500 + 64 * 25_000 + 405_000)}
STEPS, EPSILON, STEP = 20, 0.02, 0.005


def run(options: Options) -> Iterator[Record]:
    """Yields every case."""
    for network, (batch, multiply_adds) in NETWORKS.items():
        name = f"pgd {network} batch={batch}"
        if options.selects(name):
            yield from measure(_case(name, network, batch, 2.0 * batch * multiply_adds * (2 * STEPS + 1)), options)


def _case(name: str, network: str, batch: int, flops: float) -> Case:
    model = models.create(network, num_classes=10, input_shape=(28, 28, 1), rngs=nnx.Rngs(0))
    graph, params = nnx.split(model, nnx.Param)
    images = jax.random.uniform(jax.random.key(1), (batch, 28, 28, 1))
    apply = lambda params, images: nnx.merge(graph, params)(images)
    labels = jnp.argmax(jax.jit(apply)(params, images), axis=1)
    key = jax.random.key(2)

    def attack(scaling: Any) -> Implementation:
        run = lambda params, images, labels, scaling: robustness.pgd(
            apply, params, images, labels, key=key, radius=EPSILON, step_size=STEP, num_steps=STEPS, scaling=scaling
        )
        return Implementation(jax.jit(run), (params, images, labels, scaling), canonical=_success_rate)

    njs = robustness.network_jacobian_scaling(apply, params, images[:100])
    return Case(
        benchmark="robustness",
        name=name,
        implementations={
            "ours": attack(None),
            "ours, njs": attack(njs),
            "ours, hns": attack(robustness.HessianNormScaling()),
            "python loop": Implementation(_python_loop(apply, params, images, labels), canonical=_success_rate),
            "foolbox": peer("foolbox", lambda foolbox: _foolbox(foolbox, network, params, images, labels)),
        },
        reference="python loop",
        flops=flops,
        seconds=15.0,
        min_rounds=5,
    )


def _success_rate(result: Any) -> np.ndarray:
    return np.mean(np.asarray(result[-1]), keepdims=True)


def _python_loop(apply: Any, params: Any, images: jax.Array, labels: jax.Array) -> Callable[[], Any]:
    @jax.jit
    def step(params: Any, x: jax.Array) -> jax.Array:
        loss = lambda x: -jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(apply(params, x)), labels[:, None], axis=1))
        ahead = x + STEP * jnp.sign(jax.grad(loss)(x))
        return jnp.clip(jnp.clip(ahead, images - EPSILON, images + EPSILON), 0, 1)

    failed = jax.jit(lambda params, x: jnp.argmax(apply(params, x), axis=1) != labels)

    def attack() -> tuple[jax.Array, jax.Array]:
        x = jnp.clip(images + EPSILON * jax.random.uniform(jax.random.key(3), images.shape, minval=-1), 0, 1)
        for _ in range(STEPS):
            x = step(params, x)
        return x, failed(params, x)

    return attack


def _foolbox(foolbox: Any, network: str, params: Any, images: jax.Array, labels: jax.Array) -> Implementation:
    import torch

    build = {"lenet300": _torch_lenet300, "lenet5": _torch_lenet5}[network]
    model = foolbox.PyTorchModel(build(torch, params).eval(), bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=STEP, steps=STEPS, random_start=True)
    x = torch.from_numpy(np.array(images).transpose(0, 3, 1, 2).copy())
    y = torch.from_numpy(np.array(labels).astype(np.int64))

    def call() -> tuple[Any, Any]:
        _, clipped, success = attack(model, x, y, epsilons=EPSILON)
        return clipped, success

    return Implementation(call, canonical=_success_rate)


def _torch_layer(torch: Any, layer: Any) -> Any:
    """A linear or convolutional layer with the weights of ours."""
    kernel, bias = np.array(layer["kernel"][...]), torch.from_numpy(np.array(layer["bias"][...]))
    if kernel.ndim == 2:
        made = torch.nn.Linear(*kernel.shape)
        weight = kernel.T
    else:
        made = torch.nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[:2])
        weight = kernel.transpose(3, 2, 0, 1)
    with torch.no_grad():
        made.weight.copy_(torch.from_numpy(weight.copy()))
        made.bias.copy_(bias)
    return made


def _torch_lenet300(torch: Any, params: Any) -> Any:
    layers = [_torch_layer(torch, params[f"dense{i}"]) for i in (1, 2, 3)]
    relu = torch.nn.ReLU
    return torch.nn.Sequential(torch.nn.Flatten(), layers[0], relu(), layers[1], relu(), layers[2])


def _torch_lenet5(torch: Any, params: Any) -> Any:
    class ChannelsLast(torch.nn.Module):
        def forward(self, x: Any) -> Any:
            return x.permute(0, 2, 3, 1).reshape(len(x), -1)

    layer = functools.partial(_torch_layer, torch)
    pool = functools.partial(torch.nn.MaxPool2d, 2)
    convolutions = (layer(params["conv1"]), pool(), layer(params["conv2"]), pool(), ChannelsLast())
    return torch.nn.Sequential(*convolutions, layer(params["dense1"]), torch.nn.ReLU(), layer(params["dense2"]))
