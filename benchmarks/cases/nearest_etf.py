"""The nearest-ETF inner problem, forward and backward, against Riemannian trust regions and a differentiated SVD.

Cases `solver K=... d=...`: frame and dL/dY for given class means, the state one step after the previous one.
  ours           polar factor with its closed-form backward, float32, method None: on CPU an SVD at K = 10 and the
                 K x K eigenproblem above
  newton_schulz  the same by matrix products (the accelerators' path)
  svd            the same by an SVD
  svd autodiff   the same frame, differentiated through jnp.linalg.svd
  trust region   the authors' route in float64: pymanopt's trust regions with their settings (30 outer iterations,
                 gradient norm 1e-6, warm start), then, up to K = 50, the dense declarative backward with all K(K+1)/2
                 constraints. Above, the forward alone is timed; at K = 1000 even that takes too long to repeat.
  ours, float64  the reference of `error`
Case `dense backward K=100 d=512` times the authors' forward and backward at K = 100, 93 s a call on one core: the
Jacobian of the constraints takes 2 GB there (8 TB at K = 1000, d = 2048). The aim is ratios["trust region"] >= 100.
`peak_bytes` of ours divided by 4 (d K + K^2) stays below ten: memory O(d K + K^2). LAPACK's own workspace, another
O(K^2), is not in it.

Cases `step ...`: one training step with the nearest-ETF head and with a learned linear classifier. `head only` leaves
the network out: what the head costs in itself at batch 256, by method, and without the gradient through the frame.
`resnet18` has the CIFAR stem and 32 x 32 images, batch 256; the aim is ratios["linear"] >= 0.91, an overhead of at most
10 %. A frame of 1000 classes needs 999 features: there a linear layer widens the 512 of ResNet-18 to 1024 in both.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, Skip, measure, peer
from jaxlib_methods import models
from jaxlib_methods.classifiers import NearestETFHead, nearest_etf
from peers.nearest_etf import trust_region

HEADLINES = (
    ("solver K=10 d=512", "ours", ("trust region", "svd autodiff"), 100),
    ("solver K=10 d=2048", "ours", ("trust region", "svd autodiff"), 100),
    ("solver K=50 d=512", "ours", ("trust region", "svd autodiff"), 100),
    ("dense backward K=100 d=512", "ours", ("trust region",), 100),
    ("solver K=1000 d=2048", "ours", ("svd autodiff",)),
    ("step resnet18 K=10 batch=256", "ours", ("linear",), 0.91),
    ("step resnet18 K=100 batch=256", "ours", ("linear",), 0.91),
    ("step resnet18 K=1000 batch=256", "ours", ("linear",), 0.91),
)
DELTA = 1e-3
SIZES = ((10, 512), (10, 2048), (50, 512), (100, 512), (100, 2048), (1000, 2048))
DENSE_MAX = 50  # classes up to which the dense backward is repeated
TRUST_REGION_MAX = 100  # classes up to which the trust region is repeated


def run(options: Options) -> Iterator[Record]:
    """Yields every case; with --quick neither K = 1000 nor the network."""
    for K, d in SIZES:
        name = f"solver K={K} d={d}"
        if options.selects(name) and not (options.quick and K > 100):
            yield from measure(_solver_case(name, K, d), options)
    name = "dense backward K=100 d=512"
    if options.selects(name) and not options.quick:
        yield from measure(_dense_case(name, 100, 512), options)
    for K in (10, 100, 1000):
        name = f"step head only K={K} batch=256"
        if options.selects(name) and not (options.quick and K > 100):
            yield from measure(_head_case(name, K), options)
    for K in (10, 100, 1000):
        name = f"step resnet18 K={K} batch=256"
        if options.selects(name) and not options.quick:
            yield from measure(_network_case(name, K, 256), options)


# -------------------------------------------------------------------------------------------------- the inner problem


def _problem(K: int, d: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Half-collapsed means, the frame of slightly different ones, and a cotangent as W makes it (G 1 = 0)."""
    rng = np.random.default_rng(0)
    M = np.eye(K) - 1 / K
    U = np.linalg.qr(rng.standard_normal((d, K)))[0]
    noise = lambda size: size * rng.standard_normal((d, K)) / np.sqrt(d * K)
    Y = U @ M / np.sqrt(K - 1) + noise(1.0)
    before = Y + noise(0.1)
    Y = Y / np.linalg.norm(Y)
    Q, _, Vt = np.linalg.svd(2 / np.sqrt(K - 1) * before / np.linalg.norm(before) @ M + DELTA * U, full_matrices=False)
    return Y, Q @ Vt, rng.standard_normal((d, K)) @ M


def _ours(method: str | None) -> Callable[..., Any]:
    @jax.jit
    def both(Y: jax.Array, prox: jax.Array, G: jax.Array) -> tuple[jax.Array, jax.Array]:
        solve = lambda Y: nearest_etf(Y, prox, proximal_weight=DELTA, normalize=False, method=method)
        U, vjp = jax.vjp(solve, Y)
        return U, vjp(G)[0]

    return both


def _exact(Y: np.ndarray, prox: np.ndarray, G: np.ndarray) -> Callable[[], Any]:
    reference = _ours("svd")

    def exact() -> tuple[np.ndarray, np.ndarray]:
        with jax.enable_x64(True):
            return jax.device_get(reference(*(jnp.asarray(x) for x in (Y, prox, G))))

    return exact


def _pymanopt(Y: np.ndarray, prox: np.ndarray, G: np.ndarray, *, backward: bool) -> Implementation | Skip:
    enabled = jax.config.jax_enable_x64
    make = lambda _: Implementation(trust_region(Y, prox, G, delta=DELTA, backward=backward))
    solver = peer("pymanopt", make, extra="test")
    jax.config.update("jax_enable_x64", enabled)  # importing pymanopt switches the whole process to float64
    return solver


def _dense_case(name: str, K: int, d: int) -> Case:
    Y, prox, G = _problem(K, d)
    args = tuple(jnp.asarray(x, jnp.float32) for x in (Y, prox, G))
    return Case(
        benchmark="nearest_etf",
        name=name,
        implementations={
            "ours": Implementation(_ours(None), args),
            "trust region": _pymanopt(Y, prox, G, backward=True),
            "ours, float64": Implementation(_exact(Y, prox, G)),
        },
        reference="ours, float64",
        flops=12.0 * d * K * K + 24.0 * K**3,
        min_rounds=2,
        warm_up=1,
    )


def _solver_case(name: str, K: int, d: int) -> Case:
    Y, prox, G = _problem(K, d)
    args = tuple(jnp.asarray(x, jnp.float32) for x in (Y, prox, G))

    @jax.jit
    def autodiff(Y: jax.Array, prox: jax.Array, G: jax.Array) -> tuple[jax.Array, jax.Array]:
        def solve(Y: jax.Array) -> jax.Array:
            A = 2 / np.sqrt(K - 1) * (Y - Y.mean(axis=1, keepdims=True)) + DELTA * prox
            Q, _, Vt = jnp.linalg.svd(A.astype(Y.dtype), full_matrices=False)
            return Q @ Vt

        U, vjp = jax.vjp(solve, Y)
        return U, vjp(G)[0]

    forward_only = lambda output: (np.asarray(output[0]),)
    both_parts = K <= DENSE_MAX
    if K <= TRUST_REGION_MAX:
        solver = _pymanopt(Y, prox, G, backward=both_parts)
    else:
        solver = Skip(f"the trust region takes minutes a call at K = {K}, d = {d}")
    if isinstance(solver, Implementation) and not both_parts:
        solver = Implementation(solver.function, (), canonical=forward_only)
    canonical = (lambda output: output) if both_parts or K > TRUST_REGION_MAX else forward_only
    slow = K > 100 or K == DENSE_MAX
    return Case(
        benchmark="nearest_etf",
        name=name,
        implementations={
            "ours": Implementation(_ours(None), args, canonical),
            "newton_schulz": Implementation(_ours("newton_schulz"), args, canonical),
            "svd": Implementation(_ours("svd"), args, canonical),
            "svd autodiff": Implementation(autodiff, args, canonical),
            "trust region": solver,
            "ours, float64": Implementation(_exact(Y, prox, G), (), canonical),
        },
        reference="ours, float64",
        flops=12.0 * d * K * K + 24.0 * K**3,  # thin SVD and backward, by the usual count
        seconds=5.0,
        min_rounds=3 if slow else 7,
        warm_up=1 if slow else 2,
    )


# -------------------------------------------------------------------------------------------------- the training step


class _Linear(nnx.Module):
    def __init__(self, num_features: int, num_classes: int):
        self.dense = nnx.Linear(num_features, num_classes, rngs=nnx.Rngs(1))

    def __call__(self, features: jax.Array, labels: jax.Array) -> jax.Array:
        return self.dense(features)


def _head_case(name: str, K: int) -> Case:
    d = 512 if K <= 512 else 2048
    h = jax.random.normal(jax.random.key(0), (256, d))
    labels = jnp.arange(256, dtype=jnp.int32) % K
    heads = {
        "ours": NearestETFHead(d, K),
        "newton_schulz": NearestETFHead(d, K, method="newton_schulz"),
        "svd": NearestETFHead(d, K, method="svd"),
        "no implicit gradient": NearestETFHead(d, K, implicit_gradient=False),
        "linear": _Linear(d, K),
    }
    return Case(
        benchmark="nearest_etf",
        name=name,
        implementations={
            which: Implementation(*_step(lambda h: h, head, h, labels), canonical=lambda output: output[0])
            for which, head in heads.items()
        },
        seconds=5.0,
    )


def _step(backbone: Callable[[jax.Array], jax.Array], head: nnx.Module, x: jax.Array, labels: jax.Array):
    """A jitted loss and its gradients for the head's parameters and the features, with the head's new state."""
    graph, params, state = nnx.split(head, nnx.Param, ...)

    @jax.jit
    def step(params: Any, state: Any, x: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            head = nnx.merge(graph, params, state, copy=True)
            losses = optax.softmax_cross_entropy_with_integer_labels(head(backbone(x), labels), labels)
            return losses.mean(), nnx.split(head, nnx.Param, ...)[2]

        (value, new), grads = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, x)
        return value, new, grads

    state = step(params, state, x, labels)[1]  # the first step solves twice; what is timed are the others
    return step, (params, state, x, labels)


def _network_case(name: str, K: int, batch: int) -> Case:
    net = models.create("resnet18", num_classes=K, input_shape=(32, 32, 3), rngs=nnx.Rngs(0))
    d = 512 if K <= 512 else 1024
    net.dense = _Passing() if d == 512 else nnx.Linear(512, d, use_bias=False, rngs=nnx.Rngs(2))
    x = jax.random.normal(jax.random.key(0), (batch, 32, 32, 3))
    labels = jnp.arange(batch, dtype=jnp.int32) % K

    def implementation(head: nnx.Module) -> Implementation:
        graph, params, state = nnx.split((net, head), nnx.Param, ...)
        tx = optax.sgd(0.01, momentum=0.9)

        @jax.jit
        def step(params: Any, state: Any, opt_state: Any, x: jax.Array, labels: jax.Array) -> Any:
            def loss(params: Any) -> tuple[jax.Array, Any]:
                net, head = nnx.merge(graph, params, state, copy=True)
                losses = optax.softmax_cross_entropy_with_integer_labels(head(net(x), labels), labels)
                return losses.mean(), nnx.split((net, head), nnx.Param, ...)[2]

            (value, new), grads = jax.value_and_grad(loss, has_aux=True)(params)
            updates, new_opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), new, new_opt_state, value

        return Implementation(step, (params, state, tx.init(params), x, labels), canonical=lambda output: output[3])

    heads = {"ours": NearestETFHead(d, K), "linear": _Linear(d, K)}
    return Case(
        benchmark="nearest_etf",
        name=name,
        implementations={which: implementation(head) for which, head in heads.items()},
        min_rounds=3,
        warm_up=1,
    )


class _Passing(nnx.Module):
    def __call__(self, x: jax.Array) -> jax.Array:
        return x
