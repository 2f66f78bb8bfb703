"""KEDA's ScaledObjects and plain HorizontalPodAutoscalers want the same of the same metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import yaml

from tests.support.manifests import (
    KUBERNETES,
    Resource,
    environment,
    named,
    quantity,
    resources,
    workloads,
)

ADAPTER = KUBERNETES / "components" / "hpa" / "adapter.yaml"


@dataclass(frozen=True, slots=True)
class Autoscaler:
    """What either kind says of a fleet."""

    target: Mapping[str, str]
    replicas: tuple[int, int]
    behavior: Resource
    asked: tuple[tuple[str, str, float], ...]
    """Query, what its answer means, and threshold."""


def rules() -> dict[str, Resource]:
    """The adapter's rules by the names of metrics that they make."""
    found = yaml.safe_load(ADAPTER.read_text())["rules"]["external"]
    by_name = {rule["name"]["as"]: rule for rule in found}
    assert len(by_name) == len(found)
    return by_name


def of_keda(scaled: Resource) -> Autoscaler:
    spec = scaled["spec"]
    asked = (
        (
            trigger["metadata"]["query"],
            trigger["metricType"],
            float(trigger["metadata"]["threshold"]),
        )
        for trigger in spec["triggers"]
    )
    return Autoscaler(
        spec["scaleTargetRef"],
        (spec["minReplicaCount"], spec["maxReplicaCount"]),
        spec["advanced"]["horizontalPodAutoscalerConfig"]["behavior"],
        tuple(asked),
    )


def of_hpa(autoscaler: Resource) -> Autoscaler:
    spec, made = autoscaler["spec"], rules()
    asked = []
    for metric in spec["metrics"]:
        assert metric["type"] == "External"
        target = dict(metric["external"]["target"])
        kind = target.pop("type")
        (threshold,) = target.values()
        query = made[metric["external"]["metric"]["name"]]["metricsQuery"]
        # As the adapter does for an autoscaler in our namespace.
        query = query.replace("<<.LabelMatchers>>", 'namespace="outrider"')
        asked.append((query, kind, round(quantity(threshold), 9)))
    return Autoscaler(
        spec["scaleTargetRef"],
        (spec["minReplicas"], spec["maxReplicas"]),
        spec["behavior"],
        tuple(asked),
    )


@pytest.mark.parametrize("fleet", ["verifier", "drafter", "orchestrator"])
def test_both_want_the_same(fleet: str) -> None:
    name = f"outrider-{fleet}"
    keda = of_keda(named("keda", "ScaledObject", name))
    assert of_hpa(named("hpa", "HorizontalPodAutoscaler", name)) == keda
    target = named("gpu", keda.target["kind"], keda.target["name"])
    assert keda.target["apiVersion"] == target["apiVersion"]
    # From zero nobody would measure anything.
    assert 1 <= keda.replicas[0] <= keda.replicas[1]


def test_the_adapter_makes_what_is_asked_for_and_nothing_else() -> None:
    asked = {
        metric["external"]["metric"]["name"]
        for autoscaler in resources("hpa", "HorizontalPodAutoscaler")
        for metric in autoscaler["spec"]["metrics"]
    }
    assert asked == rules().keys()
    for name, rule in rules().items():
        # Without it the adapter never discovers the metric, and with another namespace's it
        # would mix fleets.
        assert rule["seriesQuery"].partition("{")[0] in rule["metricsQuery"], name
        assert rule["resources"] == {"overrides": {"namespace": {"resource": "namespace"}}}
        assert rule["metricsQuery"].count("{") == rule["metricsQuery"].count("<<.LabelMatchers>>")


def test_thresholds_follow_what_a_verifier_takes() -> None:
    """Three quarters of the sessions that the overlay gives a verifier."""
    (verifier,) = [one for one in workloads("keda") if one.name == "outrider-verifier"]
    room = int(environment("keda", verifier.containers[0])["OUTRIDER_VERIFIER_SESSIONS_MAX"])
    sessions, *_ = of_keda(named("keda", "ScaledObject", "outrider-verifier")).asked
    assert sessions[2] == 0.75 * room
