"""A decoder on one device with a coded boundary after every block but the last: what a pipeline would compute."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from experiments._machinery import loop
from experiments.data import text
from experiments.tasks import language_modelling
from jaxlib_methods import models, parallel, trees
from jaxlib_methods.parallel import boundaries
from jaxlib_methods.parallel.boundaries import Codec, Subspace, grassmann
from jaxlib_methods.typing import PyTree

COORDINATES = r"^embed/tokens|(out|down)/(kernel|bias)$"  # of the constrained blocks


class CodedDecoder(NamedTuple):
    """A model in stages with a codec for each direction of its boundaries.

    `losses` maps (parameters, states, windows [B, T + 1], pushes) to losses [B, T] and new states. The states are those
    of the boundaries, behind the basis U where it moves: then nothing is compiled anew for it. The pushes,
    [boundaries, B, T, d] or None, are added to the stream behind the boundaries: their gradient is its.
    """

    init: Callable[[jax.Array], PyTree]  # key -> parameters
    codecs: tuple[Codec, Codec]  # forwards and backwards
    like: PyTree  # shapes of the activations of a batch
    boundaries: int
    losses: Callable[..., tuple[jax.Array, PyTree]]
    coordinates: PyTree  # bools: which parameters are coordinates
    parameters: int
    bytes: tuple[float, float]  # of a token, forwards and backwards
    basis: jax.Array | None  # U at the start, where it moves

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
            return None, (boundaries.grassmann.gradient_moment(G, states[0]), jnp.mean(jnp.sum(G**2, axis=-1)))

        Y, total = jax.lax.scan(of_batch, None, windows)[1]
        return jnp.mean(Y, axis=0), jnp.mean(total)


def coded(decoder: models.GPTConfig, batch_size: int, codecs: tuple[Codec, Codec]) -> CodedDecoder:
    """A decoder between codecs that know nothing of it."""
    fns = models.gpt_stages(decoder)
    model = parallel.StageModel(fns.embed, fns.block, _head(fns))
    return _decoder(decoder, batch_size, lambda U: (model, codecs), None, moving=False)


def subspace_coded(
    decoder: models.GPTConfig, batch_size: int, subspace: Subspace, *, moving: bool = False
) -> CodedDecoder:
    """A decoder between the codecs of a subspace, which it keeps to if it is a subspace network."""
    fns = models.gpt_stages(decoder)
    embed, block = fns.embed, fns.block
    if decoder.subspace is None:
        embed, block = lambda p, ids, U, fixed: fns.embed(p, ids, None, fixed), lambda p, x, U: fns.block(p, x)

    def with_basis(U: jax.Array) -> tuple[parallel.StageModel, tuple[Codec, Codec]]:
        at = subspace._replace(U=U)
        forward = boundaries.subspace_codec(at, activation_dtype=decoder.dtype)
        return boundaries.subspace_model(embed, block, _head(fns), at), (
            forward,
            boundaries.subspace_gradient_codec(at),
        )

    return _decoder(decoder, batch_size, with_basis, subspace.U, moving=moving)


def _head(fns: models.GPTStages) -> Callable[..., jax.Array]:
    return lambda params, x, targets: language_modelling.cross_entropy(fns.head(params, x), targets)


def _decoder(
    decoder: models.GPTConfig,
    batch_size: int,
    with_basis: Callable[[jax.Array | None], tuple[parallel.StageModel, tuple[Codec, Codec]]],
    basis: jax.Array | None,
    *,
    moving: bool,
) -> CodedDecoder:
    fixed, count = with_basis(basis), decoder.layers - 1

    def losses(
        params: PyTree, states: PyTree, windows: jax.Array, pushes: jax.Array | None = None
    ) -> tuple[jax.Array, PyTree]:
        U, states = states if moving else (None, states)
        stages, (forward, backward) = with_basis(U) if moving else fixed
        transmit = boundaries.codecs.coded_boundary(forward, backward)
        of_embed, of_blocks, of_head = models.split_gpt_params(decoder, params)
        x, states = stages.embed(of_embed, windows[:, :-1]), list(states)
        for i, of_block in enumerate(of_blocks):
            x = stages.block(of_block, x)
            if i < count:
                x, states[i] = transmit(x, states[i])
                x = x if pushes is None else x | {"x": x["x"] + pushes[i]}
        return stages.head(of_head, x, windows[:, 1:]), (U, states) if moving else states

    init = jax.jit(lambda key: nnx.state(models.GPT(decoder, rngs=nnx.Rngs(key)), nnx.Param))
    params = jax.eval_shape(init, jax.random.key(0))
    windows = jax.ShapeDtypeStruct((batch_size, decoder.block_size), jnp.int32)
    model, codecs = fixed
    like = jax.eval_shape(model.embed, models.split_gpt_params(decoder, params)[0], windows)
    floating = [leaf for leaf in jax.tree.leaves(like) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    sizes = [boundaries.payload_bytes(codec, x) for codec, x in zip(codecs, (like, floating), strict=True)]
    coordinates = jax.tree.map(
        lambda p, named: named and p.shape[-1] == decoder.subspace, params, trees.mask_tree(params, COORDINATES)
    )
    return CodedDecoder(
        init=init,
        codecs=codecs,
        like=like,
        boundaries=count,
        losses=losses,
        coordinates=coordinates,
        parameters=language_modelling.parameter_count(params),
        bytes=tuple(size / windows.size for size in sizes),
        basis=basis if moving else None,
    )


class Training:
    """All runs of a network share one compiled program: the learning rate is `step_size` in the optimizer's state.

    Args:
      config: options of the language model; where the basis moves, with `basis_every`, `basis_batches`, `basis_step`.
      task: of these options.
      network: what is trained.
      optimizer: how.
      steps: how long.
    """

    def __init__(
        self,
        config: Any,
        task: language_modelling.Task,
        network: CodedDecoder,
        optimizer: optax.GradientTransformation,
        steps: int,
    ):
        self.config, self.task, self.network, self.optimizer = config, task, network, optimizer
        self.steps = steps

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
        self.evaluate = loop.evaluator(per_window, held_out, batch_size=config.batch_size, prefix="validation_")

    def fit(self, rate: float, seed: int, workdir: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
        """Evaluations by step, and the moves of the basis."""
        config = self.config
        init_key, train_key = jax.random.split(jax.random.key(seed))
        params, states = self.network.init(init_key), self.network.states()
        state = loop.init_state(params, self.optimizer, key=train_key, model_state=states)
        state = state._replace(opt_state=optax.tree_utils.tree_set(state.opt_state, step_size=jnp.float32(rate)))
        moving, history, moves = self.network.basis is not None, [], []
        every = config.basis_every if moving else self.steps
        for stop in (*range(every, self.steps, every), self.steps):
            # The checkpoint at the end of a part holds the state before the move: each part has its own folder.
            folder = workdir / "checkpoints" / f"until_{stop}" if moving else workdir
            state, records = loop.fit(
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
                label=f"{workdir.name} lr={rate:g}",
            )
            history += records
            if moving:
                windows = self.task.calibration(config.basis_batches * config.batch_size, seed=stop)
                captured, moved = self.move(state, windows.reshape(config.basis_batches, config.batch_size, -1))
                state = moved if stop < self.steps else state
                cost = self.evaluate(state)["validation_loss"] - records[-1]["validation_loss"]
                moves.append({"step": stop, "captured": float(captured), "cost": cost})
        return language_modelling.evaluations(history), moves

    @functools.cached_property
    def move(self) -> Callable[[loop.TrainState, jax.Array], tuple[jax.Array, loop.TrainState]]:
        """Jitted: (state, windows) -> the share of the gradients in the subspace, the state in the moved basis."""

        def move(state: loop.TrainState, windows: jax.Array) -> tuple[jax.Array, loop.TrainState]:
            U, ends = state.model_state
            Y, total = self.network.moments(state.params, state.model_state, windows)
            moved = grassmann.grassmann_step(U, Y / jnp.linalg.norm(Y, 2), self.config.basis_step)
            change = lambda tree: grassmann.change_basis(tree, U, moved, self.network.coordinates)
            m = change(optax.tree_utils.tree_get(state.opt_state, "m"))
            return jnp.sum(U * Y) / total, state._replace(
                params=change(state.params),
                opt_state=optax.tree_utils.tree_set(state.opt_state, m=m),
                model_state=(moved, ends),
            )

        return jax.jit(move)
