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
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import optax

from experiments._machinery import plots
from experiments._machinery.errors import NonFiniteLossError
from experiments._machinery.options import Count, Positive
from experiments._machinery.records import Case, Outcome, Target, Targets
from experiments.tasks import coded_decoder, language_modelling
from experiments.tasks.coded_decoder import CodedDecoder, Training
from jaxlib_methods import models, optimizers
from jaxlib_methods.parallel import boundaries

PyTree = Any
Method = Literal[
    "dense", "bf16", "int8", "top_k", "top_k_plain", "unconstrained", "subspace", "row_shared", "subspace_long",
    "subspace_moving",
]  # fmt: skip
CONSTRAINED = ("subspace", "row_shared", "subspace_long", "subspace_moving")


@dataclasses.dataclass(frozen=True)
class Config(language_modelling.Options):
    """Every combination of method, learning rate and seed is one case; each is resumable."""

    width: Count | None = 96
    block: Count | None = 64
    batch_size: Count = 8
    steps: Count = 400
    seeds: Count = 2
    evaluate_every: Count = 100
    rank: Count = 12  # k
    embedding_std: Positive = 1.0  # of the frozen part of the embedding
    methods: tuple[Method, ...] = (
        "dense", "int8", "top_k", "unconstrained", "subspace", "row_shared", "subspace_long"
    )  # fmt: skip
    learning_rates: tuple[Positive, ...] = (1e-3, 3e-3)  # the first seed tries all of them
    longer: Count = 3
    basis_every: Count = 100  # steps between moves of the basis; about 500 in the paper, of many more
    basis_step: float = 0.5  # eta of a move, for a Sigma U of spectral norm 1
    basis_batches: Count = 16  # of training text, that Sigma is measured on
    weight_decay: float = 0.01
    clip: Positive = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.model().layers < 2:
            raise ValueError(f"layers must be at least 2, for one boundary; got {self.model().layers}")
        self.subspace_model()

    def subspace_model(self, vocab_size: int | None = None) -> models.GPTConfig:
        """The subspace network with as many parameters as the dense model, to half a unit of its MLPs."""
        return language_modelling.subspace_network(self.model(vocab_size), self.rank)


SMOKE = {
    "layers": 2, "width": 16, "heads": 2, "block": 16, "rank": 4, "steps": 10, "seeds": 1, "evaluate_every": 10,
    "validation_windows": 8, "learning_rates": (3e-3,), "methods": ("top_k", "subspace_moving"),
    "basis_every": 5, "basis_batches": 2,
}  # fmt: skip
SHOWN = (
    "validation_loss", "bytes forward", "bytes backward", "captured first", "captured last", "move cost", "steps_ratio"
)  # fmt: skip
TUNED_BY = "validation_loss"


class Shared(NamedTuple):
    config: Config
    training: Callable[[Method], Training]  # kept for all learning rates and seeds of a method


def variants(config: Config) -> dict[str, Method]:
    return {method: method for method in config.methods}


def candidates(config: Config, row: str, chosen: dict[str, float]) -> Sequence[float]:
    return (chosen["subspace"],) if row == "subspace_long" and "subspace" in chosen else config.learning_rates


def load(config: Config) -> Shared:
    task = language_modelling.load(config)
    return Shared(config, functools.lru_cache(maxsize=1)(functools.partial(training, config, task)))


def training(config: Config, task: language_modelling.Task, method: Method) -> Training:
    network, steps = (
        decoder(config, task.config, method),
        config.steps * (config.longer if method == "subspace_long" else 1),
    )
    return Training(config, task, network, make_optimizer(config, network, method, steps), steps)


def run(shared: Shared, method: Method, seed: int, workdir: Any, rate: float) -> Outcome:
    trained = shared.training(method)
    network = trained.network
    about = {
        "learning_rate": rate,
        "parameters": network.parameters,
        "bytes forward": network.bytes[0],
        "bytes backward": network.bytes[1],
    }
    try:
        curve, moves = trained.fit(rate, seed, workdir)
    except NonFiniteLossError as error:
        print(f"diverged: {error}", flush=True)
        return Outcome(about)
    moved = {}
    if moves:
        captured = [move["captured"] for move in moves]
        moved = {"captured first": captured[0], "captured last": captured[-1]}
        moved["move cost"] = sum(move["cost"] for move in moves)
    return Outcome(about | {"validation_loss": curve[-1]["validation_loss"]} | moved, curve)


def decoder(config: Config, dense: models.GPTConfig, method: Method) -> CodedDecoder:
    """The network of a method, with its codecs."""
    if method not in (*CONSTRAINED, "unconstrained"):
        return coded_decoder.coded(dense, config.batch_size, lossy_codecs(method, config.rank))
    network = config.subspace_model(dense.vocab_size) if method in CONSTRAINED else dense
    subspace = boundaries.random_subspace(
        key=jax.random.key(0),
        vocab_size=dense.vocab_size,
        width=network.width,
        rank=config.rank,
        embedding_std=config.embedding_std,
    )
    return coded_decoder.subspace_coded(network, config.batch_size, subspace, moving=method == "subspace_moving")


def lossy_codecs(method: str, rank: int) -> tuple[boundaries.Codec, boundaries.Codec]:
    """Forwards and backwards; the gradients' codec of a simulated boundary has no memory."""
    if method in ("top_k", "top_k_plain"):
        k = max(1, (4 * rank + 1) // 5)  # entries of a value and an index, in the bytes of k values and an id
        plain = boundaries.top_k_codec(k, error_feedback=False)
        return plain if method == "top_k_plain" else boundaries.top_k_codec(k), plain
    codec = {"bf16": boundaries.cast_codec(), "int8": boundaries.int8_codec()}.get(method, boundaries.identity_codec())
    return codec, codec


def make_optimizer(config: Config, network: CodedDecoder, method: Method, steps: int) -> optax.GradientTransformation:
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
        optax.scale_by_schedule(language_modelling.warmup_cosine(1.0, steps)),
        optax.inject_hyperparams(optax.scale)(step_size=1.0),
        optax.scale(-1.0),
    )


def compare(shared: Shared, cases: list[Case]) -> list[tuple[str, int, dict[str, float]]]:
    """The first evaluated step of the longer run with at most dense's final loss, over dense's steps."""
    dense = {case.seed: case.metrics.get("validation_loss", -math.inf) for case in cases if case.name == "dense"}
    found = []
    for case in (case for case in cases if case.name == "subspace_long" and case.seed in dense):
        reached = [point["step"] for point in case.curve if point["validation_loss"] <= dense[case.seed]]
        found += [(case.name, case.seed, {"steps_ratio": reached[0] / shared.config.steps})] if reached else []
    return found


def targets(config: Config) -> Targets:
    """Official records at d = 1024, k = 160, 8 blocks: 9125 steps against 2925 for one loss."""
    network = config.model()
    if (network.width, config.rank, network.layers) != (1024, 160, 8):
        return {}
    ratio = Target(9125 / 2925, "official records of Protocol Models, d = 1024, k = 160", "authors' code")
    return {"subspace_long": {"steps_ratio": ratio}}


def figures(shared: Shared, cases: list[Case]) -> dict[str, plots.Figure]:
    loss = {"validation_loss": "validation loss (nats per token)"}
    by_bytes = plots.over(
        cases,
        lambda case: case.metrics["bytes forward"],
        loss,
        label=lambda case: case.name,
        xlabel="bytes of a token and boundary forwards",
        xscale="log",
    )
    return {"subspace": plots.curves(cases, "step", loss), "bytes": by_bytes}
