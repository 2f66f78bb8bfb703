"""The images, and the `local` overlay's pods as real containers: `make image-test`.

Skipped where podman or the images are missing, and unless asked for: it takes a minute, and room on
the disk.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.containers import Containers, containers, need_images, podman
from tests.support.manifests import quantity, workloads

OVERLAY = "local"
ORCHESTRATOR_BYTES_MAX = 500_000_000
# Nothing is compiled or fetched for it, and its greedy text repeats itself, as lookups like it.
TINY = "random:tiny?seed=1"
SERVICES = ("verifier", "drafter", "orchestrator")
STAYING = ("redis", *SERVICES)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module", autouse=True)
def asked_for(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("--containers"):
        pytest.skip("runs containers: `make image-test` asks for it")
    need_images(OVERLAY)


@pytest.fixture(scope="module")
def fleet(request: pytest.FixtureRequest) -> Iterator[Containers]:
    """The overlay's pods, started in the order in which a cluster would have them ready."""
    model = request.config.getoption("--containers-model")
    with containers(OVERLAY, {"OUTRIDER_VERIFIER_MODEL": model} if model else {}) as there:
        there.play("models")
        for component in STAYING:
            there.play(component)
        for component in STAYING:
            there.wait_for(component, "startupProbe", 600.0)
            there.wait_for(component, "readinessProbe", 60.0)
        yield there


def image(component: str) -> str:
    (found,) = {
        container["image"]
        for workload in workloads(OVERLAY, "Deployment", "StatefulSet")
        for container in workload.containers
        if workload.labels["app.kubernetes.io/component"] == component
    }
    return str(found)


def inside(component: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in an image, locked down as in the manifests."""
    locked = ("--read-only", "--cap-drop=ALL", "--network=none", "--security-opt=no-new-privileges")
    at = ("run", "--rm", *locked, "--entrypoint", command[0])
    return podman(*at, image(component), *command[1:], check=False)


def test_the_orchestrator_is_small_and_without_model_libraries() -> None:
    (described,) = json.loads(podman("image", "inspect", image("orchestrator")).stdout)
    assert described["Size"] < ORCHESTRATOR_BYTES_MAX
    for library in ("torch", "transformers"):
        done = inside("orchestrator", "python", "-c", f"import {library}")
        assert f"No module named '{library}'" in done.stderr
    needed = "import kubernetes, opentelemetry.sdk, tokenizers, jinja2, uvloop"
    assert inside("orchestrator", "python", "-c", needed).returncode == 0


@pytest.mark.parametrize("component", SERVICES)
def test_images_start_as_nobody_in_particular(component: str) -> None:
    (described,) = json.loads(podman("image", "inspect", image(component)).stdout)
    assert described["Config"]["User"] == "10001:10001"
    assert described["Config"]["Entrypoint"] == ["outrider", component]
    assert "outrider.serving.probe" in described["Healthcheck"]["Test"]
    who = inside(component, "sh", "-c", "id -u; id -g; touch /opt/x /usr/x || echo refused")
    assert who.stdout.split() == ["10001", "10001", "refused"]
    helped = inside(component, "outrider", component, "--help")
    assert helped.returncode == 0, helped.stderr


def test_the_job_ends_well(fleet: Containers) -> None:
    ended = podman("wait", fleet.pods["models"].container())
    assert ended.stdout.strip() == "0", fleet.logs("models")


@pytest.mark.parametrize("component", STAYING)
def test_containers_are_locked_down(fleet: Containers, component: str) -> None:
    played = fleet.pods[component]
    said = podman("exec", played.container(), "cat", "/proc/1/status").stdout
    status = dict(line.split(":\t", 1) for line in said.splitlines() if ":\t" in line)
    user = str(played.workload.pod["securityContext"]["runAsUser"])
    assert set(status["Uid"].split()) == {user}
    assert int(status["CapEff"], 16) == int(status["CapBnd"], 16) == 0
    assert status["NoNewPrivs"].strip() == "1"
    refused = podman("exec", played.container(), "touch", "/usr/x", check=False)
    assert "Read-only file system" in refused.stderr
    if component in ("verifier", "drafter"):
        refused = podman("exec", played.container(), "touch", "/models/x", check=False)
        assert "Read-only file system" in refused.stderr


@pytest.mark.parametrize("component", STAYING)
def test_a_kubelet_would_leave_them_alone(fleet: Containers, component: str) -> None:
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert fleet.ask(component, probe) is None, probe


def test_a_request_over_http_is_answered_with_the_drafters_help(fleet: Containers) -> None:
    body = {"prompt": "1 2 3 4 1 2 3 4 1 2 3 4", "max_tokens": 96, "temperature": 0}
    answer = _post(fleet, body)
    assert answer["usage"]["completion_tokens"] == 96
    assert answer["choices"][0]["text"]
    counted = _metrics(fleet)
    assert counted['outrider_requests_total{outcome="length"}'] >= 1
    assert sum(_of(counted, "outrider_accepted_tokens_total")) > 0, "no guess was right"
    # The target alone would have written the same.
    alone = _post(fleet, body | {"speculative": {"enabled": False}})
    assert alone["choices"][0]["text"] == answer["choices"][0]["text"]


def test_a_request_over_grpc(fleet: Containers) -> None:
    asked = ("--endpoint", "outrider-orchestrators:50050", "--temperature", "0", "--json")
    said = json.loads(fleet.run("outrider", "generate", *asked, "--tokens-max", "24", "1 2 3 1 2"))
    assert said["text"]


def test_it_fits_into_its_limits(fleet: Containers) -> None:
    """Of real processes, at their worst so far; the policy tests add up the limits."""
    total = 0
    for component in STAYING:
        played = fleet.pods[component]
        status = podman("exec", played.container(), "cat", "/proc/1/status").stdout
        (peak,) = [line for line in status.splitlines() if line.startswith("VmHWM:")]
        used = 1_024 * int(peak.split()[1])
        limit = quantity(played.workload.containers[0]["resources"]["limits"]["memory"])
        assert used < 0.9 * limit, f"{component}: {used / 2**20:.0f} of {limit / 2**20:.0f} MiB"
        total += used
    assert total < 3.25 * 2**30


def test_an_orchestrator_that_is_stopped_finishes_its_answers(fleet: Containers) -> None:
    """What a rolling update does: SIGTERM, and grace. The last of these tests: it is gone then."""
    body = {"prompt": "1 2 3 4", "max_tokens": 600, "temperature": 0, "ignore_eos": True}
    played = fleet.pods["orchestrator"]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_post, fleet, body)
        while not sum(_of(_metrics(fleet), 'outrider_sessions{role="orchestrator"}')):
            assert not answer.done(), answer.result()
        grace_s = played.workload.pod["terminationGracePeriodSeconds"]
        podman("stop", "--time", str(grace_s), played.container())
        assert answer.result()["usage"]["completion_tokens"] == 600
    assert fleet.state(played)["ExitCode"] == 0, fleet.logs("orchestrator")
    for component in ("drafter", "verifier"):
        played = fleet.pods[component]
        grace_s = played.workload.pod["terminationGracePeriodSeconds"]
        podman("stop", "--time", str(grace_s), played.container())
        assert fleet.state(played)["ExitCode"] == 0, fleet.logs(component)


_ASK = """
import json, sys, urllib.request
def ask(path, body=None):
    made = urllib.request.Request("http://outrider:8080" + path, data=body,
                                  headers={"content-type": "application/json"})
    return urllib.request.urlopen(made, timeout=300).read()
"""


def _post(fleet: Containers, body: dict[str, object]) -> dict[str, object]:
    asked = (
        'served = json.loads(ask("/v1/models"))["data"][0]["id"]\n'
        'body = json.load(sys.stdin) | {"model": served}\n'
        'print(ask("/v1/completions", json.dumps(body).encode()).decode())'
    )
    return json.loads(fleet.run("python", "-c", _ASK + asked, text=json.dumps(body)))


def _metrics(fleet: Containers) -> dict[str, float]:
    said = fleet.run("python", "-c", _ASK + 'print(ask("/metrics").decode())')
    lines = (line.rpartition(" ") for line in said.splitlines() if line[:1] not in ("", "#"))
    return {name: float(value) for name, _, value in lines}


def _of(counted: dict[str, float], name: str) -> list[float]:
    return [value for each, value in counted.items() if each.startswith(name)]
