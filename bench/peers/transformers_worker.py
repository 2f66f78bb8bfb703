"""Continuous batching of transformers, as a peer: see `bench.peers.worker`.

    python -m bench.peers.transformers_worker FOLDER DTYPE THREADS [SETTINGS as JSON]

The defaults were the fastest of those tried on a CPU without bfloat16 instructions; SETTINGS
changes them: attention, and any field of `ContinuousBatchingConfig`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

from bench.peers.worker import Generate, serve

_DEFAULTS: dict[str, Any] = {
    "attention": "sdpa",
    # Enough for 16 sessions of this benchmark. What is allotted costs nothing until it is used.
    "page_size": 32,
    "num_blocks": 1024,
    "max_batch_tokens": 512,
    # Repeated prompts would otherwise hit the cache; the other contenders share nothing either.
    "allow_block_sharing": False,
}
_RESULT_TIMEOUT_S = 600.0
_NO_EOS = -1


def main() -> None:
    """Serve the model named on the command line."""
    folder, dtype, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    settings = {**_DEFAULTS, **(json.loads(sys.argv[4]) if len(sys.argv) > 4 else {})}
    serve(lambda: _start(folder, dtype, threads, settings))


def _start(
    folder: str, dtype: str, threads: int, settings: dict[str, Any]
) -> tuple[Generate, dict[str, Any]]:
    # The manager computes on a thread of its own. Were this one to run parallel regions as well,
    # there would be more OpenMP threads than processors, which is slow: it loads with one.
    torch.set_num_threads(1)
    fields = dict(settings)
    attention = fields.pop("attention")
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, dtype), attn_implementation=attention)
    model.eval()
    torch.set_num_threads(threads)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=_NO_EOS),
        continuous_batching_config=ContinuousBatchingConfig(**fields),
    )
    manager.start()

    def generate(
        prompts: list[list[int]], tokens: int, eos_ids: list[int]
    ) -> tuple[list[list[float]], list[list[int]]]:
        names = [
            manager.add_request(
                prompt,
                max_new_tokens=tokens,
                record_timestamps=True,
                eos_token_id=eos_ids or _NO_EOS,
            )
            for prompt in prompts
        ]
        results: dict[str, Any] = {}
        while len(results) < len(names):
            result = manager.get_result(timeout=_RESULT_TIMEOUT_S)
            if result is None:
                raise RuntimeError("the generation thread gave no result")
            if result.error is not None:
                raise RuntimeError(result.error)
            if result.is_finished():
                results[result.request_id] = result
        ordered = [results[name] for name in names]
        return [list(r.timestamps) for r in ordered], [list(r.generated_tokens) for r in ordered]

    return generate, {"transformers": transformers.__version__, "dtype": dtype, **settings}


if __name__ == "__main__":
    main()
    # The manager's thread is not a daemon and waits for more requests.
    sys.stderr.flush()
    import os

    os._exit(0)
