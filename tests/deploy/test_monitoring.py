"""What dashboards and alerts name is what an orchestrator exports."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
import yaml

from orchestrator.config import DriverConfig
from orchestrator.driver import OUTCOMES, Driver
from orchestrator.fleet import Fleet
from orchestrator.http.metrics import NAMES, PREFIX, Exposition
from orchestrator.scaling import reading
from orchestrator.workers import LinkState
from outrider.domain import FinishReason
from tests.support.manifests import KUBERNETES, ROOT, resources

DASHBOARDS = ROOT / "deploy" / "dashboards"
ADAPTER = KUBERNETES / "components" / "hpa" / "adapter.yaml"
ADDED = {"namespace", "le"}
"""Labels that Prometheus' operator puts on, and those of histograms."""
_METRIC = re.compile(r"\boutrider_[a-z_]+")
_SELECTED = re.compile(r"\b(outrider_[a-z_]+)\{([^}]*)\}")
_GROUPED = re.compile(r"\bby \(([^)]*)\)")


def rules() -> list[dict[str, object]]:
    document = yaml.safe_load((DASHBOARDS / "alerts.yaml").read_text())
    return [rule for group in document["spec"]["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Everything that is asked of Prometheus, with where it stands."""
    for rule in rules():
        yield str(rule["alert"]), str(rule["expr"])
    for panel in json.loads((DASHBOARDS / "outrider.json").read_text())["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for scaled in resources("keda", "ScaledObject"):
        for trigger in scaled["spec"]["triggers"]:
            yield scaled["metadata"]["name"], trigger["metadata"]["query"]
    for rule in yaml.safe_load(ADAPTER.read_text())["rules"]["external"]:
        yield rule["name"]["as"], rule["seriesQuery"]
        # Which the adapter puts the namespace into.
        yield rule["name"]["as"], rule["metricsQuery"].replace("<<.LabelMatchers>>", "namespace=''")


async def exported() -> dict[str, set[str]]:
    """Series of an orchestrator, with the labels they have."""
    fleet = Fleet("test", verifiers=(), drafters=(), worker_timeout_s=5.0, tls=None)
    driver = Driver(fleet, DriverConfig())
    try:
        series: dict[str, set[str]] = {}
        for family in Exposition(driver, fleet, {}, vllm_names=False).collect():
            labels = set(getattr(family, "_labelnames", ()))
            match family.type:
                case "histogram":
                    endings: tuple[str, ...] = ("_bucket", "_sum", "_count")
                case "counter":
                    endings = ("_total",)
                case _:
                    endings = ("",)
            series |= {family.name + ending: labels for ending in endings}
        return series
    finally:
        await driver.close()


async def test_every_metric_and_label_that_is_asked_for_is_exported() -> None:
    series = await exported()
    assert {name.removeprefix(PREFIX) for name in series} >= {
        name for name in NAMES if not name.endswith("_seconds")
    }
    used: set[str] = set()
    for place, expression in expressions():
        names = set(_METRIC.findall(expression))
        assert names, place
        assert names <= series.keys(), f"{place}: {names - series.keys()}"
        used |= names
        labels = {label for name in names for label in series[name]} | ADDED
        for group in _GROUPED.findall(expression):
            assert {label.strip() for label in group.split(",")} <= labels, place
        for name, selector in _SELECTED.findall(expression):
            asked = set(re.findall(r"([a-z_]+)\s*(?:=~|!=|=)", selector))
            assert asked <= series[name] | ADDED, f"{place}: {name}"
    # And the fleet controller reads these.
    assert {PREFIX + name for name in reading.NAMES} <= series.keys()
    used |= {PREFIX + name for name in reading.NAMES}
    unused = series.keys() - used - {name for name in series if name.endswith(("_sum", "_count"))}
    assert not unused, f"nobody looks at {unused}"


def test_alerts_ask_for_values_that_occur() -> None:
    states = {state.value for state in LinkState} | {"refused"}
    outcomes = {*OUTCOMES.values(), *(reason.value for reason in FinishReason), "abandoned"}
    for place, expression in expressions():
        for value in re.findall(r'\bstate="([^"]*)"', expression):
            assert value in states, place
        for values in re.findall(r'\boutcome=~?"([^"]*)"', expression):
            assert set(values.split("|")) <= outcomes, place


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_every_alert_is_explained(rule: dict[str, dict[str, str]]) -> None:
    guide = (ROOT / "docs" / "kubernetes.md").read_text()
    assert f"`{rule['alert']}`" in guide
    assert rule["labels"]["severity"] in ("critical", "warning", "info")


def test_panels_do_not_overlap() -> None:
    panels = json.loads((DASHBOARDS / "outrider.json").read_text())["panels"]
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        assert place["x"] + place["w"] <= 24
        taken |= cells
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_every_metric_is_documented_by_its_question() -> None:
    guide = (ROOT / "docs" / "observability.md").read_text()
    for name, question in NAMES.items():
        assert f"| `{PREFIX}{name}` | {question} |" in guide
