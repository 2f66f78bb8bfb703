"""vLLM's CPU build, as a peer: see `bench.peers.worker`.

    PYTHON_OF_ITS_ENVIRONMENT -m bench.peers.vllm_worker FOLDER DTYPE LENGTH_MAX [lookup]

With `lookup` it guesses from the prompt, as prompt lookup does. Runs where neither Outrider
nor its dependencies are installed (`make peers`).
"""

from __future__ import annotations

import importlib
import itertools
import sys
import time
from typing import Any

from bench.peers.worker import Generate, serve

_SESSIONS_MAX = 16
_NGRAM = {
    # Spec-Bench's settings of prompt lookup decoding, but for the length of guesses: each costs
    # here what it costs on a processor, and 5 is what vLLM's own documentation uses.
    "method": "ngram",
    "num_speculative_tokens": 5,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}


def main() -> None:
    """Serve the model named on the command line."""
    folder, dtype, length_max = sys.argv[1], sys.argv[2], int(sys.argv[3])
    speculative = _NGRAM if sys.argv[4:] == ["lookup"] else None
    serve(lambda: _start(folder, dtype, length_max, speculative))


def _start(
    folder: str, dtype: str, length_max: int, speculative: dict[str, Any] | None
) -> tuple[Generate, dict[str, Any]]:
    vllm = importlib.import_module("vllm")  # by name: no type checker of ours can see it
    llm = vllm.LLM(
        model=folder,
        dtype=dtype,
        max_model_len=length_max,
        max_num_seqs=_SESSIONS_MAX,
        # Repeated prompts would otherwise hit the cache; the other contenders share nothing either.
        enable_prefix_caching=False,
        speculative_config=speculative,
    )
    engine = llm.llm_engine
    numbers = itertools.count()

    def generate(
        prompts: list[list[int]], tokens: int, eos_ids: list[int]
    ) -> tuple[list[list[float]], list[list[int]]]:
        params = vllm.SamplingParams(
            temperature=0.0, max_tokens=tokens, ignore_eos=True, stop_token_ids=eos_ids
        )
        names = [str(next(numbers)) for _ in prompts]
        for name, prompt in zip(names, prompts, strict=True):
            engine.add_request(name, {"prompt_token_ids": prompt}, params)
        times: dict[str, list[float]] = {name: [] for name in names}
        ids: dict[str, list[int]] = {name: [] for name in names}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            now = time.perf_counter()
            for output in outputs:
                ids[output.request_id] = list(output.outputs[0].token_ids)
                seen = times[output.request_id]
                seen += [now] * (len(ids[output.request_id]) - len(seen))
        return [times[name] for name in names], [ids[name] for name in names]

    settings: dict[str, Any] = {
        "vllm": vllm.__version__,
        "dtype": dtype,
        "sessions_max": _SESSIONS_MAX,
        "speculative": speculative,
    }
    return generate, settings


if __name__ == "__main__":
    main()
