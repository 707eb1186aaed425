"""Runs one experiment and writes its `result.json`; what `python -m experiments run` and a cluster launcher call."""

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import subprocess
import time
from types import ModuleType
from typing import Any
from unittest import mock

import jax

from experiments._machinery import cluster, plots, records, registry
from experiments._machinery.cases import run_all
from experiments._machinery.checkpoint import claim
from experiments._machinery.errors import ExperimentError
from experiments._machinery.files import write_json


def run(
    module: ModuleType, config: Any, workdir: str | os.PathLike, *, smoke: bool = False, command: str = ""
) -> dict[str, Any]:
    """Runs all cases of a method in a claimed folder and returns what was written to its `result.json`.

    The same call again resumes an interrupted run, and reads back a finished one.
    """
    name = module.__name__.rpartition(".")[2]
    workdir = claim(workdir, dataclasses.asdict(config) | {"experiment": name, "smoke": smoke})
    finished = workdir / "result.json"
    if finished.exists():
        if jax.process_index() == 0:
            print(f"{workdir} holds the finished run; delete it to run again")
        return json.loads(finished.read_text())
    clock = _Clock(workdir)
    about = {"experiment": name, "config": dataclasses.asdict(config), "smoke": smoke}
    code = versions()  # of what is imported now, whatever happens to the checkout meanwhile
    measured = _run(module, config, workdir)
    made = {"versions": code, "device": device(), "command": command, "wall_s": round(clock.total(), 1)}
    result = json.loads(json.dumps(about | measured | made, default=str))
    if jax.process_index() == 0:
        write_json(finished, result)
    return result


def _run(method: ModuleType, config: Any, workdir: pathlib.Path) -> dict[str, Any]:
    """Records and targets of all cases, after the figures are drawn."""
    shared = method.load(config) if hasattr(method, "load") else config
    cases = list(run_all(method, config, shared, workdir))
    found = [(case.name, case.seed, case.metrics) for case in cases if case.metrics]
    if hasattr(method, "compare"):
        found += method.compare(shared, cases)
    if jax.process_index() == 0:
        for name, picture in method.figures(shared, cases).items():
            plots.save(workdir / f"{name}.png", picture)
    return {
        "records": [records.record(*values) for values in found],
        "targets": records.targets_to_json(method.targets(config)),
        "shown": list(getattr(method, "SHOWN", ())),
    }


def versions() -> dict[str, str]:
    """Of everything that can change a number, with the commit of this checkout."""
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "jaxlib_methods"):
        found[package] = metadata.version(package)
    git = [
        "git",
        "-C",
        str(pathlib.Path(__file__).parent),
        "describe",
        "--always",
        "--dirty",
        "--abbrev=12",
        "--exclude=*",
    ]
    try:
        found["commit"] = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        found["commit"] = "unknown"
    return found


def device() -> str:
    """Kind and number of the devices; for the CPU also how many cores it has."""
    kind, count = jax.devices()[0].device_kind, jax.device_count()
    cores = f" ({os.cpu_count()} cores)" if jax.default_backend() == "cpu" else ""
    hosts = f", {jax.process_count()} processes" if jax.process_count() > 1 else ""
    return f"{count} x {kind}{cores}{hosts}"


class _Clock:
    """Seconds of all attempts at a run: an attempt that was killed ends with the last file it wrote."""

    def __init__(self, workdir: pathlib.Path):
        path = workdir / "attempts.json"
        self._attempts = json.loads(path.read_text()) if path.exists() else []
        if self._attempts:
            last_write = max((file.stat().st_mtime for file in workdir.rglob("*") if file.is_file()), default=0.0)
            self._attempts[-1][1] = max(last_write, self._attempts[-1][0])
        self._attempts.append([time.time(), None])
        if jax.process_index() == 0:
            write_json(path, self._attempts)

    def total(self) -> float:
        return time.time() - self._attempts[-1][0] + sum(end - start for start, end in self._attempts[:-1])


def main(name: str, options: Any, arguments: list[str], command: str) -> int:
    """The `run` command: options of the runner are parsed already, `arguments` are for the experiment's `Config`."""
    if options.distributed:
        address = options.coordinator_address, options.num_processes, options.process_id
        with cluster.joined(*address, options.start_timeout):
            return _main(name, options, arguments, command)
    return _main(name, options, arguments, command)


def _main(name: str, options: Any, arguments: list[str], command: str) -> int:
    module = registry.load(name)
    config = parse_config(module, arguments, smoke=options.smoke, name=name)
    if hasattr(module, "devices"):  # before JAX looks for them
        cluster.fake_devices(module.devices(config))
    stem = module.__name__.rpartition(".")[2]
    workdir = pathlib.Path(options.workdir or f"runs/{stem}" + ("-smoke" if options.smoke else ""))
    result = run(module, config, workdir, smoke=options.smoke, command=command)
    if jax.process_index() == 0:
        from experiments._machinery import report

        report.print_tables(report.tables([result], with_smoke=True))
        print(f"results, log and figures: {workdir}")
    return 0


def parse_config(module: ModuleType, arguments: list[str], *, smoke: bool, name: str) -> Any:
    """The `Config` of an experiment: its defaults, then SMOKE, then explicit options.

    Raises:
      BadOption: `Config.__post_init__` refused the values. Options that do not parse end the program in tyro, with 2.
    """
    import tyro

    # tyro draws a box around a ValueError; parsed without the check, the values can be refused in one sentence.
    check = getattr(module.Config, "__post_init__", None)
    with mock.patch.object(module.Config, "__post_init__", lambda self: None) if check else contextlib.nullcontext():
        parsed = tyro.cli(
            module.Config,
            prog=f"python -m experiments run {name}",
            description=f"{module.__doc__ or ''}\n\n{RUNNER_HELP}",
            default=module.Config(**(module.SMOKE if smoke else {})),
            args=arguments,
        )
    try:
        return dataclasses.replace(parsed)
    except ValueError as error:
        raise BadOption(str(error)) from error


class BadOption(ExperimentError):
    """An option has a value that the experiment refuses."""


RUNNER_HELP = """\
Options of the runner: --workdir DIR (default runs/NAME); --smoke (a few seconds, for testing); --distributed with
--coordinator-address, --num-processes and --process-id, which go to jax.distributed.initialize (leave them out where
the cluster tells), and --start-timeout SECONDS (default 120), within which all processes must have come."""
