"""Several processes as one run: they start within a bounded time, and each says why it ended.

A process that loses another one finds out in one of two ways. A collective fails, and Python raises: the process says
so and leaves at once, because leaving in order waits for all. Or JAX ends the process from a thread of its own, after
which no Python code runs: a small shell that waits for the process has the last word then.
"""

import contextlib
import os
import subprocess
import sys
import traceback
from collections.abc import Iterator

import jax

from experiments._machinery.errors import ExperimentError

START_S = 120  # within which all processes must have come
HEARTBEAT_S = 20  # after which a process that says nothing counts as gone
SHUTDOWN_S = 60  # within which all must have ended once one has
REMEDY = "start all processes again with the same commands: the run goes on from its last checkpoint"
LAST_WORDS = (
    "error: this process ended because another one of the run died, could not be reached or did not come in time; "
    f"see their outputs, check --coordinator-address, and {REMEDY}"
)
OF_OTHERS = ("Gloo", "NCCL", "UNAVAILABLE", "DEADLINE_EXCEEDED", "coordination service", "Connection")


@contextlib.contextmanager
def joined(
    coordinator_address: str | None, num_processes: int | None, process_id: int | None, start_s: int | None = None
) -> Iterator[None]:
    """Joins the processes of a run; what fails inside of the block ends this process, and the others soon after.

    Args:
      coordinator_address: host and port of process 0; None, as the next two, where JAX finds it on the cluster.
      num_processes: of the run.
      process_id: of this one.
      start_s: seconds within which all must have come; None: `START_S`.

    Raises:
      ExperimentError: JAX knows no cluster here and no address was given; or as raised in the block.
    """
    try:
        with _last_words():
            _initialize(coordinator_address, num_processes, process_id, start_s or START_S)
            yield
    except Exception as error:
        reason = _loss_of_another(error)
        if reason is None and isinstance(error, ExperimentError):
            raise  # the processes agree on it, and end in order
        if reason is None:
            traceback.print_exc()
        else:
            print(f"error: another process of the run is gone ({reason}); {REMEDY}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def fake_devices(count: int) -> None:
    """A single process on a CPU gets that many devices, unless JAX_NUM_CPU_DEVICES says how many."""
    if "JAX_NUM_CPU_DEVICES" not in os.environ and not jax.distributed.is_initialized():
        jax.config.update("jax_num_cpu_devices", count)


def _loss_of_another(error: BaseException) -> str | None:
    """The line that speaks of it, of the error or of one that it was raised from."""
    lines = str(error).splitlines()
    found = next((line[:300] for line in lines if any(word in line for word in OF_OTHERS)), None)
    return found or (_loss_of_another(error.__cause__) if error.__cause__ else None)


def _initialize(address: str | None, num_processes: int | None, process_id: int | None, start_s: int) -> None:
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            initialization_timeout=start_s,
            heartbeat_timeout_seconds=HEARTBEAT_S,
            shutdown_timeout_seconds=SHUTDOWN_S,
        )
    except (ValueError, RuntimeError) as error:
        raise ExperimentError(
            f"--distributed could not start ({error}); outside a cluster that JAX knows, give "
            "--coordinator-address HOST:PORT --num-processes N --process-id I"
        ) from error


@contextlib.contextmanager
def _last_words() -> Iterator[None]:
    """A shell prints `LAST_WORDS` when this process ends inside of the block without leaving it."""
    watcher = subprocess.Popen(
        ["sh", "-c", 'read -r _ || echo "$0" >&2', LAST_WORDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process
    )
    try:
        yield
    finally:
        watcher.communicate(b"left\n")
