"""An overlay's pods as real containers, played by podman where a cluster is missing.

What podman does not know is done here, as a cluster would: names of Services (by their selectors),
variables from Secrets and from the pod itself, and what the kubelet asks by probes.
"""

from __future__ import annotations

import base64
import copy
import ipaddress
import json
import secrets
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import yaml

from tests.support.manifests import (
    Resource,
    Workload,
    environment,
    named,
    resources,
    selects,
    workloads,
)

ORDER_S = 120.0
"""What a single order to podman may take."""
_ASKED_BY_US = ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle")
_PROBE = """
import json, socket, sys, urllib.request
from outrider.serving.probe import check
host, probe = sys.argv[1], json.loads(sys.argv[2])
if "grpc" in probe:
    how = probe["grpc"]
    sys.exit(check(f"{host}:{how['port']}", how.get("service", ""), None, 5.0))
elif "httpGet" in probe:
    how = probe["httpGet"]
    urllib.request.urlopen(f"http://{host}:{how['port']}{how['path']}", timeout=5).close()
else:
    socket.create_connection((host, probe["tcpSocket"]["port"]), timeout=5).close()
"""


def podman(
    *arguments: str, text: str | None = None, check: bool = True
) -> subprocess.CompletedProcess[str]:
    """Give podman an order; skips the test where it is not installed."""
    command = shutil.which("podman")
    if command is None:
        pytest.skip("podman is not installed; with it, `make image-test` runs this")
    done = subprocess.run(
        [command, *arguments],
        input=text,
        capture_output=True,
        text=True,
        check=False,
        timeout=ORDER_S,
    )
    assert not check or done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
    return done


def need_images(overlay: str) -> None:
    """Skip the test unless all images of an overlay are here, or can be had."""
    for name in sorted(
        {c["image"] for workload in workloads(overlay) for c in workload.all_containers}
    ):
        if podman("image", "exists", name, check=False).returncode == 0:
            continue
        if name.startswith("outrider/"):
            pytest.skip(f"image {name} is not built: make images BUILDER=podman")
        if podman("pull", "--quiet", name, check=False).returncode != 0:
            pytest.skip(f"image {name} is not here and cannot be pulled")


@dataclass
class Played:
    """A pod that podman runs."""

    workload: Workload
    pod: str
    address: str

    def container(self, name: str | None = None) -> str:
        """Name of a container, of the first one unless said otherwise."""
        return f"{self.pod}-{name or self.workload.containers[0]['name']}"


@dataclass
class Containers:
    """An overlay on this machine."""

    overlay: str
    settings: Mapping[str, str]
    """Variables that are other than the overlay has them."""
    pods: dict[str, Played] = field(default_factory=dict)
    """By component."""
    token: str = field(default_factory=lambda: secrets.token_hex(3))
    _addresses: Iterator[Any] = field(init=False)

    def __post_init__(self) -> None:
        podman("network", "create", self.network)
        (described,) = json.loads(podman("network", "inspect", self.network).stdout)
        hosts = ipaddress.ip_network(described["subnets"][0]["subnet"]).hosts()
        self._addresses = (host for number, host in enumerate(hosts) if number >= 9)
        for workload in workloads(self.overlay):
            component = workload.labels["app.kubernetes.io/component"]
            pod = f"{workload.name}-{self.token}"
            self.pods[component] = Played(workload, pod, str(next(self._addresses)))

    @property
    def network(self) -> str:
        return f"outrider-{self.token}"

    @property
    def client(self) -> str:
        """A container that knows the Services' names, and has the client library."""
        return f"outrider-client-{self.token}"

    def hosts(self) -> dict[str, str]:
        """Addresses of Services: of the pod that each selects."""
        return {
            service["metadata"]["name"]: played.address
            for service in resources(self.overlay, "Service")
            for played in self.pods.values()
            if selects({"matchLabels": service["spec"]["selector"]}, played.workload.labels)
        }

    def prepare(self) -> None:
        """Make the volumes, and start what asks."""
        podman("play", "kube", "-", text=yaml.safe_dump_all(self._claims()))
        image = self.pods["orchestrator"].workload.containers[0]["image"]
        names = [f"--add-host={name}:{address}" for name, address in self.hosts().items()]
        at = ("--network", self.network, *names, "--entrypoint", "sleep")
        podman("run", "--detach", "--no-healthcheck", "--name", self.client, *at, image, "infinity")

    def play(self, component: str) -> None:
        """Run a component's pod."""
        played = self.pods[component]
        at = f"{self.network}:ip={played.address}"
        podman("play", "kube", "--network", at, "-", text=yaml.safe_dump(self._pod(played)))

    def wait_for(self, component: str, probe: str, within_s: float) -> None:
        """Ask by a probe until it is answered well, as the kubelet does."""
        deadline_s = time.monotonic() + within_s
        while (fault := self.ask(component, probe)) is not None:
            played = self.pods[component]
            assert time.monotonic() < deadline_s, f"{component}, {probe}: {fault}\n" + self.logs(
                component
            )
            assert self.state(played)["Running"], self.logs(component)

    def ask(self, component: str, probe: str) -> str | None:
        """Ask by a probe; returns what is wrong."""
        played = self.pods[component]
        container = played.workload.containers[0]
        how = container[probe]
        if "exec" in how:
            command = [played.container(), *how["exec"]["command"]]
        else:
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            (kind,) = {"grpc", "httpGet", "tcpSocket"} & how.keys()
            port = ports.get(how[kind]["port"], how[kind]["port"])
            told = json.dumps({kind: how[kind] | {"port": port}})
            command = [self.client, "python", "-c", _PROBE, played.address, told]
        done = podman("exec", *command, check=False)
        return None if done.returncode == 0 else done.stderr.strip()[-500:] or "no answer"

    def run(self, *command: str, text: str | None = None) -> str:
        """Run a command beside the fleet; returns what it says."""
        return podman("exec", "--interactive", self.client, *command, text=text).stdout

    def state(self, played: Played) -> dict[str, Any]:
        (found,) = json.loads(podman("inspect", played.container()).stdout)
        state: dict[str, Any] = found["State"]
        return state

    def logs(self, component: str) -> str:
        """The end of what a pod has written."""
        played = self.pods[component]
        done = podman("logs", "--tail", "40", played.container(), check=False)
        return done.stdout + done.stderr

    def remove(self) -> None:
        """Leave nothing behind."""
        podman("rm", "--force", "--time", "0", self.client, check=False)
        for played in self.pods.values():
            podman("pod", "rm", "--force", played.pod, check=False)
        for claim in self._claims():
            podman("volume", "rm", "--force", claim["metadata"]["name"], check=False)
        podman("network", "rm", "--force", self.network, check=False)

    def _claims(self) -> list[Resource]:
        """Volumes of this run's own."""
        claims = copy.deepcopy(resources(self.overlay, "PersistentVolumeClaim"))
        for claim in claims:
            claim["metadata"]["name"] += f"-{self.token}"
        return claims

    def _pod(self, played: Played) -> Resource:
        spec = copy.deepcopy(played.workload.pod)
        for container in [*spec.get("initContainers", []), *spec["containers"]]:
            for asked in _ASKED_BY_US:
                container.pop(asked, None)
            values = self._environment(played, container)
            container.pop("envFrom", None)
            container["env"] = [{"name": k, "value": v} for k, v in values.items()]
            for part in ("command", "args"):
                container[part] = [_expanded(word, values) for word in container.get(part, [])]
        for volume in spec.get("volumes", []):
            if "persistentVolumeClaim" in volume:
                volume["persistentVolumeClaim"]["claimName"] += f"-{self.token}"
        names = [{"ip": ip, "hostnames": [name]} for name, ip in self.hosts().items()]
        metadata = {
            "name": played.pod,
            "labels": dict(played.workload.labels),
            # Else podman removes init containers that have ended, and sometimes before they have.
            "annotations": {"io.podman.annotations.init.container.type": "always"},
        }
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata}
        return pod | {"spec": spec | {"hostAliases": names}}

    def _environment(self, played: Played, container: Resource) -> dict[str, str]:
        """A container's variables with their values; podman lets ConfigMaps win, not pods."""
        of_pod = {"metadata.name": played.workload.name, "status.podIP": played.address}
        values = environment(self.overlay, container)
        for entry in container.get("env", []):
            match entry:
                case {"value": value}:
                    values[entry["name"]] = _expanded(value, values)
                case {"valueFrom": {"fieldRef": {"fieldPath": path}}}:
                    values[entry["name"]] = of_pod[path]
                case {"valueFrom": {"secretKeyRef": {"optional": True}}}:
                    del values[entry["name"]]
                case {"valueFrom": {"secretKeyRef": {"name": name, "key": key}}}:
                    values[entry["name"]] = _secret(self.overlay, name, key)
        return values | self.settings


@contextmanager
def containers(overlay: str, settings: Mapping[str, str]) -> Iterator[Containers]:
    """Prepare an overlay's network and names, and remove everything in the end."""
    need_images(overlay)
    made = Containers(overlay, settings)
    try:
        made.prepare()
        yield made
    finally:
        made.remove()


def _secret(overlay: str, name: str, key: str) -> str:
    found = named(overlay, "Secret", name)
    return base64.b64decode(found["data"][key]).decode()


def _expanded(text: str, values: Mapping[str, str]) -> str:
    for name, value in values.items():
        text = text.replace(f"$({name})", value)
    return text
