"""Bytes read from compiled programs, against programs whose messages are counted by hand."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlib_methods.parallel.pipelines import communication

STAGES, REPLICAS, TICKS = 4, 2, 5


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((STAGES, REPLICAS), ("stage", "data"), axis_types=(AxisType.Auto,) * 2)


def compiled(mesh, function, *shapes, specs):
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs[:-1], out_specs=specs[-1])
    return jax.jit(mapped).lower(*(jax.ShapeDtypeStruct(*shape) for shape in shapes)).compile()


@pytest.fixture(scope="module")
def ticking(mesh):
    """Each tick sends a float32 [3, 8] to the next stage and a bfloat16 [2] back; the end averages over the data."""
    ahead = [(j, j + 1) for j in range(STAGES - 1)]
    back = [(j + 1, j) for j in range(STAGES - 1)]

    def function(w, x, g):
        def tick(carry, _):
            x, g = carry
            x = jax.lax.ppermute(jnp.tanh(x @ w[0]), "stage", ahead)
            return (x, jax.lax.ppermute(g + jnp.bfloat16(1), "stage", back)), None

        (x, g), _ = jax.lax.scan(tick, (x, g), None, length=TICKS)
        return jax.lax.pmean(x, "data"), g

    spec, both = PartitionSpec("stage"), PartitionSpec(("stage", "data"))
    return compiled(
        mesh,
        function,
        ((STAGES, 8, 8), jnp.float32),
        ((3 * STAGES * REPLICAS, 8), jnp.float32),
        ((2 * STAGES * REPLICAS,), jnp.bfloat16),
        specs=(spec, both, both, (spec, both)),
    )


@pytest.mark.contract
def test_permutes_in_a_scan_are_counted_once_a_tick(ticking):
    found = communication.collectives(ticking)
    permutes = [c for c in found if c.kind == "collective-permute"]
    assert [c.count for c in permutes] == [TICKS, TICKS]
    assert {len(c.groups) for c in permutes} == {(STAGES - 1) * REPLICAS}
    # Devices are numbered stage-major: (stage, replica) is 2 stage + replica. The CPU may compute in float32 what is
    # bfloat16 in the source, and then sends it so.
    sizes = {c.groups[0][1] - c.groups[0][0]: c.bytes for c in permutes}
    assert sizes[REPLICAS] == 3 * 8 * 4 and sizes[-REPLICAS] in (2 * 2, 2 * 4)
    assert ("f32[2]" in ticking.as_text()) or sizes[-REPLICAS] == 4


def test_links_sum_what_crosses_them(ticking):
    total = communication.link_bytes(ticking)
    assert len(total) == 2 * (STAGES - 1) * REPLICAS
    for stage in range(STAGES - 1):
        for replica in range(REPLICAS):
            here, there = REPLICAS * stage + replica, REPLICAS * (stage + 1) + replica
            assert total[here, there] == TICKS * 96
            assert total[there, here] in (TICKS * 4, TICKS * 8)


def test_the_average_over_replicas_is_an_all_reduce_within_each_stage(ticking):
    (reduced,) = [c for c in communication.collectives(ticking) if c.kind == "all-reduce"]
    assert (reduced.bytes, reduced.count) == (96, 1)
    assert sorted(reduced.groups) == [(0, 1), (2, 3), (4, 5), (6, 7)]


def test_gathers_and_scatters_count_what_a_device_puts_in(mesh):
    def function(x):
        whole = jax.lax.all_gather(x, "stage", tiled=True)  # [4, 6]
        return jax.lax.psum_scatter(whole * x[:1], "stage", tiled=True)  # [1, 6]

    program = compiled(mesh, function, ((8, 6), jnp.float32), specs=(PartitionSpec(("stage", "data")),) * 2)
    found = {c.kind: c.bytes for c in communication.collectives(program)}
    assert found["all-gather"] == 24
    assert found.get("reduce-scatter", found.get("all-reduce")) == 96


def test_nested_loops_multiply(mesh):
    def function(x):
        shift = lambda _, x: jax.lax.ppermute(jnp.sin(x), "stage", [(0, 1)])
        inner = lambda _, x: jax.lax.fori_loop(0, 3, shift, x) * 2
        return jax.lax.fori_loop(0, 4, inner, x)

    program = compiled(mesh, function, ((8, 6), jnp.float32), specs=(PartitionSpec(("stage", "data")),) * 2)
    assert sum(c.count for c in communication.collectives(program)) == 12
    assert communication.link_bytes(program) == {(0, 2): 12 * 24, (1, 3): 12 * 24}


def test_a_loop_of_unknown_length_is_an_error(mesh):
    def function(x):
        body = lambda x: jax.lax.ppermute(x * 0.5, "stage", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return jax.lax.while_loop(lambda x: jax.lax.pmax(jnp.max(x), ("stage", "data")) > 1.0, body, x)

    program = compiled(mesh, function, ((8, 6), jnp.float32), specs=(PartitionSpec(("stage", "data")),) * 2)
    with pytest.raises(ValueError, match="XLA does not know its trip count"):
        communication.collectives(program)
    with pytest.raises(TypeError, match="program must be compiled, lowered or HLO text, got function"):
        communication.collectives(function)
    with pytest.raises(ValueError, match="no ENTRY computation"):
        communication.collectives("HloModule nothing")


HLO = """
HloModule other, num_partitions=4

%reducer (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[4,2], y: bf16[3]) -> f32[4,2] {{
  %x = f32[4,2]{{1,0:T(8,128)}} parameter(0)
  %y = bf16[3]{{0}} parameter(1)
  {start}
  ROOT %out = f32[4,2]{{1,0}} get-tuple-element(%done), index=0
}}
"""


@pytest.mark.parametrize(
    ("start", "kind", "size", "groups"),
    [
        (
            "%s = (f32[4,2], f32[4,2], u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}\n"
            "  %done = f32[4,2]{1,0} collective-permute-done(%s)",
            "collective-permute",
            32,
            ((0, 1), (1, 0)),
        ),
        (
            "%done = (f32[4,2]{1,0}, /*index=1*/bf16[3]{0}) all-reduce(%x, %y), replica_groups=[2,2]<=[2,2]T(1,0), "
            "to_apply=%reducer",
            "all-reduce",
            38,
            ((0, 2), (1, 3)),
        ),
        (
            "%done = (f32[4,2]{1,0}) all-reduce(f32[4,2]{1,0} %x), replica_groups={{0,1},{2,3}}, to_apply=%reducer",
            "all-reduce",
            32,
            ((0, 1), (2, 3)),
        ),
        ("%done = (f32[4,2]{1,0}) all-to-all(%x), replica_groups={}", "all-to-all", 32, ()),
    ],
)
def test_forms_of_other_backends(start, kind, size, groups):
    assert communication.collectives(HLO.format(start=start)) == (communication.Collective(kind, size, 1, groups),)


def test_conditionals_count_with_all_their_branches(mesh):
    def function(x):
        ahead = functools.partial(jax.lax.ppermute, axis_name="stage", perm=[(0, 1)])
        return jax.lax.cond(jax.lax.pmax(x[0, 0], ("stage", "data")) > 0, lambda x: ahead(x) + 1, ahead, x)

    program = compiled(mesh, function, ((8, 6), jnp.float32), specs=(PartitionSpec(("stage", "data")),) * 2)
    permutes = [c for c in communication.collectives(program) if c.kind == "collective-permute"]
    assert [c.bytes for c in permutes] in ([24, 24], [24])  # XLA may move what both branches do in front of them
