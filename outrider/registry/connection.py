"""A connection to Redis, shared by all that keeps something there.

Redis is a notice board: every call is bounded in time, and every failure is one error of ours, so
that callers go on without. Only commands that Redis 7.0 has.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Final
from urllib.parse import urlsplit

from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from outrider.errors import ConfigError, RegistryUnavailable

KEY_PREFIX: Final = "outrider:1:"
"""What all our keys begin with; the number is the version of their layout."""


class Connection:
    """Connections to one Redis; every call is bounded in time.

    May be created without a running event loop and while Redis is away.
    """

    def __init__(self, url: str, *, timeout_s: float = 2.0) -> None:
        """`timeout_s` bounds each call as a whole. Raises `ConfigError` for a wrong URL."""
        self.place: Final = redacted(url)
        """Where Redis is, fit for logs."""
        self._timeout_s = timeout_s
        self.redis: Final = Redis.from_pool(_connection_pool(url, timeout_s))
        """The client, which owns its pool; used within `call()` only."""

    @contextlib.asynccontextmanager
    async def call(self, timeout_s: float | None = None) -> AsyncIterator[None]:
        """Bound a call in time and turn Redis' errors into ours.

        Raises `RegistryUnavailable`.
        """
        bound_s = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(bound_s):
                yield
        except TimeoutError as error:
            message = f"Redis at {self.place} did not answer within {bound_s:g} s"
            raise RegistryUnavailable(message) from error
        # OSError: what the event loop raises below the client, such as a TLS failure.
        except (RedisError, OSError) as error:
            raise RegistryUnavailable(f"Redis at {self.place}: {error}") from error

    async def close(self) -> None:
        """Close the connections. Never raises for Redis' sake."""
        with contextlib.suppress(RegistryUnavailable):
            async with self.call():
                await self.redis.aclose()


def redacted(url: str) -> str:
    """Return host, port and database of a Redis URL, without user, password and options."""
    try:
        parts = urlsplit(url)
        port = "" if parts.port is None else f":{parts.port}"
        return f"{parts.scheme}://{parts.hostname or ''}{port}{parts.path}"
    except ValueError:
        return "(malformed URL)"


def _connection_pool(url: str, timeout_s: float) -> ConnectionPool:
    try:
        pool = ConnectionPool.from_url(
            url,
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            # Once: a connection that Redis closed meanwhile is only noticed by using it.
            retry=Retry(NoBackoff(), 1),
            # A managed service's extension that asks every server whether it has it.
            maint_notifications_config=MaintNotificationsConfig(enabled=False),
        )
        # Only here are the URL's options looked at. It does not connect.
        pool.make_connection()  # type: ignore[no-untyped-call]
    # Whatever it is: options reach constructors unchecked. Not chained, not quoted: errors of
    # parsing quote pieces of the URL, which may be pieces of a password.
    except Exception:
        raise ConfigError(
            "the Redis URL is wrong; it must look like redis://[user:password@]host:port/database, "
            "with rediss:// for TLS"
        ) from None
    return pool
