"""Settings of the drafter; read once by `__main__`, frozen, passed down."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from outrider.config import Device, Dtype, Quantize, Tls
from outrider.errors import ConfigError

LANGUAGE_MODEL = "language-model"
PROPOSERS = ("lookup", "datastore", "recycling", LANGUAGE_MODEL)
"""What can guess, from cheap to dear."""
_CASCADE = "cascade:"


def stages_of(proposer: str) -> tuple[str, ...]:
    """Names of the proposers that a setting stands for, in order. Raises `ConfigError`."""
    names = tuple(name.strip() for name in proposer.removeprefix(_CASCADE).split(","))
    known = ", ".join(PROPOSERS)
    unknown = [name for name in names if name not in PROPOSERS]
    if unknown:
        raise ConfigError(f"unknown proposer {unknown[0]!r}; there are {known}")
    if proposer.startswith(_CASCADE):
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"a cascade has two or more different proposers of {known}")
        if LANGUAGE_MODEL in names[:-1]:
            raise ConfigError("the language model comes last in a cascade: the others spare it")
    elif len(names) > 1:
        raise ConfigError(f"several proposers are a cascade: {_CASCADE}{','.join(names)}")
    return names


@dataclass(frozen=True)
class GrowingConfig:
    """Bounds of the growing thread."""

    sessions_max: int = 4_096
    """Sessions mirrored at once, most of them idle; more are refused."""
    mirrors_bytes_max: int = 512 << 20
    """Memory of mirrors, estimated; idle ones beyond it are put aside as bare tokens."""
    aside_tokens_max: int = 1 << 24
    """Tokens of those put aside, four bytes each; the oldest beyond it are given up."""
    nodes_max: int = 1_024
    """Live nodes of a session, whatever its budget asks for."""
    depth_max: int = 64
    step_delay_s: float = 0.0
    """Added to each step: makes a slow drafter, for tests and trials."""


@dataclass(frozen=True)
class DrafterConfig:
    """Everything a drafter process needs to know."""

    proposer: str
    """One of `PROPOSERS`, or several as in "cascade:lookup,language-model"."""
    model: str | None
    target: str | None
    """Model spec of a distilled drafter's target; None: as the drafter's folder has it."""
    dtype: Dtype
    quantize: Quantize
    device: Device
    threads: int
    compiled: bool
    """Compile the model's steps."""
    leaves_max: int
    kv_tokens_max: int | None
    """KV budget of a draft model in tokens; None: what the machine has room for."""
    datastore: Path | None
    """Corpus that the datastore proposer guesses from."""
    cascade_tokens: float
    """Expected tokens of guesses from which on a cascade spares its later stages."""
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
    otlp_endpoint: str | None = None
    """Collector of traces; None: there are none."""
