"""Our errors to gRPC status and back, through a real server."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from outrider.errors import (
    ConfigError,
    Exhausted,
    InternalError,
    InvalidRequest,
    Mismatch,
    ModelLoadError,
    OutriderError,
    StaleEpoch,
    Unavailable,
    UnknownModel,
)
from outrider.serving.status import FIELD_KEY, code_of, error_of_status, status_of_errors

SECRET = "/etc/outrider/secret.json"


@contextlib.asynccontextmanager
async def failing_server(error: BaseException) -> AsyncIterator[grpc.aio.Channel]:
    """Serve one method whose body raises `error`."""

    async def fail(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        async with status_of_errors(context):
            raise error
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(fail)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("outrider.Test", {"Fail": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield channel
    finally:
        await server.stop(0)


async def failure_of(error: BaseException) -> grpc.aio.AioRpcError:
    async with failing_server(error) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/outrider.Test/Fail")(b"", timeout=20.0)
    return raised.value


CASES = [
    (InvalidRequest("sampling.top_p", "must lie above 0"), grpc.StatusCode.INVALID_ARGUMENT),
    (UnknownModel("model", "nobody serves 'gpt'; there is smollm2"), grpc.StatusCode.NOT_FOUND),
    (Exhausted("no room: äöü 日本\nsecond line"), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable("no verifier"), grpc.StatusCode.UNAVAILABLE),
    (StaleEpoch("another one holds it", 7), grpc.StatusCode.ABORTED),
    (Mismatch("run the same release"), grpc.StatusCode.FAILED_PRECONDITION),
]


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda case: type(case).__name__)
async def test_errors_come_back_as_what_they_were(
    error: OutriderError, code: grpc.StatusCode
) -> None:
    failure = await failure_of(error)
    assert failure.code() is code
    back = error_of_status(failure)
    assert type(back) is type(error)
    assert str(back) == str(error)
    if isinstance(error, InvalidRequest):
        assert isinstance(back, InvalidRequest)
        assert (back.field, back.message) == (error.field, error.message)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("x"), grpc.StatusCode.FAILED_PRECONDITION),
        (ModelLoadError("x"), grpc.StatusCode.INTERNAL),
        (InternalError("x"), grpc.StatusCode.INTERNAL),
        (OutriderError("x"), grpc.StatusCode.INTERNAL),
    ],
)
def test_the_other_errors_have_a_code_too(error: OutriderError, code: grpc.StatusCode) -> None:
    assert code_of(error) is code


def test_every_error_is_mapped_on_purpose() -> None:
    mapped = {type(error) for error, _ in CASES} | {ConfigError, ModelLoadError, InternalError}
    assert set(OutriderError.__subclasses__()) | {UnknownModel} == mapped


async def test_an_unexpected_error_says_nothing_but_an_incident(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.ERROR, "outrider.serving.status"):
        failure = await failure_of(KeyError(SECRET))
    assert failure.code() is grpc.StatusCode.INTERNAL
    details = failure.details() or ""
    assert "quote incident " in details
    for internal in (SECRET, "KeyError", "Traceback", ".py", "raise"):
        assert internal not in details
        assert internal not in str(failure.trailing_metadata())
    # Whoever runs the service finds the whole story under the number that the client was given.
    incident = details.split("incident ")[1].split()[0]
    record = next(record for record in caplog.records if incident in record.getMessage())
    assert record.exc_info is not None
    assert SECRET in str(record.exc_info[1])
    assert isinstance(error_of_status(failure), InternalError)


async def test_a_handlers_own_abort_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    async def refuse(request: bytes, context: grpc.aio.ServicerContext[Any, Any]) -> bytes:
        async with status_of_errors(context):
            await context.abort(grpc.StatusCode.OUT_OF_RANGE, "as I say")
        return b""

    server = grpc.aio.server()
    handler = grpc.unary_unary_rpc_method_handler(refuse)
    server.add_generic_rpc_handlers(
        (grpc.method_handlers_generic_handler("outrider.Test", {"Fail": handler}),)
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/outrider.Test/Fail")(b"", timeout=20.0)
    await server.stop(0)
    assert raised.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert raised.value.details() == "as I say"
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


def failed(code: grpc.StatusCode, details: str, **metadata: str) -> grpc.aio.AioRpcError:
    trailing = grpc.aio.Metadata(*metadata.items())
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, details=details)


def test_status_of_others_is_understood() -> None:
    deadline = error_of_status(failed(grpc.StatusCode.DEADLINE_EXCEEDED, "too late"))
    assert isinstance(deadline, Unavailable)
    bare = error_of_status(failed(grpc.StatusCode.INVALID_ARGUMENT, "no"))
    assert isinstance(bare, InvalidRequest)
    assert (bare.field, bare.message) == ("request", "no")
    named = error_of_status(failed(grpc.StatusCode.INVALID_ARGUMENT, "a: no", **{FIELD_KEY: "a"}))
    assert isinstance(named, InvalidRequest)
    assert (named.field, named.message) == ("a", "no")
    other = error_of_status(failed(grpc.StatusCode.UNIMPLEMENTED, "what?"))
    assert isinstance(other, InternalError)
    assert str(other) == "UNIMPLEMENTED: what?"
    assert str(error_of_status(failed(grpc.StatusCode.UNAVAILABLE, ""))) == "no details"
    assert str(error_of_status(grpc.RpcError("broken"))) == "broken"


async def test_a_server_that_is_not_there_is_unavailable() -> None:
    # Port 1 of the loopback needs no privilege to be refused.
    async with grpc.aio.insecure_channel("127.0.0.1:1") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/outrider.Test/Fail")(b"", timeout=20.0)
    assert isinstance(error_of_status(raised.value), Unavailable)
