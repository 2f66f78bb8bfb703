"""Clusters for the contract suite: the fake, and a real one where KUBECONFIG names it.

Both are reached through a link that can be cut and taken away, which a real API server cannot.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncIterator
from typing import Any, Protocol
from urllib.parse import urlsplit

import pytest
from kubernetes.aio import client, config

from orchestrator.cluster.api import Cluster
from tests.support.api_server import FakeApiServer

COMPONENT = "app.kubernetes.io/component"


class Link:
    """Forwards connections to a server; cuts them, or is not there."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def start(self) -> None:
        """Listen, on the same port as before if it was away."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Go away, and break what is connected."""
        if self._server is not None:
            self._server.close()
            self.cut()
            await self._server.wait_closed()
            self._server = None

    def cut(self) -> None:
        """Break what is connected."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        beyond: asyncio.StreamWriter | None = None
        try:
            answers, beyond = await asyncio.open_connection(self._host, self._port)
            self._writers |= {writer, beyond}
            await asyncio.wait(
                [
                    asyncio.create_task(self._copy(reader, beyond)),
                    asyncio.create_task(self._copy(answers, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
        except OSError:
            pass
        finally:
            for each in (writer, beyond):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()


class TestCluster(Protocol):
    """A namespace in which a test may do as it likes."""

    __test__ = False
    link: Link

    def connect(self, timeout_s: float = 5.0) -> Cluster:
        """Return a new client of the namespace, through the link."""
        ...

    async def put_slice(
        self, name: str, component: str, hosts: list[str], *, unready: tuple[str, ...] = ()
    ) -> None:
        """Make or change an EndpointSlice."""
        ...

    async def delete_slice(self, name: str) -> None:
        """Delete an EndpointSlice."""
        ...

    async def put_workload(self, kind: str, name: str, replicas: int) -> None:
        """Make a `deployment` or `statefulset`."""
        ...

    async def replicas(self, kind: str, name: str) -> int:
        """How many replicas a workload should have."""
        ...

    async def forget(self) -> str:
        """Forget what happened; returns a version that a watch cannot begin from any more."""
        ...


class FakeCluster:
    """The fake behind a link."""

    def __init__(self, server: FakeApiServer, link: Link) -> None:
        self.server, self.link = server, link

    def connect(self, timeout_s: float = 5.0) -> Cluster:
        settings = client.Configuration(host=f"http://127.0.0.1:{self.link.port}")
        return Cluster(settings, "outrider", timeout_s)

    async def put_slice(
        self, name: str, component: str, hosts: list[str], *, unready: tuple[str, ...] = ()
    ) -> None:
        await self.server.put_slice(name, component, hosts, unready=unready)

    async def delete_slice(self, name: str) -> None:
        await self.server.delete("endpointslices", name)

    async def put_workload(self, kind: str, name: str, replicas: int) -> None:
        await self.server.put_workload(f"{kind}s", name, replicas)

    async def replicas(self, kind: str, name: str) -> int:
        return self.server.replicas(f"{kind}s", name)

    async def forget(self) -> str:
        await self.server.bookmark()
        self.server.forget()
        return "1"


class RealCluster:
    """A namespace of its own in the cluster that KUBECONFIG names."""

    def __init__(self, settings: client.Configuration, link: Link, namespace: str) -> None:
        self.link, self._settings, self.namespace = link, settings, namespace
        self.api = client.ApiClient(settings)

    def connect(self, timeout_s: float = 5.0) -> Cluster:
        return Cluster(self._settings, self.namespace, timeout_s)

    async def put_slice(
        self, name: str, component: str, hosts: list[str], *, unready: tuple[str, ...] = ()
    ) -> None:
        body = {
            "metadata": {
                "name": name,
                "labels": {"app.kubernetes.io/name": "outrider", COMPONENT: component},
            },
            "addressType": "IPv4",
            "endpoints": [
                {"addresses": [host], "conditions": {"ready": host not in unready}}
                for host in hosts
            ],
            "ports": [{"name": "grpc", "port": 7000, "protocol": "TCP"}],
        }
        slices: Any = client.DiscoveryV1Api(self.api)
        found = await slices.list_namespaced_endpoint_slice(self.namespace)
        if name in {each.metadata.name for each in found.items}:
            await slices.replace_namespaced_endpoint_slice(name, self.namespace, body)
        else:
            await slices.create_namespaced_endpoint_slice(self.namespace, body)

    async def delete_slice(self, name: str) -> None:
        slices = client.DiscoveryV1Api(self.api)
        await slices.delete_namespaced_endpoint_slice(name, self.namespace)

    async def put_workload(self, kind: str, name: str, replicas: int) -> None:
        labels = {"app": name}
        body = {
            "metadata": {"name": name},
            "spec": {
                "replicas": replicas,
                "selector": {"matchLabels": labels},
                # Never to be scheduled: only the number is looked at.
                "template": {
                    "metadata": {"labels": labels},
                    "spec": {
                        "nodeSelector": {"outrider/nowhere": "true"},
                        "containers": [{"name": "none", "image": "none:none"}],
                    },
                },
            },
        }
        apps: Any = client.AppsV1Api(self.api)
        if kind == "deployment":
            await apps.create_namespaced_deployment(self.namespace, body)
        else:
            body["spec"]["serviceName"] = name  # type: ignore[index]
            await apps.create_namespaced_stateful_set(self.namespace, body)

    async def replicas(self, kind: str, name: str) -> int:
        apps: Any = client.AppsV1Api(self.api)
        read = (
            apps.read_namespaced_deployment
            if kind == "deployment"
            else apps.read_namespaced_stateful_set
        )
        return int((await read(name, self.namespace)).spec.replicas)

    async def forget(self) -> str:
        # Compacted long ago, in any cluster.
        return "1"


@contextlib.asynccontextmanager
async def test_cluster(kind: str) -> AsyncIterator[TestCluster]:
    """Run the fake, or use the real one; skips the test where there is none."""
    if kind == "fake":
        server = FakeApiServer()
        await server.start()
        link = Link("127.0.0.1", int(server.url.rpartition(":")[2]))
        await link.start()
        try:
            yield FakeCluster(server, link)
        finally:
            await link.stop()
            await server.stop()
        return
    if "KUBECONFIG" not in os.environ:
        pytest.skip("no real API server: KUBECONFIG is not set")
    settings = client.Configuration()
    await config.load_kube_config(client_configuration=settings)
    place = urlsplit(settings.host)
    assert place.hostname is not None
    link = Link(place.hostname, place.port or 443)
    await link.start()
    settings.host = f"{place.scheme}://127.0.0.1:{link.port}"
    settings.tls_server_name = settings.tls_server_name or place.hostname
    cluster = RealCluster(settings, link, f"outrider-test-{secrets.token_hex(4)}")
    core: Any = client.CoreV1Api(cluster.api)
    await core.create_namespace({"metadata": {"name": cluster.namespace}})
    try:
        yield cluster
    finally:
        await core.delete_namespace(cluster.namespace)
        await cluster.api.close()
        await link.stop()


test_cluster.__test__ = False  # type: ignore[attr-defined]
