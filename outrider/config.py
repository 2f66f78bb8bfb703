"""Settings that several services share; read once by each `__main__`, validated, frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Dtype = Literal["float32", "bfloat16", "float16"]
"""Precision of weights and activations."""
Device = Literal["auto", "cpu", "cuda"]
"""Where a model runs; auto takes a GPU if there is one."""
Quantize = Literal["none", "int8"]
"""How the weights of linear layers are kept."""

DEFAULT_CACHE = Path.home() / ".cache" / "outrider"
"""Where models are kept."""
DEFAULT_ENDPOINT = "127.0.0.1:50050"
"""Where clients look for an orchestrator."""
DEFAULT_HTTP_URL = "http://127.0.0.1:8080"
"""Where they look for its HTTP door."""


@dataclass(frozen=True, slots=True)
class Tls:
    """Who a service is to the others, and whom it trusts; PEM files."""

    certificate: Path
    private_key: Path
    authority: Path
    """Certificates by this authority are accepted, of clients and servers alike."""
    server_name: str | None = None
    """Name in the servers' certificates; None: the address that was connected to."""
