"""A gRPC server with health, reflection and a clean stop.

Health: the empty service name answers "is the process alive", a service's own name answers "does
it take new work", so that liveness and readiness probes can differ.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Sequence

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from outrider.config import Tls
from outrider.errors import ConfigError
from outrider.serving.tls import is_loopback, server_credentials

STREAM_MESSAGE_BYTES_MAX = 64 * 1024 * 1024
"""Between services: a prompt of a million ids fits; gRPC's own default is 4 MiB."""

# Clients of ours ping idle connections every 20 s; a server that expects less answers GOAWAY.
CHANNEL_OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", STREAM_MESSAGE_BYTES_MAX),
    ("grpc.max_send_message_length", STREAM_MESSAGE_BYTES_MAX),
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A worker that restarts on the same address should be found again soon.
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.max_reconnect_backoff_ms", 2_000),
)

_CALLS_END_TURNS = 50
"""Looks, a hundredth of a second apart, at whether calls that were cut off have ended."""
_log = logging.getLogger(__name__)


class Server:
    """One listening gRPC server. Add servicers to `grpc` before `start`."""

    def __init__(
        self,
        service_names: Sequence[str],
        *,
        host: str,
        port: int,
        message_bytes_max: int = STREAM_MESSAGE_BYTES_MAX,
        tls: Tls | None = None,
        plaintext: bool = False,
    ) -> None:
        """With `plaintext`, other machines may connect although there is no `tls`."""
        self._tls, self._plaintext = tls, plaintext
        self._service_names = tuple(service_names)
        self._host, self._port = host, port
        self.grpc = grpc.aio.server(
            options=(
                ("grpc.max_receive_message_length", message_bytes_max),
                ("grpc.max_send_message_length", STREAM_MESSAGE_BYTES_MAX),
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
                # Two processes on one port would share connections at random.
                ("grpc.so_reuseport", 0),
            )
        )
        self._health = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.grpc)
        reflection.enable_server_reflection(
            (*self._service_names, health.SERVICE_NAME, reflection.SERVICE_NAME), self.grpc
        )

    async def start(self) -> str:
        """Listen; returns "host:port" with the port really bound. Raises `ConfigError`."""
        wanted = f"{self._host}:{self._port}"
        if self._tls is None and not self._plaintext and not is_loopback(self._host):
            raise ConfigError(
                f"other machines can reach {self._host}, so give --tls-cert, --tls-key and "
                "--tls-ca; or say --plaintext to do without"
            )
        try:
            if self._tls is None:
                port = self.grpc.add_insecure_port(wanted)
            else:
                port = self.grpc.add_secure_port(wanted, server_credentials(self._tls))
        except RuntimeError:
            port = 0
        if port == 0:
            raise ConfigError(f"cannot listen on {wanted}: the address is in use or not ours")
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.set_ready(False)
        await self.grpc.start()
        return f"{self._host}:{port}"

    async def set_ready(self, ready: bool) -> None:
        """Say whether new work is welcome."""
        state = health_pb2.HealthCheckResponse
        for name in self._service_names:
            await self._health.set(name, state.SERVING if ready else state.NOT_SERVING)

    async def set_alive(self, alive: bool) -> None:
        """Say whether the process does its work; one that does not is to be restarted."""
        state = health_pb2.HealthCheckResponse
        await self._health.set("", state.SERVING if alive else state.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Stop listening; calls under way get `grace_s` to end."""
        await self._health.enter_graceful_shutdown()
        await self.grpc.stop(grace_s)
        # Calls that were cut off see their end through: cancelled once more, with the event loop,
        # they would be logged as errors.
        for _ in range(_CALLS_END_TURNS):
            if not any("_schedule_rpc_coro" in repr(task) for task in asyncio.all_tasks()):
                break
            await asyncio.sleep(0.01)


async def stop_requested() -> None:
    """Wait for SIGTERM or SIGINT. A second one ends the process at once."""
    loop = asyncio.get_running_loop()
    asked = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    await asked.wait()
    _log.info("asked to stop")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.remove_signal_handler(number)
        signal.signal(number, signal.SIG_DFL)
