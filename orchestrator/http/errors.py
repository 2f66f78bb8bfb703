"""Our errors to HTTP status and body; the only place that knows the mapping.

Bodies are OpenAI's: `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

import logging
import math
import re
import uuid
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from starlette.exceptions import HTTPException

from outrider.errors import (
    Exhausted,
    InvalidRequest,
    Mismatch,
    OutriderError,
    StaleEpoch,
    Unavailable,
    UnknownGeneration,
    UnknownModel,
)

_RETRY_S = 1
_log = logging.getLogger(__name__)


class RateLimited(Exhausted):
    """A key has used up what it is allowed; the same request may succeed later."""


class Unauthorized(InvalidRequest):
    """No key, or one that nobody knows."""


class TooLarge(InvalidRequest):
    """A body of more bytes than are taken."""


class TooSlow(InvalidRequest):
    """A body that did not arrive in time."""


class WrongMediaType(InvalidRequest):
    """A body that is no JSON."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What the client is told instead of an answer."""

    status: int
    message: str
    type: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()
    """Lines; a name may be in several of them."""

    @property
    def body(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "error": {
                "message": self.message,
                "type": self.type,
                "param": self.param,
                "code": self.code,
            }
        }


# Most derived first: the first class that fits decides.
_STATUS: tuple[tuple[type[OutriderError], int, str, str | None], ...] = (
    (Unauthorized, 401, "authentication_error", "invalid_api_key"),
    (TooLarge, 413, "invalid_request_error", "request_too_large"),
    (TooSlow, 408, "invalid_request_error", "request_timeout"),
    (WrongMediaType, 415, "invalid_request_error", "unsupported_media_type"),
    (UnknownModel, 404, "invalid_request_error", "model_not_found"),
    (UnknownGeneration, 404, "invalid_request_error", "generation_not_found"),
    (InvalidRequest, 400, "invalid_request_error", "invalid_value"),
    (RateLimited, 429, "rate_limit_error", "rate_limit_exceeded"),
    (Exhausted, 429, "rate_limit_error", "overloaded"),
    (Unavailable, 503, "server_error", "unavailable"),
    (StaleEpoch, 409, "server_error", "superseded"),
    (Mismatch, 409, "server_error", "mismatch"),
    (OutriderError, 500, "server_error", "internal_error"),
)


def refusal_of(error: Exception) -> Refusal:
    """Say what the client is told; a defect is logged under a number that the client gets."""
    match error:
        case OutriderError():
            return _of_ours(error)
        case HTTPException():  # The router's: no such route or method.
            headers = tuple((error.headers or {}).items())
            kind = "invalid_request_error"
            return Refusal(error.status_code, error.detail, kind, headers=headers)
        case _:
            incident = uuid.uuid4().hex[:8]
            _log.error("internal error, incident %s", incident, exc_info=error)
            message = f"internal error; quote incident {incident} when you report it"
            return Refusal(500, message, "server_error", code="internal_error")


# The second one makes a browser ask for the key; Chromium knows only the first one of a line.
_CHALLENGES = (
    ("www-authenticate", "Bearer"),
    ("www-authenticate", 'Basic realm="outrider", charset="UTF-8"'),
)


def _of_ours(error: OutriderError) -> Refusal:
    status, kind, code = next(row[1:] for row in _STATUS if isinstance(error, row[0]))
    headers: tuple[tuple[str, str], ...] = ()
    if isinstance(error, Exhausted) and error.retry_after_s is not None:
        headers = (("retry-after", str(max(1, math.ceil(error.retry_after_s)))),)
    elif status in (429, 503):
        headers = (("retry-after", str(_RETRY_S)),)
    elif status == 401:
        headers = _CHALLENGES
    if isinstance(error, InvalidRequest):
        # Nobody sends a field of these names: the request as a whole is at fault.
        param = error.field if error.field not in ("", "request", "authorization") else None
        return Refusal(status, error.message, kind, param, code, headers)
    return Refusal(status, str(error), kind, None, code, headers)


# How pydantic marks the members of a union in an error's place.
_TAG = re.compile(r"\W|^(str|int|float|bool|text|json_object|TextPart|constrained.*)$")


def invalid_body(error: ValidationError) -> InvalidRequest:
    """Name the field at fault of a body that does not fit its schema."""
    # Of a union's members the one that the client got furthest with says most.
    first = max(error.errors(include_url=False), key=lambda one: len(one["loc"]))
    parts = list(first["loc"])
    if parts[:1] == ["response_format"]:
        del parts[1:2]  # Which of the formats it is.
    place = [str(part) for part in parts if isinstance(part, int) or not _TAG.search(part)]
    if first["type"] == "extra_forbidden":
        return InvalidRequest(".".join(place), "is not supported")
    if first["type"] == "json_invalid":
        return InvalidRequest("request", f"the body is no JSON: {first['ctx']['error']}")
    message = first["msg"]
    return InvalidRequest(".".join(place) or "request", message[:1].lower() + message[1:])
