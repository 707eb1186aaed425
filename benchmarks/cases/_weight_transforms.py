"""What unextractable weights cost: a morph of all blocks beside steps and forward passes, and the matrices N and Q."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks._machinery import staged_decoder
from benchmarks.cases._link_traffic import DESIGN
from benchmarks.timing import Case, Implementation, Options, Record, measure
from jaxlib_methods import models, trees
from jaxlib_methods.parallel import unextractable

PyTree = Any
LAYERS, EXAMPLES, BLOCK = 4, 4, 128
STEPS, TOKENS, SECONDS = (
    100,
    524_288,
    30.0,
)  # between two morphs: in training both, which the paper calls equal; serving


def transforms_case(width: int) -> Case:
    """Forward passes and steps of a model with and without its matrices, and morphs of all its blocks."""
    config = models.GPTConfig(256, BLOCK, LAYERS, width, max(1, width // 64), **DESIGN)
    plain = models.split_gpt_params(config, nnx.to_pure_dict(staged_decoder.initial(config)))
    draw = lambda names: unextractable.draw_transforms(names, width, key=jax.random.key(1))
    rotations = [T.matrix for T in draw(range(2 * LAYERS + 1)).values()]
    params = unextractable.gpt.transformable_gpt_params(config, plain, rotations)
    names = [("boundary", i) for i in range(LAYERS + 1)] + [("middle", i) for i in range(LAYERS)]
    rules = unextractable.gpt.gpt_transform_rules(LAYERS)
    inputs, targets = (jnp.asarray(ids[0]) for ids in staged_decoder.tokens(config, 1, EXAMPLES))

    def logits(parts: models.GPTStages, params: PyTree, ids: jax.Array) -> jax.Array:
        embed, blocks, head = params
        return parts.head(
            head, functools.reduce(lambda x, block: parts.block(block, x), blocks, parts.embed(embed, ids))
        )

    def step(parts: models.GPTStages, params: PyTree, opt_state: PyTree) -> Any:
        def loss(params: PyTree) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(logits(parts, params, inputs), targets).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    fixed = lambda params: trees.label_tree(params, [("transforms/", "fixed")], default="trained", allow_unmatched=True)
    optimizer = optax.partition({"trained": optax.sgd(1e-3, momentum=0.9), "fixed": optax.set_to_zero()}, fixed)
    transformable = unextractable.gpt.transformable_gpt_stages(config)
    opt_state = optimizer.init(params)

    def morph(*, momentum: bool) -> Callable[[], PyTree]:
        def run() -> PyTree:
            drawn = draw(names)
            new = unextractable.morph(params, drawn, rules)
            if not momentum:
                return new
            return new, unextractable.transform_momentum(opt_state, params, drawn, rules)

        return run

    jitted = lambda function, parts: jax.jit(functools.partial(function, parts))
    ordinary = models.gpt_stages(config)
    return Case(
        "decentralised",
        f"transforms d={width}",
        {
            "forward": Implementation(jitted(logits, transformable), (params, inputs)),
            "forward, plain": Implementation(jitted(logits, ordinary), (plain, inputs)),
            "step": Implementation(jitted(step, transformable), (params, opt_state)),
            "step, plain": Implementation(jitted(step, ordinary), (plain, optimizer.init(plain))),
            "draw": Implementation(lambda: draw(names)),
            "morph": Implementation(morph(momentum=False)),
            "morph, momentum": Implementation(morph(momentum=True)),
        },
        seconds=30.0,
        min_rounds=5,
    )


def tell(records: list[Record], width: int, options: Options) -> None:
    """The medians as overheads at the paper's schedules, beside the paper's."""
    name, tokens = f"transforms d={width}", EXAMPLES * BLOCK
    ms = {record.implementation: record.median_ms for record in records}
    options.note(f"{name}: drawing is {ms['draw'] / ms['morph']:.2f} of a morph (paper: 0.95)")
    for what, steps in (
        (f"every {STEPS} steps of {tokens} tokens", STEPS),
        (f"every {TOKENS} tokens", TOKENS / tokens),
    ):
        options.note(f"{name}: training, {what}: {ms['morph, momentum'] / (steps * ms['step']):.2%} (paper: 1.6 %)")
    options.note(
        f"{name}: serving, every {SECONDS:g} s: {ms['morph'] / (10 * SECONDS):.2f} % on this device (paper: 3 %); a "
        f"morph takes as long as {ms['morph'] / ms['forward']:.3g} forward passes of {tokens} tokens"
    )
    for what, counted in (("forward", "8 d^2 of 24 d^2 operations are 33.3 %"), ("step", "16 of 72 are 22.2 %")):
        more = ms[what] / ms[f"{what}, plain"] - 1
        options.note(f"{name}: N and Q make a {what} {more:.1%} longer; {counted}")


def run_cases(options: Options) -> Iterator[Record]:
    """The cases `transforms`; with --quick a narrow one."""
    for width in (64,) if options.quick else (512, 1024):
        if options.selects(f"transforms d={width}"):
            records = measure(transforms_case(width), options)
            tell(records, width, options)
            yield from records
