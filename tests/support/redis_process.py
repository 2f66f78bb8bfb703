"""A Redis on a port of its own that can go away and come back empty."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from outrider import redis_server
from outrider.processes import spawn, stop
from outrider.redis_server import start_redis


class RedisProcess:
    """Runs from its making on, until it is stopped; `start` brings it back."""

    def __init__(self, folder: Path) -> None:
        self._log_path = folder / "redis.log"
        with start_redis(None, self._log_path) as server:
            self.url = server.url
        self._binary = next(redis_server._binaries())[1]
        self.start()

    @property
    def address(self) -> str:
        """host:port"""
        return urlsplit(self.url).netloc

    def start(self) -> None:
        """Start it, empty."""
        port = urlsplit(self.url).port
        assert port is not None
        words = ["--port", str(port), "--bind", "127.0.0.1", "--save", ""]
        self._process = spawn([self._binary, *words], self._log_path)
        assert redis_server._wait_until_ready(self._process, port)

    def stop(self) -> None:
        """End it; what it held is gone."""
        stop(self._process)
