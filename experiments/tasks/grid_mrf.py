"""MAP inference in pairwise MRFs on pixel grids: instances, solvers by name and their traces over the iterations.

    task = grid_mrf.load(config, read)             # read: name -> (what was measured, its Instance)
    outcome = task.solve(task.instance("tsukuba"), "trwp-4", 50, workdir)
    outcome.metrics["energy@50"], grid_solvers.labels_of(workdir)

Energies are those of the 4-connected grid for any number of directions.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np

from experiments._machinery import options, plots
from experiments._machinery.options import Count, OneOf, Positive
from experiments._machinery.records import Case, Outcome, Target
from experiments.tasks.grid_solvers import REPORTED, SOLVERS, Instance, solve

OWN = "own"  # the name of the user's own instance


@dataclasses.dataclass(frozen=True)
class Options(options.Options):
    """Options of every experiment on grids; its `Config` adds its own."""

    data_dir: str | None = None  # folder of prepared instances; None: one that is made from a bundled photograph
    instances: tuple[str, ...] | None = None  # None: all prepared ones, or without data_dir the embedded one
    # sgm, sgm_path_costs, isgmr, trwp or mean_field, each with -4, -8 or -16 directions; trws needs g++
    solvers: tuple[Annotated[str, OneOf(SOLVERS)], ...] = ("sgm-4", "isgmr-4", "trwp-4", "mean_field-4")
    iterations: Count = 50
    evaluate_every: Count = 1  # iterations between energies
    smoothness: Literal["linear", "quadratic"] = "linear"  # this and the next two: V of your own instance
    truncation: Positive | None = None  # of the cost; None does not truncate
    weight: Positive = 20.0
    shrink: Count = 2  # the photograph of the embedded instance is this many times smaller than the bundled one
    seed: int = 0  # of what is random in the embedded instance

    def chosen(self, prepared: Sequence[str], embedded: str, *, own: bool, folder: str) -> tuple[str, ...]:
        """The names of the instances to solve.

        Args:
          prepared: those under `data_dir`.
          embedded: the one that needs no data.
          own: whether the user gave one.
          folder: what `data_dir` must hold, `{}` standing for the instance.

        Raises:
          ValueError: an instance needs data that are not given, or is asked for beside the user's own.
        """
        if own:
            if self.instances or self.data_dir:
                raise ValueError("your own instance is solved alone; leave out --instances and --data-dir")
            return (OWN,)
        for name in self.instances or ():
            if name != embedded and self.data_dir is None:
                raise ValueError(f"instance {name!r} needs --data-dir, the folder that holds {folder.format(name)}")
        return self.instances or ((embedded,) if self.data_dir is None else tuple(prepared))


class Problem(NamedTuple):
    """V(x, y) = weight * min(d, T) or weight * min(d^2, T), d = |x - y|."""

    smoothness: Literal["linear", "quadratic"]
    truncation: float | None  # T, of the cost; None does not truncate
    weight: float


class Row(NamedTuple):
    """A variant: an instance and a solver, or a baseline of the method."""

    instance: str
    solver: str


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """Instances by name, each read once, and how they are solved."""

    options: Options
    measured: Callable[[str], Any]  # name -> the pair or picture
    instance: Callable[[str], Instance]
    solve: Callable[[Instance, str, int, pathlib.Path], Outcome]  # (instance, solver, iterations, case's folder)


def load(options: Options, read: Callable[[str], tuple[Any, Instance]]) -> Task:
    """The task of these options; `read` makes an instance and what it was made of from its name."""
    read = functools.cache(read)
    run = functools.partial(solve, evaluate_every=options.evaluate_every)
    return Task(options, lambda name: read(name)[0], lambda name: read(name)[1], run)


def rows(names: Sequence[str], solvers: Sequence[str], baselines: Sequence[str] = ()) -> dict[str, Row]:
    """The variants: every instance by every baseline and solver."""
    return {f"{name}/{way}": Row(name, way) for name in names for way in (*baselines, *solvers)}


def pairwise_cost(problem: Problem, num_labels: int) -> tuple[Any, np.ndarray]:
    """V, with its profile in float64."""
    from jaxlib_methods import message_passing as mp

    kind, truncation, weight = problem
    power = {"linear": 1, "quadratic": 2}[kind]
    costs = np.arange(num_labels, dtype=np.float64) ** power
    if truncation is not None:
        reach = min(int(np.ceil(truncation ** (1 / power))), num_labels - 1)
        costs = np.minimum(costs[: reach + 1], truncation)
    if kind == "linear" and truncation is not None:
        pairwise = mp.potentials.truncated_linear(weight, truncation=truncation)
    elif truncation is not None:
        pairwise = mp.potentials.truncated_quadratic(weight, truncation=truncation, truncate="cost")
    else:
        pairwise = getattr(mp.potentials, kind)(weight, num_labels=num_labels)
    return pairwise, weight * costs


def make_instance(unaries: Any, problem: Problem) -> Instance:
    """An instance from its unaries (H, W, L) and V."""
    unaries = np.asarray(unaries)
    return Instance(unaries, *pairwise_cost(problem, unaries.shape[-1]))


Measured = tuple[int, Sequence[int], Sequence[int], float, int, tuple[int, float], int]


def reference_targets(table: Mapping[str, Measured], source: str) -> dict[str, dict[str, Target]]:
    """Targets by row from our own reimplementation's table.

    Args:
      table: instance -> SGM at 1 iteration, ISGMR and TRWP at `REPORTED`, TRWP's bound and sequential rounding at 50,
        TRW-S at 50 with its bound, mean field at 50.
      source: where it stands.
    """
    found: dict[str, dict[str, float]] = {}
    for name, (sgm, isgmr, trwp, bound, sequential, (trws, trws_bound), mean_field) in table.items():
        found[f"{name}/sgm-4"] = {"energy@1": sgm}
        found[f"{name}/isgmr-4"] = {f"energy@{k}": e for k, e in zip(REPORTED, isgmr, strict=True)}
        found[f"{name}/trwp-4"] = {f"energy@{k}": e for k, e in zip(REPORTED, trwp, strict=True)}
        found[f"{name}/trwp-4"] |= {"bound@50": bound, "sequential@50": sequential}
        found[f"{name}/trws"] = {"energy@50": trws, "bound@50": trws_bound}
        found[f"{name}/mean_field-4"] = {"energy@50": mean_field}
    return {row: {metric: Target(e, source, "ours") for metric, e in of.items()} for row, of in found.items()}


def energy_figure(title: str, cases: Sequence[Case]) -> plots.Figure:
    """Energy against iterations and against time, as the excess over the best bound, on a log scale."""
    best = max((point["bound"] for case in cases for point in case.curve if "bound" in point), default=0.0)
    figure, ((left, right),) = plots.axes(1, 2, size=(6, 4), sharey=True)
    for number, case in enumerate(cases):
        for kind, style, label in (("energy", "-", ""), ("sequential", ":", ", sequential rounding")):
            points = [point for point in case.curve if kind in point]
            iterations = np.array([point["iteration"] for point in points])
            excess = 100 * (np.array([point[kind] for point in points]) - best) / abs(best or 1.0)
            look = {"color": f"C{number}", "marker": "o" if len(points) < 8 else None, "ms": 3}
            if points:
                left.plot(iterations, excess, style, label=case.variant.solver + label, **look)
                right.plot(1e-3 * case.metrics["ms_per_iteration"] * iterations, excess, style, **look)
    for axes, label in ((left, "iteration"), (right, "seconds of message passing")):
        axes.set(xscale="log", yscale="log", xlabel=label)
        axes.grid(alpha=0.3)
    left.set_ylabel(f"energy above the best bound {best:,.0f}, per cent", fontsize=8)
    figure.legend(*left.get_legend_handles_labels(), fontsize=7, loc="outside right upper")
    figure.suptitle(title, fontsize=10)
    return figure


def figures(
    task: Task,
    cases: Sequence[Case],
    *,
    views: Callable[[str], list[tuple[str, np.ndarray]]],
    picture: Callable[[Case], np.ndarray],
    caption: Callable[[Case], str],
    folder: str,
    top: Callable[[str], float],
) -> dict[str, plots.Figure | np.ndarray]:
    """Of every instance the pictures side by side and the energies; and each picture as it is, under `folder`.

    Args:
      task: of the cases.
      cases: those of all instances.
      views: name -> what is shown before the solutions, with titles.
      picture: case -> its labels as grey values, uint8.
      caption: case -> what to say of it after the solver's name.
      folder: of the pictures as they are.
      top: name -> the grey value that is white in the panels.
    """
    found: dict[str, plots.Figure | np.ndarray] = {}
    for name in dict.fromkeys(case.variant.instance for case in cases):
        solved = [case for case in cases if case.variant.instance == name]
        panels = views(name)
        for case in solved:
            image = found[f"{folder}/{name}-{case.variant.solver}"] = picture(case)
            panels.append((f"{case.variant.solver.replace('_', ' ')}{caption(case)}", image))
        found[name] = plots.images(panels, cmap="gray", vmin=0, vmax=top(name))
        size = " x ".join(map(str, task.instance(name).unaries.shape))
        found[f"{name}-energy"] = energy_figure(f"{name}, {size} labels", [case for case in solved if case.curve])
    return found
