"""Which peers there are, and how each is started."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.peers.process import ROOT, Peer, PeerError

PEERS = ROOT / ".peers"
"""Environments of their own, each installed by `make peer-NAME`."""

NAMES = (
    "hf",
    "hf-lookup",
    "hf-assisted",
    "hf-batching",
    "vllm",
    "vllm-ngram",
    "llama-cpp",
    "llama-cpp-lookup",
    "openvino",
    "openvino-lookup",
)
"""`hf` is `generate` of transformers, `hf-batching` its continuous batching."""
_GENERATE = {"hf": "plain", "hf-lookup": "lookup", "hf-assisted": "assisted"}


@dataclass(frozen=True, slots=True)
class Target:
    """What all peers run: the same weights on the same cores."""

    folder: Path
    dtype: str
    threads: int
    length_max: int
    """Prompt and output together, in tokens."""
    assistant: Path | None = None
    """Folder of a draft model for assisted decoding."""


def start(name: str, target: Target) -> Peer:
    """Start a peer and wait until it is ready. Raises `PeerError`, which says why it is not."""
    threads = str(target.threads)
    environment = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "OMP_NUM_THREADS": threads,
    }
    base = [str(target.folder), target.dtype]
    if name in _GENERATE:
        command = [sys.executable, "-m", "bench.peers.generate_worker", *base, threads]
        command += [_GENERATE[name]]
        if name == "hf-assisted":
            if target.assistant is None:
                raise PeerError("needs a draft model (--assistant)")
            command += [str(target.assistant)]
    elif name == "hf-batching":
        command = [sys.executable, "-m", "bench.peers.transformers_worker", *base, threads]
    else:
        command = _elsewhere(name, target, base)
        environment |= _ENVIRONMENTS.get(name.split("-")[0], {})
    peer = Peer(name, command, environment)
    try:
        peer.wait_ready()
    except BaseException:
        peer.close()
        raise
    return peer


_ENVIRONMENTS = {
    "vllm": {
        # It shares the processors with nobody while it runs, so it need not be bound.
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "2",
        # Without a second process of its own, steps can be timed and nothing polls.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
    }
}


def _elsewhere(name: str, target: Target, base: Sequence[str]) -> list[str]:
    """Command of a peer that lives in an environment of its own."""
    engine = name.removesuffix("-ngram").removesuffix("-lookup")
    python = PEERS / engine / "bin" / "python"
    if not python.is_file():
        raise PeerError(f"not installed (make peer-{engine}): there is no {python}")
    guesses = ["lookup"] if name.endswith(("-lookup", "-ngram")) else []
    length_max = str(target.length_max)
    if engine == "vllm":
        return [str(python), "-m", "bench.peers.vllm_worker", *base, length_max, *guesses]
    # Both read GGUF, which is written here: their environments cannot read safetensors.
    from bench.peers.gguf_file import write_gguf

    kind = "bfloat16" if engine == "llama-cpp" else "float16"
    dtype = kind if target.dtype == "bfloat16" else target.dtype
    try:
        path = write_gguf(target.folder, PEERS / "models", dtype)
    except (OSError, KeyError, ValueError) as error:
        raise PeerError(f"its model cannot be written: {type(error).__name__}: {error}") from error
    module = f"bench.peers.{engine.replace('-', '_')}_worker"
    return [str(python), "-m", module, str(path), str(target.threads), length_max, *guesses]
