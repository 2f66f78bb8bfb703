"""Who may reach whom, worked out from the network policies as a cluster would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.support.manifests import OVERLAYS, Resource, resources, selects, workloads

pytestmark = pytest.mark.parametrize("overlay", OVERLAYS)

STRANGER: Mapping[str, str] = {"app.kubernetes.io/name": "somebody"}
CLIENT: Mapping[str, str] = {"outrider/client": "true"}


def test_every_pod_is_closed_both_ways(overlay: str) -> None:
    for workload in workloads(overlay):
        directions = {
            direction
            for policy in _policies(overlay, workload.labels)
            for direction in policy["spec"]["policyTypes"]
        }
        assert directions == {"Ingress", "Egress"}, workload.name


def test_every_port_is_covered_by_a_policy_and_no_policy_is_idle(overlay: str) -> None:
    found = workloads(overlay)
    for workload in found:
        opened = {
            port["port"]
            for policy in _policies(overlay, workload.labels)
            for rule in policy["spec"].get("ingress", [])
            for port in rule["ports"]
        }
        listening = {
            port["containerPort"]
            for container in workload.containers
            for port in container.get("ports", [])
        }
        assert opened == listening, workload.name
    for policy in resources(overlay, "NetworkPolicy"):
        assert any(selects(policy["spec"]["podSelector"], one.labels) for one in found)


@pytest.mark.parametrize(
    ("role", "port", "callers"),
    [("verifier", 7000, {"orchestrator", "verifier"}), ("drafter", 7001, {"orchestrator"})],
)
def test_who_reaches_workers(overlay: str, role: str, port: int, callers: set[str]) -> None:
    labels = {one.labels["app.kubernetes.io/component"]: one.labels for one in workloads(overlay)}
    for name, source in {**labels, "stranger": STRANGER, "client": CLIENT}.items():
        may = _may_enter(overlay, source, labels[role], port)
        assert may is (name in callers), f"{name} to {role}"
        if name in labels:
            assert _may_leave(overlay, source, labels[role], port) is may, f"{name} to {role}"


def test_only_ours_reach_redis(overlay: str) -> None:
    labels = {one.labels["app.kubernetes.io/component"]: one.labels for one in workloads(overlay)}
    if "redis" not in labels:
        pytest.skip("this Redis is run elsewhere")
    for name, source in {**labels, "stranger": STRANGER, "client": CLIENT}.items():
        ours = name in ("orchestrator", "verifier", "drafter")
        assert _may_enter(overlay, source, labels["redis"], 6379) is ours, name
        if name in labels:
            assert _may_leave(overlay, source, labels["redis"], 6379) is ours, name


def test_the_doors(overlay: str) -> None:
    (door,) = [one.labels for one in workloads(overlay) if one.name == "outrider-orchestrator"]
    assert _may_enter(overlay, STRANGER, door, 8080)
    assert not _may_enter(overlay, STRANGER, door, 50050)
    assert _may_enter(overlay, CLIENT, door, 50050)


def test_the_controller_reaches_orchestrators_and_nobody_of_ours_else(overlay: str) -> None:
    labels = {one.labels["app.kubernetes.io/component"]: one.labels for one in workloads(overlay)}
    if "controller" not in labels:
        pytest.skip("no controller here")
    assert _may_leave(overlay, labels["controller"], labels["orchestrator"], 8080)
    assert _may_enter(overlay, labels["controller"], labels["orchestrator"], 8080)
    for role, port in (("verifier", 7000), ("drafter", 7001), ("orchestrator", 50050)):
        assert not _may_leave(overlay, labels["controller"], labels[role], port), role
    prometheus = {"app.kubernetes.io/name": "prometheus"}
    assert _may_enter(overlay, prometheus, labels["controller"], 8081)
    assert not _may_enter(overlay, STRANGER, labels["controller"], 8081)


def test_only_the_job_gets_out(overlay: str) -> None:
    for workload in workloads(overlay):
        rules = [
            rule
            for policy in _policies(overlay, workload.labels)
            for rule in policy["spec"].get("egress", [])
            if any("ipBlock" in peer for peer in rule["to"])
        ]
        if workload.kind == "Job":
            assert [rule["ports"] for rule in rules] == [[{"port": 443, "protocol": "TCP"}]]
            assert "169.254.0.0/16" in rules[0]["to"][0]["ipBlock"]["except"]
        else:
            ports = sorted(each["port"] for rule in rules for each in rule["ports"])
            assert {peer["ipBlock"]["cidr"] for rule in rules for peer in rule["to"]} <= {
                "10.0.0.0/8"
            }
            # The API server's, for those that have a token, and a Redis that is run elsewhere.
            api = [443, 6443] if workload.pod["automountServiceAccountToken"] else []
            redis = workload.name != "outrider-controller" and overlay == "production"
            assert ports == sorted(api + [6379] * redis), workload.name


def _policies(overlay: str, labels: Mapping[str, str]) -> list[Resource]:
    return [
        policy
        for policy in resources(overlay, "NetworkPolicy")
        if selects(policy["spec"]["podSelector"], labels)
    ]


def _may_enter(
    overlay: str, source: Mapping[str, str], target: Mapping[str, str], port: int
) -> bool:
    return _allowed(overlay, "ingress", "from", at=target, other=source, port=port)


def _may_leave(
    overlay: str, source: Mapping[str, str], target: Mapping[str, str], port: int
) -> bool:
    return _allowed(overlay, "egress", "to", at=source, other=target, port=port)


def _allowed(
    overlay: str,
    direction: str,
    peers: str,
    *,
    at: Mapping[str, str],
    other: Mapping[str, str],
    port: int,
) -> bool:
    policies = _policies(overlay, at)
    if not any(direction.capitalize() in policy["spec"]["policyTypes"] for policy in policies):
        return True
    return any(
        port in [each["port"] for each in rule["ports"]]
        and (peers not in rule or any(_is_peer(peer, other) for peer in rule[peers]))
        for policy in policies
        for rule in policy["spec"].get(direction, [])
    )


def _is_peer(peer: dict[str, Any], labels: Mapping[str, str]) -> bool:
    """True for a pod with these labels; whatever namespace a peer may be in, it is in that."""
    return "podSelector" in peer and selects(peer["podSelector"], labels)
