"""Request bodies: read within bounds, parsed against their schema."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any, TypeAlias, TypeVar

from pydantic import BaseModel, ValidationError

from orchestrator.config import HttpConfig
from orchestrator.http.errors import TooLarge, TooSlow, WrongMediaType, invalid_body
from outrider.errors import Exhausted, InvalidRequest

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BodyT = TypeVar("BodyT", bound=BaseModel)


class ClientGoneError(Exception):
    """The client has left; nobody is there to be told anything."""


class BodyReader:
    """Reads bodies, and knows how much of them is held in memory."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self._held_bytes = 0

    async def read(self, scope: Scope, receive: Receive) -> bytes:
        """Return the whole body. Raises `InvalidRequest`, `Exhausted` or `ClientGoneError`."""
        headers = dict(scope["headers"])
        # Said, not guessed: a web page elsewhere may have a browser post what has no type.
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            raise WrongMediaType("request", "the body must be application/json")
        if int(headers.get(b"content-length", b"0")) > self._config.body_bytes_max:
            raise self._too_large()
        with self._hold() as hold:
            try:
                async with asyncio.timeout(self._config.body_timeout_s):
                    return await self._pieces(receive, hold)
            except TimeoutError:
                limit_s = self._config.body_timeout_s
                raise TooSlow("request", f"the body did not come within {limit_s:g} s") from None

    async def _pieces(self, receive: Receive, hold: Callable[[int], None]) -> bytes:
        pieces: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece: bytes = message.get("body", b"")
            size += len(piece)
            if size > self._config.body_bytes_max:
                raise self._too_large()
            hold(len(piece))
            pieces.append(piece)
            if not message.get("more_body", False):
                return b"".join(pieces)

    @contextlib.contextmanager
    def _hold(self) -> Iterator[Callable[[int], None]]:
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            if self._held_bytes + count > self._config.bodies_bytes_max:
                raise Exhausted("too many large requests are being read; try again later")
            mine += count
            self._held_bytes += count

        try:
            yield hold
        finally:
            self._held_bytes -= mine

    def _too_large(self) -> TooLarge:
        limit = self._config.body_bytes_max
        return TooLarge("request", f"the body has more than {limit} bytes, which is the limit")


def parse(kind: type[BodyT], data: bytes) -> BodyT:
    """Parse a body. Raises `InvalidRequest` naming the field."""
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        raise invalid_body(error) from None
    except RecursionError:
        raise InvalidRequest("request", "the body is nested too deeply") from None
