"""Our errors to gRPC status and back; the only place that knows the mapping.

Beside code and message, the trailing metadata carries `outrider-error`, the error's class,
`outrider-field`, the request field at fault, and `grpc-retry-pushback-ms`, when to try again, so
that clients need not parse messages.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import uuid
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio

from outrider.errors import (
    ConfigError,
    Exhausted,
    InternalError,
    InvalidRequest,
    Mismatch,
    OutriderError,
    StaleEpoch,
    Unavailable,
    UnknownGeneration,
    UnknownModel,
)

FIELD_KEY = "outrider-field"
ERROR_KEY = "outrider-error"
"""Its presence tells a server's own word from that of a broken connection."""
RETRY_KEY = "grpc-retry-pushback-ms"
"""When to try again, where gRPC's own retry policies look for it."""
GENERATION_FIELD = "generation_id"

_log = logging.getLogger(__name__)

# Most derived first: the first class that fits decides.
_CODES: tuple[tuple[type[OutriderError], grpc.StatusCode], ...] = (
    (UnknownModel, grpc.StatusCode.NOT_FOUND),
    (UnknownGeneration, grpc.StatusCode.NOT_FOUND),
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (Exhausted, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (StaleEpoch, grpc.StatusCode.ABORTED),
    (Mismatch, grpc.StatusCode.FAILED_PRECONDITION),
    (ConfigError, grpc.StatusCode.FAILED_PRECONDITION),
    (OutriderError, grpc.StatusCode.INTERNAL),
)


def code_of(error: OutriderError) -> grpc.StatusCode:
    """Return the gRPC status code for one of our errors."""
    return next(code for kind, code in _CODES if isinstance(error, kind))


@contextlib.asynccontextmanager
async def status_of_errors(
    context: grpc.aio.ServicerContext[Any, Any],
) -> AsyncIterator[None]:
    """Turn exceptions of a handler's body into a status; no traceback ever reaches a client."""
    try:
        yield
    except OutriderError as error:
        # Aborting would replace what was to be told anyway.
        metadata = [*(context.trailing_metadata() or ()), (ERROR_KEY, type(error).__name__)]
        if isinstance(error, InvalidRequest):
            metadata.append((FIELD_KEY, error.field))
        if isinstance(error, Exhausted) and error.retry_after_s is not None:
            metadata.append((RETRY_KEY, str(math.ceil(error.retry_after_s * 1000))))
        await _abort(context, code_of(error), str(error), tuple(metadata))
    except (grpc.aio.AbortError, grpc.aio.UsageError):
        raise
    except Exception:
        incident = uuid.uuid4().hex[:8]
        _log.exception("internal error, incident %s", incident)
        await _abort(
            context,
            grpc.StatusCode.INTERNAL,
            f"internal error; quote incident {incident} when you report it",
        )


async def _abort(
    context: grpc.aio.ServicerContext[Any, Any],
    code: grpc.StatusCode,
    text: str,
    metadata: tuple[tuple[str, str], ...] = (),
) -> None:
    try:
        await context.abort(code, text, metadata)
    except grpc.aio.InternalError:
        # The client has left, and nobody is there to be told.
        raise asyncio.CancelledError from None


def answered(error: grpc.aio.AioRpcError | grpc.RpcError) -> bool:
    """True if a server of ours said so, False if a connection broke or was never made."""
    if not isinstance(error, (grpc.aio.AioRpcError, grpc.Call)):
        return False
    return any(key == ERROR_KEY for key, _ in error.trailing_metadata() or ())


def error_of_status(error: grpc.aio.AioRpcError | grpc.RpcError) -> OutriderError:
    """Turn a failed call back into one of our errors, for clients."""
    # A failed call of grpc.aio is no `grpc.Call`, although it answers the same questions.
    if not isinstance(error, (grpc.aio.AioRpcError, grpc.Call)):
        return InternalError(str(error))
    message = error.details() or "no details"
    metadata = {key: value for key, value in error.trailing_metadata() or ()}
    field = str(metadata.get(FIELD_KEY, ""))
    message = message.removeprefix(f"{field}: ") if field else message
    match error.code():
        case grpc.StatusCode.INVALID_ARGUMENT:
            return InvalidRequest(field or "request", message)
        case grpc.StatusCode.NOT_FOUND if field == GENERATION_FIELD:
            return UnknownGeneration(field, message)
        case grpc.StatusCode.NOT_FOUND:
            return UnknownModel(field or "model", message)
        case grpc.StatusCode.RESOURCE_EXHAUSTED:
            hint = str(metadata.get(RETRY_KEY, ""))
            return Exhausted(message, int(hint) / 1000.0 if hint.isdigit() else None)
        case grpc.StatusCode.UNAVAILABLE | grpc.StatusCode.DEADLINE_EXCEEDED:
            return Unavailable(message)
        case grpc.StatusCode.ABORTED:
            return StaleEpoch(message, 0)
        case grpc.StatusCode.FAILED_PRECONDITION:
            return Mismatch(message)
        case _:
            return InternalError(f"{error.code().name}: {message}")
