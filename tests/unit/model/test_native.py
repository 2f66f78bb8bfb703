"""Where our C++ operators come from, and that nothing but time is lost without them."""

from __future__ import annotations

import logging
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from outrider.model import native
from outrider.model.language_model import Row
from outrider.model.loading import load_language_model

TOKENS = [*range(40)]

_LOGITS = """
import logging, sys, torch
from pathlib import Path
logging.basicConfig(format="%(levelname)s %(message)s")
from outrider.model import native
from outrider.model.language_model import Row
from outrider.model.loading import load_language_model
model = load_language_model("random:tiny?seed=1", device="cpu", cache_dir=Path("/nonexistent"))
logits = model.forward([Row(model.new_cache(), [*range(40)], None, range(40))])
torch.save((native.available(), model.model_fingerprint, logits), sys.argv[1])
"""


def compiler_that(folder: Path, command: str) -> str:
    path = folder / "cxx"
    path.write_text(f"#!/bin/sh\n{command}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("how", ["missing", "broken", "off"])
def test_without_operators_a_model_gives_the_same_logits(tmp_path: Path, how: str) -> None:
    result = tmp_path / "result.pt"
    broken = compiler_that(tmp_path, "echo cannot compile >&2; exit 1")
    environment = {
        "missing": {"PATH": str(tmp_path), "CXX": ""},
        "broken": {"CXX": broken},
        "off": {native.OFF: "0", "CXX": broken},
    }[how]
    process = subprocess.run(
        [sys.executable, "-c", _LOGITS, str(result)],
        env={**os.environ, native.FOLDER: str(tmp_path / "native"), **environment},
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    there, fingerprint, logits = torch.load(result)
    assert not there
    assert not (tmp_path / "native").exists()
    model = load_language_model("random:tiny?seed=1", device="cpu", cache_dir=tmp_path)
    expected = model.forward([Row(model.new_cache(), TOKENS, None, range(40))])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
    # Other code rounds otherwise: its KV must not be taken for the other's.
    assert (fingerprint != model.model_fingerprint) == native.available()
    logged = process.stderr
    assert ("WARNING no C++ compiler is found" in logged) == (how == "missing")
    assert ("operators cannot be built" in logged) == ("cannot compile" in logged)
    assert ("WARNING the CPU operators cannot be built" in logged) == (how == "broken")


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (None, "No such file"),
        ("echo who knows >&2; exit 3", "who knows"),
        ("[ $1 = --version ] || { echo not this >&2; exit 1; }", "not this"),
        # It says that all is well, and writes nothing of use; or nothing at all.
        ('for last; do [ "$prev" = -o ] && echo junk > "$last"; prev=$last; done', "slower: "),
        ("exit 0", "slower: "),
    ],
)
def test_a_broken_compiler_is_reported_and_done_without(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: str | None,
    reason: str,
) -> None:
    monkeypatch.setenv(native.FOLDER, str(tmp_path / "native"))
    compiler = str(tmp_path / "none") if command is None else compiler_that(tmp_path, command)
    monkeypatch.setenv("CXX", compiler)
    assert native.available.__wrapped__() is False
    (record,) = [one for one in caplog.records if one.levelno >= logging.WARNING]
    assert record.levelname == "WARNING"
    assert "the CPU operators cannot be built" in record.getMessage()
    assert reason in record.getMessage()
    assert "\n" not in record.getMessage()


@pytest.fixture
def counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A compiler that writes a line for each build, and the file of these lines."""
    lines = tmp_path / "lines"
    command = (
        f'if [ "$1" = --version ]; then echo 1; exit; fi; echo build >> {lines};'
        ' for last; do [ "$prev" = -o ] && echo built > "$last"; prev=$last; done'
    )
    monkeypatch.setenv(native.FOLDER, str(tmp_path / "native"))
    return compiler_that(tmp_path, command), lines


def test_what_was_built_is_used_again(counting: tuple[str, Path]) -> None:
    compiler, lines = counting
    library = native._library(compiler)
    assert library.read_text() == "built\n"
    assert native._library(compiler) == library
    assert lines.read_text().splitlines() == ["build"]
    # Nothing half-built is left behind.
    assert sorted(path.suffix for path in library.parent.iterdir()) in ([".lock", ".so"], [".so"])


def test_what_was_built_for_another_set_up_is_not(
    counting: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, lines = counting
    libraries = {native._library(compiler)}
    source = tmp_path / "ops.cpp"
    source.write_text("// another source\n")
    for name, value in (
        ("_processor", lambda: "flags: none"),
        ("_FLAGS", ("-O1",)),
        ("_SOURCES", (source,)),
        ("_SOURCES", (native._SOURCES[0], source)),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(native, name, value)
            libraries.add(native._library(compiler))
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "0.1")
        libraries.add(native._library(compiler))
    Path(compiler).write_text(Path(compiler).read_text().replace("echo 1;", "echo 2;"))
    libraries.add(native._library(compiler))
    assert len(libraries) == 7
    assert len(lines.read_text().splitlines()) == 7


def test_a_build_that_fails_leaves_nothing_to_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(native.FOLDER, str(tmp_path / "native"))
    failing = compiler_that(
        tmp_path,
        '[ "$1" = --version ] && exit 0;'
        ' for last; do [ "$prev" = -o ] && echo half > "$last"; prev=$last; done; exit 1',
    )
    for _ in range(2):
        with pytest.raises(subprocess.CalledProcessError):
            native._library(failing)
    assert {path.suffix for path in (tmp_path / "native").iterdir()} <= {".lock"}


def test_devices_and_precisions_without_operators() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert not native.has_operators(gpu, torch.float32)
    assert not native.has_operators(cpu, torch.float16)
    assert not native.has_operators(gpu, torch.bfloat16)
    if shutil.which("g++"):
        assert native.has_operators(cpu, torch.float32)
        assert native.has_operators(cpu, torch.bfloat16)
