"""torch.distributed.pipelining on the model whose sizes stand in `peers.worker`: GPipe or 1F1B over gloo, AdamW."""

import sys
import time
from typing import Any

from peers.worker import BATCH, BLOCK, HEADS, LAYERS, VOCABULARY, WIDTH, M, P, answer


def main(address: str, number: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://{address}", rank=number, world_size=P)
    answer(_Worker(number))


class _Worker:
    def __init__(self, number: int):
        import numpy as np
        import torch

        self.number = number
        tokens = np.random.default_rng(0).integers(VOCABULARY, size=(2, 64, BATCH, BLOCK))
        self.tokens = torch.from_numpy(tokens)
        self.running: dict[str, Any] = {}

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        schedule, count = request["schedule"], request["count"]
        if schedule not in self.running:
            self.running[schedule] = self._make(schedule)
        pipe, optimizer = self.running[schedule]
        began = time.perf_counter()
        losses: list[Any] = []
        for at in range(0, count, M):
            inputs, targets = (part[at : at + M].flatten(0, 1) for part in self.tokens)
            optimizer.zero_grad()
            if self.number == 0:
                pipe.step(inputs)
            else:
                losses.clear()
                pipe.step(target=targets, losses=losses)
            optimizer.step()
        loss = float(losses[-1].detach()) if losses else 0.0
        return {"seconds": time.perf_counter() - began, "loss": loss}

    def _make(self, schedule: str) -> tuple[Any, Any]:
        import torch
        from torch.distributed import pipelining

        torch.manual_seed(self.number)
        share = LAYERS // P
        module = _stage(share, first=self.number == 0, last=self.number == P - 1)
        stage = pipelining.PipelineStage(module, self.number, P, torch.device("cpu"))
        kinds = {"gpipe": pipelining.ScheduleGPipe, "1f1b": pipelining.Schedule1F1B}
        loss = lambda logits, targets: torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        pipe = kinds[schedule](stage, M, loss_fn=loss)
        return pipe, torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=1e-4)


def _stage(blocks: int, *, first: bool, last: bool) -> Any:
    """Blocks of the library's GPT (pre-norm, ReLU, no bias in queries, keys and values) between embedding and head."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
            self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)
            self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.ReLU(), nn.Linear(4 * WIDTH, WIDTH))

        def forward(self, x: Any) -> Any:
            heads = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, WIDTH // HEADS)).permute(2, 0, 3, 1, 4)
            mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
            x = x + self.out(mixed.transpose(1, 2).flatten(2))
            return x + self.mlp(self.norm2(x))

    class Stage(nn.Module):
        def __init__(self):
            super().__init__()
            if first:
                self.embedding, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(BLOCK, WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(blocks))
            if last:
                self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY)

        def forward(self, x: Any) -> Any:
            if first:
                x = self.embedding(x) + self.positions(torch.arange(x.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)) if last else x

    return Stage()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
