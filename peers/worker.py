"""One of two processes that run a pipeline when they are told to: the model's sizes, and the worker's side of the wire.

A worker reads one JSON line per request and answers with one.
"""

import json
import os
import sys
from typing import Any

P, M = 2, 2  # stages, microbatches of a synchronous update
LAYERS, WIDTH, HEADS, BLOCK, BATCH, VOCABULARY = 4, 128, 4, 128, 4, 256


def answer(handle: Any) -> None:
    """The worker's side: `handle(request)` -> answer, until the parent closes."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not stand between the answers
    for line in sys.stdin:
        replies.write(json.dumps(handle(json.loads(line))) + "\n")
        replies.flush()
