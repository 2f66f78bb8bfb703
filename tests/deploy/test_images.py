"""The Dockerfile and what belongs into its images."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import outrider
from tests.support.manifests import ROOT

DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()
SCRIPT = ROOT / "deploy" / "models.sh"


def stage(name: str) -> str:
    """Return a stage's lines, those of the stages that it builds upon first."""
    found = re.search(rf"^FROM (\S+) AS {name}\n(.*?)(?=^FROM |\Z)", DOCKERFILE, re.M | re.S)
    assert found is not None, name
    base, lines = found.groups()
    return (stage(base) if re.search(rf" AS {base}$", DOCKERFILE, re.M) else "") + lines


@pytest.mark.parametrize("target", ["orchestrator", "drafter", "verifier"])
def test_images_run_as_nobody_in_particular_and_can_be_asked(target: str) -> None:
    lines = stage(target)
    users = re.findall(r"^USER (.*)$", lines, re.M)
    assert users[-1] == "10001:10001"
    port = re.search(r"^EXPOSE (\d+)", lines, re.M)
    assert port is not None
    assert "HEALTHCHECK" in lines
    assert f'"outrider.serving.probe", "--port", "{port.group(1)}"' in lines
    assert f'ENTRYPOINT ["outrider", "{target}"]' in lines


def test_the_orchestrator_gets_no_model_libraries() -> None:
    lines = stage("build-orchestrator")
    wanted = re.findall(r"pip install -c constraints.txt '([^']*)'", lines)
    assert wanted == [".[otel,speed]", ".[kubernetes,otel,speed]"]
    assert "--from=build-orchestrator" in stage("orchestrator")
    assert "g++" not in stage("orchestrator")


def test_what_is_built_upon_is_pinned() -> None:
    (base,) = re.findall(r"^ARG BASE=(\S+)$", DOCKERFILE, re.M)
    assert re.search(r":\d+\.\d+\.\d+-", base)
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for service in compose["services"].values():
        assert "latest" not in service["image"]
        if service["image"].startswith("outrider/"):
            assert f":{outrider.__version__}" in service["image"]


def test_everything_that_is_copied_is_in_the_context() -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.M):
        for source in [word for word in line.split() if not word.startswith("--")][:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source}" in ignore, source


def test_containers_in_compose_can_do_nothing_but_their_work() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for name, service in compose["services"].items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name


def run_script(folder: Path, command: str, **models: str) -> subprocess.CompletedProcess[str]:
    """Run models.sh with an `outrider` that writes down how it was called."""
    fake = folder / "bin"
    fake.mkdir(exist_ok=True)
    (fake / "outrider").write_text('#!/bin/sh\necho "$@" >> "$OUTRIDER_CACHE/calls"\n')
    # Nothing is waited for here: whoever would wait fails instead.
    (fake / "sleep").write_text("#!/bin/sh\nexit 3\n")
    for file in fake.iterdir():
        file.chmod(0o755)
    environment = {"PATH": f"{fake}:{os.environ['PATH']}", "OUTRIDER_CACHE": str(folder)}
    return subprocess.run(
        ["sh", str(SCRIPT), command],
        env=environment | models,
        capture_output=True,
        text=True,
        check=False,
        timeout=20,
    )


def test_models_are_fetched_once_asked_for_and_then_found(tmp_path: Path) -> None:
    models = {"OUTRIDER_VERIFIER_MODEL": "Qwen/Qwen3-8B", "OUTRIDER_DRAFTER_MODEL": "smollm2"}
    waiting = run_script(tmp_path, "wait", **models)
    assert waiting.returncode == 3
    assert "waiting for model 'Qwen/Qwen3-8B'" in waiting.stdout
    assert run_script(tmp_path, "fetch", **models).returncode == 0
    assert (tmp_path / "calls").read_text() == "fetch Qwen/Qwen3-8B\nfetch smollm2\n"
    assert run_script(tmp_path, "wait", **models).returncode == 0
    other = {"OUTRIDER_VERIFIER_MODEL": "Qwen/Qwen3-4B"}
    assert run_script(tmp_path, "wait", **other).returncode == 3


@pytest.mark.parametrize("model", ["", "synthetic:a?step=1:22", "random:tiny", "/models/mine"])
def test_what_needs_no_fetching_is_not_waited_for(tmp_path: Path, model: str) -> None:
    for command in ("fetch", "wait"):
        done = run_script(tmp_path, command, OUTRIDER_VERIFIER_MODEL=model)
        assert done.returncode == 0, done.stderr
    assert not (tmp_path / "calls").exists()


def test_a_model_that_cannot_be_fetched_is_not_said_to_be_there(tmp_path: Path) -> None:
    # The fake writes into its cache, and there is none.
    missing = tmp_path / "none"
    done = run_script(
        tmp_path, "fetch", OUTRIDER_VERIFIER_MODEL="smollm2", OUTRIDER_CACHE=str(missing)
    )
    assert done.returncode != 0
    assert not missing.exists()
