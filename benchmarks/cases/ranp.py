"""RANP: a training step and a prediction of the smaller dense 3D-UNet against the full one; removal against a peer.

RANP-f chooses the neurons on the generated volumes of `experiments/methods/ranp.py`; batch 4, sides of 16 voxels. The
names of the smaller networks hold the ratio R of the full network's FLOPs to theirs, so that ratios["full"] / R of a
record is the share of the FLOP reduction that shows up as time (aim: 0.8); the ratio of peaks is that of memory.

Case `step`: loss, gradients and SGD, full against smaller; the latter also with widths rounded up to multiples of 8.
Case `predict`: evaluation mode. `masked` is the full network with the removed channels switched off: the smaller one
gives its outputs (`error`).
Case `removal`: from a network to a smaller one. Ours traces the wiring, makes a random choice consistent and copies;
Torch-Pruning (where it is installed) builds its dependency graph and removes the same share of channels at random.
"""

import copy
import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.timing import Case, Implementation, Options, Record, measure, peer
from experiments.methods import ranp
from experiments.tasks import volume_segmentation
from jaxlib_methods import pruning

HEADLINES = (  # 0.8 of the reduction in FLOPs, whose factor stands in the name
    ("step", "pruned, FLOPs/7.22", ("full",), 5.8),
    ("step", "multiples of 8, FLOPs/3.55", ("full",), 2.8),
    ("predict", "pruned, FLOPs/7.22", ("masked",)),
    ("removal", "ours", ("torch_pruning",)),
)
PyTree = Any
CONFIG = ranp.Config(samples=8)
SHARE = 0.4  # of the channels, in the case `removal`


def run(options: Options) -> Iterator[Record]:
    """Yields every case; with --quick a narrow network."""
    config = dataclasses.replace(CONFIG, width=4, sparsity=0.25, samples=2) if options.quick else CONFIG
    shared = ranp.load(config)
    net = nnx.merge(nnx.split(shared.network, nnx.Param, ...)[0], *shared.init(jax.random.key(0)))
    if options.selects("step") or options.selects("predict"):
        nets = _smaller(shared, net)
        batch = jax.tree.map(lambda x: jnp.asarray(x[: config.batch_size]), shared.task.dataset.train)
        if options.selects("step"):
            yield from measure(_step_case(nets, batch), options)
        if options.selects("predict"):
            yield from measure(_predict_case(nets, batch), options)
    if options.selects("removal"):
        yield from measure(_removal_case(shared, net), options)


def _smaller(shared: ranp.Shared, net: nnx.Module) -> dict[str, nnx.Module]:
    """By name: what RANP-f leaves, the same rounded, the full network, and the full network masked."""
    found: dict[str, nnx.Module] = {}
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    for name, multiple in (("pruned", 1), ("multiples of 8", 8)):
        rounded = shared._replace(config=dataclasses.replace(shared.config, multiple=multiple))
        kept, _, _ = ranp.choose(rounded, "ranp_f", params, rest, jax.random.key(1))
        small = pruning.remove_neurons(net, kept, shared.wiring)
        flops = pruning.wiring.network_costs(small, shared.task.example)[-1].flops
        found[f"{name}, FLOPs/{shared.full['flops'] / flops:.2f}"] = small
        if multiple == 1:
            masks = pruning.removal.neuron_masks(params, kept, shared.wiring)
            masked = nnx.merge(graph, pruning.apply_masks(params, masks), rest, copy=True)
    return found | {"full": net, "masked": masked}


def _step_case(nets: dict[str, nnx.Module], batch: PyTree) -> Case:
    def implementation(net: nnx.Module) -> Implementation:
        graph, params, state = nnx.split(net, nnx.Param, ...)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params: PyTree, state: PyTree, batch: PyTree) -> tuple[PyTree, PyTree]:
            grads, state = jax.grad(lambda p: volume_segmentation.loss_of(graph, p, state, batch), has_aux=True)(params)
            return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), state

        return Implementation(step, (params, state, batch))

    implementations = {name: implementation(net) for name, net in nets.items() if name != "masked"}
    return Case("ranp", "step", implementations, seconds=40.0, min_rounds=9)


def _predict_case(nets: dict[str, nnx.Module], batch: PyTree) -> Case:
    def implementation(net: nnx.Module) -> Implementation:
        graph, params, state = nnx.split(net, nnx.Param, ...)
        predict = lambda params, state, x: volume_segmentation.logits_of(graph, params, state, x, "eval")[0]
        return Implementation(jax.jit(predict), (params, state, batch.volumes))

    names = [name for name in nets if name != "full" and not name.startswith("multiples")]
    return Case("ranp", "predict", {n: implementation(nets[n]) for n in names}, reference="masked", seconds=10.0)


def _removal_case(shared: ranp.Shared, net: nnx.Module) -> Case:
    def ours() -> PyTree:
        wiring = pruning.trace_wiring(net, shared.task.example)
        rng = np.random.default_rng(0)
        scores = {layer.name: rng.random(layer.width) for layer in wiring.layers}
        masks = pruning.keep_neurons(scores, SHARE, scope="per_layer")
        return nnx.state(pruning.remove_neurons(net, pruning.clean_up_neurons(masks, wiring, scores), wiring))

    def theirs(tp: Any) -> Implementation:
        import torch

        width, classes = shared.config.width, shared.task.dataset.num_classes
        unet = _torch_unet(torch, width, classes)
        example = torch.zeros(1, 1, *shared.task.example.shape[1:-1])

        def remove(net: Any) -> None:
            importance = tp.importance.RandomImportance()
            pruner = tp.pruner.BasePruner(
                net, example, importance=importance, pruning_ratio=SHARE, ignored_layers=[net.head]
            )
            pruner.step()

        return Implementation(remove, lambda: (copy.deepcopy(unet),))

    implementations = {"ours": Implementation(ours), "torch_pruning": peer("torch_pruning", theirs)}
    return Case("ranp", "removal", implementations, seconds=10.0, min_rounds=5)


def _torch_unet(torch: Any, width: int, classes: int) -> Any:
    """The 3D-UNet of `jaxlib_methods.models` in PyTorch."""
    nn = torch.nn

    def block(m: int, n: int) -> Any:
        return nn.Sequential(nn.Conv3d(m, n, 3, padding=1, bias=False), nn.BatchNorm3d(n), nn.ReLU())

    class UNet(nn.Module):
        def __init__(self):
            super().__init__()
            widths, channels = [width * 2**stage for stage in range(4)], 1
            self.encoder, self.decoder = nn.ModuleList(), nn.ModuleList()
            for f in widths:
                first = max(f // 2, channels)
                self.encoder.append(nn.Sequential(block(channels, first), block(first, f)))
                channels = f
            for f in widths[-2::-1]:
                self.decoder.append(nn.Sequential(block(f + channels, f), block(f, f)))
                channels = f
            self.head = nn.Conv3d(channels, classes, 1)

        def forward(self, x: Any) -> Any:
            skipped = []
            for stage, blocks in enumerate(self.encoder):
                if stage:
                    skipped.append(x)
                    x = nn.functional.max_pool3d(x, 2)
                x = blocks(x)
            for blocks in self.decoder:
                x = blocks(torch.cat([skipped.pop(), nn.functional.interpolate(x, scale_factor=2)], dim=1))
            return self.head(x)

    return UNet()
