"""A distilled drafter that was never trained: layers of a random target, and rows of its head."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from outrider.model.distillation import stages
from outrider.model.distillation.folder import TargetName, write_folder
from outrider.model.distillation.student import new_student, own_parameters, student_config


def write_untrained(folder: Path, target: str, layers: Sequence[int], kept: Sequence[int]) -> None:
    """Write the drafter; `target` is the spec of a random model."""
    module = stages.whole_target(target, None)
    write_folder(
        folder,
        target=TargetName(target, stages.target_digest(target, None, folder)),
        layers=layers,
        model_config=student_config(module.config, layers),
        kept=kept,
        weights=own_parameters(new_student(module, layers, kept)),
    )
