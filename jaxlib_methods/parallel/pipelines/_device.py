"""The view of one device: its part of the state, and its part of the program."""

from typing import Any

import jax

from jaxlib_methods.parallel.pipelines import stages as stages_
from jaxlib_methods.parallel.pipelines._engine import Program
from jaxlib_methods.parallel.pipelines.hooks import BoundaryHook
from jaxlib_methods.parallel.pipelines.layout import Layout
from jaxlib_methods.parallel.pipelines.stages import StageModel
from jaxlib_methods.typing import PyTree


def local_program(
    layout: Layout,
    model: StageModel,
    batch: tuple[PyTree, PyTree],
    hooks: tuple[BoundaryHook | None, BoundaryHook | None],
) -> tuple[Program, tuple[PyTree, PyTree]]:
    """The program of a device and the shapes of its part of a micro-batch; what does not fit is found here."""

    def local(leaf: Any) -> jax.ShapeDtypeStruct:
        if not leaf.shape or leaf.shape[0] % layout.num_replicas:
            raise ValueError(
                f"{layout.num_replicas} replicas must divide the examples of a micro-batch, got the shape {leaf.shape}"
            )
        return jax.ShapeDtypeStruct((leaf.shape[0] // layout.num_replicas, *leaf.shape[1:]), leaf.dtype)

    inputs, targets = shapes = jax.tree.map(local, batch)
    whole = {"embed": layout.shapes[0]["embed"], "blocks": ()}
    x = jax.eval_shape(lambda params, inputs: stages_.run_stage(model, params, inputs), whole, inputs)
    for j, stage in enumerate(layout.shapes):
        one = lambda params, x: stages_.run_stage(model, {"blocks": params["blocks"]}, x)
        out = jax.eval_shape(one, stage, x)
        if jax.tree.structure(out) != jax.tree.structure(x) or any(
            (a.shape, a.dtype) != (b.shape, b.dtype)
            for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(x), strict=True)
        ):
            raise ValueError(f"blocks must keep the shapes of their input, those of stage {j} turn {x} into {out}")
    loss = jax.eval_shape(model.head, layout.shapes[-1]["head"], x, targets)
    if getattr(loss, "shape", None) != ():
        raise ValueError(f"head must return a scalar loss, got {loss}")
    return Program(model, layout.kind_of, layout.params, x, hooks), shapes


def squeeze(tree: PyTree) -> PyTree:
    """A device's part of arrays [P, D, ...]."""
    return jax.tree.map(lambda leaf: leaf[0, 0], tree)


def expand(tree: PyTree) -> PyTree:
    """The inverse of `squeeze`."""
    return jax.tree.map(lambda leaf: leaf[None, None], tree)
