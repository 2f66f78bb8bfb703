"""What both clients do alike with calls."""

from __future__ import annotations

from typing import TypeAlias

import grpc

from outrider.errors import OutriderError, Unavailable
from outrider.serving.status import error_of_status
from outrider.v1 import generation_pb2

CALL_TIMEOUT_S = 30.0

AnyResponse: TypeAlias = generation_pb2.GenerateResponse | generation_pb2.ResumeResponse


def inner(
    response: AnyResponse,
) -> generation_pb2.GenerateResponse:
    """Return what a stream says, resumed or not."""
    if isinstance(response, generation_pb2.ResumeResponse):
        return response.response
    return response


def error_at(address: str, error: grpc.RpcError) -> OutriderError:
    """Turn a failed call into one of our errors."""
    ours = error_of_status(error)
    if isinstance(ours, Unavailable) and "connect" in str(ours):
        return Unavailable(f"no orchestrator answers at {address}; is it running? ({ours})")
    return ours
