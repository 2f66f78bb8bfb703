"""Every setting in the manifests and in compose.yaml is a real option, with a value it takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

import click
import pytest
import yaml

from drafter_service.__main__ import command as drafter
from orchestrator.__main__ import command as orchestrator
from orchestrator.cluster.__main__ import command as controller
from orchestrator.cluster.controller import HTTP_PORT
from orchestrator.cluster.discovery import COMPONENT, GRPC_PORT, SELECTOR
from tests.support.manifests import (
    OVERLAYS,
    ROOT,
    Resource,
    Workload,
    environment,
    named,
    resources,
    selects,
    workloads,
)
from verifier_service.__main__ import command as verifier

COMMANDS: Mapping[str, click.Command] = {
    "verifier": verifier,
    "drafter": drafter,
    "orchestrator": orchestrator,
}
FOREIGN = {"HF_HUB_OFFLINE", "HF_TOKEN", "POD_IP", "REDIS_PASSWORD"}
"""Read by libraries, or by the manifests themselves."""


def options(command: click.Command) -> dict[str, click.Option]:
    """Options by the variables that set them."""
    prefix = command.context_settings["auto_envvar_prefix"]
    found: dict[str, click.Option] = {}
    for parameter in command.params:
        assert isinstance(parameter, click.Option)
        assert parameter.name is not None
        envvar = parameter.envvar
        for name in [envvar] if isinstance(envvar, str) else envvar or []:
            found[name] = parameter
        found[f"{prefix}_{parameter.name.upper()}"] = parameter
    return found


def check(command: click.Command, settings: Mapping[str, str]) -> None:
    """Fail for a variable that sets nothing, or that says what its option does not take."""
    known = options(command)
    context = click.Context(command)
    for name, value in settings.items():
        if name in FOREIGN:
            continue
        assert name in known, f"{name} is no option of {command.name}"
        kind = known[name].type
        if not value:
            continue  # From a Secret or the pod itself.
        if isinstance(kind, click.Path):
            assert PurePosixPath(value).is_absolute(), name
        else:
            kind.convert(value, known[name], context)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_settings_of_services_are_options(overlay: str) -> None:
    checked = 0
    for workload in workloads(overlay, "Deployment", "StatefulSet"):
        role = workload.labels["app.kubernetes.io/component"]
        for container in workload.containers:
            if role in COMMANDS:
                check(COMMANDS[role], environment(overlay, container))
                checked += 1
    assert checked == len(COMMANDS)


def test_settings_of_the_controller_are_options() -> None:
    workload = _workload("production", "controller")
    container = _container(workload)
    assert container["command"] == ["outrider", "controller"]
    settings = environment("production", container)
    check(controller, settings)
    assert [int(settings["OUTRIDER_CONTROLLER_PORT"])] == [
        port["containerPort"] for port in container["ports"]
    ]
    # It asks orchestrators as Prometheus does: with a key of its own, over HTTPS.
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    files = {value for value in settings.values() if value.startswith("/etc/outrider/")}
    assert {str(PurePosixPath(file).parent) for file in files} <= mounts
    assert len(files) == 2
    # What it scales by default is there, and it looks in its own namespace.
    context = controller.make_context("controller", [], obj=None)
    for fleet in ("orchestrators", "verifiers", "drafters"):
        kind, _, name = str(context.params[fleet]).partition("/")
        named("production", {"deployment": "Deployment", "statefulset": "StatefulSet"}[kind], name)
    assert settings["OUTRIDER_CONTROLLER_DISCOVER"] == "kubernetes:outrider"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_say_whose_endpoints_they_are(overlay: str) -> None:
    """Workers and orchestrators are found by labels that EndpointSlices take over from Services."""
    ports: dict[str, set[str]] = {}
    for service in resources(overlay, "Service"):
        labels = service["metadata"].get("labels", {})
        component = labels.get(COMPONENT)
        if component is not None:
            assert selects({"matchLabels": dict([SELECTOR.split("=")])}, labels)
            assert service["spec"]["selector"][COMPONENT] == component
            ports[component] = {port["name"] for port in service["spec"]["ports"]}
    assert GRPC_PORT in ports["verifier"]
    assert GRPC_PORT in ports["drafter"]
    assert HTTP_PORT in ports["orchestrator"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_services_listen_where_the_manifests_say(overlay: str) -> None:
    for role, variables in (
        ("verifier", ["PORT"]),
        ("drafter", ["PORT"]),
        ("orchestrator", ["PORT", "HTTP_ADDRESS"]),
    ):
        container = _container(_workload(overlay, role))
        settings = environment(overlay, container)
        told = [
            int(settings[f"OUTRIDER_{role.upper()}_{each}"].rpartition(":")[2])
            for each in variables
        ]
        assert told == [port["containerPort"] for port in container["ports"]]
        assert settings[f"OUTRIDER_{role.upper()}_HOST"] == "0.0.0.0"
        if role != "orchestrator":
            # Without, it would refuse to start: nobody can be sent to 0.0.0.0.
            assert settings[f"OUTRIDER_{role.upper()}_ADVERTISE"] == f"$(POD_IP):{told[0]}"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_services_have_certificates_or_say_plaintext(overlay: str) -> None:
    """Otherwise they refuse to start: `Server.start` and `check_exposure`."""
    for role in COMMANDS:
        workload = _workload(overlay, role)
        settings = environment(overlay, _container(workload))
        plaintext = settings.get("OUTRIDER_PLAINTEXT") == "true"
        assert plaintext is (overlay == "local")
        files = [value for value in settings.values() if value.startswith("/etc/outrider/")]
        mounts = {mount["mountPath"] for mount in _container(workload)["volumeMounts"]}
        assert {str(PurePosixPath(file).parent) for file in files} <= mounts
        names = {"OUTRIDER_TLS_CERT", "OUTRIDER_TLS_KEY", "OUTRIDER_TLS_CA"}
        # Peers connect to addresses, which no certificate names.
        names |= {"OUTRIDER_TLS_SERVER_NAME"}
        if role == "orchestrator":
            door = ("HTTP_CERTIFICATE", "HTTP_KEYS")
            names |= {f"OUTRIDER_ORCHESTRATOR_{name}" for name in door}
            opened = settings.get("OUTRIDER_ORCHESTRATOR_HTTP_OPEN") == "true"
            assert opened is plaintext
        assert (names & settings.keys()) == (set() if plaintext else names)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_workers_find_the_models_that_the_job_fetches(overlay: str) -> None:
    (job,) = workloads(overlay, "Job")
    fetched = environment(overlay, _container(job))
    for role in ("verifier", "drafter"):
        workload = _workload(overlay, role)
        (waiting,) = workload.pod["initContainers"]
        variable = f"OUTRIDER_{role.upper()}_MODEL"
        settings = environment(overlay, _container(workload))
        wanted = settings.get(variable)
        assert environment(overlay, waiting).get(variable) == wanted
        assert fetched.get(variable) == wanted
        for container in (waiting, _container(workload)):
            mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
            assert mounts["models"]["mountPath"] == "/models"
            assert mounts["models"]["readOnly"] is True
    claim = named(overlay, "PersistentVolumeClaim", "outrider-models")
    assert claim["spec"]["accessModes"] == [
        "ReadWriteOnce" if overlay == "local" else "ReadWriteMany"
    ]


def test_a_drafter_model_is_only_named_where_it_is_used() -> None:
    for overlay in OVERLAYS:
        settings = environment(overlay, _container(_workload(overlay, "drafter")))
        with_model = settings["OUTRIDER_DRAFTER_PROPOSER"] == "language-model"
        assert with_model is ("OUTRIDER_DRAFTER_MODEL" in settings)


def test_settings_in_compose_are_options() -> None:
    compose = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())
    for role, command in COMMANDS.items():
        settings = compose["services"][role]["environment"]
        check(command, {k: v for k, v in settings.items() if "${" not in v})
        grace_s = float(compose["services"][role].get("stop_grace_period", "10s").rstrip("s"))
        drain_s = float(settings.get(f"OUTRIDER_{role.upper()}_DRAIN_S", 0))
        assert grace_s >= drain_s + 5


@pytest.mark.parametrize("value", [{"OUTRIDER_VERIFIER_SESSIONS": "3"}, {"OUTRIDER_DRAIN_S": "4"}])
def test_a_variable_that_sets_nothing_is_found(value: dict[str, str]) -> None:
    with pytest.raises(AssertionError, match="is no option"):
        check(verifier, value)


def test_a_value_that_an_option_does_not_take_is_found() -> None:
    with pytest.raises(click.BadParameter):
        check(verifier, {"OUTRIDER_VERIFIER_DTYPE": "bf16"})


@pytest.mark.parametrize("command", [*COMMANDS.values(), controller], ids=lambda each: each.name)
def test_every_option_says_what_it_is_for(command: click.Command) -> None:
    given = [each for each in command.params if isinstance(each, click.Option)]
    assert [each.name for each in given if not each.help and not each.hidden] == []


def _workload(overlay: str, role: str) -> Workload:
    (workload,) = [one for one in workloads(overlay) if one.name == f"outrider-{role}"]
    return workload


def _container(workload: Workload) -> Resource:
    (container,) = workload.containers
    return container
