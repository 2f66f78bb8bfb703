"""Drafters that come with Outrider: found in a checkout and where a wheel puts them, and whole."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

import outrider
from outrider import shipped
from outrider.model.distillation.folder import is_distilled, read_folder
from outrider.shipped import shipped_drafter

ROOT = Path(outrider.__file__).parents[1]
BYTES_MAX = 25_000_000


def test_the_demonstrations_model_has_a_drafter() -> None:
    folder = shipped_drafter("smollm2")
    assert folder is not None
    assert is_distilled(str(folder))
    drafter = read_folder(folder)
    assert drafter.target.model == "smollm2"
    assert len(drafter.kept) > 1_000
    assert sum(path.stat().st_size for path in folder.iterdir()) <= BYTES_MAX
    assert (folder / "README.md").is_file()


def test_other_models_have_none() -> None:
    assert shipped_drafter("random:tiny") is None


def test_a_wheel_has_it_where_it_is_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    described = tomllib.loads((ROOT / "pyproject.toml").read_text())
    data = described["tool"]["setuptools"]["data-files"]
    for place, patterns in data.items():
        for pattern in patterns:
            assert list(ROOT.glob(pattern)), pattern
        installed = tmp_path / place
        installed.mkdir(parents=True)
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "site" / "outrider" / "shipped.py"))
    assert shipped_drafter("smollm2") is None
    monkeypatch.setattr(shipped, "_installed", lambda: tmp_path / "share" / "outrider" / "models")
    assert shipped_drafter("smollm2") == tmp_path / "share/outrider/models/smollm2-drafter"
