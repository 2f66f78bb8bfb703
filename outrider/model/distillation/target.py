"""What a drafter needs of its target: a digest that tells it from others, and its embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from outrider.errors import ModelLoadError
from outrider.model import random_model
from outrider.model.fingerprint import parameters_digest, tensors_digest
from outrider.model.packaged import quiet_transformers


def whole_target(spec: str, folder: Path | None) -> PreTrainedModel:
    """Return the target as transformers makes it, float32 on the CPU: what students start from.

    `folder`: where it lies, None for a random one. Raises ModelLoadError.
    """
    if folder is None:
        return random_model.build_random_model(random_model.parse_random_spec(spec), "sdpa")
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        with quiet_transformers():
            module: PreTrainedModel = load(
                folder, dtype=torch.float32, use_safetensors=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise ModelLoadError(f"cannot load model '{spec}': {error}") from error
    return module


def target_digest(spec: str, folder: Path | None, cache_dir: Path) -> str:
    """Return the SHA-256 (hex) over the target's tensors, however its files are laid out."""
    if folder is None:
        return parameters_digest(whole_target(spec, None))
    return tensors_digest(folder, cache_dir)


def borrowed_embeddings(spec: str, folder: Path | None) -> torch.Tensor:
    """Return the target's embeddings, float32 [vocabulary, hidden]. Raises ModelLoadError."""
    if folder is None:
        embeddings: Any = whole_target(spec, None).get_input_embeddings()
        weight: torch.Tensor = embeddings.weight.detach()
        return weight
    name = _embeddings_name(folder)
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if name in file.keys():  # noqa: SIM118 (not a mapping)
                    found: torch.Tensor = file.get_tensor(name)
                    return found.float()
        except (OSError, SafetensorError) as error:
            raise ModelLoadError(f"{path} cannot be read: {error}") from error
    raise ModelLoadError(f"the target in {folder} has no tensor '{name}'")


def _embeddings_name(folder: Path) -> str:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"), quiet_transformers():
        module: Any = AutoModelForCausalLM.from_config(config.get_text_config(decoder=True))
    wanted = module.get_input_embeddings().weight
    names: list[str] = [name for name, weight in module.named_parameters() if weight is wanted]
    return names[0]
