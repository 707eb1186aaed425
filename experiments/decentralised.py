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
import math
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils

from experiments import async_mesh, pipeline
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models, optimizers, parallel, trees
from jaxlib_methods.parallel import boundaries, integrity, unextractable

PyTree = Any
METHODS = ("plain", "averaging", "subspace", "verification", "transforms", "attacked", "unprotected")
PLUG_INS = METHODS[1:5]


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """Every combination of method and seed is one case; each is resumable."""

    layers: int | None = 4
    width: int | None = 64
    heads: int | None = 2
    block: int | None = 64
    batch_size: int = 12  # windows of a microbatch, shared by the replicas
    steps: int = 800  # updates
    seeds: int = 2
    validation_windows: int = 48
    evaluate_every: int = 80
    checkpoint_every: int = 400
    stages: int = 4  # P
    replicas: int = 3  # R; a minority of a stage's must be able to be malicious
    asynchronous: bool = False
    methods: tuple[Literal[METHODS], ...] = METHODS
    learning_rate: float = 3e-3
    warmup: float = 0.1  # share of the steps
    weight_decay: float = 0.01
    clip: float = 1.0  # norm of a stage's gradient
    fraction: float = 0.05  # p, of the weights averaged after an update
    tau: int = 10  # updates between a snapshot and the arrival of its average
    rank: int = 16  # k
    shared_basis: bool = False
    verified_from: int = 400  # updates without verdicts, in which references and fences are built
    attack_from: int = 500  # messages before the attack begins
    morph_every: int = 100  # updates between transforms

    def __post_init__(self):
        super().__post_init__()
        if not self.methods:
            raise ValueError("methods is empty; name at least one")
        if self.stages < 2 or self.model().layers % self.stages:
            raise ValueError(
                f"stages must be at least 2 and divide the {self.model().layers} blocks, got {self.stages}"
            )
        if self.replicas < 2 or self.batch_size % self.replicas:
            raise ValueError(
                f"replicas must be at least 2 and divide batch_size {self.batch_size}, got {self.replicas}"
            )
        if self.stages < 3 and {"attacked", "unprotected"} & {*self.methods}:
            raise ValueError(f"the first and the last stage are honest: an attack needs 3 stages, got {self.stages}")
        for name in ("learning_rate", "clip", "checkpoint_every", "morph_every", "verified_from"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction must lie in (0, 1], got {self.fraction}")
        if self.tau < 0:
            raise ValueError(f"tau must be at least 0, got {self.tau}")
        dataclasses.replace(self.model(), subspace=self.rank)


SMOKE = {
    "layers": 2, "width": 16, "heads": 2, "block": 16, "rank": 4, "batch_size": 4, "steps": 12, "seeds": 1,
    "validation_windows": 8, "evaluate_every": 6, "checkpoint_every": 6, "stages": 2, "replicas": 2,
    "methods": ("transforms",), "tau": 2, "verified_from": 12, "morph_every": 4,
}  # fmt: skip
PAPER: dict[str, float] = {}  # no paper has all four at once


def prepare(config: Config) -> None:
    """A single process on a CPU gets as many devices as the mesh needs, unless JAX_NUM_CPU_DEVICES says how many."""
    pipeline.fake_devices(config.stages * config.replicas)


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figure and returns losses, spreads, bytes and bans, one per seed."""
    dense, coded = functools.cache(lambda: pipeline.Model(config)), functools.cache(lambda: CoordinateModel(config))
    metrics: dict[str, list[float] | float] = {}
    curves: dict[str, list[list[dict[str, float]]]] = {}
    for method in config.methods:
        model = (coded if "subspace" in plug_ins(method) else dense)()
        run = _Runs(config, model, method, config.stages, workdir / "cases")
        results = [run(config.learning_rate, seed) for seed in range(config.seeds)]
        curves[method] = [result["curve"] for result in results if result["curve"]]
        metrics[f"diverged {method}"] = [float("validation_loss" not in result) for result in results]
        ends = [curve[-1] for curve in curves[method]]
        for name in ("validation_loss", "spread", "bans", "attackers_banned"):
            if found := [end[name] for end in ends if name in end]:
                metrics[f"{name} {method}"] = found
        metrics[f"bytes per token {method}"] = model.message_bytes
    if jax.process_index() == 0:
        async_mesh.figure(config, curves, workdir / "decentralised.png")
    return metrics


def plug_ins(method: str) -> set[str]:
    """Which of the four a method has."""
    if method == "unprotected":
        return {*PLUG_INS} - {"verification"}
    return {*PLUG_INS[: METHODS.index(method)]}


class CoordinateModel(pipeline.Model):
    """The subspace network of equal size; its activations are coordinates."""

    def decoder(self, config: Config, vocab_size: int) -> models.GPTConfig:
        self.shared_basis = config.shared_basis
        dense = dataclasses.replace(config.model(vocab_size), full_rank_blocks=0)  # all blocks are between boundaries
        self.subspace = boundaries.random_subspace(
            key=jax.random.key(0), vocab_size=vocab_size, width=dense.width, rank=config.rank
        )
        return language_model.subspace_network(dense, config.rank)

    def functions(self) -> models.GPTStages:
        fixed = lambda ids: boundaries.fixed_embedding(ids, self.subspace)
        return unextractable.gpt_coordinates.coordinate_gpt_stages(self.config, fixed)

    def init(self, key: jax.Array) -> tuple[PyTree, list[PyTree], PyTree]:
        gpt, count = self.config, 2 * self.config.layers + 1
        params = super().init(key)
        basis = lambda key: jnp.linalg.qr(jax.random.normal(key, (gpt.width, gpt.subspace)))[0]
        bases = [self.subspace.U] * count
        if not self.shared_basis:
            bases = [basis(one) for one in jax.random.split(jax.random.fold_in(key, 1), count)]
        return unextractable.gpt_coordinates.coordinate_gpt_params(gpt, params, bases)


class _Runs(async_mesh.Runs):
    """All runs of one method."""

    def __init__(self, config: Config, model: pipeline.Model, method: str, P: int, folder: pathlib.Path):
        super().__init__(config, model, method, P, folder)
        self.synchronous, self.plug_ins = not config.asynchronous, plug_ins(method)
        self.malicious = {(1, config.replicas - 1)} if method in ("attacked", "unprotected") else set()

    @property
    def chunk(self) -> int:
        return math.gcd(super().chunk, self.config.morph_every) if "transforms" in self.plug_ins else super().chunk

    @functools.cached_property
    def pipe(self) -> parallel.pipelines.Pipeline:
        config, mesh = self.config, parallel.make_mesh(self.config.stages, self.config.replicas)
        stages = parallel.split_stages(jax.eval_shape(self.model.init, jax.random.key(0)), config.stages)
        tokens = jax.ShapeDtypeStruct((config.batch_size, self.model.config.block_size), jnp.int32)
        model, hooks = self.model.parts, {}
        if self.malicious or "verification" in self.plug_ins:
            model, hooks = integrity.guard_model(model), self._verification(mesh)
        of_all = model, stages, make_optimizer(config, self.model.config.subspace), mesh
        averaging = "averaging" in self.plug_ins
        weight = async_mesh.ema_weight(config.steps)
        average = parallel.replicas.sparse_averaging(
            config.fraction, key=jax.random.key(1), delay=config.tau, ema_weight=weight
        )
        hooks |= {
            "batch": (tokens, tokens),
            "average_gradients": not averaging,
            "data_hook": average if averaging else None,
        }
        if self.synchronous:
            return parallel.synchronous_pipeline(*of_all, num_microbatches=1, schedule="gpipe", **hooks)
        return parallel.asynchronous_pipeline(*of_all, **hooks)

    def _verification(self, mesh: jax.sharding.Mesh) -> dict[str, parallel.pipelines.hooks.BoundaryHook]:
        options = {"forward": 0.9, "backward": 0.8}  # decay of the references
        attacks = [
            integrity.Attack("scale", stage, replica, value=-1.0, start=self.config.attack_from)
            for stage, replica in self.malicious
        ]
        verifier = lambda decay: integrity.VerifierConfig(
            decay=decay, warmup_steps=self.config.verified_from, distances=("euclidean", "wasserstein")
        )
        return {
            f"{direction}_hook": integrity.verification_hook(
                verifier(decay) if "verification" in self.plug_ins else None,
                mesh,
                direction,
                key=jax.random.key(2),
                attacks=attacks,
            )
            for direction, decay in options.items()
        }

    def evaluate(self, state: PyTree) -> dict[str, float]:
        """Validation loss of the replicas' mean, their spread, and bans of honest and of malicious workers."""
        found = super().evaluate(state)
        if "verification" not in self.plug_ins:
            return found
        banned = self._banned(state)
        found |= {"banned": sorted(banned), "bans": float(len(banned - self.malicious))}
        return found | ({"attackers_banned": float(len(banned & self.malicious))} if self.malicious else {})

    def _banned(self, state: PyTree) -> set[tuple[int, int]]:
        """Workers (stage, replica) that have been banned by the verifier behind or before them."""
        verifiers, banned = integrity.find_verifiers(self.pipe, state), set()
        for direction, sender in (("forward", -1), ("backward", 1)):
            bans = verifiers[direction].bans
            bans = np.asarray(multihost_utils.process_allgather(bans, tiled=True))[:, 0]  # all replicas agree
            banned |= {(int(stage) + sender, int(replica)) for stage, replica in zip(*np.nonzero(bans), strict=True)}
        return banned

    def _advance(self, state: PyTree, seed: int, begin: int, end: int) -> tuple[PyTree, np.ndarray]:
        drained = np.zeros(0)
        if "transforms" in self.plug_ins and begin and begin % self.config.morph_every == 0:
            if not self.synchronous:
                state, done = self.pipe.drain(state)
                drained = np.asarray(done.loss)[np.asarray(done.microbatch) >= 0]
            state = self._transformed(state, jax.random.fold_in(jax.random.key(seed), begin))
        state, losses = super()._advance(state, seed, begin, end)
        if "verification" in self.plug_ins:
            state = integrity.share_bans(self.pipe, state)
        return state, np.concatenate([drained, losses])

    def _transformed(self, state: PyTree, key: jax.Array) -> PyTree:
        """The state with new coordinates before each block, in the middle of each, and before the head."""
        config, L = self.config, self.model.config.layers
        names = [("boundary", i) for i in range(L + 1)] + [("middle", i) for i in range(L)]
        transforms = unextractable.draw_transforms(names, config.rank, key=key)
        rules = unextractable.gpt_coordinates.coordinate_gpt_rules(L, patterns=unextractable.gpt.STAGE_PATTERNS)
        between = [("boundary", j * L // config.stages) for j in range(1, config.stages)]
        return unextractable.morph_pipeline(self.pipe, state, transforms, rules, boundaries=between)


def make_optimizer(config: Config, rank: int | None) -> optax.GradientTransformation:
    """AdamW after clipping; of a subspace network, with one second moment for each row of coordinates."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.99)
    if rank is not None:
        adam = optimizers.row_shared.scale_by_row_shared_adam(
            b1=0.9,
            b2=0.99,
            shared=unextractable.gpt_coordinates.coordinate_gpt_mask,
            row_size=config.model().width,
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),  # of the stage: it is applied to nothing else
        adam,
        optax.add_decayed_weights(config.weight_decay, lambda params: trees.mask_tree(params, r"^(?!.*transforms/)")),
        optax.scale_by_schedule(language_model.warmup_cosine(1.0, config.steps, warmup=config.warmup)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),
        optax.scale(-1.0),
    )
