"""A distilled drafter as an ordinary model folder, for engines that know no other kind.

Such a folder has all that a distilled one borrows or leaves out: the target's embeddings, its
tokenizer, and a head over the whole vocabulary. The rows that the drafter lacks are the target's,
turned as those that it has (`training`), so it can say a little more than the drafter itself.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from outrider.errors import ConfigError
from outrider.model.distillation.folder import read_folder
from outrider.model.distillation.student import (
    empty_student,
    own_parameters,
    turned_rows,
)
from outrider.model.distillation.target import target_digest, whole_target
from outrider.model.packaged import quiet_transformers

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
"""What of the target's folder is not for the drafter."""


def export_drafter(
    drafter_folder: Path, target_folder: Path, folder: Path, cache_dir: Path
) -> None:
    """Write a drafter to `folder` as transformers stores models, float32.

    `target_folder` has the target that it was made for. Raises `ConfigError` for another one or if
    there is something at `folder` already, and `ModelLoadError`.
    """
    drafter = read_folder(drafter_folder)
    if folder.exists():
        raise ConfigError(f"{folder} is there already")
    if target_digest(drafter.target.model, target_folder, cache_dir) != drafter.target.digest:
        raise ConfigError(f"{drafter_folder} was made for another target than {target_folder}")
    target: Any = whole_target(drafter.target.model, target_folder)
    embeddings = target.get_input_embeddings().weight.detach()
    target_head = target.get_output_embeddings().weight.detach()
    model = empty_student(drafter.model_config, embeddings, len(target_head), "sdpa")
    head: Any = model.get_output_embeddings()
    kept = list(drafter.kept)
    with torch.no_grad():
        for name, parameter in own_parameters(model).items():
            weight = drafter.weights[name]
            if parameter is head.weight:
                parameter.copy_(turned_rows(target_head, kept, weight))
            else:
                parameter.copy_(weight)
    # Not seen half written by somebody who looks for it.
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(target_folder, partial, ignore=shutil.ignore_patterns(*_WEIGHTS))
    with quiet_transformers():
        model.save_pretrained(partial)
    partial.replace(folder)
