"""Runs made of many cases (sparsity x score x seed): finished cases are read back, an unfinished one resumes."""

import json
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax

from experiments._machinery.errors import WorkdirError
from experiments._machinery.files import write_json


def run_or_load(
    case_dir: pathlib.Path, fn: Callable[[pathlib.Path], dict[str, Any]], *, keep_checkpoints: bool = False
) -> dict[str, Any]:
    """Returns the metrics of one case: from `case_dir/metrics.json`, or from `fn(case_dir)`, written there at its end.

    `fn` hands `case_dir` to `fit` as workdir, so that a killed case goes on from its last checkpoint. The metrics may
    be anything JSON holds; they come back as JSON gives them back on the first run as well. A finished case's
    checkpoints are deleted unless asked to keep. On several processes the folder is shared, and process 0 writes.
    """
    path = pathlib.Path(case_dir) / "metrics.json"
    if _exists_on_first_process(path):
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise WorkdirError(f"{path} is not JSON ({error}); delete it to run this case again") from error
    metrics = fn(path.parent)
    if jax.process_index() == 0:
        write_json(path, metrics)
        if not keep_checkpoints:
            shutil.rmtree(path.parent / "checkpoints", ignore_errors=True)
    return json.loads(json.dumps(metrics))


def _exists_on_first_process(path: pathlib.Path) -> bool:
    """Process 0 looks and tells the others: they must not disagree on whether there is a program to run together."""
    exists = path.exists()
    if jax.process_count() > 1:
        import numpy as np
        from jax.experimental import multihost_utils

        exists = bool(multihost_utils.broadcast_one_to_all(np.asarray(exists)))
    return exists
