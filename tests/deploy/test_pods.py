"""What must hold for every pod that an overlay makes."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.manifests import (
    KUBERNETES,
    OVERLAYS,
    ROOT,
    Resource,
    environment,
    named,
    quantity,
    rendered_text,
    resources,
    selects,
    strings,
    workloads,
)

SERVICES = ("verifier", "drafter", "orchestrator")
DRAIN_DEFAULT_S = 10.0
(OPEN,) = re.findall(r"^_OPEN = (.*)$", (ROOT / "orchestrator/http/app.py").read_text(), re.M)
"""Routes that need no key. Read off the source, as imports take seconds."""

pytestmark = pytest.mark.parametrize("overlay", OVERLAYS)


def test_containers_can_do_nothing_but_their_work(overlay: str) -> None:
    for workload in workloads(overlay):
        pod = workload.pod["securityContext"]
        assert pod["runAsNonRoot"] is True
        assert pod["runAsUser"] > 0
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in workload.all_containers:
            place = f"{workload.name}/{container['name']}"
            own = container["securityContext"]
            assert own["readOnlyRootFilesystem"] is True, place
            assert own["allowPrivilegeEscalation"] is False, place
            assert own["capabilities"] == {"drop": ["ALL"]}, place
            assert not own.get("privileged"), place
            assert "runAsUser" not in own, place
        for forbidden in ("hostNetwork", "hostPID", "hostIPC"):
            assert not workload.pod.get(forbidden)
        assert not [volume for volume in workload.pod.get("volumes", []) if "hostPath" in volume]


def test_every_container_is_bounded(overlay: str) -> None:
    for workload in workloads(overlay):
        for container in workload.all_containers:
            place = f"{workload.name}/{container['name']}"
            limits = container["resources"]["limits"]
            requests = container["resources"]["requests"]
            for resource in ("cpu", "memory"):
                assert quantity(requests[resource]) <= quantity(limits[resource]), place
            gpus = "nvidia.com/gpu"
            assert requests.get(gpus) == limits.get(gpus), place
        for volume in workload.pod.get("volumes", []):
            if "emptyDir" in volume:
                assert "sizeLimit" in volume["emptyDir"], f"{workload.name}/{volume['name']}"


def test_what_stays_has_all_three_probes(overlay: str) -> None:
    for workload in workloads(overlay, "Deployment", "StatefulSet"):
        for container in workload.containers:
            ports = {port["name"]: port["containerPort"] for port in container["ports"]}
            for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
                place = f"{workload.name}/{container['name']} {probe}"
                how = container[probe]
                assert len({"grpc", "httpGet", "exec", "tcpSocket"} & how.keys()) == 1, place
                port = how.get("grpc", how.get("httpGet", how.get("tcpSocket", {}))).get("port")
                assert port is None or port in ports or port in ports.values(), place
            # A worker that computes is late, not dead.
            assert container["livenessProbe"]["failureThreshold"] >= 3


def test_probes_speak_as_the_services_do(overlay: str) -> None:
    """The kubelet's gRPC probe knows no TLS; and the names are those that services register."""
    for role in ("verifier", "drafter"):
        names = _registered(role)
        container = _service(overlay, role)
        encrypted = "OUTRIDER_TLS_CERT" in environment(overlay, container)
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            how = container[probe]
            assert ("exec" if encrypted else "grpc") in how, f"{role} {probe}"
            words = (
                how["exec"]["command"]
                if encrypted
                else [f"--port={how['grpc']['port']}", f"--service={how['grpc'].get('service')}"]
            )
            assert f"--port={container['ports'][0]['containerPort']}" in words
            asked = {word.removeprefix("--service=") for word in words if "--service=" in word}
            if probe == "livenessProbe":
                assert asked <= {"None"}, "a worker that drains must not be killed for it"
            else:
                assert asked <= set(names), f"{role} {probe}"
                assert asked
    container = _service(overlay, "orchestrator")
    encrypted = "OUTRIDER_ORCHESTRATOR_HTTP_CERTIFICATE" in environment(overlay, container)
    for probe, path in (
        ("startupProbe", "/health/live"),
        ("readinessProbe", "/health/ready"),
        ("livenessProbe", "/health/live"),
    ):
        asked_for = container[probe]["httpGet"]
        assert asked_for["path"] == path
        assert f'"{path}"' in OPEN, "a probe has no API key"
        assert (asked_for.get("scheme", "HTTP") == "HTTPS") is encrypted


def test_drain_fits_into_grace(overlay: str) -> None:
    for workload in workloads(overlay, "Deployment", "StatefulSet"):
        role = workload.labels["app.kubernetes.io/component"]
        container = workload.containers[0]
        drain_s = 0.0
        if role in SERVICES:
            settings = environment(overlay, container)
            drain_s = float(settings.get(f"OUTRIDER_{role.upper()}_DRAIN_S", DRAIN_DEFAULT_S))
        hook = container.get("lifecycle", {}).get("preStop", {})
        before_s = hook.get("sleep", {}).get("seconds", 0)
        assert hook.keys() <= {"sleep"}
        grace_s = workload.pod["terminationGracePeriodSeconds"]
        # A moment more: streams are closed, and the model's memory is given back.
        assert grace_s >= before_s + drain_s + 5, workload.name
        for word in container.get("command", []):
            if word.startswith("--shutdown-timeout="):
                assert drain_s < float(word.partition("=")[2]) < grace_s - before_s


def test_only_who_needs_one_gets_a_token(overlay: str) -> None:
    assert resources(overlay, "ClusterRole", "ClusterRoleBinding") == []
    bound = {
        subject["name"]
        for binding in resources(overlay, "RoleBinding")
        for subject in binding["subjects"]
    }
    with_api = {"outrider-controller", "outrider-orchestrator"}
    assert bound == (with_api if overlay == "production" else set())
    for workload in workloads(overlay):
        account = workload.pod["serviceAccountName"]
        assert workload.pod["automountServiceAccountToken"] is (account in bound)
        # Said by the pod, so that nothing else that runs under the account has one.
        made = named(overlay, "ServiceAccount", account)
        assert made["automountServiceAccountToken"] is False


def test_roles_are_the_least(overlay: str) -> None:
    """Only what is ours by name, and nothing that reads Secrets."""
    scaled = {one.name for one in workloads(overlay, "Deployment", "StatefulSet")}
    for role in resources(overlay, "Role"):
        for rule in role["rules"]:
            assert "*" not in {*rule["verbs"], *rule["apiGroups"], *rule["resources"]}
            assert not {"secrets", "pods", "configmaps"} & set(rule["resources"])
            if {"update", "patch", "delete"} & set(rule["verbs"]):
                assert rule["resourceNames"], "only objects of ours"
            if rule["apiGroups"] == ["apps"]:
                assert set(rule["resourceNames"]) <= scaled
                assert all(each.endswith("/scale") for each in rule["resources"])
    for binding in resources(overlay, "RoleBinding"):
        for subject in binding["subjects"]:
            named(overlay, "ServiceAccount", subject["name"])
            assert subject["namespace"] == "outrider"


def test_replicas_are_left_to_whoever_sizes_the_fleets(overlay: str) -> None:
    """Else each apply would set them back."""
    sized = {each["spec"]["scaleTargetRef"]["name"] for each in resources(overlay, "ScaledObject")}
    for workload in workloads(overlay, "Deployment"):
        if workload.name == "outrider-controller":
            sized |= {"outrider-orchestrator", "outrider-verifier", "outrider-drafter"}
    for workload in workloads(overlay, "Deployment", "StatefulSet"):
        assert ("replicas" not in workload.resource["spec"]) is (workload.name in sized)


def test_services_variables_are_not_taken_for_options(overlay: str) -> None:
    for workload in workloads(overlay):
        assert workload.pod["enableServiceLinks"] is False, workload.name


def test_selectors_match(overlay: str) -> None:
    found = workloads(overlay)
    for workload in workloads(overlay, "Deployment", "StatefulSet"):
        selector = workload.resource["spec"]["selector"]
        assert selects(selector, workload.labels)
        others = [other for other in found if other.name != workload.name]
        assert not [other.name for other in others if selects(selector, other.labels)]
        for constraint in workload.pod.get("topologySpreadConstraints", []):
            assert constraint["labelSelector"] == selector
        budgets = [
            each
            for each in resources(overlay, "PodDisruptionBudget")
            if selects(each["spec"]["selector"], workload.labels)
        ]
        assert len(budgets) == 1, workload.name
    for service in resources(overlay, "Service"):
        picked = [
            one
            for one in found
            if selects({"matchLabels": service["spec"]["selector"]}, one.labels)
        ]
        assert len(picked) == 1, service["metadata"]["name"]
        names = {port["name"] for each in picked[0].containers for port in each["ports"]}
        for port in service["spec"]["ports"]:
            assert port["targetPort"] in names
    for monitor in resources(overlay, "ServiceMonitor"):
        services = [
            each
            for each in resources(overlay, "Service")
            if selects(monitor["spec"]["selector"], each["metadata"].get("labels", {}))
        ]
        assert len(services) == 1
        ports = {port["name"] for port in services[0]["spec"]["ports"]}
        assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} <= ports


def test_all_that_is_named_is_there_or_documented(overlay: str) -> None:
    guide = (KUBERNETES.parents[1] / "docs" / "kubernetes.md").read_text()
    made = {each["metadata"]["name"] for each in resources(overlay, "Secret")}
    for workload in workloads(overlay):
        if "priorityClassName" in workload.pod:
            named(overlay, "PriorityClass", workload.pod["priorityClassName"])
        volumes = workload.pod.get("volumes", [])
        for container in workload.all_containers:
            mounted = {mount["name"] for mount in container.get("volumeMounts", [])}
            assert mounted <= {volume["name"] for volume in volumes}
        for volume in volumes:
            if "persistentVolumeClaim" in volume:
                claim = volume["persistentVolumeClaim"]["claimName"]
                named(overlay, "PersistentVolumeClaim", claim)
        secrets = {volume["secret"]["secretName"] for volume in volumes if "secret" in volume}
        for container in workload.all_containers:
            for entry in container.get("env", []):
                reference = entry.get("valueFrom", {}).get("secretKeyRef")
                if reference is not None:
                    secrets.add(reference["name"])
        for secret in secrets - made:
            assert f"`{secret}`" in guide, f"{secret} is needed and nobody says how to make it"


def test_images_are_pinned(overlay: str) -> None:
    import outrider

    for workload in workloads(overlay):
        for container in workload.all_containers:
            name, _, tag = container["image"].rpartition(":")
            assert name, container["image"]
            assert tag != "latest"
            if name.startswith("outrider/"):
                assert tag.split("-")[0] == outrider.__version__


def test_services_are_told_apart_by_pools_where_there_are_gpus(overlay: str) -> None:
    if "nvidia.com/gpu" not in rendered_text(overlay):
        pytest.skip("no GPUs here")
    for role in ("verifier", "drafter"):
        (workload,) = [one for one in workloads(overlay) if one.name == f"outrider-{role}"]
        wanted = set(strings(workload.pod["affinity"]))
        assert {"outrider/pool", role} <= wanted
        tolerated = {each["key"] for each in workload.pod["tolerations"]}
        assert tolerated == {"outrider/pool", "nvidia.com/gpu"}


def test_the_local_overlay_fits_two_cores_and_4_gib(overlay: str) -> None:
    if overlay != "local":
        pytest.skip("larger machines")
    cpu = memory = 0.0
    for workload in workloads(overlay, "Deployment", "StatefulSet"):
        for container in workload.containers:
            replicas = workload.resource["spec"]["replicas"]
            cpu += quantity(container["resources"]["requests"]["cpu"]) * replicas
            memory += quantity(container["resources"]["limits"]["memory"]) * replicas
    assert cpu <= 1.5, "the cluster's own pods want something, too"
    assert memory <= 3.25 * 2**30
    (job,) = workloads(overlay, "Job")
    # The verifier waits for the job, so its memory is free meanwhile.
    verifier = _service(overlay, "verifier")
    limit = quantity(job.containers[0]["resources"]["limits"]["memory"])
    assert limit <= quantity(verifier["resources"]["limits"]["memory"])


def _registered(role: str) -> set[str]:
    """Names under which a worker reports its health; importing it would load torch."""
    source = (ROOT / f"{role}_service" / "service.py").read_text()
    (names,) = re.findall(r"^SERVICE_NAMES = (\(.*?\))$", source, re.M | re.S)
    return set(ast.literal_eval(names))


def _service(overlay: str, role: str) -> Resource:
    (workload,) = [one for one in workloads(overlay) if one.name == f"outrider-{role}"]
    (container,) = workload.containers
    return container
