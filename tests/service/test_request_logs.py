"""What services log of requests: their names, never what was asked or answered."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator
from typing import Any

import grpc.aio
import pytest

from outrider.domain import RejectionCode, SessionSpec
from outrider.serving import logs
from outrider.v1 import generation_pb2, generation_pb2_grpc, types_pb2, verifier_pb2
from tests.support.fleet import TARGET, drafter, load, lookup, orchestrator, until, verifier
from tests.support.http_door import http_door
from tests.support.scripted_verifier import answer, rejection, scripted_verifier

ASKED, ANSWERED = "xylophone", b"parsley"
SAY = {"model": "scripted", "prompt": "x"}
COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"


class Heard:
    """All that has been logged, as a service would print it."""

    def __init__(self) -> None:
        self.stream = io.StringIO()

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def of(self, request_id: str) -> list[str]:
        """Messages that name a request."""
        return [one["message"] for one in self.lines if one.get("request_id") == request_id]


@pytest.fixture
def heard() -> Iterator[Heard]:
    heard, root = Heard(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logs.configure_logging("test", level="debug", fmt="json")
    root.handlers[0].setStream(heard.stream)  # type: ignore[attr-defined]
    yield heard
    root.handlers[:] = handlers
    root.setLevel(level)


def honest(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    return answer(spec, ANSWERED)


def bodies() -> list[tuple[str, dict[str, Any]]]:
    """Requests that hold the canary wherever a text can be, right and wrong."""
    turn = {"role": "user", "content": ASKED}
    base = {"model": "scripted", "prompt": ASKED}
    talk = {"model": "scripted", "messages": [turn]}
    schema = {"type": ASKED, "properties": {ASKED: {}}}
    return [
        (COMPLETE, {**base, "stop": [ASKED], "user": ASKED, "cache_salt": ASKED}),
        (COMPLETE, {**base, "echo": True, "logprobs": 2, "stream": True}),
        (CHAT, {**talk, "prediction": {"type": "content", "content": ASKED}}),
        (CHAT, {**talk, "messages": [{"role": ASKED, "content": ASKED}]}),
        (COMPLETE, {**base, "prompt": [ASKED, [1, 2, ASKED]]}),
        (COMPLETE, {**base, "model": ASKED}),
        (COMPLETE, {**base, ASKED: ASKED}),
        (COMPLETE, {**base, "temperature": ASKED}),
        (COMPLETE, {**base, "logit_bias": {ASKED: 1}}),
        (COMPLETE, {**base, "stop": [ASKED] * 100}),
        (
            CHAT,
            {
                **talk,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": ASKED, "schema": schema},
                },
            },
        ),
    ]


async def test_no_line_holds_what_was_asked_or_answered(heard: Heard) -> None:
    async with scripted_verifier(honest) as target, http_door([target.address]) as door:
        statuses = []
        for index, (path, body) in enumerate(bodies()):
            named = {"x-request-id": f"r-{index}"}
            response = await door.client.post(path, json=body, headers=named)
            statuses.append(response.status_code)
            assert response.headers["x-request-id"] == f"r-{index}"
            assert "answered" in heard.of(f"r-{index}")
        assert statuses.count(200) >= 3, statuses
        assert max(statuses) < 500, statuses

        def broken(*_: object) -> None:
            raise ValueError(f"cannot make sense of {ASKED}")

        door.orchestrator.fleet.models = broken  # type: ignore[method-assign,assignment]
        named = {"x-request-id": "r-broken"}
        response = await door.client.post(COMPLETE, json=bodies()[0][1], headers=named)
        assert response.status_code == 500
        assert any("internal error" in message for message in heard.of("r-broken"))
    text = heard.stream.getvalue()
    assert ASKED not in text
    assert ANSWERED.decode() not in text
    assert all(ord(character) < 128 for character in text)


async def test_a_request_can_be_followed_through_all_services(heard: Heard) -> None:
    async with (
        verifier(load(TARGET)) as target,
        drafter(lookup()) as guesser,
        orchestrator([target.address], [guesser.address]) as running,
        grpc.aio.insecure_channel(running.address) as channel,
    ):
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        request = generation_pb2.GenerateRequest(
            prompt=f"{ASKED}, {ASKED}",
            tokens_max=12,
            ignore_eos=True,
            sampling=types_pb2.SamplingParams(temperature=0),
        )
        call = stub.Generate(request, metadata=(("x-request-id", "r-7"),))
        text = "".join([response.delta.text async for response in call])
        assert ("x-request-id", "r-7") in tuple(await call.trailing_metadata())

        async def told() -> bool:
            return len(heard.of("r-7")) >= 3

        await until(told, what="all services have told of the session")
    loggers = {one["logger"] for one in heard.lines if one.get("request_id") == "r-7"}
    expected = {"orchestrator.reporting", "verifier_service.accounts", "drafter_service.accounts"}
    assert expected <= loggers
    named = [one for one in heard.lines if one.get("request_id") == "r-7"]
    assert len({one["session"] for one in named if "session" in one}) == 1
    assert ASKED not in heard.stream.getvalue()
    assert json.dumps(text)[1:-1] not in heard.stream.getvalue()


@pytest.mark.parametrize("number", ["", "two words", "x" * 129, 'a"b', "naïve"])
async def test_names_that_do_not_fit_a_log_are_replaced(heard: Heard, number: str) -> None:
    async with scripted_verifier(honest) as target, http_door([target.address]) as door:
        named = {"x-request-id": number.encode("latin-1").decode("latin-1")}
        sent = [(name.encode(), value.encode("latin-1")) for name, value in named.items()]
        response = await door.client.post(COMPLETE, json=SAY, headers=sent)
        told = response.headers["x-request-id"]
        assert told != number
        assert len(told) == 32
        assert heard.of(told)


async def test_refusals_of_the_verifier_are_told_by_kind(heard: Heard) -> None:
    def refusing(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
        text = f"cannot parse {ASKED}"
        yield rejection(spec, RejectionCode.INVALID, text, "sampling.grammar.regex")

    async with scripted_verifier(refusing) as target, http_door([target.address]) as door:
        named = {"x-request-id": "r-1"}
        response = await door.client.post(COMPLETE, json=SAY, headers=named)
        assert response.status_code == 400
    assert ASKED not in heard.stream.getvalue()
    ended = [one for one in heard.lines if one["message"] == "session ended"]
    assert [one["end"] for one in ended] == ["invalid"]
