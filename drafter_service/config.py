"""Settings of the drafter; read once by `__main__`, frozen, passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outrider.config import Device, Dtype, Quantize, Tls


@dataclass(frozen=True)
class GrowingConfig:
    """Bounds of the growing thread."""

    sessions_max: int = 256
    """Mirrors held at once; more are refused."""
    nodes_max: int = 1_024
    """Live nodes of a session, whatever its budget asks for."""
    depth_max: int = 64
    step_delay_s: float = 0.0
    """Added to each step: makes a slow drafter, for tests and trials."""


@dataclass(frozen=True)
class DrafterConfig:
    """Everything a drafter process needs to know."""

    proposer: str
    """"lookup" or "language-model"."""
    model: str | None
    dtype: Dtype
    quantize: Quantize
    device: Device
    threads: int
    compiled: bool
    """Compile the model's steps."""
    leaves_max: int
    kv_tokens_max: int | None
    """KV budget of a draft model in tokens; None: what the machine has room for."""
    host: str
    port: int
    advertise: str | None
    redis_url: str | None
    worker_id: str
    cache_dir: Path
    drain_s: float
    growing: GrowingConfig
    tls: Tls | None = None
    """Between services; None: plaintext."""
    plaintext: bool = False
    """Plaintext is meant, even where other machines can connect."""
