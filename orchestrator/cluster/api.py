"""The few calls of the Kubernetes API that we make, bounded in time, with errors of ours.

What may be called is what `deploy/kubernetes` grants: tests hold the two against each other.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import math
import os
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp
from kubernetes.aio import client, config
from kubernetes.aio.client.exceptions import ApiException

from outrider.errors import ConfigError, Unavailable

CALL_TIMEOUT_S = 10.0
_WATCH_GRACE_S = 10.0
_config: Any = config
"""It has no types."""
_OK, _NOT_FOUND, _CONFLICT, _GONE = 200, 404, 409, 410


class ClusterUnavailable(Unavailable):
    """The API server cannot be reached, is too slow, or refuses what it is asked."""


class Conflict(Exception):
    """Somebody else has changed an object since it was read, or made it first.

    Like `Expired` it says what to do next, and never leaves this package.
    """


class Expired(Exception):
    """A watch cannot go on from where it was: what happened since then is forgotten."""


@dataclass(frozen=True, slots=True)
class Endpoints:
    """One EndpointSlice: addresses of pods behind a Service."""

    name: str
    labels: dict[str, str]
    """With those of the Service."""
    hosts: tuple[str, ...]
    """IP address of each endpoint that is ready."""
    ports: Mapping[str, int]
    """By name."""
    leaving: int = 0
    """Endpoints that are about to go."""

    def addresses(self, port: str) -> list[str]:
        """host:port of each endpoint that is ready; none without a port of this name."""
        number = self.ports.get(port)
        if number is None:
            return []
        return [f"[{host}]:{number}" if ":" in host else f"{host}:{number}" for host in self.hosts]


@dataclass(frozen=True, slots=True)
class Change:
    """What a watch has seen."""

    version: str
    """Where a watch goes on from."""
    endpoints: Endpoints | None = None
    """None: nothing has changed but the version."""
    deleted: bool = False


@dataclass(frozen=True, slots=True)
class Workload:
    """What has a scale: `kind` is `deployment` or `statefulset`."""

    kind: str
    name: str

    @classmethod
    def read(cls, text: str) -> Workload:
        """Read `deployment/NAME` or `statefulset/NAME`. Raises `ConfigError`."""
        kind, slash, name = text.partition("/")
        if kind not in ("deployment", "statefulset") or not slash or not name:
            raise ConfigError(f"{text!r} is no workload; write deployment/NAME or statefulset/NAME")
        return cls(kind, name)

    def __str__(self) -> str:
        """As it is written."""
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True, slots=True)
class Scale:
    """How many replicas a workload should have, and has."""

    replicas: int
    version: str
    """Of the object; writing needs it."""
    existing: int = 0


@dataclass(frozen=True, slots=True)
class LeaseRecord:
    """Who leads, by a Lease."""

    holder: str
    duration_s: int
    renewed_at: str
    """By the holder's clock: only compared for equality."""
    transitions: int = 0
    version: str = ""
    """Of the object; empty: it does not exist yet."""


class Cluster:
    """A namespace of a cluster."""

    def __init__(
        self, settings: client.Configuration, namespace: str, timeout_s: float = CALL_TIMEOUT_S
    ) -> None:
        """`timeout_s` bounds each call but watches."""
        self.namespace = namespace
        self._timeout_s = timeout_s
        self._api = client.ApiClient(settings)
        self._slices = client.DiscoveryV1Api(self._api)
        self._leases = client.CoordinationV1Api(self._api)
        self._apps = client.AppsV1Api(self._api)

    @classmethod
    async def connect(cls, namespace: str, timeout_s: float = CALL_TIMEOUT_S) -> Cluster:
        """Take the settings of the pod that this runs in, or else KUBECONFIG's.

        Does not call the API yet. Raises `ConfigError`.
        """
        settings = client.Configuration()
        settings.retries = None
        try:
            if "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ:
                _config.load_incluster_config(client_configuration=settings)
            else:
                # Named here, since the client looks at the environment only when it is imported.
                await _config.load_kube_config(
                    config_file=os.environ.get("KUBECONFIG"), client_configuration=settings
                )
        except (config.ConfigException, OSError, TypeError, KeyError, ValueError) as error:
            raise ConfigError(
                f"cannot tell how to reach the Kubernetes API: {error}; in a pod it needs a service"
                " account's token, elsewhere KUBECONFIG"
            ) from None
        return cls(settings, namespace, timeout_s)

    async def close(self) -> None:
        """Close the connections."""
        close: Any = self._api.close
        await close()

    # --- endpoints ---

    async def endpoints(self, selector: str) -> tuple[list[Endpoints], str]:
        """List EndpointSlices with these labels, and the version of the list.

        Raises `ClusterUnavailable`.
        """
        async with self._call():
            response = await self._list_slices(selector, _request_timeout=self._timeout_s)
            async with response:
                answer = await _checked(response)
        items = [_endpoints(each) for each in answer.get("items") or []]
        return items, str(answer["metadata"].get("resourceVersion", ""))

    async def watch(
        self, selector: str, version: str, timeout_s: float, report: Callable[[Change], None]
    ) -> None:
        """Report changes after a version until the server ends the watch or the stream breaks.

        Raises `Expired` and `ClusterUnavailable`.
        """
        bound_s = timeout_s + _WATCH_GRACE_S
        async with self._call(bound_s):
            response = await self._list_slices(
                selector,
                watch=True,
                resource_version=version,
                allow_watch_bookmarks=True,
                timeout_seconds=math.ceil(timeout_s),
                _request_timeout=bound_s,
            )
            async with response:
                if response.status != _OK:
                    await _checked(response)
                # Read line by line: the client's own `Watch` would try again by itself, and
                # checks each object field by field, which takes milliseconds for large ones.
                async for line in response.content:
                    change = _change(line)
                    if change is None:
                        return
                    report(change)

    async def _list_slices(self, selector: str, **options: Any) -> aiohttp.ClientResponse:
        found: aiohttp.ClientResponse = (
            await self._slices.list_namespaced_endpoint_slice_without_preload_content(
                self.namespace, label_selector=selector, **options
            )
        )
        return found

    # --- scale ---

    async def read_scale(self, workload: Workload) -> Scale:
        """Read the scale subresource. Raises `ClusterUnavailable`."""
        read: Any = (
            self._apps.read_namespaced_deployment_scale
            if workload.kind == "deployment"
            else self._apps.read_namespaced_stateful_set_scale
        )
        async with self._call():
            scale = await read(workload.name, self.namespace, _request_timeout=self._timeout_s)
        return Scale(
            replicas=scale.spec.replicas or 0 if scale.spec is not None else 0,
            version=str(scale.metadata.resource_version),
            existing=scale.status.replicas if scale.status is not None else 0,
        )

    async def write_scale(self, workload: Workload, replicas: int, version: str) -> None:
        """Set the replicas of a workload that nobody has changed since it was read.

        Raises `Conflict` and `ClusterUnavailable`.
        """
        replace: Any = (
            self._apps.replace_namespaced_deployment_scale
            if workload.kind == "deployment"
            else self._apps.replace_namespaced_stateful_set_scale
        )
        body = client.V1Scale(
            metadata=client.V1ObjectMeta(
                name=workload.name, namespace=self.namespace, resource_version=version
            ),
            spec=client.V1ScaleSpec(replicas=replicas),
        )
        async with self._call():
            await replace(workload.name, self.namespace, body, _request_timeout=self._timeout_s)

    # --- leases ---

    async def read_lease(self, name: str) -> LeaseRecord | None:
        """Read a Lease, None if there is none. Raises `ClusterUnavailable`."""
        try:
            async with self._call():
                lease = await self._leases.read_namespaced_lease(
                    name, self.namespace, _request_timeout=self._timeout_s
                )
        except ClusterUnavailable as error:
            cause = error.__cause__
            if isinstance(cause, ApiException) and cause.status == _NOT_FOUND:
                return None
            raise
        spec = lease.spec or client.V1LeaseSpec()
        return LeaseRecord(
            holder=spec.holder_identity or "",
            duration_s=spec.lease_duration_seconds or 0,
            renewed_at=str(spec.renew_time),
            transitions=spec.lease_transitions or 0,
            version=_version(lease.metadata),
        )

    async def write_lease(
        self, name: str, record: LeaseRecord, at: datetime.datetime
    ) -> LeaseRecord:
        """Write a Lease that nobody has changed since it was read; make it if it has no version.

        `at` is the time of renewal. Returns it with its new version. Raises `Conflict` and
        `ClusterUnavailable`.
        """
        body = client.V1Lease(
            metadata=client.V1ObjectMeta(
                name=name, namespace=self.namespace, resource_version=record.version or None
            ),
            spec=client.V1LeaseSpec(
                holder_identity=record.holder or None,
                lease_duration_seconds=record.duration_s,
                renew_time=at,
                lease_transitions=record.transitions,
            ),
        )
        timeout_s = self._timeout_s
        async with self._call():
            if record.version:
                lease = await self._leases.replace_namespaced_lease(
                    name, self.namespace, body, _request_timeout=timeout_s
                )
            else:
                lease = await self._leases.create_namespaced_lease(
                    self.namespace, body, _request_timeout=timeout_s
                )
        spec = lease.spec
        return LeaseRecord(
            record.holder,
            record.duration_s,
            str(spec.renew_time if spec is not None else at),
            record.transitions,
            _version(lease.metadata),
        )

    @contextlib.asynccontextmanager
    async def _call(self, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Bound a call in time and turn the client's errors into ours."""
        bound_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(bound_s):
                yield
        except ApiException as error:
            if error.status == _GONE:
                raise Expired(f"the Kubernetes API has forgotten: {error.reason}") from error
            if error.status == _CONFLICT:
                raise Conflict(f"changed meanwhile: {error.reason}") from error
            raise ClusterUnavailable(
                f"the Kubernetes API refuses: {error.status} {error.reason}"
            ) from error
        except TimeoutError as error:
            raise ClusterUnavailable(
                f"the Kubernetes API did not answer within {bound_s:g} s"
            ) from error
        except (aiohttp.ClientError, OSError) as error:
            raise ClusterUnavailable(f"the Kubernetes API: {error}") from error


def _version(metadata: client.V1ObjectMeta | None) -> str:
    """Return an object's version. Raises `ApiException` for an answer without one."""
    if metadata is None or not metadata.resource_version:
        raise ApiException(status=_OK, reason="an object without a version")
    return str(metadata.resource_version)


async def _checked(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Read an answer whole. Raises `ApiException`."""
    if response.status != _OK:
        raise ApiException(status=response.status, reason=response.reason)
    answer: dict[str, Any] = await response.json()
    return answer


def _change(line: bytes) -> Change | None:
    """Read an event of a watch; None if it was cut off. Raises `ApiException`."""
    try:
        event: dict[str, Any] = json.loads(line)
    except ValueError:
        return None
    found = event["object"]
    if event["type"] == "ERROR":
        raise ApiException(status=found.get("code"), reason=found.get("message"))
    version = str(found["metadata"]["resourceVersion"])
    if event["type"] == "BOOKMARK":
        return Change(version)
    return Change(version, _endpoints(found), deleted=event["type"] == "DELETED")


def _endpoints(found: Mapping[str, Any]) -> Endpoints:
    ports = {port.get("name") or "": port.get("port") for port in found.get("ports") or []}
    addresses: list[str] = []
    leaving = 0
    for endpoint in found.get("endpoints") or []:
        conditions = endpoint.get("conditions") or {}
        leaving += bool(conditions.get("terminating"))
        # Not said counts as ready, as the API's documentation has it.
        if conditions.get("ready") is not False and endpoint.get("addresses"):
            # All of an endpoint's addresses are the same pod's.
            addresses.append(endpoint["addresses"][0])
    return Endpoints(
        name=str(found["metadata"]["name"]),
        labels=dict(found["metadata"].get("labels") or {}),
        hosts=tuple(sorted(addresses)),
        ports={name: port for name, port in ports.items() if port},
        leaving=leaving,
    )
