"""Streams of events that break and go on at another orchestrator, by Last-Event-ID."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import pytest

from outrider.domain import FinishReason, SessionSpec
from outrider.redis_server import RedisServer, start_redis
from outrider.registry import Connection, Leases
from outrider.v1 import verifier_pb2
from tests.support.http_door import RunningDoor, SseEvent, events, http_door
from tests.support.scripted_verifier import commit, opened, scripted_verifier

TEXT = b"none lost, none doubled"
PATHS = {
    "/v1/completions": {"prompt": "Say"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Say"}]},
}


def halting(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    """Says half of it to whoever begins, and the rest to whoever goes on."""
    yield opened(spec)
    done = len(spec.committed)
    half = len(TEXT) // 2
    end = len(TEXT) if done >= half else half
    for start in range(done, end, 2):
        tokens = TEXT[start : min(start + 2, end)]
        last = start + len(tokens) == len(TEXT)
        yield commit(spec, start, tokens, FinishReason.LENGTH if last else None)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(None, tmp_path_factory.mktemp("redis") / "log") as running:
        yield running


@contextlib.asynccontextmanager
async def two_doors(redis: RedisServer) -> AsyncIterator[tuple[RunningDoor, RunningDoor]]:
    connection = Connection(redis.url)
    store = Leases(connection, 60.0)
    try:
        async with (
            scripted_verifier(halting) as target,
            http_door([target.address], store=store) as first,
            http_door([target.address], store=store) as second,
        ):
            yield first, second
    finally:
        await connection.close()


def body(path: str, **options: Any) -> dict[str, Any]:
    return {"model": "scripted", "stream": True, "return_token_ids": True, **PATHS[path], **options}


async def heard(
    door: RunningDoor, path: str, last: str = "", *, until_tokens: int = 1_000, **options: Any
) -> list[SseEvent]:
    """Read a stream to its end, or until so many tokens have come, then break it."""
    headers = {"last-event-id": last} if last else {}
    wanted = body(path, **options)
    said: list[SseEvent] = []
    async with door.client.stream("POST", path, json=wanted, headers=headers) as response:
        assert response.status_code == 200, await response.aread()
        async for event in events(response):
            said.append(event)
            if len(ids(said)) >= until_tokens:
                break
    return said


def ids(said: list[SseEvent]) -> list[int]:
    chunks = [event.data for event in said if event.data != "[DONE]"]
    return [one for chunk in chunks for part in chunk["choices"] for one in part["token_ids"]]


def text(said: list[SseEvent]) -> str:
    parts = [part for event in said if event.id for part in event.data["choices"]]
    return "".join(
        part["text"] if "text" in part else part["delta"].get("content", "") for part in parts
    )


@pytest.mark.parametrize("path", PATHS)
async def test_a_stream_goes_on_elsewhere_where_it_broke(redis: RedisServer, path: str) -> None:
    async with two_doors(redis) as (first, second):
        begun = await heard(first, path, until_tokens=len(TEXT) // 2)
        rest = await heard(second, path, begun[-1].id or "")
        assert ids(begun) + ids(rest) == list(TEXT)
        assert text(begun) + text(rest) == TEXT.decode()
        assert rest[-1].data == "[DONE]"
        assert rest[0].data["id"] == begun[0].data["id"]
        # Told again from an earlier event, and from the very last one.
        again = await heard(first, path, begun[0].id or "")
        assert ids(begun[:1]) + ids(again) == list(TEXT)
        over = await heard(second, path, rest[-2].id or "")
        assert [event.data for event in over] == ["[DONE]"]


async def test_what_cannot_be_resumed_is_refused(redis: RedisServer) -> None:
    path = "/v1/completions"
    async with two_doors(redis) as (first, second):
        begun = await heard(first, path, until_tokens=len(TEXT) // 2)
        known = begun[-1].id or ""
        generation, _, position = known.partition(":")
        offset, digest, rest = position.split("-", 2)
        for last, status in (
            ("nonsense", 400),
            (f"gen-of-nobody:{position}", 404),
            (f"{generation}:{offset}-{'0' * 16}-{rest}", 400),
            (f"{generation}:999-{digest}-{rest}", 409),
            (f"{known},{position}", 400),
        ):
            headers = {"last-event-id": last}
            response = await second.client.post(path, json=body(path), headers=headers)
            assert response.status_code == status, response.text
            if status != 409:
                assert response.json()["error"]["param"] == "last-event-id"
        whole = body(path, stream=False)
        headers = {"last-event-id": known}
        refused = await second.client.post(path, json=whole, headers=headers)
        assert refused.status_code == 400
        assert ids(begun) + ids(await heard(second, path, known)) == list(TEXT)
