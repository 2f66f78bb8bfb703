"""Settings that several services share; read once by each `__main__`, validated, frozen."""

from __future__ import annotations

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
