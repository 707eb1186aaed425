"""Where the numbers of a run go: JSON lines always, TensorBoard on request. A listener is any `record -> None`."""

import json
import pathlib
from typing import Any

import jax

Record = dict[str, Any]


class JsonLines:
    """Appends records to a `.jsonl` file, one line each, readable while the run goes on; process 0 only."""

    def __init__(self, path: pathlib.Path, earlier: list[Record]):
        """Starts from `earlier`, the history of the checkpoint: lines written after it will be written again."""
        self._file = None
        if jax.process_index() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
            for record in earlier:
                self(record)

    def __call__(self, record: Record) -> None:
        if self._file:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def close(self) -> None:
        if self._file:
            self._file.close()


class TensorBoard:
    """Writes every number of a record as a scalar under `workdir/tensorboard`; process 0 only."""

    def __init__(self, workdir: pathlib.Path):
        self._writer = None
        if jax.process_index() == 0:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(workdir / "tensorboard"))

    def __call__(self, record: Record) -> None:
        if self._writer:
            for name, value in record.items():
                if name != "step" and isinstance(value, int | float):
                    self._writer.add_scalar(name, value, record["step"])
            self._writer.flush()
