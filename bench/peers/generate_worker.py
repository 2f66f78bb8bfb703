"""`generate` of transformers, as a peer: see `bench.peers.worker`.

    python -m bench.peers.generate_worker FOLDER DTYPE THREADS plain|lookup|assisted [ASSISTANT]

`lookup` is prompt lookup decoding with Spec-Bench's settings, `assisted` has the model in the
folder ASSISTANT guess. One prompt at a time.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer

from bench.peers.worker import Generate, serve

_LOOKUP = {"prompt_lookup_num_tokens": 10, "max_matching_ngram_size": 3}


def main() -> None:
    """Serve the model named on the command line."""
    folder, dtype, threads, method, *assistant = sys.argv[1:]
    serve(lambda: _start(folder, dtype, int(threads), method, *assistant))


class _Clock(BaseStreamer):
    """Notes when tokens come; those of one step come together. The first to come is the prompt."""

    def __init__(self) -> None:
        self.times_s: list[float] = []
        self._prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Hear of tokens."""
        if not self._prompt:
            self.times_s += [time.perf_counter()] * value.numel()
        self._prompt = False

    def end(self) -> None:
        """Hear of the end."""


def _start(
    folder: str, dtype: str, threads: int, method: str, assistant: str | None = None
) -> tuple[Generate, dict[str, Any]]:
    torch.set_num_threads(threads)
    model = _load(folder, dtype)
    how: dict[str, Any] = {"plain": {}, "lookup": _LOOKUP, "assisted": {}}[method]
    if method == "assisted":
        if assistant is None:
            raise ValueError("an assistant model is needed")
        how = {"assistant_model": _load(assistant, dtype)}

    def generate(
        prompts: list[list[int]], tokens: int, eos_ids: list[int]
    ) -> tuple[list[list[float]], list[list[int]]]:
        (prompt,) = prompts
        clock = _Clock()
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=eos_ids or None,
                pad_token_id=(eos_ids or [0])[0],
                streamer=clock,
                **how,
            )
        made = output[0, len(prompt) :].tolist()
        # What was accepted beyond the end was heard of, and is not part of the output.
        return [clock.times_s[: len(made)]], [made]

    settings = {"transformers": transformers.__version__, "dtype": dtype, "method": method}
    return generate, {**settings, **(_LOOKUP if method == "lookup" else {})}


def _load(folder: str, dtype: str) -> Any:
    load: Any = AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.eval()
    model.generation_config.eos_token_id = None
    return model


if __name__ == "__main__":
    main()
