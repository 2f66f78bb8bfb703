"""OpenVINO GenAI, as a peer: see `bench.peers.worker`.

    PYTHON_OF_ITS_ENVIRONMENT -m bench.peers.openvino_worker FILE.gguf THREADS LENGTH_MAX [lookup]

One prompt at a time. With `lookup` it does prompt lookup decoding.
"""

from __future__ import annotations

import importlib
import sys
import time
from typing import Any

from bench.peers.worker import Generate, serve

_LOOKUP = {"num_assistant_tokens": 10, "max_ngram_size": 3}


def main() -> None:
    """Serve the model named on the command line."""
    path, threads, length_max, *guesses = sys.argv[1:]
    serve(lambda: _start(path, int(threads), int(length_max), bool(guesses)))


def _start(
    path: str, threads: int, length_max: int, lookup: bool
) -> tuple[Generate, dict[str, Any]]:
    # By name: no type checker of ours can see them.
    openvino = importlib.import_module("openvino")
    genai = importlib.import_module("openvino_genai")
    numpy = importlib.import_module("numpy")
    settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
    scheduler = genai.SchedulerConfig()
    # Nobody profits here from prompts that were computed before.
    scheduler.enable_prefix_caching = False
    scheduler.max_num_batched_tokens = length_max
    guessing = {"prompt_lookup": True} if lookup else {}
    pipeline = genai.LLMPipeline(path, "CPU", scheduler_config=scheduler, **settings, **guessing)

    class Clock(genai.StreamerBase):  # type: ignore[misc, name-defined]
        """Notes when tokens come; those of one step come together."""

        def __init__(self) -> None:
            super().__init__()
            self.times: list[float] = []

        def write(self, token: int | list[int]) -> Any:
            """Hear of a token, or of several."""
            count = len(token) if isinstance(token, list) else 1
            self.times += [time.perf_counter()] * count
            return genai.StreamingStatus.RUNNING

        def end(self) -> None:
            """Hear of the end."""

    def generate(
        prompts: list[list[int]], tokens: int, eos_ids: list[int]
    ) -> tuple[list[list[float]], list[list[int]]]:
        (prompt,) = prompts
        config = genai.GenerationConfig()
        config.max_new_tokens = tokens
        config.do_sample = False
        config.ignore_eos = not eos_ids
        config.stop_token_ids = set(eos_ids)
        for name, value in (_LOOKUP if lookup else {}).items():
            setattr(config, name, value)
        ids = openvino.Tensor(numpy.array([prompt], dtype=numpy.int64))
        mask = openvino.Tensor(numpy.ones((1, len(prompt)), dtype=numpy.int64))
        clock = Clock()
        result = pipeline.generate(genai.TokenizedInputs(ids, mask), config, clock)
        made = list(result.tokens[0])
        times = clock.times[: len(made)]
        # The end-of-sequence id may be part of the output without having been streamed.
        times += [time.perf_counter()] * (len(made) - len(times))
        return [times], [made]

    told = {"openvino_genai": genai.__version__, "file": path.rsplit("/", 1)[-1]}
    return generate, {**told, **settings, **(_LOOKUP if lookup else {})}


if __name__ == "__main__":
    main()
