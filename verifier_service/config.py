"""Settings of the verifier; read once by `__main__`, frozen, passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outrider.config import Device, Dtype, Quantize, Tls


@dataclass(frozen=True)
class EngineConfig:
    """Budgets of the engine."""

    sessions_max: int = 64
    """Sessions admitted at once; more are refused, never queued without bound."""
    kv_tokens_max: int | None = None
    """KV budget in tokens; None: what the machine has room for."""
    kv_overcommit: float = 2.0
    """Sessions are admitted until all of them together might need this many times the budget:
    most end early. Those for which there is no room wait, or are preempted and wait."""
    step_nodes_max: int = 32
    """Draft nodes verified in one step, over all sessions."""
    prefill_tokens_max: int = 256
    """Prompt tokens computed beside decoding rows in one step: what bounds a stall."""
    tree_nodes_max: int = 512
    """Live draft nodes kept for a session."""
    tree_depth_max: int = 64
    """Deepest live draft node below the tip."""
    drafts_queued_max: int = 4_096
    """Draft messages that may wait for the next step; later ones are dropped."""
    grammar_timeout_s: float = 5.0
    """A session whose grammar takes longer to compile is refused."""
    own_guesses: bool = False
    """Guess from sessions' own text, beside the drafters, where a session may be guessed for. On
    in a service unless it is switched off; an engine by itself verifies what it is given."""
    kv_pull: bool = True
    """Fetch KV from other verifiers where that is quicker than computing it, and let them fetch."""
    kv_pull_wait_s: float = 5.0
    """A session waits no longer than this for KV of a peer."""
    kv_pulls_max: int = 4
    """Fetches at once; other sessions compute."""
    kv_serves_max: int = 2
    """Peers served at once; others are refused."""
    step_delay_s: float = 0.0
    """Added to each step: gives a tiny model the step time of a large one, for tests."""
    warm_up: bool = True
    """Measure step times before taking sessions."""


@dataclass(frozen=True)
class VerifierConfig:
    """Everything a verifier process needs to know."""

    model: str
    dtype: Dtype
    quantize: Quantize
    device: Device
    threads: int
    compiled: bool
    """Compile the model's steps."""
    host: str
    port: int
    advertise: str | None
    redis_url: str | None
    worker_id: str
    cache_dir: Path
    drain_s: float
    engine: EngineConfig
    tls: Tls | None = None
    """Between services; None: plaintext."""
    plaintext: bool = False
    """Plaintext is meant, even where other machines can connect."""
    otlp_endpoint: str | None = None
    """Collector of traces; None: there are none."""
