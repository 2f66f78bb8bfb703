"""The door itself: routes, who may pass, and what errors look like."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route, Router

import outrider
from orchestrator.config import DriverConfig, HttpConfig
from orchestrator.driver import Driver
from orchestrator.fleet import Fleet
from orchestrator.http.bodies import BodyReader, ClientGoneError, Receive, Scope, Send
from orchestrator.http.completions import Completions
from orchestrator.http.errors import Refusal, refusal_of
from orchestrator.http.keys import ANYBODY, Keyring, Limiter
from orchestrator.http.metrics import Exposition
from orchestrator.http.openapi import document
from orchestrator.http.overview import overview
from orchestrator.http.page import PAGE, PAGE_HEADERS
from orchestrator.http.reading import read_chat, read_completion
from orchestrator.http.schemas import ChatCompletionRequest, CompletionRequest
from orchestrator.http.writing import encode
from orchestrator.jobs import model_named
from orchestrator.takeover import Takeover
from outrider.domain import PROTOCOL_VERSION, RULE_VERSION, ModelInfo
from outrider.errors import Exhausted, Unavailable
from outrider.serving.origins import REQUEST_ID_KEY, answering, origin_of
from outrider.serving.telemetry import Tracing

_OPEN = frozenset({"/health", "/health/live", "/health/ready"})
"""Routes that need no key."""
_ALWAYS = _OPEN | {"/metrics"}
"""Routes that are served however many clients are connected."""
_NAMING = (REQUEST_ID_KEY, "traceparent", "tracestate")
"""Headers that name a request."""

_log = logging.getLogger(__name__)


class Door:
    """The ASGI application."""

    def __init__(
        self,
        driver: Driver,
        fleet: Fleet,
        takeover: Takeover,
        limits: DriverConfig,
        config: HttpConfig,
        tracing: Tracing | None = None,
    ) -> None:
        """With `tracing`, requests that generate are traced."""
        self._driver, self._fleet, self._tracing = driver, fleet, tracing
        self.keyring: Keyring | None = None
        """Who may ask; None: everybody."""
        self.responses: Counter[tuple[str, int]] = Counter()
        """Answers by route and status."""
        self._started_s = int(time.time())
        self._connections_max = config.connections_max
        self.connections: Callable[[], int] = lambda: 0
        """How many clients are connected; whoever listens says so."""
        exposition = Exposition(
            driver,
            fleet,
            self.responses,
            vllm_names=config.vllm_metrics,
            connections=lambda: self.connections(),
            connections_max=config.connections_max,
        )
        shared: dict[str, Any] = {"bodies": BodyReader(config), "limiter": Limiter()}
        common = (driver, fleet, takeover, limits, config)
        generating: dict[str, Completions[Any]] = {
            "/v1/completions": Completions(CompletionRequest, read_completion, *common, **shared),
            "/v1/chat/completions": Completions(
                ChatCompletionRequest, read_chat, *common, **shared
            ),
        }
        openapi = encode(document())
        page = HTMLResponse(PAGE, headers=PAGE_HEADERS)

        async def metrics(request: Request) -> Response:
            return Response(exposition.text(), media_type=exposition.media_type)

        async def published(request: Request) -> Response:
            return Response(openapi, media_type="application/json")

        async def live_page(request: Request) -> Response:
            return page

        self._router = Router(
            [
                Route("/health", self._ready),
                Route("/health/live", self._live),
                Route("/health/ready", self._ready),
                Route("/version", self._version),
                Route("/metrics", metrics),
                Route("/openapi.json", published),
                Route("/v1/models", self._models),
                Route("/v1/models/{model:path}", self._model),
                Route("/fleet", self._workers),
                Route("/", live_page),
                *(Route(path, app, methods=["POST"]) for path, app in generating.items()),
            ],
            redirect_slashes=False,
        )
        self._generating = frozenset(generating)
        self._routes = {route.path for route in self._router.routes if isinstance(route, Route)}

    @property
    def paths(self) -> frozenset[str]:
        """All routes."""
        return frozenset(self._routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            return
        path: str = scope["path"]
        route = path if path in self._routes else "other"
        headers = dict(scope["headers"])
        origin = origin_of(
            {name: headers.get(name.encode(), b"").decode("latin-1") for name in _NAMING}
        )
        began_s = time.monotonic()
        status = 0

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                name = (REQUEST_ID_KEY.encode(), origin.request_id.encode())
                message = {**message, "headers": [*message["headers"], name]}
                self.responses[route, status] += 1
            await send(message)

        scope["app"] = self  # Has the router raise what it otherwise answers in plain text.
        generating = path in self._generating
        tracing = self._tracing if generating else None
        with answering(tracing, f"POST {path}", origin) as request:
            scope["state"]["origin"] = request.origin
            try:
                self._let_in(scope, path)
                await self._router(scope, receive, told)
            except ClientGoneError:
                await _abort(scope, receive)
            except Exception as error:
                request.failed(error)
                refusal = refusal_of(error)
                if status:
                    await _abort(scope, receive)
                else:
                    surplus = scope["state"].get("surplus", False)
                    await _refuse(refusal, told, close=surplus)
            finally:
                took_s = round(time.monotonic() - began_s, 6)
                level = logging.INFO if generating else logging.DEBUG
                fields = {"route": route, "status": status, "took_s": took_s}
                _log.log(level, "answered", extra=fields)
                request.tell({"http.route": route, "http.response.status_code": status})

    def _let_in(self, scope: Scope, path: str) -> None:
        if scope["state"].get("surplus") and path not in _ALWAYS:
            raise Exhausted(
                f"the orchestrator has {self._connections_max} connections, which is the most;"
                " ask another replica, or try again later"
            )
        scope["state"]["key"] = ANYBODY
        if self.keyring is not None and path not in _OPEN:
            authorization = dict(scope["headers"]).get(b"authorization", b"")
            scope["state"]["key"] = self.keyring.find(authorization.decode("latin-1"))

    # --- small routes ---

    async def _live(self, request: Request) -> Response:
        return _json({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        if self._driver.draining:
            raise Unavailable("the orchestrator is draining; ask another replica")
        if not self._fleet.models():
            raise Unavailable("no verifier is ready; try again in a moment")
        return _json({"status": "ready"})

    async def _version(self, request: Request) -> Response:
        return _json(
            {
                "version": outrider.__version__,
                "protocol_version": PROTOCOL_VERSION,
                "rule_version": RULE_VERSION,
            }
        )

    async def _models(self, request: Request) -> Response:
        models = [self._card(info) for info in self._fleet.models().values()]
        return _json({"object": "list", "data": models})

    async def _model(self, request: Request) -> Response:
        return _json(self._card(model_named(request.path_params["model"], self._fleet.models())))

    def _card(self, info: ModelInfo) -> dict[str, Any]:
        return {
            "id": info.model,
            "object": "model",
            "created": self._started_s,
            "owned_by": "outrider",
            "max_model_len": info.length_max,
            "fingerprint": info.model_fingerprint,
        }

    async def _workers(self, request: Request) -> Response:
        return _json(overview(self._driver, self._fleet))


def _json(value: Any) -> Response:
    return Response(encode(value), media_type="application/json")


async def _refuse(refusal: Refusal, send: Send, *, close: bool) -> None:
    body = encode(refusal.body).encode()
    headers = [
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        *refusal.headers,
    ]
    if close or refusal.status in (408, 413):  # The rest of such a body is not going to be read.
        headers.append(("connection", "close"))
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": False})


async def _abort(scope: Scope, receive: Receive) -> None:
    """Cut the connection off and wait until it is: the client is gone, or must see a break."""
    abort = scope["state"].get("abort")
    if abort is None:
        return
    abort()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(1.0):
            while (await receive())["type"] != "http.disconnect":
                pass
