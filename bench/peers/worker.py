"""The side of a peer's process: JSON lines on standard input and output.

Only the standard library, since a peer's environment has none of our dependencies. The first line
out is {"ready": settings}; then each line in, {"prompts": [[id]], "tokens": n, "eos_ids": [id]}, is
answered with {"times_s": [[second of each token since the request came]], "ids": [[id]]}, or
{"error": text}. An output ends with the first of `eos_ids`, which is part of it; without any, it
goes on to the last token. Tokens of one step have one time.
"""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

Generate = Callable[[list[list[int]], int, list[int]], tuple[list[list[float]], list[list[int]]]]
"""(prompts, output tokens, eos ids) to (`time.perf_counter` of each token, ids), by prompt."""


def serve(start: Callable[[], tuple[Generate, dict[str, Any]]]) -> None:
    """Answer requests until standard input ends. `start` loads the engine."""
    # Libraries print as they like: their standard output becomes standard error.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def answer(message: dict[str, Any]) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        generate, settings = start()
    except Exception as error:
        traceback.print_exc()
        answer({"error": f"{type(error).__name__}: {error}"})
        return
    answer({"ready": settings})
    for line in sys.stdin:
        request = json.loads(line)
        eos_ids = request["eos_ids"]
        started = time.perf_counter()
        try:
            times, ids = generate(request["prompts"], request["tokens"], eos_ids)
        except Exception as error:
            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
            continue
        ends = [_end(row, eos_ids) for row in ids]
        times = [row[:end] for row, end in zip(times, ends, strict=True)]
        ids = [row[:end] for row, end in zip(ids, ends, strict=True)]
        answer({"times_s": [[at - started for at in row] for row in times], "ids": ids})


def _end(ids: list[int], eos_ids: list[int]) -> int:
    """Where an output ends; engines that guess several tokens may run past it."""
    for at, token in enumerate(ids, 1):
        if token in eos_ids:
            return at
    return len(ids)
