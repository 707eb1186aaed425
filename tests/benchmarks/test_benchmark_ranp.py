"""The benchmark of RANP compares what it says: one choice of neurons, and networks whose FLOPs stand in their names."""

import dataclasses

import jax
from flax import nnx

from benchmarks.cases import ranp as benchmark
from benchmarks.timing import Skip
from experiments.methods import ranp
from jaxlib_methods import pruning
from tests.jaxlib_methods.pruning.ranp_networks import filled


def test_networks_and_removal(monkeypatch):
    config = dataclasses.replace(benchmark.CONFIG, width=8, stages=2, volumes=3, samples=1)
    shared = ranp.load(config)
    net = filled(lambda: shared.network)
    chosen = []

    def choose(shared, variant, params, model_state, key):
        """A choice without gradients: the benchmark's own compiles for seconds."""
        chosen.append((variant, shared.config.multiple))
        scores = {layer.name: [float(i) for i in range(layer.width)] for layer in shared.wiring.layers}
        masks = pruning.keep_neurons(scores, 0.6, scope="per_layer")
        return pruning.clean_up_neurons(masks, shared.wiring, scores, multiple=shared.config.multiple), 0.6, 0.6

    monkeypatch.setattr(ranp, "choose", choose)
    nets = benchmark._smaller(shared, net)
    assert chosen == [("ranp_f", 1), ("ranp_f", 8)]
    pruned, rounded, full, masked = nets
    assert (full, masked) == ("full", "masked")
    for name in (pruned, rounded):
        flops = pruning.wiring.network_costs(nets[name], shared.task.example)[-1].flops
        assert name.endswith(f"FLOPs/{shared.full['flops'] / flops:.2f}") and flops < shared.full["flops"]
    assert nets[rounded].encoder[1][1].conv.out_features == 8
    shapes = lambda net: jax.tree.map(lambda leaf: leaf.shape, nnx.state(net))
    assert shapes(nets["masked"]) == shapes(net)

    batch = jax.tree.map(lambda x: x[:2], shared.task.dataset.train)
    assert set(benchmark._step_case(nets, batch).implementations) == {pruned, rounded, "full"}
    predict = benchmark._predict_case(nets, batch)
    assert set(predict.implementations) == {pruned, "masked"} and predict.reference == "masked"

    removal = benchmark._removal_case(shared, net).implementations
    assert removal["ours"].function()["encoder"][1][1]["conv"]["kernel"][...].shape[-1] == 10  # of 16, ceil(0.6 x 16)
    if isinstance(removal["torch_pruning"], Skip):
        assert "torch_pruning" in removal["torch_pruning"].reason
