"""A language model in stages whose boundaries carry few bytes: the subspace network beside lossy codecs and dense.

Paper: Ramasinghe, Ajanthan, Avraham, Zuo, Long, "Protocol Models: Scaling Decentralized Training with
Communication-Efficient Model Parallelism", NeurIPS 2025

    python -m experiments run subspace                                   # 0.5M parameters, minutes of one core
    python -m experiments run subspace --text tiny_shakespeare --data-dir DIR
    python -m experiments run subspace --text train.npy --preset llama_small --layers 8 --width 1024 --heads 8 \
        --rank 160 --block 1024 --dtype bfloat16 --batch-size 64 --steps 3000 --evaluate-every 500 \
        --learning-rates 3e-4                                            # 0.2 billion parameters: a GPU

A boundary stands after every block but the last, as in a pipeline with one block a stage; activations and their
gradients cross it coded. What is trained is what such a pipeline computes, on one device. Methods:

    dense           boundaries in float32
    bf16, int8      rounded, int8 with one scale a token
    top_k           the largest entries, as many as fit into the subspace's bytes, with error feedback forwards
    top_k_plain     the same without error feedback
    unconstrained   the subspace's code for a model that does not keep to it
    subspace        the subspace network, its parameters made equal to the dense ones by a wider MLP; AdamW on Z
    row_shared      the same with the paper's AdamW, one second moment for each row of Z
    subspace_long   the same as subspace for `longer` times as many steps
    subspace_moving row_shared, and every `basis_every` steps all stages take a Grassmann step of the basis together,
                    with Sigma measured on `basis_batches` training batches; off in all released code

The learning rate of each method is the best of a grid by the validation loss of the first seed; subspace_long takes
that of subspace. steps_ratio: the step at which subspace_long reaches the final loss of dense, over dense's steps.
captured: the share of the boundaries' squared gradients that is in the subspace, at the first move and at the end; move
cost: nats by which all moves together raised the validation loss. --basis-step 0 measures without moving.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from experiments._machinery import cases, loop as training
from experiments._machinery.errors import NonFiniteLossError
from experiments.data import text
from experiments.tasks import language_modelling as language_model
from jaxlib_methods import models, optimizers, parallel, trees

PyTree = Any
Method = Literal[
    "dense", "bf16", "int8", "top_k", "top_k_plain", "unconstrained", "subspace", "row_shared", "subspace_long",
    "subspace_moving",
]  # fmt: skip
CONSTRAINED = ("subspace", "row_shared", "subspace_long", "subspace_moving")
COORDINATES = r"^embed/tokens|(out|down)/(kernel|bias)$"  # of the constrained blocks


@dataclasses.dataclass(frozen=True)
class Config(language_model.Options):
    """Every combination of method, learning rate and seed is one case; each is resumable."""

    width: int | None = 96
    block: int | None = 64
    batch_size: int = 8
    steps: int = 400
    seeds: int = 2
    evaluate_every: int = 100
    rank: int = 12  # k
    embedding_std: float = 1.0  # of the frozen part of the embedding
    methods: tuple[Method, ...] = (
        "dense", "int8", "top_k", "unconstrained", "subspace", "row_shared", "subspace_long"
    )  # fmt: skip
    learning_rates: tuple[float, ...] = (1e-3, 3e-3)  # the first seed tries all of them
    longer: int = 3
    basis_every: int = 100  # steps between moves of the basis; about 500 in the paper, of many more
    basis_step: float = 0.5  # eta of a move, for a Sigma U of spectral norm 1
    basis_batches: int = 16  # of training text, that Sigma is measured on
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not self.methods or not self.learning_rates:
            raise ValueError("methods and learning_rates must each name at least one")
        if min(self.learning_rates) <= 0:
            raise ValueError(f"learning_rates must be positive, got {self.learning_rates}")
        for name in ("longer", "basis_every", "basis_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.model().layers < 2:
            raise ValueError(f"layers must be at least 2, for one boundary; got {self.model().layers}")
        self.subspace_model()

    def subspace_model(self, vocab_size: int | None = None) -> models.GPTConfig:
        """The subspace network with as many parameters as the dense model, to half a unit of its MLPs."""
        return language_model.subspace_network(self.model(vocab_size), self.rank)


SMOKE = {
    "layers": 2, "width": 16, "heads": 2, "block": 16, "rank": 4, "steps": 10, "seeds": 1, "evaluate_every": 10,
    "validation_windows": 8, "learning_rates": (3e-3,), "methods": ("top_k", "subspace_moving"),
    "basis_every": 5, "basis_batches": 2,
}  # fmt: skip


def PAPER(config: Config) -> dict[str, float]:
    """Official records at d = 1024, k = 160, 8 blocks: 9125 steps against 2925 for one loss."""
    decoder = config.model()
    published = (decoder.width, config.rank, decoder.layers) == (1024, 160, 8)
    return {"steps_ratio": 9125 / 2925} if published else {}


def train(config: Config, workdir: pathlib.Path) -> dict[str, Any]:
    """Runs all cases, draws the figure and returns losses and bytes."""
    task = language_model.load(config)
    metrics: dict[str, Any] = {}
    chosen: dict[str, list[dict[str, Any]]] = {}
    rates: dict[str, float] = {}
    for method in config.methods:
        run = _Runs(config, task, method, workdir / "cases")
        grid = (rates["subspace"],) if method == "subspace_long" and "subspace" in rates else config.learning_rates
        first = {rate: run(rate, 0) for rate in grid}
        rates[method] = min(first, key=lambda rate: first[rate].get("validation_loss", math.inf))
        chosen[method] = [first[rates[method]], *(run(rates[method], seed) for seed in range(1, config.seeds))]
        metrics[f"learning_rate {method}"] = rates[method]
        metrics[f"parameters {method}"] = run.network.parameters
        metrics[f"bytes forward {method}"], metrics[f"bytes backward {method}"] = run.network.bytes
        if finished := [result for result in chosen[method] if "validation_loss" in result]:
            metrics[f"validation_loss {method}"] = [result["validation_loss"] for result in finished]
            if moves := [result["moves"] for result in finished if result.get("moves")]:
                metrics["captured first"] = [of_run[0]["captured"] for of_run in moves]
                metrics["captured last"] = [of_run[-1]["captured"] for of_run in moves]
                metrics["move cost"] = [sum(move["cost"] for move in of_run) for of_run in moves]
    ratios = steps_ratio(chosen.get("dense", []), chosen.get("subspace_long", []), config.steps)
    if ratios:
        metrics["steps_ratio"] = ratios
    if jax.process_index() == 0:
        _figure(config, chosen, metrics, workdir)
    return metrics


class Network(NamedTuple):
    """A model in stages with a codec for each direction of its boundaries."""

    init: Callable[[jax.Array], PyTree]  # key -> parameters
    codecs: tuple[parallel.boundaries.Codec, parallel.boundaries.Codec]
    like: PyTree  # shapes of the activations of a batch
    boundaries: int
    losses: Callable[..., tuple[jax.Array, PyTree]]  # see `of`
    coordinates: PyTree  # bools: which parameters are coordinates
    parameters: int
    bytes: tuple[float, float]  # of a token, forwards and backwards
    basis: jax.Array | None  # U at the start, where it moves

    @classmethod
    def of(cls, config: Config, task: language_model.Task, method: str) -> "Network":
        """`losses` maps (parameters, states, windows [B, T + 1], pushes) to losses [B, T] and new states.

        The states are those of the boundaries, behind U where it moves: then nothing is compiled anew for it. The
        pushes, [boundaries, B, T, d] or None, are added to the stream behind the boundaries: their gradient is its.
        """
        constrained, moving = method in CONSTRAINED, method == "subspace_moving"
        V = task.config.vocab_size
        decoder = config.subspace_model(V) if constrained else task.config
        fns = models.gpt_stages(decoder)
        head = lambda params, x, targets: language_model.cross_entropy(fns.head(params, x), targets)
        if constrained or method == "unconstrained":
            drawn = parallel.boundaries.random_subspace(
                key=jax.random.key(0),
                vocab_size=V,
                width=decoder.width,
                rank=config.rank,
                embedding_std=config.embedding_std,
            )
            dense = (lambda p, ids, U, fixed: fns.embed(p, ids, None, fixed), lambda p, x, U: fns.block(p, x))
            embed, block = (fns.embed, fns.block) if constrained else dense

            def coded(U: jax.Array) -> tuple[parallel.StageModel, tuple[parallel.boundaries.Codec, ...]]:
                subspace = drawn._replace(U=U)
                return parallel.boundaries.subspace_model(embed, block, head, subspace), (
                    parallel.boundaries.subspace_codec(subspace, activation_dtype=decoder.dtype),
                    parallel.boundaries.subspace_gradient_codec(subspace),
                )

            model, codecs = coded(drawn.U)
        else:
            model = parallel.StageModel(fns.embed, fns.block, head)
            codecs = lossy_codecs(method, config.rank)
        boundaries = decoder.layers - 1

        def losses(
            params: PyTree, states: PyTree, windows: jax.Array, pushes: jax.Array | None = None
        ) -> tuple[jax.Array, PyTree]:
            U, states = states if moving else (None, states)
            stages, (forward, backward) = coded(U) if moving else (model, codecs)
            transmit = parallel.boundaries.codecs.coded_boundary(forward, backward)
            of_embed, of_blocks, of_head = models.split_gpt_params(decoder, params)
            x, states = stages.embed(of_embed, windows[:, :-1]), list(states)
            for i, of_block in enumerate(of_blocks):
                x = stages.block(of_block, x)
                if i < boundaries:
                    x, states[i] = transmit(x, states[i])
                    x = x if pushes is None else x | {"x": x["x"] + pushes[i]}
            return stages.head(of_head, x, windows[:, 1:]), (U, states) if moving else states

        init = jax.jit(lambda key: nnx.state(models.GPT(decoder, rngs=nnx.Rngs(key)), nnx.Param))
        params = jax.eval_shape(init, jax.random.key(0))
        windows = jax.ShapeDtypeStruct((config.batch_size, decoder.block_size), jnp.int32)
        like = jax.eval_shape(model.embed, models.split_gpt_params(decoder, params)[0], windows)
        floating = [leaf for leaf in jax.tree.leaves(like) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        sizes = [parallel.boundaries.payload_bytes(codec, x) for codec, x in zip(codecs, (like, floating), strict=True)]
        return cls(
            init,
            codecs,
            like,
            boundaries,
            losses,
            jax.tree.map(
                lambda p, named: named and p.shape[-1] == config.rank, params, trees.mask_tree(params, COORDINATES)
            ),
            language_model.parameter_count(params),
            tuple(size / windows.size for size in sizes),
            drawn.U if moving else None,
        )

    def states(self, like: PyTree | None = None, basis: jax.Array | None = None) -> PyTree:
        """Of both ends of all boundaries at the start, behind the basis where it moves."""
        init = lambda: self.codecs[0].init(self.like if like is None else like)
        ends = [(init(), init()) for _ in range(self.boundaries)]
        return ends if self.basis is None else (self.basis if basis is None else basis, ends)

    def moments(self, params: PyTree, states: PyTree, windows: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sigma U and tr Sigma of the gradients of the residual stream as they come to the boundaries [n, B, T + 1]."""
        x = self.like["x"]

        def of_batch(_: None, windows: jax.Array) -> tuple[None, tuple[jax.Array, jax.Array]]:
            loss = lambda pushes: self.losses(params, states, windows, pushes)[0].mean()
            G = jax.grad(loss)(jnp.zeros((self.boundaries, *x.shape), x.dtype)).astype(jnp.float32)
            return None, (parallel.boundaries.grassmann.gradient_moment(G, states[0]), jnp.mean(jnp.sum(G**2, axis=-1)))

        Y, total = jax.lax.scan(of_batch, None, windows)[1]
        return jnp.mean(Y, axis=0), jnp.mean(total)


def lossy_codecs(method: str, rank: int) -> tuple[parallel.boundaries.Codec, parallel.boundaries.Codec]:
    """Forwards and backwards; the gradients' codec of a simulated boundary has no memory."""
    if method in ("top_k", "top_k_plain"):
        k = max(1, (4 * rank + 1) // 5)  # entries of a value and an index, in the bytes of k values and an id
        plain = parallel.boundaries.top_k_codec(k, error_feedback=False)
        return plain if method == "top_k_plain" else parallel.boundaries.top_k_codec(k), plain
    codec = {"bf16": parallel.boundaries.cast_codec(), "int8": parallel.boundaries.int8_codec()}.get(
        method, parallel.boundaries.identity_codec()
    )
    return codec, codec


def steps_ratio(dense: list[dict], longer: list[dict], steps: int) -> list[float]:
    """For each seed, the first evaluated step of the longer run with at most dense's final loss, over dense's steps."""
    ratios = []
    for short, long in zip(dense, longer, strict=False):
        reached = [p["step"] for p in long["curve"] if p["validation_loss"] <= short.get("validation_loss", -math.inf)]
        ratios += [reached[0] / steps] if reached else []
    return ratios


def make_optimizer(config: Config, network: Network, method: str, steps: int) -> optax.GradientTransformation:
    """AdamW with linear warm-up and a cosine, after clipping; the learning rate is `step_size` in the state."""
    adam = optax.scale_by_adam(b1=0.9, b2=0.99)
    if method in ("row_shared", "subspace_moving"):
        width = config.model().width
        adam = optimizers.row_shared.scale_by_row_shared_adam(
            b1=0.9, b2=0.99, shared=network.coordinates, row_size=width
        )
    return optax.chain(
        optax.clip_by_global_norm(config.clip),
        adam,
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_schedule(language_model.warmup_cosine(1.0, steps)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),
        optax.scale(-1.0),
    )


class _Runs:
    """All runs of a method share one compiled program: the learning rate is an array in the state."""

    def __init__(self, config: Config, task: language_model.Task, method: str, folder: pathlib.Path):
        self.config, self.task, self.method, self.folder = config, task, method, folder
        self.network = network = Network.of(config, task, method)
        self.steps = config.steps * (config.longer if method == "subspace_long" else 1)
        self.optimizer = make_optimizer(config, network, method, self.steps)

        def loss_fn(params: PyTree, states: PyTree, windows: jax.Array, key: jax.Array):
            del key
            losses, states = network.losses(params, states, windows)
            return losses.mean(), (states, {})

        def per_window(params: PyTree, states: PyTree, windows: jax.Array) -> dict[str, jax.Array]:
            # The boundaries of validation windows remember nothing of the training batch.
            resized = lambda leaf: jax.ShapeDtypeStruct((len(windows), *leaf.shape[1:]), leaf.dtype)
            states = network.states(jax.tree.map(resized, network.like), *([] if network.basis is None else states[:1]))
            return {"loss": network.losses(params, states, windows)[0].mean(axis=1)}

        held_out = text.validation_rows(task.text.validation, task.config.block_size, config.validation_windows)
        self.loss_fn = loss_fn
        self.evaluate = training.evaluator(per_window, held_out, batch_size=config.batch_size, prefix="validation_")

    def __call__(self, rate: float, seed: int) -> dict[str, Any]:
        case_dir = self.folder / f"{self.method}-lr{rate:g}-seed{seed}"
        return cases.run_or_load(case_dir, functools.partial(self._run, rate, seed))

    def _run(self, rate: float, seed: int, case_dir: pathlib.Path) -> dict[str, Any]:
        config = self.config
        init_key, train_key = jax.random.split(jax.random.key(seed))
        params, states = self.network.init(init_key), self.network.states()
        state = training.init_state(params, self.optimizer, key=train_key, model_state=states)
        state = state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, step_size=jnp.float32(rate)))
        moving, history, moves = self.network.basis is not None, [], []
        every = config.basis_every if moving else self.steps
        try:
            for stop in (*range(every, self.steps, every), self.steps):
                # The checkpoint at the end of a part holds the state before the move: each part has its own folder.
                folder = case_dir / "checkpoints" / f"until_{stop}" if moving else case_dir
                state, records = training.fit(
                    self.loss_fn,
                    self.optimizer,
                    state,
                    self.task.rows,
                    batch_size=config.batch_size,
                    steps=stop,
                    steps_per_call=min(25, config.evaluate_every),
                    augment=self.task.window,
                    evaluate=self.evaluate,
                    evaluate_every=config.evaluate_every,
                    workdir=folder,
                    checkpoint_every=200,
                    mesh=self.task.rows.mesh,
                    label=f"{self.method} lr={rate:g} seed={seed}",
                )
                history += records
                if moving:
                    windows = self.task.calibration(config.basis_batches * config.batch_size, seed=stop)
                    captured, moved = self.move(state, windows.reshape(config.basis_batches, config.batch_size, -1))
                    state = moved if stop < self.steps else state
                    cost = self.evaluate(state)["validation_loss"] - records[-1]["validation_loss"]
                    moves.append({"step": stop, "captured": float(captured), "cost": cost})
        except NonFiniteLossError as error:
            print(f"diverged: {error}", flush=True)
            return {"curve": []}
        curve = language_model.evaluations(history)
        return {"curve": curve, "validation_loss": curve[-1]["validation_loss"], "moves": moves}

    @functools.cached_property
    def move(self) -> Callable[[training.TrainState, jax.Array], tuple[jax.Array, training.TrainState]]:
        """Jitted: (state, windows) -> the share of the gradients in the subspace, the state in the moved basis."""

        def move(state: training.TrainState, windows: jax.Array) -> tuple[jax.Array, training.TrainState]:
            U, ends = state.model_state
            Y, total = self.network.moments(state.params, state.model_state, windows)
            moved = parallel.boundaries.grassmann.grassmann_step(U, Y / jnp.linalg.norm(Y, 2), self.config.basis_step)
            change = lambda tree: parallel.boundaries.grassmann.change_basis(tree, U, moved, self.network.coordinates)
            m = change(optax.tree_utils.tree_get(state.opt_state, "m"))
            return jnp.sum(U * Y) / total, state._replace(
                params=change(state.params),
                opt_state=optax.tree_utils.tree_set(state.opt_state, m=m),
                model_state=(moved, ends),
            )

        return jax.jit(move)


def _figure(config: Config, chosen: dict[str, list[dict]], metrics: dict[str, Any], workdir: pathlib.Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (curves, by_bytes) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for method, results in chosen.items():
        finished = [result for result in results if result["curve"]]
        if not finished:
            continue
        steps = [point["step"] for point in finished[0]["curve"]]
        losses = np.array([[point["validation_loss"] for point in result["curve"]] for result in finished])
        size = metrics[f"bytes forward {method}"]
        (line,) = curves.plot(steps, losses.mean(0), label=f"{method} ({size:g} B)")
        final = losses[:, -1]
        by_bytes.errorbar(size, final.mean(), final.std(), marker="o", color=line.get_color())
        by_bytes.annotate(method, (size, final.mean()), textcoords="offset points", xytext=(5, 4), fontsize="small")
    curves.set(xlabel="step", ylabel="validation loss (nats per token)", title="loss, and bytes of a token forwards")
    by_bytes.set(xlabel="bytes of a token and boundary forwards", xscale="log", title="final loss")
    for axis in (curves, by_bytes):
        axis.grid(alpha=0.3)
    curves.legend(fontsize="small")
    decoder = config.model()
    figure.suptitle(
        f"{decoder.layers} blocks of width {decoder.width}, a boundary after each, k = {config.rank}, "
        f"{pathlib.Path(config.text).stem}, {config.seeds} seed(s)"
    )
    figure.savefig(workdir / "subspace.png", dpi=130)
    plt.close(figure)
