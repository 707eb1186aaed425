"""Notebooks in the percent form: plain Python whose cells begin with `# %%` or `# %% [markdown]`.

`run` executes one in a process of its own, as Jupyter would: a cell shows what it prints, its last expression and its
figures. `render` makes a page of it. Jupyter opens the same files with jupytext.
"""

import ast
import base64
import contextlib
import io
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from typing import NamedTuple

REPOSITORY = pathlib.Path(__file__).resolve().parent.parent
CELL = re.compile(r"^# %%(?: \[(markdown)\])?[^\n]*\n", re.MULTILINE)


class Cell(NamedTuple):
    is_text: bool
    source: str


class Output(NamedTuple):
    text: str
    images: list[bytes]  # PNG


def cells_of(path: pathlib.Path) -> list[Cell]:
    _, *parts = CELL.split(path.read_text())
    cells = []
    for kind, source in zip(parts[::2], parts[1::2], strict=True):
        if kind:
            source = re.sub(r"^# ?", "", source, flags=re.MULTILINE)
        cells.append(Cell(bool(kind), source.strip()))
    return cells


def run(path: pathlib.Path) -> list[Output]:
    """Executes the code cells in order and returns what each shows; a cell that fails raises with its traceback."""
    quick_to_compile = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    environment = os.environ | quick_to_compile | {"MPLBACKEND": "agg", "PYTHONPATH": str(REPOSITORY)}
    with tempfile.NamedTemporaryFile(suffix=".json") as shown:
        done = subprocess.run(
            [sys.executable, __file__, path, shown.name], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"{path} failed:\n{done.stderr}")
        return [Output(text, [*map(base64.b64decode, images)]) for text, images in json.load(shown)]


def render(path: pathlib.Path) -> tuple[str, dict[str, bytes]]:
    """The page of a notebook in Markdown, and its figures by file name."""
    outputs = iter(run(path))
    lines: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in cells_of(path):
        if cell.is_text:
            lines += [cell.source, ""]
            continue
        output = next(outputs)
        lines += ["```python", cell.source, "```", ""]
        if output.text:
            lines += ["```text", output.text.rstrip(), "```", ""]
        for image in output.images:
            name = f"{path.stem}_{len(figures)}.png"
            figures[name] = image
            lines += [f"![what the cell above draws]({name})", ""]
    lines += [f"[This page as a notebook]({path.name}), for Jupyter with jupytext; CI executes it.", ""]
    return "\n".join(lines), figures


def _execute(path: pathlib.Path) -> list[tuple[str, list[str]]]:
    names: dict = {"__name__": "__main__"}
    shown = []
    for number, cell in enumerate(cells_of(path)):
        if cell.is_text:
            continue
        statements = ast.parse(cell.source, f"{path.name}, cell {number}").body
        last = statements.pop() if statements and isinstance(statements[-1], ast.Expr) else None
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(ast.Module(statements, []), f"{path.name}, cell {number}", "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), f"{path.name}, cell {number}", "eval"), names)
                if value is not None:
                    print(repr(value))
        shown.append((printed.getvalue(), _figures()))
    return shown


def _figures() -> list[str]:
    """The open figures of matplotlib, if a cell has imported it, as base64 of their PNG; they are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    pictures = []
    for number in pyplot.get_fignums():
        picture = io.BytesIO()
        pyplot.figure(number).savefig(picture, dpi=110, bbox_inches="tight")
        pictures.append(base64.b64encode(picture.getvalue()).decode())
    pyplot.close("all")
    return pictures


if __name__ == "__main__":
    pathlib.Path(sys.argv[2]).write_text(json.dumps(_execute(pathlib.Path(sys.argv[1]))))
