"""A distilled drafter as a folder: what it is (config.json), weights, and its vocabulary.

Matrices are stored as 8-bit integers with a scale per row and widened when they are read. The
target's embeddings are not in there; the folder names its target by a digest of the latter's
weights, and is refused for another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from transformers import AutoConfig

from outrider.errors import ModelLoadError

FORMAT = "outrider-drafter-1"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
VOCABULARY_FILE = "vocabulary.json"

_SCALE = ".scale"


@dataclass(frozen=True, slots=True)
class TargetName:
    """What a drafter knows of its target."""

    model: str
    """Model spec under which it was loaded when the drafter was made."""
    digest: str
    """See `target_digest`."""


@dataclass(frozen=True, slots=True)
class DistilledFolder:
    """The contents of a folder, checked."""

    name: str
    target: TargetName
    layers: tuple[int, ...]
    """Layers of the target from which those here were made."""
    model_config: Any
    """The student's PreTrainedConfig."""
    kept: tuple[int, ...]
    """The target's id of each output of the head, ascending."""
    weights: Mapping[str, torch.Tensor]
    """float32, by name; without the embeddings."""
    digest: str
    """SHA-256 (hex) of weights and vocabulary as stored."""


def is_distilled(spec: str) -> bool:
    """True if a model spec names a folder with a distilled drafter."""
    try:
        config = json.loads((Path(spec).expanduser() / CONFIG_FILE).read_text())
    except (OSError, ValueError):
        return False
    return isinstance(config, dict) and config.get("format") == FORMAT


def write_folder(
    folder: Path,
    *,
    target: TargetName,
    layers: Sequence[int],
    model_config: Any,
    kept: Sequence[int],
    weights: Mapping[str, torch.Tensor],
) -> None:
    """Write a drafter; what else the folder holds stays."""
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in weights.items():
        if tensor.ndim == 2:
            stored[name], stored[name + _SCALE] = _narrowed(tensor.detach().float())
        else:
            stored[name] = tensor.detach().float().contiguous()
    save_file(stored, folder / WEIGHTS_FILE, {"format": "pt"})
    described = model_config.to_diff_dict() | {"model_type": model_config.model_type}
    for key in ("_name_or_path", "_model_name_or_path", "transformers_version", "dtype"):
        described.pop(key, None)
    config = {
        "format": FORMAT,
        "target": {"model": target.model, "digest": target.digest},
        "layers": list(layers),
        "model": described,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    (folder / VOCABULARY_FILE).write_text(json.dumps(list(kept)) + "\n")


def read_folder(folder: Path) -> DistilledFolder:
    """Read a drafter. Raises ModelLoadError, which names the file at fault."""
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        if config.get("format") != FORMAT:
            raise ModelLoadError(f"{folder / CONFIG_FILE} is not of the format {FORMAT}")
        target = TargetName(config["target"]["model"], config["target"]["digest"])
        described = dict(config["model"])
        model_config = AutoConfig.for_model(described.pop("model_type"), **described)
        layers = tuple(int(layer) for layer in config["layers"])
        vocabulary_size = int(model_config.vocab_size)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelLoadError(f"{folder / CONFIG_FILE} cannot be read: {error}") from error
    kept, vocabulary = _vocabulary(folder / VOCABULARY_FILE, vocabulary_size)
    try:
        content = (folder / WEIGHTS_FILE).read_bytes()
        stored = load(content)
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{folder / WEIGHTS_FILE} cannot be read: {error}") from error
    digest = hashlib.sha256(vocabulary)
    digest.update(content)
    return DistilledFolder(
        folder.resolve().name,
        target,
        layers,
        model_config,
        kept,
        _widened(folder / WEIGHTS_FILE, stored),
        digest.hexdigest(),
    )


def _vocabulary(path: Path, vocabulary_size: int) -> tuple[tuple[int, ...], bytes]:
    try:
        content = path.read_bytes()
        ids = json.loads(content)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise ModelLoadError(f"{path} must be a list of token ids")
    if not ids or ids != sorted(set(ids)) or not 0 <= ids[0] <= ids[-1] < vocabulary_size:
        raise ModelLoadError(f"{path} must list ids below {vocabulary_size} once, ascending")
    return tuple(ids), content


def _narrowed(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a matrix as int8 and the scale of each row, symmetric around zero."""
    scale = matrix.abs().amax(dim=1) / 127.0
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (matrix / scale[:, None]).round().to(torch.int8), scale


def _widened(path: Path, stored: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    weights = {}
    for name, tensor in stored.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in stored:
            continue
        wide = tensor.float()
        if tensor.dtype == torch.int8:
            scale = stored.get(name + _SCALE)
            if scale is None or scale.shape != tensor.shape[:1]:
                raise ModelLoadError(f"{path}: {name} has no scales that fit")
            wide *= scale[:, None]
        if not wide.isfinite().all():
            raise ModelLoadError(f"{path}: {name} has values that are no numbers")
        weights[name] = wide
    return weights
