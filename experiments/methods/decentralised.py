"""Four plug-ins on one pipeline: sparse averaging, subspace coding, verification and transforms, added one by one.

Paper: Ajanthan et al., "AsyncMesh", 2026; Ramasinghe et al., "Protocol Models", NeurIPS 2025; Dolatabadi et al.,
"SENTINEL", 2026; Long et al., "Unextractable Protocol Models", NeurIPS 2025

    python -m experiments run decentralised                                # embedded text, a 4 x 3 mesh on one CPU
    python -m experiments run decentralised --text tiny_shakespeare --data-dir DIR
    python -m experiments run decentralised --text train.npy --preset llama_small --layers 8 --width 1024 --heads 8 \
        --block 1024 --rank 160 --dtype bfloat16 --batch-size 48 --steps 30000 --evaluate-every 1000 \
        --learning-rate 3e-4                                                                        # 12 accelerators

Every device of the mesh ("stage", "data") holds one stage of one replica. Methods, each with all that the one before
it has:

    plain          gradients averaged over the replicas before every update
    averaging      replicas average a twentieth of their weights after each update, `tau` updates late, by the EMA rule
    subspace       the residual stream has k coordinates, which alone cross the boundaries, with the token ids; as many
                   parameters as before; AdamW with one second moment for each row of coordinates
    verification   SENTINEL at all boundaries, in both directions
    transforms     every `morph_every` updates random orthogonal matrices are folded into both sides of all boundaries:
                   all four plug-ins
    attacked       the same, while one worker of the second stage sends its messages with the opposite sign
    unprotected    the same attack without verification

By default all stages update together, once a microbatch; with `--asynchronous` each after its own backward passes, at
stashed weights. The four compose because the coordinates are the frame of everything: messages, references of the
verifiers and the matrices that write to the residual stream are rotated, the second moments of a row are not changed by
a rotation, and matrices that read from the stream stay as they are. Stages have private bases unless `--shared-basis`:
with one public basis the matrices that read reveal the product of all transforms. Verifiers compare the two distances
that do not depend on the coordinates. An asynchronous pipeline runs dry before a transform.

The validation loss is that of the replicas' mean; `spread` is how far they are from it; `bans` counts honest workers
who were banned. Figure: loss and spread by updates.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from experiments._machinery import plots
from experiments._machinery.options import Count, OneOf, Positive, Range, Share
from experiments._machinery.records import Case, Outcome, Targets
from experiments.tasks import language_modelling, pipelines
from jaxlib_methods import models, optimizers, parallel, trees
from jaxlib_methods.parallel import boundaries, integrity, replicas, unextractable
from jaxlib_methods.parallel.pipelines import BoundaryHook, Pipeline
from jaxlib_methods.parallel.unextractable import gpt, gpt_coordinates

PyTree = Any
METHODS = ("plain", "averaging", "subspace", "verification", "transforms", "attacked", "unprotected")
PLUG_INS = METHODS[1:5]


@dataclasses.dataclass(frozen=True)
class Config(pipelines.Options):
    """Every combination of method and seed is one case; each is resumable."""

    preset: Annotated[str, OneOf(models.GPT_CONFIGS)] = "llama_tiny"
    layers: Count | None = 4
    width: Count | None = 64
    init_std: Positive | None = None
    batch_size: Count = 12  # windows of a microbatch, shared by the replicas
    steps: Count = 800  # updates
    seeds: Count = 2
    evaluate_every: Count = 80
    checkpoint_every: Count = 400
    stages: Annotated[int, Range(2)] = 4  # P
    replicas: Annotated[int, Range(2)] = 3  # R; a minority of a stage's must be able to be malicious
    asynchronous: bool = False
    methods: tuple[Literal[METHODS], ...] = METHODS
    learning_rate: Positive = 3e-3
    warmup: Share = 0.1  # share of the steps
    fraction: Annotated[float, Range(0, 1, closed="right")] = 0.05  # p, of the weights averaged after an update
    tau: Annotated[int, Range(0)] = 10  # updates between a snapshot and the arrival of its average
    rank: Count = 16  # k
    shared_basis: bool = False
    verified_from: Count = 400  # updates without verdicts, in which references and fences are built
    attack_from: int = 500  # messages before the attack begins
    morph_every: Count = 100  # updates between transforms

    def __post_init__(self):
        super().__post_init__()
        self.check_mesh(self.stages)
        if self.stages < 3 and {"attacked", "unprotected"} & {*self.methods}:
            raise ValueError(f"the first and the last stage are honest: an attack needs 3 stages, got {self.stages}")
        dataclasses.replace(self.model(), subspace=self.rank)


SMOKE = {
    "layers": 2, "width": 16, "heads": 2, "block": 16, "rank": 4, "batch_size": 4, "steps": 12, "seeds": 1,
    "validation_windows": 8, "evaluate_every": 6, "checkpoint_every": 6, "stages": 2, "replicas": 2,
    "methods": ("transforms",), "tau": 2, "verified_from": 12, "morph_every": 4,
}  # fmt: skip
SHOWN = ("validation_loss", "spread", "bans", "attackers_banned", "bytes per token")


class Variant(NamedTuple):
    plug_ins: frozenset[str]
    malicious: frozenset[tuple[int, int]]  # workers (stage, replica)


class Shared(NamedTuple):
    """Loaded once and kept: the task of a variant, and its pipeline for all seeds."""

    task: Callable[[bool], pipelines.Task]  # whether its activations are coordinates -> task
    pipe: Callable[[Variant], Pipeline]


def variants(config: Config) -> dict[str, Variant]:
    attacker = frozenset({(1, config.replicas - 1)})
    return {
        method: Variant(plug_ins(method), attacker if method in ("attacked", "unprotected") else frozenset())
        for method in config.methods
    }


def plug_ins(method: str) -> frozenset[str]:
    """Which of the four a method has."""
    if method == "unprotected":
        return frozenset(PLUG_INS) - {"verification"}
    return frozenset(PLUG_INS[: METHODS.index(method)])


def devices(config: Config) -> int:
    return config.stages * config.replicas


def load(config: Config) -> Shared:
    networks = {False: pipelines.dense, True: functools.partial(coordinate_network, config)}
    task = functools.cache(lambda coordinates: pipelines.load(config, networks[coordinates]))
    pipe = functools.lru_cache(maxsize=1)(lambda variant: build(task("subspace" in variant.plug_ins), variant))
    return Shared(task, pipe)


def coordinate_network(config: Config, dense: models.GPTConfig) -> pipelines.Network:
    """The subspace network of equal size; its activations are coordinates."""
    dense = dataclasses.replace(dense, full_rank_blocks=0)  # all blocks are between boundaries
    subspace = boundaries.random_subspace(
        key=jax.random.key(0), vocab_size=dense.vocab_size, width=dense.width, rank=config.rank
    )
    network = pipelines.dense(language_modelling.subspace_network(dense, config.rank))
    count, size = 2 * network.config.layers + 1, (dense.width, config.rank)

    def init(key: jax.Array) -> pipelines.Split:
        bases = [subspace.U] * count
        if not config.shared_basis:
            basis = lambda key: jnp.linalg.qr(jax.random.normal(key, size))[0]
            bases = [basis(one) for one in jax.random.split(jax.random.fold_in(key, 1), count)]
        return gpt_coordinates.coordinate_gpt_params(network.config, network.init(key), bases)

    fixed = lambda ids: boundaries.fixed_embedding(ids, subspace)
    return pipelines.Network(network.config, gpt_coordinates.coordinate_gpt_stages(network.config, fixed), init)


def build(task: pipelines.Task, variant: Variant) -> Pipeline:
    config, hooks = task.options, {}
    if variant.malicious or "verification" in variant.plug_ins:
        mesh = parallel.make_mesh(config.stages, config.replicas)
        hooks = {"model": integrity.guard_model(task.model)} | _verification(config, variant, mesh)
    if "averaging" in variant.plug_ins:
        weight = pipelines.ema_weight(config.steps)
        average = replicas.sparse_averaging(config.fraction, key=jax.random.key(1), delay=config.tau, ema_weight=weight)
        hooks |= {"average_gradients": False, "data_hook": average}
    optimizer = make_optimizer(config, task.config.subspace)
    return pipelines.build(task, config.stages, optimizer, num_microbatches=None if config.asynchronous else 1, **hooks)


def _verification(config: Config, variant: Variant, mesh: jax.sharding.Mesh) -> dict[str, BoundaryHook]:
    attacks = [integrity.Attack("scale", *worker, value=-1.0, start=config.attack_from) for worker in variant.malicious]
    hooks = {}
    for direction, decay in (("forward", 0.9), ("backward", 0.8)):
        verifier = integrity.VerifierConfig(
            decay=decay, warmup_steps=config.verified_from, distances=("euclidean", "wasserstein")
        )
        verifier = verifier if "verification" in variant.plug_ins else None
        hooks[f"{direction}_hook"] = integrity.verification_hook(
            verifier, mesh, direction, key=jax.random.key(2), attacks=attacks
        )
    return hooks


def make_optimizer(config: Config, rank: int | None) -> optax.GradientTransformation:
    """AdamW after clipping; of a subspace network, with one second moment for each row of coordinates."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.99)
    if rank is not None:
        adam = optimizers.row_shared.scale_by_row_shared_adam(
            b1=0.9, b2=0.99, shared=gpt_coordinates.coordinate_gpt_mask, row_size=config.model().width
        )
    return pipelines.chain(config, adam, decays=lambda params: trees.mask_tree(params, r"^(?!.*transforms/)"))


def run(shared: Shared, variant: Variant, seed: int, workdir: Any) -> Outcome:
    task, pipe = shared.task("subspace" in variant.plug_ins), shared.pipe(variant)
    curve = pipelines.fit(
        task,
        pipe,
        functools.partial(_evaluate, variant, task, pipe),
        workdir,
        rate=task.options.learning_rate,
        seed=seed,
        advance=functools.partial(_advance, variant),
        pause=task.options.morph_every if "transforms" in variant.plug_ins else 0,
    )
    shown = ("validation_loss", "spread", "bans", "attackers_banned")
    return pipelines.outcome(curve, *shown, **{"bytes per token": task.message_bytes})


def _evaluate(variant: Variant, task: pipelines.Task, pipe: Pipeline, state: PyTree) -> dict[str, Any]:
    """Validation loss of the replicas' mean, their spread, and bans of honest and of malicious workers."""
    found = pipelines.evaluate_mean(task, pipe, state)
    if "verification" not in variant.plug_ins:
        return found
    verifiers, banned = integrity.find_verifiers(pipe, state), set()
    for direction, sender in (("forward", -1), ("backward", 1)):
        bans = verifiers[direction].bans
        bans = np.asarray(multihost_utils.process_allgather(bans, tiled=True))[:, 0]  # all replicas agree
        banned |= {(int(stage) + sender, int(replica)) for stage, replica in zip(*np.nonzero(bans), strict=True)}
    found |= {"banned": sorted(banned), "bans": float(len(banned - variant.malicious))}
    return found | ({"attackers_banned": float(len(banned & variant.malicious))} if variant.malicious else {})


def _advance(
    variant: Variant, task: pipelines.Task, pipe: Pipeline, state: PyTree, seed: int, begin: int, end: int
) -> tuple[PyTree, np.ndarray]:
    drained = np.zeros(0)
    if "transforms" in variant.plug_ins and begin and begin % task.options.morph_every == 0:
        if task.options.asynchronous:
            state, done = pipe.drain(state)
            drained = pipelines.finished_losses(done)
        state = _transformed(task, pipe, state, jax.random.fold_in(jax.random.key(seed), begin))
    state, losses = pipelines.advance(task, pipe, state, seed, begin, end)
    if "verification" in variant.plug_ins:
        state = integrity.share_bans(pipe, state)
    return state, np.concatenate([drained, losses])


def _transformed(task: pipelines.Task, pipe: Pipeline, state: PyTree, key: jax.Array) -> PyTree:
    """The state with new coordinates before each block, in the middle of each, and before the head."""
    L, P = task.config.layers, task.options.stages
    names = [("boundary", i) for i in range(L + 1)] + [("middle", i) for i in range(L)]
    transforms = unextractable.draw_transforms(names, task.options.rank, key=key)
    rules = gpt_coordinates.coordinate_gpt_rules(L, patterns=gpt.STAGE_PATTERNS)
    between = [("boundary", j * L // P) for j in range(1, P)]
    return unextractable.morph_pipeline(pipe, state, transforms, rules, boundaries=between)


def targets(config: Config) -> Targets:
    """None: no paper has all four at once."""
    return {}


def figures(shared: Shared, cases: list[Case]) -> dict[str, plots.Figure]:
    return {"decentralised": pipelines.losses_and_spreads(cases)}
