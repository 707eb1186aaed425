"""The figures of all experiments: curves, a metric over a variable, bars, images side by side.

`figures(shared, cases)` of a method returns {name: picture}; the runner saves each as `name.png` in the workdir. A
picture is a matplotlib `Figure`, from these functions or from `axes`, or an image uint8 [H, W(, 3)] of plain pixels.
"""

import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments._machinery.records import Case

Figure = Any  # matplotlib is imported when something is drawn


def axes(
    rows: int = 1, columns: int = 1, *, size: tuple[float, float] = (5.0, 4.0), **share: Any
) -> tuple[Figure, Any]:
    """A figure without pyplot's global state, and its axes [rows, columns], each of that size in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **share)


def save(path: pathlib.Path, picture: Figure | np.ndarray) -> None:
    """Writes a picture as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(picture, np.ndarray):
        from PIL import Image

        Image.fromarray(picture).save(path)
    else:
        picture.savefig(path, dpi=130)


def by_name(cases: Sequence[Case], label: Callable[[Case], str] | None = None) -> dict[str, list[Case]]:
    """The cases of each row, all seeds; `label` names the rows otherwise."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(label(case) if label else case.name, []).append(case)
    return groups


def curves(
    cases: Sequence[Case],
    x: str,
    ys: Mapping[str, str],
    *,
    label: Callable[[Case], str] | None = None,
    panel: Callable[[Case], str] | None = None,
    title: str = "",
    **style: Any,
) -> Figure:
    """Points of the cases' curves: one panel a quantity, one line a row, the median of the seeds within their range.

    Args:
      cases: those without a point of a quantity are left out there.
      x: name of the abscissa in a point, e.g. "step".
      ys: name in a point -> what to write at the axis.
      label: of a line; the row's name by default.
      panel: what is drawn apart, e.g. the depth; it titles its panels, one a quantity.
      title: of the whole figure.
      style: for `Axes.set` of every panel, e.g. `yscale="log"`, `xlabel="updates"`.
    """
    apart = by_name(cases, panel) if panel else {"": cases}
    wanted = [(heading, y) for heading in apart for y in ys]
    rows = -(-len(wanted) // 4)
    columns = -(-len(wanted) // rows)
    figure, grid = axes(rows, columns)
    for place, (heading, y) in itertools.zip_longest(grid.flat, wanted, fillvalue=(None, None)):
        if y is None:
            place.set_axis_off()
            continue
        for name, group in by_name(apart[heading], label).items():
            series = [[(point[x], point[y]) for point in case.curve if y in point] for case in group]
            series = [points for points in series if points]
            if not series:
                continue
            shortest = min(map(len, series))  # a seed that diverged ends early
            values = np.array([points[:shortest] for points in series])
            at, middle = values[0, :, 0], np.median(values[..., 1], axis=0)
            (line,) = place.plot(at, middle, marker="." if shortest < 40 else None, label=name)
            band = values[..., 1].min(0), values[..., 1].max(0)
            place.fill_between(at, *band, color=line.get_color(), alpha=0.15, linewidth=0)
        place.set(**{"xlabel": x, "ylabel": ys[y], "title": heading} | style)
        place.grid(alpha=0.3)
    grid[0, 0].legend(fontsize="small")
    figure.suptitle(title, fontsize=10)
    return figure


def over(
    cases: Sequence[Case],
    x: Callable[[Case], float | None],
    ys: Mapping[str, str],
    *,
    label: Callable[[Case], str],
    targets: Mapping[str, Sequence[tuple[float, float]]] | None = None,
    title: str = "",
    **style: Any,
) -> Figure:
    """Metrics over a variable of the variants: means over the seeds with their standard deviations.

    Args:
      cases: where `x` is None a horizontal line is drawn, e.g. of the dense network.
      x: the variable, e.g. `lambda case: case.variant.sparsity`.
      ys: metric -> what to write at the axis; one panel each.
      label: which line a case belongs to, e.g. `lambda case: case.variant.score`.
      targets: points (x, value) to compare with, by what to call them; in the first panel.
      title: of the whole figure.
      style: for `Axes.set` of every panel.
    """
    figure, panels = axes(1, len(ys))
    for panel, (y, ylabel) in zip(panels[0], ys.items(), strict=True):
        for name, group in by_name(cases, label).items():
            values: dict[float | None, list[float]] = {}
            for case in group:
                if y in case.metrics:
                    values.setdefault(x(case), []).append(case.metrics[y])
            if (level := values.pop(None, None)) is not None:
                panel.axhline(np.mean(level), color="black", linewidth=1, label=name)
            if values:
                at = sorted(values)
                means, spread = [np.mean(values[k]) for k in at], [np.std(values[k]) for k in at]
                panel.errorbar(at, means, spread, marker="o", capsize=3, label=name)
        panel.set(**{"ylabel": ylabel} | style)
        panel.grid(alpha=0.3)
    for name, points in (targets or {}).items():
        panels[0, 0].plot(*zip(*points, strict=True), "k*", markersize=10, label=name)
    panels[0, 0].legend(fontsize="small")
    figure.suptitle(title, fontsize=10)
    return figure


def bars(cases: Sequence[Case], ys: Mapping[str, str], *, title: str = "", **style: Any) -> Figure:
    """One panel a metric, one bar a row: the mean over the seeds with the standard deviation."""
    groups = by_name(cases)
    figure, panels = axes(1, len(ys), size=(max(4.0, 0.6 * len(groups) + 1), 4.0))
    for panel, (y, ylabel) in zip(panels[0], ys.items(), strict=True):
        found = {name: [case.metrics[y] for case in group if y in case.metrics] for name, group in groups.items()}
        found = {name: values for name, values in found.items() if values}
        panel.bar(
            list(found), [np.mean(v) for v in found.values()], yerr=[np.std(v) for v in found.values()], capsize=3
        )
        panel.set(**{"ylabel": ylabel} | style)
        panel.tick_params(axis="x", rotation=60 if len(found) > 4 else 0)
    figure.suptitle(title, fontsize=10)
    return figure


def images(panels: Sequence[tuple[str, np.ndarray]], columns: int = 4, **imshow: Any) -> Figure:
    """Images side by side with titles; `imshow` holds for those without colours, e.g. `cmap="gray"`."""
    rows = -(-len(panels) // columns)
    height, width = panels[0][1].shape[:2]
    figure, grid = axes(rows, columns, size=(3.2, 3.2 * height / width + 0.35))
    for place in grid.flat:
        place.axis("off")
    for place, (title, image) in zip(grid.flat, panels, strict=False):
        place.imshow(image, interpolation="nearest", **(imshow if image.ndim == 2 else {}))
        place.set_title(title, fontsize=9)
    return figure
