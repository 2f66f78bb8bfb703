"""Every overlay renders, and is what an API server accepts, old or new."""

from __future__ import annotations

from collections import Counter

import jsonschema
import pytest

from tests.support.manifests import OVERLAYS, resources

OLDEST, NEWEST = "1.30", "1.37"
"""`preStop.sleep`, which everything waits with, is there since 1.30."""

_STRING = {"type": "string", "minLength": 1}
_KEY = {
    "type": "object",
    "properties": {"name": _STRING, "key": _STRING},
    "required": ["name", "key"],
    "additionalProperties": False,
}
_LABELS = {"type": "object", "additionalProperties": _STRING}
_POLICIES = {
    "type": "array",
    "minItems": 1,
    "items": {
        "type": "object",
        "properties": {
            "type": {"enum": ["Pods", "Percent"]},
            "value": {"type": "integer", "minimum": 1},
            "periodSeconds": {"type": "integer", "minimum": 1, "maximum": 1800},
        },
        "required": ["type", "value", "periodSeconds"],
        "additionalProperties": False,
    },
}
_RULES = {
    "type": "object",
    "properties": {
        "stabilizationWindowSeconds": {"type": "integer", "minimum": 0, "maximum": 3600},
        "policies": _POLICIES,
    },
    "additionalProperties": False,
}
_COUNT = {"type": "integer", "minimum": 0}
CUSTOM = {
    "ScaledObject": {
        "type": "object",
        "properties": {
            "scaleTargetRef": {
                "type": "object",
                "properties": {"apiVersion": _STRING, "kind": _STRING, "name": _STRING},
                "required": ["name"],
                "additionalProperties": False,
            },
            "pollingInterval": _COUNT,
            "minReplicaCount": _COUNT,
            "maxReplicaCount": _COUNT,
            "fallback": {
                "type": "object",
                "properties": {
                    "failureThreshold": _COUNT,
                    "replicas": _COUNT,
                    "behavior": {
                        "enum": [
                            "static",
                            "currentReplicas",
                            "currentReplicasIfHigher",
                            "currentReplicasIfLower",
                        ]
                    },
                },
                "required": ["failureThreshold", "replicas"],
                "additionalProperties": False,
            },
            "advanced": {
                "type": "object",
                "properties": {
                    "horizontalPodAutoscalerConfig": {
                        "type": "object",
                        "properties": {
                            "behavior": {
                                "type": "object",
                                "properties": {"scaleUp": _RULES, "scaleDown": _RULES},
                                "additionalProperties": False,
                            }
                        },
                        "additionalProperties": False,
                    }
                },
                "additionalProperties": False,
            },
            "triggers": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {
                        "type": {"const": "prometheus"},
                        "metricType": {"enum": ["AverageValue", "Value"]},
                        "metadata": {
                            "type": "object",
                            "properties": {
                                "serverAddress": _STRING,
                                "query": _STRING,
                                "threshold": {"type": "string", "pattern": r"^[0-9.]+$"},
                            },
                            "required": ["serverAddress", "query", "threshold"],
                            "additionalProperties": False,
                        },
                    },
                    "required": ["type", "metricType", "metadata"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["scaleTargetRef", "triggers"],
        "additionalProperties": False,
    },
    "ServiceMonitor": {
        "type": "object",
        "properties": {
            "selector": {
                "type": "object",
                "properties": {"matchLabels": _LABELS},
                "additionalProperties": False,
            },
            "endpoints": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {
                        "port": _STRING,
                        "path": _STRING,
                        "interval": _STRING,
                        "scheme": {"enum": ["http", "https"]},
                        "authorization": {
                            "type": "object",
                            "properties": {"type": _STRING, "credentials": _KEY},
                            "additionalProperties": False,
                        },
                        "tlsConfig": {
                            "type": "object",
                            "properties": {
                                "serverName": _STRING,
                                "ca": {
                                    "type": "object",
                                    "properties": {"secret": _KEY, "configMap": _KEY},
                                    "additionalProperties": False,
                                },
                            },
                            "additionalProperties": False,
                        },
                    },
                    "required": ["port"],
                    "additionalProperties": False,
                },
            },
        },
        "required": ["selector", "endpoints"],
        "additionalProperties": False,
    },
    "PrometheusRule": {
        "type": "object",
        "properties": {
            "groups": {
                "type": "array",
                "minItems": 1,
                "items": {
                    "type": "object",
                    "properties": {
                        "name": _STRING,
                        "rules": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "properties": {
                                    "alert": _STRING,
                                    "expr": _STRING,
                                    "for": {"type": "string", "pattern": "^[0-9]+[smh]$"},
                                    "labels": _LABELS,
                                    "annotations": _LABELS,
                                },
                                "required": ["alert", "expr", "for", "labels", "annotations"],
                                "additionalProperties": False,
                            },
                        },
                    },
                    "required": ["name", "rules"],
                    "additionalProperties": False,
                },
            }
        },
        "required": ["groups"],
        "additionalProperties": False,
    },
}
"""What is used of the Prometheus operator's kinds and of KEDA's: no Kubernetes schema has them."""


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_api_server_would_accept_it(overlay: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip(
        "kubernetes_validate", reason="kubernetes-validate is not installed"
    )
    found = resources(overlay)
    assert found
    for resource in found:
        if resource["kind"] in CUSTOM:
            jsonschema.validate(resource["spec"], CUSTOM[resource["kind"]])
        else:
            kubernetes_validate.validate(resource, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_all_is_in_one_namespace_and_named_once(overlay: str) -> None:
    names = Counter((each["kind"], each["metadata"]["name"]) for each in resources(overlay))
    assert [name for name, count in names.items() if count > 1] == []
    for resource in resources(overlay):
        if resource["kind"] not in ("Namespace", "PriorityClass"):
            assert resource["metadata"]["namespace"] == "outrider", resource["metadata"]["name"]


def test_production_uses_the_redis_of_others() -> None:
    kinds = ("Deployment", "Service", "ServiceAccount", "NetworkPolicy", "PodDisruptionBudget")
    assert "outrider-redis" in {each["metadata"]["name"] for each in resources("gpu", *kinds)}
    names = {each["metadata"]["name"] for each in resources("production", *kinds)}
    assert "outrider-redis" not in names
    assert "outrider-to-external-redis" in names
