"""The model fingerprint: what must match for KV to be shared or output continued exactly."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from outrider.domain import RULE_VERSION
from outrider.errors import ModelLoadError
from outrider.model.kv_cache import KV_LAYOUT

_logger = logging.getLogger(__name__)

# Where a model came from and what wrote its file do not change what it computes. The dtype it
# was stored in is covered by the weights; the one it runs in and the number of processes stand
# beside the configuration.
_CONFIG_KEYS_IGNORED = frozenset(
    {
        "_name_or_path",
        "transformers_version",
        "dtype",
        "torch_dtype",
        "architectures",
        "distributed_config",
    }
)


def model_fingerprint(
    config: dict[str, Any],
    weights: str,
    dtype: torch.dtype,
    kernels: str,
    *,
    quantization: str = "none",
    parallelism: int = 1,
) -> str:
    """Return the SHA-256 (hex) over everything that decides a model's output and KV.

    `weights` is the digest of the weights, `kernels` names the kind of code that multiplies and
    attends: other code rounds otherwise. `parallelism` is the number of processes that share
    the model, each of which keeps the KV of its own heads.
    """
    identity = {
        "config": {key: config[key] for key in config.keys() - _CONFIG_KEYS_IGNORED},
        "weights": weights,
        "dtype": str(dtype),
        "quantization": quantization,
        "parallelism": parallelism,
        "kv_layout": KV_LAYOUT,
        "kernels": kernels,
        "rule_version": RULE_VERSION,
    }
    canonical = json.dumps(identity, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()


def parameters_digest(module: torch.nn.Module) -> str:
    """Return the SHA-256 (hex) over a module's parameters; for small modules on the CPU."""
    digest = hashlib.sha256()
    for name, parameter in sorted(module.named_parameters()):
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}\n".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def folder_digest(folder: Path, cache_dir: Path) -> str:
    """Return the SHA-256 (hex) over the safetensors files of a model folder.

    Kept under `cache_dir` for as long as names, sizes and modification times stay the same; the
    model's own folder may be read-only. Raises ModelLoadError if there are none.
    """
    return _kept_digest(folder, cache_dir, _files_digest)


def tensors_digest(folder: Path, cache_dir: Path) -> str:
    """Return the SHA-256 (hex) over a model folder's tensors, in the order of their names.

    Other than `folder_digest` it does not depend on how they are spread over files. Kept likewise.
    Raises ModelLoadError if there are none.
    """
    return _kept_digest(folder, cache_dir, _tensors_digest)


def _kept_digest(folder: Path, cache_dir: Path, compute: Callable[[Sequence[Path]], str]) -> str:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelLoadError("there are no *.safetensors files; other formats are not loaded")
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    identity = [str(folder.resolve()), stats]
    if compute is not _files_digest:
        identity.append(compute.__name__)
    key = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    cached = cache_dir / "digests" / key
    if cached.is_file():
        return cached.read_text()
    digest = compute(files)
    _write_atomically(cached, digest)
    return digest


def _files_digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as content:
            digest.update(f"{file.name} ".encode())
            digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _tensors_digest(files: Sequence[Path]) -> str:
    digests = {}
    try:
        for path in files:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    tensor = file.get_tensor(name)
                    content = tensor.contiguous().view(-1).view(torch.uint8).numpy()
                    shape = f"{tensor.dtype} {tuple(tensor.shape)}"
                    digests[name] = f"{shape} {hashlib.sha256(content).hexdigest()}"
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    return hashlib.sha256(json.dumps(sorted(digests.items())).encode()).hexdigest()


def _write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see all of it or nothing; a failure costs time, no more."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        _logger.warning("cannot keep the digest of the weights: %s", error)
