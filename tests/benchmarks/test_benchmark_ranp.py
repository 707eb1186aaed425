"""The benchmark of RANP compares what it says: one choice of neurons, and networks whose FLOPs stand in their names."""

import dataclasses

import jax
from flax import nnx

from benchmarks.cases import ranp as benchmark
from benchmarks.timing import Skip
from experiments import ranp
from jaxlib_methods import pruning
from tests.jaxlib_methods.pruning.ranp_networks import filled


def test_networks_and_removal(monkeypatch):
    config = dataclasses.replace(benchmark.CONFIG, width=8, stages=2, volumes=3, samples=1)
    task = ranp.Task.of(config)
    net = filled(lambda: task.network)
    chosen = []

    def choose(task, variant, params, model_state, key):
        """A choice without gradients: the benchmark's own compiles for seconds."""
        chosen.append((variant, task.config.multiple))
        scores = {layer.name: [float(i) for i in range(layer.width)] for layer in task.wiring.layers}
        masks = pruning.keep_neurons(scores, 0.6, scope="per_layer")
        return pruning.clean_up_neurons(masks, task.wiring, scores, multiple=task.config.multiple), 0.6, 0.6

    monkeypatch.setattr(ranp, "choose", choose)
    nets = benchmark._smaller(task, net)
    assert chosen == [("ranp_f", 1), ("ranp_f", 8)]
    pruned, rounded, full, masked = nets
    assert (full, masked) == ("full", "masked")
    for name in (pruned, rounded):
        flops = pruning.wiring.network_costs(nets[name], task.example)[-1].flops
        assert name.endswith(f"FLOPs/{task.full['flops'] / flops:.2f}") and flops < task.full["flops"]
    assert nets[rounded].encoder[1][1].conv.out_features == 8
    shapes = lambda net: jax.tree.map(lambda leaf: leaf.shape, nnx.state(net))
    assert shapes(nets["masked"]) == shapes(net)

    batch = jax.tree.map(lambda x: x[:2], task.dataset.train)
    assert set(benchmark._step_case(nets, batch).implementations) == {pruned, rounded, "full"}
    predict = benchmark._predict_case(nets, batch)
    assert set(predict.implementations) == {pruned, "masked"} and predict.reference == "masked"

    removal = benchmark._removal_case(task, net).implementations
    assert removal["ours"].function()["encoder"][1][1]["conv"]["kernel"][...].shape[-1] == 10  # of 16, ceil(0.6 x 16)
    if isinstance(removal["torch_pruning"], Skip):
        assert "torch_pruning" in removal["torch_pruning"].reason
