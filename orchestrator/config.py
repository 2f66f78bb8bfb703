"""Settings of the orchestrator; read once by `__main__`, frozen, passed down."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from outrider.config import Tls
from outrider.domain import DraftBudget


@dataclass(frozen=True)
class DriverConfig:
    """Bounds and times of session handling."""

    sessions_max: int = 1_024
    """Sessions at once, one for each choice; more are refused with RESOURCE_EXHAUSTED.

    One that has ended counts as long as its output waits for a client that does not read it.
    """
    choices_max: int = 16
    """Choices of one request; more are refused with INVALID_ARGUMENT."""
    drafters_per_session: int = 2
    budget_limits: DraftBudget = field(
        default_factory=lambda: DraftBudget(nodes_max=512, depth_max=64, width_max=3)
    )
    """Bounds of what drafters are told."""
    tenant_weights: Mapping[str, float] = field(default_factory=dict)
    """Tenants' shares in drafters, beside each other; whoever is not named has 1."""
    own_guesses: bool = True
    """Verifiers are asked to guess from sessions' own text, beside the drafters."""
    silence_s: float = 5.0
    """Without a commit for this long, the verifier is asked to repeat."""
    verifier_timeout_s: float = 60.0
    """Without a commit for this long, the verifier counts as lost."""
    worker_timeout_s: float = 5.0
    """A worker that neither says anything nor answers when asked counts as lost after so long."""
    failover_wait_s: float = 30.0
    """How long a session whose verifier was lost waits for another one; new requests do not."""
    write_timeout_s: float = 30.0
    """A gRPC client that reads nothing for so long is given up, and its generation with it."""
    rebalance: bool = True
    """Sessions move to verifiers that serve them better, after a scale-up say, where it pays."""
    sweep_interval_s: float = 0.5
    prefix_lookup_s: float = 0.005
    """Admission waits so long for Redis to say who holds a prompt's beginning."""
    prompt_bytes_max: int = 4 * 1024 * 1024
    stop_strings_max: int = 16
    stop_bytes_max: int = 1_024
    stop_ids_max: int = 256


@dataclass(frozen=True)
class JournalConfig:
    """Times of journaling; see `orchestrator.journaling`."""

    retention_s: float = 600.0
    """How long Redis keeps a generation after its last entry."""
    deadline_s: float = 0.25
    """What a batch may take before output goes on without it."""
    interval_s: float = 0.002
    """Least time between the end of one batch and the next."""
    retry_s: float = 0.5
    """Between attempts while Redis is away."""
    call_timeout_s: float = 2.0
    """What an attempt may take while nothing waits for it."""
    stall_s: float = 0.5
    """Who stands still for longer asks who holds what before saying more."""
    doubt_s: float = 10.0
    """Who finds nothing out for so long, since Redis is away, too, gives its generations up."""


@dataclass(frozen=True)
class HttpConfig:
    """The HTTP front door, and what it puts up with."""

    host: str
    port: int
    certificate: Path | None = None
    """PEM, with intermediates; read anew when it changes. None: plaintext."""
    private_key: Path | None = None
    keys: Path | None = None
    """Who may ask; None: everybody."""
    open_to_all: bool = False
    """Neither keys nor TLS are insisted upon where others than this machine can connect."""
    vllm_metrics: bool = False
    """Also export metrics under vLLM's names."""
    reload_s: float = 5.0
    """How often is looked whether keys or certificates have changed."""
    connections_max: int = 4_096
    """On others only health and metrics are served, so that a full door is not taken for dead."""
    header_bytes_max: int = 32 * 1024
    header_timeout_s: float = 10.0
    """In which a request's head must have come."""
    body_bytes_max: int = 2 * 1024 * 1024
    bodies_bytes_max: int = 256 * 1024 * 1024
    """Bodies that are being read, all together."""
    body_timeout_s: float = 30.0
    write_timeout_s: float = 30.0
    """A client that reads nothing for so long is given up, and its generation with it."""
    write_buffer_bytes: int = 16 * 1024
    """For each connection; a client that is behind by more gets larger chunks instead."""
    send_buffer_bytes: int = 64 * 1024
    """Likewise, in the kernel, which would set aside megabytes for a client that reads slowly."""
    tokenize_bytes_max: int = 16 * 1024
    """Larger bodies are tokenized in a thread."""


@dataclass(frozen=True)
class OrchestratorConfig:
    """Everything an orchestrator process needs to know."""

    host: str
    port: int
    redis_url: str | None
    verifiers: tuple[str, ...]
    """Static addresses, host:port."""
    drafters: tuple[str, ...]
    name: str
    drain_s: float
    driver: DriverConfig
    journal: JournalConfig | None = None
    """None: nothing of requests or output is kept in Redis, and nothing can be resumed."""
    http: HttpConfig | None = None
    """None: gRPC only."""
    otlp_endpoint: str | None = None
    """Collector of traces; None: there are none."""
    tls: Tls | None = None
    """Between services; None: plaintext."""
    plaintext: bool = False
    """Plaintext is meant, even where other machines can connect."""
    discover: str | None = None
    """Where else workers are found than in Redis: `kubernetes:NAMESPACE[/SELECTOR]`."""
