"""Two processes, pinned to a core each, that run a pipeline of two stages whenever they are told to.

{"schedule": "gpipe", "count": 16} asks a worker to train on 16 microbatches, {"costs": 9} to time its own stage alone,
the median of 9; `peers.worker` holds the model's sizes and how requests are answered.
"""

import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxlib_methods.parallel.pipelines import communication
from peers.worker import BATCH, BLOCK, HEADS, LAYERS, VOCABULARY, WIDTH, M, P, answer

SCHEDULES = ("async", "gpipe", "gpipe keep", "1f1b")  # keep: activations are kept, not computed again


class Pair:
    """The two processes of `pair`; a request goes to both, the answers come back together."""

    def __init__(self, processes: Sequence[subprocess.Popen]):
        self.processes = processes

    def __call__(self, **request: Any) -> list[dict[str, Any]]:
        for process in self.processes:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
        answers = [process.stdout.readline() for process in self.processes]
        if not all(answers):
            raise RuntimeError(f"a worker ended instead of answering {request}; its output stands above")
        return [json.loads(answer) for answer in answers]


@contextlib.contextmanager
def pair(module: str, *, host: str = "localhost", prefixes: Sequence[list[str]] = ([], [])) -> Iterator[Pair]:
    """Starts `python -m module HOST:PORT I` twice, process I on core I, behind prefix I of its command."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    with contextlib.ExitStack() as at_end:
        processes = []
        for i in range(P):
            command = [*prefixes[i], sys.executable, "-m", module, f"{host}:{port}", str(i)]
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                preexec_fn=lambda i=i: os.sched_setaffinity(0, {i}),
            )
            processes.append(process)
            at_end.callback(process.wait)
            at_end.callback(process.kill)
        yield Pair(processes)


def main(address: str, number: int) -> None:
    import jax

    jax.distributed.initialize(address, P, number)
    answer(_Worker(number))


class _Worker:
    def __init__(self, number: int):
        import optax

        from benchmarks._machinery import staged_decoder
        from jaxlib_methods import models, parallel

        self.number = number
        config = models.GPTConfig(VOCABULARY, BLOCK, LAYERS, WIDTH, HEADS)
        self.model, params = staged_decoder.decoder(config)
        self.stages = parallel.split_stages(params, P)
        self.mesh = parallel.make_mesh(P)
        self.optimizer = optax.adamw(1e-3)
        self.tokens = staged_decoder.tokens(config, 64, BATCH)
        self.running: dict[str, Any] = {}

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        if "costs" in request:
            return self.costs(request["costs"])
        if "trace" in request:
            return self.trace(request["trace"], request["count"])
        return self.train(request["schedule"], request["count"])

    def train(self, schedule: str, count: int) -> dict[str, Any]:
        import jax

        from jaxlib_methods import parallel

        n = count if schedule == "async" else M
        if schedule not in self.running:
            batch = tuple(of_all[0] for of_all in self.tokens)
            common, shapes = (self.model, self.stages, self.optimizer, self.mesh), {"batch": batch}
            if schedule == "async":
                pipe = parallel.asynchronous_pipeline(*common, **shapes)
            else:
                name, _, keep = schedule.partition(" ")
                pipe = parallel.synchronous_pipeline(
                    *common, batch=batch, num_microbatches=M, schedule=name, remat=not keep
                )
            put = lambda at: parallel.shard_batch(self.mesh, tuple(of_all[at : at + n] for of_all in self.tokens))
            state, batches = pipe.init(self.stages), [put(at) for at in range(0, count, n)]
            hlo = pipe.lower(state, *batches[0]).compile().as_text()
            self.running[schedule] = [pipe, state, batches, communication.collectives(hlo)]
        pipe, state, batches, sent = self.running[schedule]
        began = time.perf_counter()
        for batch in batches:
            state, losses = pipe.step(state, *batch)
        jax.block_until_ready(state)
        self.running[schedule][1] = state
        permutes = [c for c in sent if c.kind == "collective-permute"]
        across = [c for c in sent if c.kind == "all-reduce" and any(len(group) > 1 for group in c.groups)]
        return {
            "seconds": time.perf_counter() - began,
            "loss": float(losses.loss[-1]),
            "summed": [c.bytes for c in across],  # of each sum over the stages in a call: the losses
            "bytes": {direction: max((c.bytes for c in permutes if c.groups[0] == pair), default=0)
                      for direction, pair in (("forward", (0, 1)), ("backward", (1, 0)))},
        }  # fmt: skip

    def trace(self, schedule: str, count: int) -> dict[str, float]:
        """The share of the time in which this process is in a permute or a sum over stages, by XLA's own trace."""
        from benchmarks._machinery import traces

        events, trained = traces.record(lambda: self.train(schedule, count))
        waiting = traces.union(e for e in events if e.name.startswith(("ppermute", "psum")))  # of several threads
        return {"waiting": traces.length(waiting) * 1e-9 / trained["seconds"]}

    def costs(self, samples: int) -> dict[str, float]:
        """Seconds of this stage alone: forward, backward with recomputation, update."""
        import jax
        import jax.numpy as jnp
        import optax

        stage, model = self.stages[self.number], self.model
        inputs, targets = (jnp.asarray(of_all[0]) for of_all in self.tokens)
        x = jnp.ones((BATCH, BLOCK, WIDTH))

        def run(params: Any, x: jax.Array) -> jax.Array:
            x = model.embed(params["embed"], inputs) if "embed" in params else x
            for block in params["blocks"]:
                x = model.block(block, x)
            return model.head(params["head"], x, targets) if "head" in params else x

        def backward(params: Any, x: jax.Array) -> Any:
            y, pull_back = jax.vjp(run, params, x)
            return y, pull_back(jnp.ones_like(y))

        def update(params: Any, state: Any) -> Any:
            updates, state = self.optimizer.update(params, state, params)
            return optax.apply_updates(params, updates), state

        last = "head" in stage
        timed = {
            "forward": None if last else (jax.jit(run), stage, x),
            "backward": (jax.jit(backward), stage, x),
            "update": (jax.jit(update), stage, self.optimizer.init(stage)),
        }
        found = {}
        for name, call in timed.items():
            found[name] = 0.0
            if call:
                function, *arguments = call
                seconds = []
                for _ in range(samples + 1):
                    began = time.perf_counter()
                    jax.block_until_ready(function(*arguments))
                    seconds.append(time.perf_counter() - began)
                found[name] = statistics.median(seconds[1:])
        return found


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
