"""A drafter written as an ordinary model says what it said, and finds its tokenizer beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from outrider.errors import ConfigError
from outrider.model.distillation.export import export_drafter
from outrider.model.distillation.folder import TargetName, read_folder, write_folder
from outrider.model.distillation.student import (
    empty_student,
    fill_student,
    new_student,
    own_parameters,
    student_config,
    turned_rows,
)
from outrider.model.distillation.target import target_digest, whole_target

from .conftest import TARGET

KEPT = tuple(range(0, 240, 2))
TEXT = torch.tensor([[5, 9, 200, 31, 17, 8]])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "target"
    whole_target(TARGET, None).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.fixture
def drafter(tmp_path: Path, target: Path) -> Path:
    model: Any = whole_target("target", target)
    student = new_student(model, (0, 1), KEPT)
    torch.manual_seed(1)
    turn = torch.eye(student.config.hidden_size)
    turn += 0.1 * torch.randn_like(turn)
    head = student.get_output_embeddings()
    weights = {
        name: parameter.detach() @ turn.T if parameter is head.weight else parameter.detach()
        for name, parameter in own_parameters(student).items()
    }
    write_folder(
        tmp_path / "drafter",
        target=TargetName("target", target_digest("target", target, tmp_path)),
        layers=(0, 1),
        model_config=student_config(model.config, (0, 1)),
        kept=KEPT,
        weights=weights,
    )
    return tmp_path / "drafter"


def test_an_exported_drafter_says_what_it_said(drafter: Path, target: Path, tmp_path: Path) -> None:
    export_drafter(drafter, target, tmp_path / "plain", tmp_path)
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32)
    found = read_folder(drafter)
    embeddings = whole_target("target", target).get_input_embeddings().weight.detach()
    student: Any = empty_student(found.model_config, embeddings, len(KEPT), "sdpa")
    fill_student(student, found.weights)
    with torch.no_grad():
        said, was = plain(TEXT).logits, student(TEXT).logits
    assert said.shape[-1] == plain.config.vocab_size > len(KEPT)
    torch.testing.assert_close(said[..., list(KEPT)], was, rtol=1e-4, atol=1e-4)
    assert (tmp_path / "plain" / "tokenizer.json").exists()


def test_rows_that_a_drafter_lacks_are_the_targets_turned() -> None:
    torch.manual_seed(0)
    target_head, turn = torch.randn(50, 8), torch.randn(8, 8)
    kept = list(range(0, 50, 2))
    whole = turned_rows(target_head, kept, (target_head @ turn.T)[kept])
    torch.testing.assert_close(whole, target_head @ turn.T, rtol=1e-3, atol=1e-3)


def test_another_target_is_refused(drafter: Path, target: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    whole_target(TARGET.replace("seed=", "seed=9"), None).save_pretrained(other)
    with pytest.raises(ConfigError, match="another target"):
        export_drafter(drafter, other, tmp_path / "plain", tmp_path)
    assert not (tmp_path / "plain").exists()


def test_what_is_there_is_not_overwritten(drafter: Path, target: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there already"):
        export_drafter(drafter, target, target, tmp_path)
    assert (target / "config.json").exists()
