"""python -m experiments list | run NAME [options] | report [FOLDER] | new NAME --family FAMILY"""

import argparse
import os
import shlex
import sys

from experiments._machinery.errors import ExperimentError


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description="Train, resume and tabulate the experiments."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="list | run | report | new")
    commands.add_parser("list", help="name, description and paper of every experiment")

    run = commands.add_parser("run", help="train one; `run NAME --help` shows its options", add_help=False)
    run.add_argument("name", help="as in `list`, or a path to a .py file")
    run.add_argument("--workdir")
    run.add_argument("--smoke", action="store_true")
    run.add_argument("--distributed", action="store_true")
    run.add_argument("--coordinator-address")
    run.add_argument("--num-processes", type=int)
    run.add_argument("--process-id", type=int)
    run.add_argument("--start-timeout", type=int)

    report = commands.add_parser("report", help="a table for each experiment with results under a folder, with targets")
    report.add_argument("folder", nargs="?", help="default: runs, or where there is none the results of the repository")
    report.add_argument("--all", action="store_true", help="also metrics without a target, and smoke runs")
    report.add_argument(
        "--write",
        metavar="FOLDER",
        nargs="?",
        const="experiments/results",
        help="take the runs into the records, the pages and the index of this folder (experiments/results)",
    )
    report.add_argument("--allow-dirty", action="store_true", help="also runs of a tree with uncommitted changes")

    new = commands.add_parser("new", help="print or write the skeleton of a method")
    new.add_argument("name", help="of the function, and of the experiment")
    new.add_argument("--family", required=True, help="a package of jaxlib_methods")
    new.add_argument("--kind", choices=("function", "loss", "transformation"), default="function")
    new.add_argument("--write", action="store_true", help="write the files instead of printing them")
    return parser


def _configure_jax() -> None:
    """What a whole program may decide and a library may not: where compiled programs are kept, and determinism."""
    if "xla_gpu_deterministic_ops" not in (flags := os.environ.get("XLA_FLAGS", "")):
        os.environ["XLA_FLAGS"] = f"{flags} --xla_gpu_deterministic_ops=true".strip()
    import jax

    from experiments._machinery.files import cache_folder

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(cache_folder() / f"xla-{jax.__version__}"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def main(argv: list[str]) -> int:
    parser = _parser()
    # Only `run` has options of its own for the experiment; abbreviations would swallow them.
    options, rest = parser.parse_known_args(argv)
    if options.command != "run" and rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if options.command == "list":
            from experiments._machinery import registry

            return registry.print_list()
        if options.command == "report":
            from experiments._machinery import report

            return report.main(options)
        if options.command == "new":
            from experiments._machinery import skeleton

            return skeleton.main(options)
        _configure_jax()
        from experiments._machinery import runner

        command = "python -m experiments " + shlex.join(argv)
        return runner.main(options.name, options, rest, command)
    except KeyboardInterrupt:
        print("interrupted; the same command resumes", file=sys.stderr)
        return 130
    except ExperimentError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if type(error).__name__ == "BadOption" else 1
