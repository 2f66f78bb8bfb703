"""A Kubernetes API server as far as we use one, over real HTTP.

It keeps objects with resource versions, refuses writes to what has changed (409), streams watches
from a version, forgets history (410), and can be cut off or away. It records who asked for what, by
verb and resource, as RBAC names them.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

from aiohttp import web

Document = dict[str, Any]
_SLICES, _LEASES = "endpointslices", "leases"
_GROUPS = {
    _SLICES: "discovery.k8s.io",
    _LEASES: "coordination.k8s.io",
    "deployments": "apps",
    "statefulsets": "apps",
}
_KINDS = {
    _SLICES: ("discovery.k8s.io/v1", "EndpointSlice"),
    _LEASES: ("coordination.k8s.io/v1", "Lease"),
}


class FakeApiServer:
    """One namespace's worth of API server."""

    def __init__(self) -> None:
        self.asked: Counter[tuple[str, str, str]] = Counter()
        """(verb, group, resource) of all that was asked, as a Role would have it."""
        self.objects: dict[tuple[str, str], Document] = {}
        """By resource and name."""
        self.url = ""
        self.refuse: Callable[[web.Request], int | None] = lambda _: None
        """Status with which a request is refused, None to serve it."""
        self.delay: Callable[[web.Request], asyncio.Event | None] = lambda _: None
        """What a request waits for before it is served."""
        self.lists = self.watches = 0
        self._version = 100
        self._oldest = 0
        """What happened up to here is forgotten."""
        self._history: list[tuple[int, str, str, Document]] = []
        self._news = asyncio.Condition()
        self._generation = 0
        """Raised to end all watches."""
        self._broken = False
        self._runner: web.AppRunner | None = None
        self._port = 0

    # --- its life ---

    async def start(self) -> None:
        """Listen, on the same port as before if it was away."""
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", self._port, reuse_address=True)
        await site.start()
        self._port = self._runner.addresses[0][1]
        self.url = f"http://127.0.0.1:{self._port}"

    async def stop(self) -> None:
        """Go away: connections break, nobody listens."""
        await self.cut(broken=True)
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def cut(self, *, broken: bool = False) -> None:
        """End all watches, in the middle of a line if `broken`."""
        self._generation += 1
        self._broken = broken
        async with self._news:
            self._news.notify_all()

    # --- its objects ---

    async def put(self, resource: str, document: Document) -> Document:
        """Make or change an object, as somebody else would."""
        name = document["metadata"]["name"]
        event = "MODIFIED" if (resource, name) in self.objects else "ADDED"
        return await self._store(resource, name, document, event)

    async def delete(self, resource: str, name: str) -> None:
        """Delete an object."""
        document = self.objects.pop((resource, name))
        await self._record(resource, "DELETED", document)

    async def put_slice(
        self,
        name: str,
        component: str,
        hosts: list[str],
        port: tuple[str, int] = ("grpc", 7000),
        *,
        unready: tuple[str, ...] = (),
        labels: dict[str, str] | None = None,
    ) -> None:
        """Make or change an EndpointSlice as the controller of Services does."""
        endpoints = [
            {"addresses": [host], "conditions": {"ready": host not in unready}} for host in hosts
        ]
        await self.put(
            _SLICES,
            {
                "metadata": {
                    "name": name,
                    "labels": {
                        "app.kubernetes.io/name": "outrider",
                        "app.kubernetes.io/component": component,
                        **(labels or {}),
                    },
                },
                "addressType": "IPv4",
                "endpoints": endpoints,
                "ports": [{"name": port[0], "port": port[1], "protocol": "TCP"}],
            },
        )

    async def put_workload(self, resource: str, name: str, replicas: int) -> None:
        """Make a Deployment or StatefulSet."""
        await self.put(
            resource,
            {"metadata": {"name": name}, "spec": {"replicas": replicas}, "status": {}},
        )

    def replicas(self, resource: str, name: str) -> int:
        """How many replicas a workload should have."""
        return int(self.objects[resource, name]["spec"]["replicas"])

    def forget(self) -> None:
        """Compact: watches cannot begin from before now."""
        self._oldest = self._version
        self._history.clear()

    async def bookmark(self) -> None:
        """Let time pass: the version rises, and watches that want to hear of it do."""
        await self._record(_SLICES, "BOOKMARK", {"metadata": {}})

    async def _store(self, resource: str, name: str, document: Document, event: str) -> Document:
        document = copy.deepcopy(document)
        document["metadata"]["name"] = name
        self.objects[resource, name] = document
        await self._record(resource, event, document)
        return document

    async def _record(self, resource: str, event: str, document: Document) -> None:
        self._version += 1
        document["metadata"]["resourceVersion"] = str(self._version)
        self._history.append((self._version, resource, event, copy.deepcopy(document)))
        async with self._news:
            self._news.notify_all()

    # --- its answers ---

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        refused = self.refuse(request)
        if refused is not None:
            return _status(refused, "refused by the test")
        waited = self.delay(request)
        if waited is not None:
            await waited.wait()
        parts = request.path.strip("/").split("/")
        # apis/GROUP/v1/namespaces/NAMESPACE/RESOURCE[/NAME[/SUBRESOURCE]]
        if len(parts) < 6 or parts[0] != "apis" or _GROUPS.get(parts[5]) != parts[1]:
            return _status(404, "no such resource")
        resource, name, subresource = [*parts[5:], "", ""][:3]
        verb = _verb(request, name)
        full = f"{resource}/{subresource}" if subresource else resource
        self.asked[verb, parts[1], full] += 1
        match verb:
            case "list":
                return self._list(resource, request)
            case "watch":
                return await self._watch(resource, request)
            case "create":
                return await self._create(resource, await request.json())
        if (resource, name) not in self.objects:
            return _status(404, f"{resource} {name} not found")
        if subresource == "scale":
            return await self._scale(resource, name, request)
        if verb == "get":
            return web.json_response(self._shown(resource, self.objects[resource, name]))
        return await self._replace(resource, name, await request.json())

    def _list(self, resource: str, request: web.Request) -> web.Response:
        self.lists += 1
        version, kind = _KINDS[resource]
        items = [
            self._shown(resource, document)
            for (found, _), document in self.objects.items()
            if found == resource and _selected(document, request)
        ]
        return web.json_response(
            {
                "apiVersion": version,
                "kind": f"{kind}List",
                "metadata": {"resourceVersion": str(self._version)},
                "items": items,
            }
        )

    async def _watch(self, resource: str, request: web.Request) -> web.StreamResponse:
        self.watches += 1
        seen = int(request.query.get("resourceVersion") or self._version)
        generation = self._generation
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        if seen < self._oldest:
            # As the real one: the stream is accepted, and its first event is the error.
            await response.write(_line("ERROR", _status_body(410, "too old resource version")))
            return response
        loop = asyncio.get_running_loop()
        end_s = loop.time() + float(request.query.get("timeoutSeconds", "3600"))
        while generation == self._generation and loop.time() < end_s:
            for version, found, event, document in list(self._history):
                if version <= seen or found != resource:
                    continue
                seen = version
                if event == "BOOKMARK" and not request.query.get("allowWatchBookmarks"):
                    continue
                if event == "BOOKMARK" or _selected(document, request):
                    await response.write(_line(event, self._shown(resource, document)))
            try:
                async with asyncio.timeout(end_s - loop.time()), self._news:
                    while generation == self._generation and self._version <= seen:
                        await self._news.wait()
            except TimeoutError:
                break
            # Other resources' news is none of this watch's.
            if not any(v > seen and found == resource for v, found, _, _ in self._history):
                seen = self._version
        if self._broken:
            with contextlib.suppress(ConnectionError):
                await response.write(b'{"type": "MODI')
            if request.transport is not None:
                request.transport.abort()
        return response

    async def _create(self, resource: str, document: Document) -> web.Response:
        name = document["metadata"]["name"]
        if (resource, name) in self.objects:
            return _status(409, f"{resource} {name} already exists")
        stored = await self._store(resource, name, document, "ADDED")
        return web.json_response(self._shown(resource, stored), status=201)

    async def _replace(self, resource: str, name: str, document: Document) -> web.Response:
        current = self.objects[resource, name]["metadata"]["resourceVersion"]
        given = document["metadata"].get("resourceVersion")
        if given is not None and given != current:
            return _status(409, "the object has been modified; please apply your changes to the"
                           " latest version")  # fmt: skip
        stored = await self._store(resource, name, document, "MODIFIED")
        return web.json_response(self._shown(resource, stored))

    async def _scale(self, resource: str, name: str, request: web.Request) -> web.Response:
        workload = self.objects[resource, name]
        if request.method == "PUT":
            body = await request.json()
            given = body["metadata"].get("resourceVersion")
            if given is not None and given != workload["metadata"]["resourceVersion"]:
                return _status(409, "the object has been modified")
            changed = copy.deepcopy(workload)
            changed["spec"]["replicas"] = body["spec"]["replicas"]
            workload = await self._store(resource, name, changed, "MODIFIED")
        return web.json_response(
            {
                "apiVersion": "autoscaling/v1",
                "kind": "Scale",
                "metadata": workload["metadata"] | {"namespace": "outrider"},
                "spec": {"replicas": workload["spec"]["replicas"]},
                "status": {"replicas": workload["spec"]["replicas"]},
            }
        )

    def _shown(self, resource: str, document: Document) -> Document:
        version, kind = _KINDS.get(resource, ("apps/v1", "Workload"))
        return {"apiVersion": version, "kind": kind, **document}


def _verb(request: web.Request, name: str) -> str:
    """The verb that RBAC has for a request."""
    if request.method == "GET":
        if name:
            return "get"
        return "watch" if request.query.get("watch", "").lower() == "true" else "list"
    return {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}[request.method]


def _selected(document: Document, request: web.Request) -> bool:
    labels = document["metadata"].get("labels", {})
    selector = request.query.get("labelSelector", "")
    pairs = [part.partition("=") for part in selector.split(",") if part]
    return all(labels.get(key) == value for key, _, value in pairs)


def _line(event: str, document: Document) -> bytes:
    return json.dumps({"type": event, "object": document}).encode() + b"\n"


def _status(code: int, message: str) -> web.Response:
    return web.json_response(_status_body(code, message), status=code)


def _status_body(code: int, message: str) -> Document:
    reasons = {404: "NotFound", 409: "Conflict", 410: "Expired", 403: "Forbidden"}
    return {
        "kind": "Status",
        "apiVersion": "v1",
        "status": "Failure",
        "message": message,
        "reason": reasons.get(code, "InternalError"),
        "code": code,
    }
