"""Listens for HTTP, on the event loop of the gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from orchestrator.config import HttpConfig
from orchestrator.http.app import Door
from orchestrator.http.connections import connection_class
from orchestrator.http.keys import Keyring
from outrider.errors import ConfigError
from outrider.serving.tls import is_loopback

_KEEP_ALIVE_S = 30
_GRACE_S = 1

_log = logging.getLogger(__name__)


class HttpServer:
    """One listening HTTP server."""

    def __init__(self, door: Door, config: HttpConfig) -> None:
        """Raises `ConfigError`."""
        check_exposure(config)
        self._door, self._config = door, config
        self._tls = _tls(config)
        self._server: _Server | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._seen: dict[Path, float] = {}

    async def start(self) -> str:
        """Listen; returns the URL with the port really bound. Raises `ConfigError`."""
        config = self._config
        # Its news of starting and stopping are ours to tell.
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        self._load_keys()
        self._load_certificate()
        listener = _listen(config.host, config.port)
        self._server = _Server(
            uvicorn.Config(
                self._door,
                http=connection_class(config),
                ws="none",
                lifespan="off",
                loop="none",
                interface="asgi3",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=_GRACE_S,
                ssl_certfile=config.certificate,
                ssl_context_factory=self._context if self._tls is not None else None,
            )
        )
        connections = self._server.server_state.connections
        self._door.connections = lambda: len(connections)
        self._tasks = [asyncio.create_task(self._server.serve([listener]))]
        if self._seen:
            self._tasks.append(asyncio.create_task(self._follow_files()))
        host, port = listener.getsockname()[:2]
        scheme = "https" if self._tls is not None else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def stop(self) -> None:
        """Stop listening; answers under way get a moment to end."""
        if self._server is None:
            return
        self._server.should_exit = True
        for task in self._tasks[1:]:
            task.cancel()
        await self._tasks[0]

    def _context(self, config: uvicorn.Config, default: Any) -> ssl.SSLContext:
        assert self._tls is not None, "asked for only with a certificate"
        return self._tls

    async def _follow_files(self) -> None:
        while True:
            await asyncio.sleep(self._config.reload_s)
            for load in (self._load_keys, self._load_certificate):
                try:
                    load()
                except ConfigError as error:
                    _log.error("%s; what was read before stays in force", error)

    def _load_keys(self) -> None:
        """Read keys that have changed. Raises `ConfigError`."""
        path = self._config.keys
        if path is not None and self._changed(path):
            self._door.keyring = Keyring.load(path)

    def _load_certificate(self) -> None:
        """Read a certificate that has changed. Raises `ConfigError`."""
        if self._tls is not None and any([*map(self._changed, self._certificate_files())]):
            _load_certificate(self._tls, self._config)

    def _certificate_files(self) -> Iterator[Path]:
        return (path for path in (self._config.certificate, self._config.private_key) if path)

    def _changed(self, path: Path) -> bool:
        try:
            changed_s = path.stat().st_mtime
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
        before_s, self._seen[path] = self._seen.get(path), changed_s
        return before_s != changed_s


class _Server(uvicorn.Server):
    """Leaves signals to whoever puts the process together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def check_exposure(config: HttpConfig) -> None:
    """Refuse to serve other machines without TLS and keys unless told to. Raises `ConfigError`."""
    if config.private_key is not None and config.certificate is None:
        raise ConfigError("a private key for HTTP is of no use without a certificate")
    if config.open_to_all or is_loopback(config.host):
        return
    lacking = [
        name
        for name, value in (("--http-cert", config.certificate), ("--api-keys", config.keys))
        if value is None
    ]
    if lacking:
        raise ConfigError(
            f"other machines can reach {config.host}, so HTTP there needs {' and '.join(lacking)};"
            " or say --http-open to do without"
        )


def _listen(host: str, port: int) -> socket.socket:
    host = host.strip("[]")
    try:
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.create_server(address[:2], family=family, backlog=1_024)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listener.setblocking(False)
    return listener


def _tls(config: HttpConfig) -> ssl.SSLContext | None:
    if config.certificate is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    _load_certificate(context, config)
    return context


def _load_certificate(context: ssl.SSLContext, config: HttpConfig) -> None:
    assert config.certificate is not None, "asked for only with a certificate"
    try:
        context.load_cert_chain(config.certificate, config.private_key)
    except OSError as error:  # ssl.SSLError is one.
        raise ConfigError(f"certificate {config.certificate} cannot be used: {error}") from error
