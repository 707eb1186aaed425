"""A quantized training step against a float one, and products with packed weights against float32 and int8 ones.

Cases `step NETWORK batch=B`: projection, loss, gradient and update of one step, all jitted, from the same batch; the
float step has Adam as well. The LeNets are batch-normalised, as networks with binary weights are trained: without it
their logits saturate the softmax, and gradients underflow. The aim is ratios["float"] >= 0.87, an
overhead of at most 15 %. Beside the 28 bytes a weight of a float step's Adam and update, the scalar forms must move 8
(read x, write w) and the lifted ones 36 with two labels (all of Adam's arrays twice, x once more). A network that uses
a weight many times, in a convolution or a large batch, hides that; a dense one does not.

Cases `matmul SPEC`: x @ W in float32 with W packed (1 or 2 bits a weight), in float32 and in int8 (converted to float32
by XLA on the way). `peak_bytes` holds the weights and what stands in memory while the product runs. On other platforms
than its own a kernel is skipped with a note: the interpreter's time says nothing.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, Skip, measure
from jaxlib_methods import models, quantization
from jaxlib_methods.kernels import ArgSpec, packed_matmul as kernel
from jaxlib_methods.kernels.packed_matmul import pallas_gpu, pallas_tpu

HEADLINES = (
    ("step lenet5 batch=100", "binary_connect", ("float",), 0.87),
    ("step lenet5 batch=100", "md_tanh_s", ("float",), 0.87),
    ("step lenet5 batch=100", "md_softmax_s", ("float",), 0.87),
    ("step lenet5 batch=100", "pmf", ("float",), 0.87),
    ("step lenet300 batch=100", "binary_connect", ("float",), 0.87),
    ("step lenet300 batch=100", "md_tanh_s", ("float",), 0.87),
    ("step lenet300 batch=100", "md_softmax_s", ("float",), 0.87),
    ("step lenet300 batch=100", "pmf", ("float",), 0.87),
    ("matmul transformer 1 token", "packed", ("float32", "int8")),
    ("matmul transformer 128 tokens", "packed", ("float32", "int8")),
)
NETWORKS = {"lenet300": (100, (28, 28, 1)), "lenet5": (100, (28, 28, 1)), "resnet18": (32, (32, 32, 3))}
BETA = quantization.inverse_temperature_schedule(1.02, 100)
METHODS = {
    "pmf": ("softmax", functools.partial(quantization.proximal_mean_field, inverse_temperature=BETA)),
    "md_softmax_s": ("softmax", functools.partial(quantization.stable_mirror_descent, inverse_temperature=BETA)),
    "md_tanh_s": ("tanh", functools.partial(quantization.stable_mirror_descent, inverse_temperature=BETA)),
    "binary_connect": ("round", quantization.binary_connect),
}


def run(options: Options) -> Iterator[Record]:
    """Yields every case; with --quick neither ResNet-18 nor matrices of more than twenty million weights."""
    for network, (batch, shape) in NETWORKS.items():
        name = f"step {network} batch={batch}"
        if options.selects(name) and not (options.quick and network == "resnet18"):
            yield from measure(_step_case(name, network, batch, shape), options)
    for spec in kernel.ARG_SPECS:
        depth, n = spec.args["x"].shape[1], spec.args["words"].shape[1]
        name = f"matmul {spec.name}"
        if options.selects(name) and not (options.quick and depth * n > 2 * 10**7):
            yield from measure(_matmul_case(name, spec), options)


def _step_case(name: str, network: str, batch: int, shape: tuple[int, ...]) -> Case:
    lenet = {"lenet300": models.LeNet300, "lenet5": models.LeNet5}.get(network)
    if lenet:
        model = lenet(10, input_shape=shape, batch_norm=True, rngs=nnx.Rngs(0))
    else:
        model = models.create(network, num_classes=10, input_shape=shape, rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    x = jax.random.normal(jax.random.key(0), (batch, *shape))
    labels = jnp.arange(batch, dtype=jnp.int32) % 10

    def loss(weights: Any, rest: Any) -> tuple[jax.Array, Any]:
        model = nnx.merge(graph, weights, rest, copy=True)
        out = optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()
        return out, nnx.split(model, nnx.Param, ...)[2]

    def step(
        variables: Any, state: Any, rest: Any, *, project: Callable[[Any, Any], Any], optimizer: Any
    ) -> tuple[Any, Any, Any]:
        grads, rest = jax.grad(loss, has_aux=True)(project(variables, state), rest)
        updates, state = optimizer.update(grads, state, variables)
        return optax.apply_updates(variables, updates), state, rest

    def implementation(variables: Any, project: Callable[[Any, Any], Any], optimizer: Any) -> Implementation:
        jitted = jax.jit(functools.partial(step, project=project, optimizer=optimizer), donate_argnums=(0, 1))
        return Implementation(jitted, (variables, optimizer.init(variables), rest))

    implementations = {}
    for method, (projection, make) in METHODS.items():
        excluded = (("bn", None),) if network == "resnet18" else ()
        lattice = quantization.Lattice(rules=excluded, projection=projection)
        aux = quantization.init_auxiliary(params, lattice, key=jax.random.key(1))
        annealed = projection != "round"
        beta_of = quantization.read_inverse_temperature if annealed else lambda state: 1.0
        project = lambda aux, state, lattice=lattice, beta_of=beta_of: quantization.project(
            aux, lattice, beta_of(state)
        )
        implementations[method] = implementation(aux, project, make(1e-3, lattice))
    implementations["float"] = implementation(params, lambda params, state: params, optax.adam(1e-3))
    return Case("quantization", name, implementations, seconds=10.0, min_rounds=5)


def _matmul_case(name: str, spec: ArgSpec) -> Case:
    labels, (m, depth), n = spec.args["labels"], spec.args["x"].shape, spec.args["words"].shape[1]
    rng = np.random.default_rng(0)
    codes = rng.integers(0, len(labels), (depth, n), dtype=np.uint8)
    x = jnp.asarray(rng.integers(-8, 9, (m, depth)), jnp.float32)  # exact in any order of addition
    bits = kernel.bits_for(len(labels))
    words = kernel.pack_codes(jnp.asarray(codes), bits)
    cost = kernel.cost_estimate(m, depth, n, bits)
    int8 = jnp.asarray(np.asarray(labels, np.int8)[codes])
    dense = int8.astype(jnp.float32)
    packed = lambda implementation: functools.partial(
        kernel.packed_matmul, labels=labels, implementation=implementation
    )

    def on_its_device(platform: str) -> Implementation | Skip:
        if jax.default_backend() != platform:
            return Skip(f"it runs on a {platform.upper()}, this is a {jax.default_backend().upper()}")
        kernel_module = {"gpu": pallas_gpu, "tpu": pallas_tpu}[platform]
        if reason := kernel_module.can_use((m, depth, n), x.dtype, len(labels)):
            return Skip(reason)
        return Implementation(jax.jit(packed(f"pallas_{platform}")), (x, words))

    return Case(
        benchmark="quantization",
        name=name,
        implementations={
            "packed": Implementation(jax.jit(packed("xla")), (x, words)),
            "packed, GPU kernel": on_its_device("gpu"),
            "packed, TPU kernel": on_its_device("tpu"),
            "float32": Implementation(jax.jit(jnp.matmul), (x, dense)),
            "int8": Implementation(jax.jit(lambda x, w: x @ w.astype(jnp.float32)), (x, int8)),
        },
        reference="float32",
        flops=float(cost.flops),
        bytes=float(cost.bytes_accessed),
        seconds=5.0,
        min_rounds=5,
    )
