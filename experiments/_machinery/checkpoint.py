"""The folder of a run: one configuration, whole checkpoints, nothing half written.

A checkpoint is one orbax step: every leaf of the training state by its path (typed keys as their words), the history,
and a digest of both. Orbax writes beside and renames, so a killed process leaves either a whole checkpoint or none. A
checkpoint that was damaged later is an error that names the folder to delete; training never silently starts over.

On several processes the folder must be on a file system that all of them see.
"""

import contextlib
import gc
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments._machinery.errors import CheckpointError, WorkdirError
from experiments._machinery.files import write_json

PyTree = Any
# Where the data lie and how a run is watched do not change its result, so a run may resume with other values of these.
NOT_COMPARED = ("data_dir", "download", "tensorboard", "progress")
FREE_BYTES = 16 * 2**20


def claim(workdir: str | os.PathLike, config: dict[str, Any]) -> pathlib.Path:
    """Makes the folder of a run ready, before any work.

    Raises:
      WorkdirError: it cannot be written, the disk is nearly full, or it holds a run of another configuration.
    """
    workdir = pathlib.Path(workdir)
    if jax.process_index():
        return workdir
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / ".probe.json", None)
        (workdir / ".probe.json").unlink()
        free = shutil.disk_usage(workdir).free
    except OSError as error:
        raise WorkdirError(
            f"the workdir {workdir} cannot be written ({error.strerror}); choose another with --workdir"
        ) from error
    if free < FREE_BYTES:
        raise WorkdirError(
            f"the disk of the workdir {workdir} is full ({free} bytes free); make room or choose another with --workdir"
        )
    config = json.loads(
        json.dumps({name: value for name, value in config.items() if name not in NOT_COMPARED}, default=str)
    )
    path = workdir / "config.json"
    if path.exists():
        try:
            found = json.loads(path.read_text())
        except ValueError as error:
            raise WorkdirError(f"{path} is not JSON ({error}); delete {workdir} or choose another --workdir") from error
        names = [name for name in sorted(found.keys() | config.keys()) if found.get(name) != config.get(name)]
        if names:
            changes = "; ".join(f"{name} was {found.get(name)!r} and is now {config.get(name)!r}" for name in names)
            raise WorkdirError(
                f"the workdir {workdir} holds a run of another configuration ({changes}); "
                "repeat its options to resume it, delete the folder, or choose another --workdir"
            )
    else:
        write_json(path, config)
    return workdir


class Checkpoints:
    """The latest checkpoints under `workdir/checkpoints`; see the module's docstring for what one holds."""

    def __init__(self, workdir: str | os.PathLike, *, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # orbax logs every step; its errors are raised as well
        import orbax.checkpoint as ocp

        self._ocp = ocp
        self.folder = pathlib.Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True, enable_async_checkpointing=True)
        try:
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        except Exception as error:  # orbax raises many types here
            raise CheckpointError(
                f"the checkpoints under {self.folder} cannot be opened ({_first_line(error)}); "
                "delete that folder to start over"
            ) from error

    def latest(self) -> int | None:
        """The step of the newest checkpoint, None where there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: PyTree, history: list[dict[str, Any]]) -> None:
        """Copies the state to the host and returns; the files are written while training goes on."""
        leaves = _by_path(state)
        about = {"history": list(history), "digest": _digest(leaves, history)}  # the caller's list grows meanwhile
        args = self._ocp.args
        try:
            self._manager.save(step, args=args.Composite(state=args.StandardSave(leaves), about=args.JsonSave(about)))
        except Exception as error:  # of this save or of the one before it, still being written until now
            raise WorkdirError(f"a checkpoint cannot be written to {self.folder} ({_first_line(error)})") from error

    def restore(self, template: PyTree) -> tuple[PyTree, list[dict[str, Any]]] | None:
        """The newest state, with the shardings of `template`, and its history; None where there is no checkpoint."""
        step = self.latest()
        if step is None:
            return None
        wanted = _by_path(template)
        args = self._ocp.args
        try:
            abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), wanted)
            with _quiet():
                found = self._manager.restore(
                    step, args=args.Composite(state=args.StandardRestore(abstract), about=args.JsonRestore())
                )
            leaves, about = found["state"], found["about"]
            if about["digest"] != _digest(leaves, about["history"]):
                raise ValueError("its digest does not match its contents")
        except Exception as error:  # a damaged file surfaces as any type
            raise CheckpointError(
                f"the checkpoint {self.folder / str(step)} cannot be read ({_first_line(error)}); "
                "delete that folder and repeat the command to continue from the one before it, or from the start"
            ) from error
        return _like(template, leaves), about["history"]

    def close(self) -> None:
        """Waits until the last checkpoint is on the disk."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise WorkdirError(f"a checkpoint cannot be written to {self.folder} ({_first_line(error)})") from error
        finally:
            self._manager.close()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Damaged files make orbax's background tasks print their own tracebacks around the one error that we raise."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level, sys.unraisablehook = logger.level, lambda _: None
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        gc.collect()  # the tasks complain when they are collected
        logger.setLevel(level)
        sys.unraisablehook = hook


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _by_path(tree: PyTree) -> dict[str, jax.Array]:
    """Leaves by their position and path, so that any pytree type can be saved and none has to be importable later.

    Arrays without entries are left out: orbax refuses them.
    """
    paths = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        f"{i:04d}.{jax.tree_util.keystr(path, simple=True, separator='.')}": jax.random.key_data(leaf)
        if _is_key(leaf)
        else leaf
        for i, (path, leaf) in enumerate(paths)
        if leaf.size
    }


def _like(template: PyTree, leaves: dict[str, jax.Array]) -> PyTree:
    wanted, treedef = jax.tree.flatten(template)
    found = iter([leaves[name] for name in sorted(leaves)])
    back = lambda old, new: jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new
    return treedef.unflatten([back(old, next(found)) if old.size else old for old in wanted])


def _digest(leaves: dict[str, jax.Array], history: list[dict[str, Any]]) -> str:
    digest = hashlib.sha256(json.dumps(history).encode())
    for name in sorted(leaves):
        digest.update(np.ascontiguousarray(_on_host(leaves[name])))
    return digest.hexdigest()


def _on_host(leaf: jax.Array) -> np.ndarray:
    """The whole array on every process, also where each holds a part of it."""
    if leaf.is_fully_addressable or leaf.is_fully_replicated:
        return np.asarray(leaf)
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
