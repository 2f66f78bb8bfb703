"""Compiled steps: torch's compiler over a whole model, once for one token and once for any number.

A step over few tokens is bound by its small operators, not by its products: compiled, they are
fused, and Python runs once per operator that is left. What is compiled is transformers' own module;
our attention and our products stay the operators that they are. Sizes are symbolic, so no batch has
to be padded to one that was captured.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
from typing import Any

import torch

from outrider.errors import ModelLoadError

_log = logging.getLogger(__name__)


def can_compile(device: torch.device) -> bool:
    """True if torch's compiler has what it needs; says in the log what is missing."""
    if device.type == "cpu" and not (os.environ.get("CXX") or shutil.which("g++")):
        _log.warning("no C++ compiler is found: steps are not compiled, and slower")
        return False
    if device.type == "cuda" and not _has_triton():
        _log.warning("Triton is not installed: steps are not compiled, and slower")
        return False
    return True


def compile_steps(module: Any) -> None:
    """Compile a model of transformers in place; the work is done when it first runs.

    Raises ModelLoadError if the model has no decoder that could be compiled.
    """
    decoder = module.base_model
    if decoder is module:
        raise ModelLoadError("it has no decoder of its own that could be compiled")
    decoder.compile(dynamic=True)


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
