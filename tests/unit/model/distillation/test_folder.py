"""A drafter's folder: what is written is read back, and whatever is wrong with it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from outrider.errors import ModelLoadError
from outrider.model.distillation import stages
from outrider.model.distillation.folder import (
    CONFIG_FILE,
    VOCABULARY_FILE,
    WEIGHTS_FILE,
    is_distilled,
    read_folder,
)
from outrider.model.distillation.student import new_student, own_parameters
from outrider.model.loading import load_language_model
from tests.support.distilled import write_untrained

from .conftest import TARGET

KEPT = tuple(range(8, 260, 14))
LAYERS = (0, 2)


@pytest.fixture(scope="module")
def drafter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A drafter that was never trained; not to be changed."""
    folder = tmp_path_factory.mktemp("made") / "drafter"
    write_untrained(folder, TARGET, LAYERS, KEPT)
    return folder


@pytest.fixture
def copy(drafter: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(drafter, tmp_path / "drafter"))


def load(folder: Path, target: str | None = None) -> object:
    return load_language_model(
        str(folder), device="cpu", cache_dir=Path("/nonexistent"), target=target
    )


def test_what_is_written_is_read_back(drafter: Path) -> None:
    read = read_folder(drafter)
    own = own_parameters(new_student(stages.whole_target(TARGET, None), LAYERS, KEPT))
    assert (read.kept, read.layers, read.target.model) == (KEPT, LAYERS, TARGET)
    assert read.weights.keys() == own.keys()
    for name, weight in read.weights.items():
        step = own[name].abs().amax(dim=-1, keepdim=True) / 127
        assert ((weight - own[name]).abs() <= 0.5001 * step).all(), name


def test_embeddings_are_not_stored(drafter: Path) -> None:
    assert not any("embed" in name for name in load_file(drafter / WEIGHTS_FILE))


def test_only_a_drafters_folder_is_one(drafter: Path, tmp_path: Path) -> None:
    assert is_distilled(str(drafter))
    assert not is_distilled(str(tmp_path))
    assert not is_distilled(TARGET)
    (tmp_path / CONFIG_FILE).write_text('{"model_type": "llama"}')
    assert not is_distilled(str(tmp_path))


def test_another_target_is_refused(drafter: Path) -> None:
    load(drafter)
    with pytest.raises(ModelLoadError, match="made for another target"):
        load(drafter, "random:tiny?seed=2&layers=4")


def test_only_a_drafter_borrows() -> None:
    with pytest.raises(ModelLoadError, match="only a distilled drafter"):
        load_language_model(
            TARGET, device="cpu", cache_dir=Path("/nonexistent"), target="random:other"
        )


def test_cut_off_weights_are_refused(copy: Path) -> None:
    content = (copy / WEIGHTS_FILE).read_bytes()
    (copy / WEIGHTS_FILE).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelLoadError, match=WEIGHTS_FILE):
        load(copy)


@pytest.mark.parametrize("damage", ["missing", "strange", "shape", "scale", "nan"])
def test_wrong_weights_are_refused(copy: Path, damage: str) -> None:
    weights = load_file(copy / WEIGHTS_FILE)
    if damage == "missing":
        del weights["model.norm.weight"]
    elif damage == "strange":
        weights["model.other.weight"] = torch.ones(3)
    elif damage == "shape":
        weights["lm_head.weight"] = weights["lm_head.weight"][:, :-1].contiguous()
    elif damage == "scale":
        del weights["lm_head.weight.scale"]
    else:
        weights["model.norm.weight"][0] = torch.nan
    save_file(weights, copy / WEIGHTS_FILE)
    with pytest.raises(ModelLoadError, match=r"weight|scale"):
        load(copy)


@pytest.mark.parametrize(
    "ids",
    [[], [1, 2], [*KEPT[:-1], KEPT[0]], KEPT[::-1], [*KEPT[:-1], 260], ["a"] * len(KEPT), {}],
)
def test_a_wrong_vocabulary_is_refused(copy: Path, ids: object) -> None:
    (copy / VOCABULARY_FILE).write_text(json.dumps(ids))
    with pytest.raises(ModelLoadError, match=rf"{VOCABULARY_FILE}|lm_head"):
        load(copy)


@pytest.mark.parametrize("key", ["target", "layers", "model"])
def test_an_incomplete_configuration_is_refused(copy: Path, key: str) -> None:
    config = json.loads((copy / CONFIG_FILE).read_text())
    del config[key]
    (copy / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match=CONFIG_FILE):
        load(copy)
