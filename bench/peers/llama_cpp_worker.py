"""llama.cpp, as a peer: see `bench.peers.worker`.

    PYTHON_OF_ITS_ENVIRONMENT -m bench.peers.llama_cpp_worker FILE.gguf THREADS LENGTH_MAX [lookup]

Its server runs in this process and is asked over HTTP, which is how it wants to be asked. One
prompt at a time. With `lookup` it guesses from the text, by its own `ngram-simple`.
"""

from __future__ import annotations

import http.client
import importlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from bench.peers.worker import Generate, serve

_SAME_STEP_S = 0.001
"""Tokens of one step are sent one by one, with less than this between them."""


def main() -> None:
    """Serve the model named on the command line."""
    path, threads, length_max, *guesses = sys.argv[1:]
    serve(lambda: _start(path, int(threads), int(length_max), bool(guesses)))


def _start(
    path: str, threads: int, length_max: int, lookup: bool
) -> tuple[Generate, dict[str, Any]]:
    library = importlib.import_module("xllamacpp")  # by name: no type checker of ours can see it
    params = library.CommonParams()
    params.model.path = path
    params.n_ctx = length_max
    params.n_parallel = 1
    params.cpuparams.n_threads = threads
    params.cpuparams_batch.n_threads = threads
    params.cache_prompt = False
    params.warmup = True
    if lookup:
        kinds = library.common_speculative_type
        params.speculative.types = [kinds.COMMON_SPECULATIVE_TYPE_NGRAM_SIMPLE]
    server = library.Server(params)

    def generate(
        prompts: list[list[int]], tokens: int, eos_ids: list[int]
    ) -> tuple[list[list[float]], list[list[int]]]:
        (prompt,) = prompts
        request = {
            "prompt": prompt,
            "n_predict": tokens,
            "temperature": 0.0,
            "cache_prompt": False,
            "ignore_eos": not eos_ids,
            "return_tokens": True,
            "stream": True,
        }
        times: list[float] = []
        ids: list[int] = []
        # The address is asked for here since the server lives as long as somebody refers to it.
        for event in _ask(urlsplit(server.listening_address).netloc, request):
            now = time.perf_counter()
            made = list(event.get("tokens") or [])
            if event.get("stop") and event.get("stop_type") == "eos":
                made.append(eos_ids[0])  # It is decoded, but not said.
            if lookup and times and now - times[-1] < _SAME_STEP_S:
                now = times[-1]
            times += [now] * len(made)
            ids += made
        return [times], [ids]

    settings = {
        "llama.cpp": f"xllamacpp {library.__version__}",
        "file": path.rsplit("/", 1)[-1],
        "speculative": "ngram-simple" if lookup else None,
    }
    return generate, settings


def _ask(address: str, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    connection = http.client.HTTPConnection(address, timeout=600)
    try:
        headers = {"content-type": "application/json"}
        connection.request("POST", "/completion", json.dumps(request), headers)
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(response.read().decode(errors="replace"))
        for line in response:
            if line.startswith(b"data: "):
                yield json.loads(line[6:])
    finally:
        connection.close()


if __name__ == "__main__":
    main()
