"""What a run shows while it trains: a bar on a terminal; elsewhere nothing but one line per evaluation."""

import sys
from typing import Any

import jax


class Progress:
    """Bar, loss, images per second and time left (rich); used as a context manager around the training loop."""

    def __init__(self, label: str, steps: int, start: int, batch_size: int, show: bool | None = None):
        self._bar, self._label, self._width = None, label, batch_size
        self._print = jax.process_index() == 0 and show is not False
        if self._print and (sys.stdout.isatty() if show is None else show):
            from rich import progress

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("loss {task.fields[loss]:.4f}"),
                progress.TextColumn("{task.fields[rate]:,.0f} images/s"),
                progress.TimeRemainingColumn(),
                transient=True,
            )
            self._task = self._bar.add_task(label, total=steps, completed=start, loss=float("nan"), rate=0.0)

    def __enter__(self) -> "Progress":
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self._bar:
            self._bar.stop()

    def update(self, step: int, loss: float, steps_per_second: float) -> None:
        if self._bar:
            self._bar.update(self._task, completed=step, loss=loss, rate=steps_per_second * self._width)

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        if self._print:
            numbers = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
            line = f"{self._label}  step {step}  {numbers}"
            self._bar.console.print(line) if self._bar else print(line, flush=True)
