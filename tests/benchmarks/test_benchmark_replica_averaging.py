"""The benchmark of exchanges between replicas reads from compiled programs and states what its formulas say."""

import jax
import jax.numpy as jnp
import optax

from benchmarks._machinery import staged_decoder
from benchmarks.cases import _replica_averaging as replica_averaging
from jaxlib_methods import models
from tests.jaxlib_methods.parallel.pipeline_problems import chain


def test_a_compiled_exchange_sends_its_numbers_in_both_slots(monkeypatch):
    config = models.GPTConfig(11, 3)
    monkeypatch.setattr(staged_decoder, "decoder", lambda config: chain(layers=2))
    monkeypatch.setattr(optax, "adamw", optax.sgd)
    packed = replica_averaging.packed_shapes(config, 2)
    exchange = replica_averaging.exchanges(packed)["diloco"]
    pipe, arguments = replica_averaging.mesh_pipeline(config, 2, 2, 2, exchange)
    compiled = pipe.lower(*arguments).compile()
    both_slots = 2 * replica_averaging.COUNT
    assert replica_averaging.reduced_bytes(compiled, 2, 2) == both_slots * 4 * exchange.reduced
    assert replica_averaging.state_bytes(pipe, arguments[0]) == 4 * exchange.kept


def test_states_hold_the_numbers_of_the_formulas():
    packed = {"common": (jnp.zeros((4, 30)), jnp.zeros(7)), "rest": {"float32": jnp.zeros(50)}}
    for name, exchange in replica_averaging.exchanges(packed).items():
        state = () if exchange.hook is None else jax.eval_shape(exchange.hook.init, packed)
        kept = [leaf.size for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        assert sum(kept) == exchange.kept, name
