"""The HTTP door before a verifier that is a script: formats, errors, endings."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterable
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.config import DriverConfig
from orchestrator.http.metrics import NAMES, PREFIX
from orchestrator.http.positions import KnownPosition, parse_event_id
from outrider.client import Request
from outrider.committed import digest
from outrider.domain import Grammar, GrammarKind, RejectionCode, SamplingParams, SessionSpec
from outrider.errors import InvalidRequest
from outrider.v1 import verifier_pb2
from tests.support.fleet import until
from tests.support.http_door import RunningDoor, http_door, streamed
from tests.support.scripted_verifier import (
    RunningScript,
    Script,
    answer,
    commit,
    opened,
    rejection,
    scripted_verifier,
)

Responses = Iterable[verifier_pb2.VerifyResponse]

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = b"hello you"


def honest(spec: SessionSpec) -> Responses:
    return answer(spec, TEXT)


def endless(spec: SessionSpec) -> Responses:
    """Begins, and never ends."""
    return [opened(spec), commit(spec, 0, b"on and on")]


def body(**options: Any) -> dict[str, Any]:
    return {"model": "scripted", "prompt": "Say", **options}


def chat(**options: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": "Say"}], **options}


@contextlib.asynccontextmanager
async def serving(
    script: Script = honest, **settings: Any
) -> AsyncIterator[tuple[RunningDoor, RunningScript]]:
    async with scripted_verifier(script) as target, http_door([target.address], **settings) as door:
        yield door, target


# --- parameters -------------------------------------------------------------------------------


async def test_every_parameter_reaches_the_verifier() -> None:
    async with serving() as (door, target):
        schema = {"type": "object", "required": ["name"]}
        response = await door.client.post(
            COMPLETE,
            json=body(
                prompt=list(b"Say it"),
                max_tokens=40,
                temperature=0.5,
                top_k=3,
                top_p=0.75,
                min_p=0.25,
                repetition_penalty=1.25,
                presence_penalty=-0.5,
                frequency_penalty=1.5,
                logit_bias={"9": -100, "2": 1.5},
                min_tokens=4,
                response_format={
                    "type": "json_schema",
                    "json_schema": {"name": "thing", "schema": schema, "strict": True},
                },
                stop_token_ids=[5],
                logprobs=2,
                echo=True,
                cache_salt="tenant",
                seed=-1,
            ),
        )
        assert response.status_code == 200, response.text
        (spec,) = target.verifier.opens
        assert spec == SessionSpec(
            session=spec.session,
            epoch=1,
            prompt=tuple(b"Say it"),
            committed=(),
            sampling=SamplingParams(
                temperature=0.5,
                top_k=3,
                top_p=0.75,
                min_p=0.25,
                repetition_penalty=1.25,
                presence_penalty=-0.5,
                frequency_penalty=1.5,
                logit_bias=((2, 1.5), (9, -100.0)),
                tokens_min=4,
                grammar=Grammar(GrammarKind.JSON_SCHEMA, json.dumps(schema)),
            ),
            seed=spec.seed,
            tokens_max=40,
            stop_ids=frozenset({5}),
            logprobs=2,
            prompt_logprobs=2,
            cache_salt="tenant",
            origin=spec.origin,
            own_guesses=True,
        )


async def test_the_seed_is_the_one_of_the_grpc_door() -> None:
    async with serving() as (door, target):
        await door.client.post(COMPLETE, json=body(seed=7))
        await door.orchestrator.client.complete(Request(prompt="Say", seed=7))
        first, second = target.verifier.opens
        assert first.seed == second.seed


@pytest.mark.parametrize(
    ("path", "request_body", "param"),
    [
        (COMPLETE, body(foo=1), "foo"),
        (COMPLETE, body(prompt=[]), "prompt"),
        (COMPLETE, body(prompt=""), "prompt"),
        (COMPLETE, body(prompt=[999]), "prompt"),
        (COMPLETE, body(temperature=-1), "temperature"),
        (COMPLETE, body(temperature="hot"), "temperature"),
        (COMPLETE, body(max_tokens=99_999), "max_tokens"),
        (COMPLETE, body(max_tokens=4, min_tokens=5), "min_tokens"),
        (COMPLETE, body(n=17), "n"),
        (COMPLETE, body(n=129), "n"),
        (COMPLETE, body(stop=["x"] * 17), "stop"),
        (COMPLETE, body(stop=[""]), "stop.0"),
        (COMPLETE, body(stop_token_ids=[999]), "stop_token_ids"),
        (COMPLETE, body(logit_bias={"999": 1}), "logit_bias"),
        (COMPLETE, body(logit_bias={"1": 101}), "logit_bias.1"),
        (COMPLETE, body(logit_bias={"1": 1, "01": 1}), "logit_bias"),
        (COMPLETE, body(logprobs=21), "logprobs"),
        (COMPLETE, body(cache_salt="x" * 257), "cache_salt"),
        (COMPLETE, body(stream_options={"include_usage": True}), "stream_options"),
        (COMPLETE, body(best_of=2), "best_of"),
        (COMPLETE, body(suffix="end"), "suffix"),
        (COMPLETE, body(ignore_eos=True, response_format={"type": "json_object"}), "ignore_eos"),
        (COMPLETE, body(response_format={"type": "yaml"}), "response_format"),
        (COMPLETE, body(response_format={"type": "json_schema"}), "response_format.json_schema"),
        (COMPLETE, body(speculative={"depth": 3}), "speculative.depth"),
        (
            COMPLETE,
            body(prediction={"type": "content", "content": "x"}, speculative={"enabled": False}),
            "prediction",
        ),
        (CHAT, chat(messages=[]), "messages"),
        (CHAT, chat(messages=[{"role": "king", "content": "x"}]), "messages.0.role"),
        (CHAT, chat(messages=[{"role": "user"}]), "messages.0.content"),
        (CHAT, chat(tools=[{"type": "function"}]), "tools"),
        (CHAT, chat(top_logprobs=2), "top_logprobs"),
        (CHAT, chat(max_tokens=3, max_completion_tokens=4), "max_tokens"),
        (CHAT, chat(max_completion_tokens=99_999), "max_completion_tokens"),
        (CHAT, chat(store=True), "store"),
    ],
)
async def test_what_cannot_be_honoured_is_refused_by_name(
    path: str, request_body: dict[str, Any], param: str
) -> None:
    async with serving() as (door, target):
        response = await door.client.post(path, json=request_body)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (400, param), error
        assert set(error) == {"message", "type", "param", "code"}
        assert error["type"] == "invalid_request_error"
        assert not target.verifier.opens


# --- answers ----------------------------------------------------------------------------------


async def test_a_completion() -> None:
    async with serving() as (door, _):
        answered = (await door.client.post(COMPLETE, json=body())).json()
        assert answered["object"] == "text_completion"
        assert answered["model"] == "scripted"
        (choice,) = answered["choices"]
        assert choice == {
            "index": 0,
            "text": "hello you",
            "logprobs": None,
            "finish_reason": "length",
        }
        assert answered["usage"]["prompt_tokens"] == 3
        assert answered["usage"]["completion_tokens"] == len(TEXT)
        assert answered["usage"]["total_tokens"] == 3 + len(TEXT)


async def test_a_chat_and_its_stream_say_the_same() -> None:
    async with serving() as (door, _):
        whole = (await door.client.post(CHAT, json=chat())).json()
        assert whole["object"] == "chat.completion"
        message = whole["choices"][0]["message"]
        assert message == {"role": "assistant", "content": "hello you", "refusal": None}
        options = {"include_usage": True}
        *chunks, usage, done = await streamed(door.client, CHAT, chat(stream_options=options))
        assert done.data == "[DONE]"
        assert {chunk.data["object"] for chunk in chunks} == {"chat.completion.chunk"}
        deltas = [chunk.data["choices"][0]["delta"] for chunk in chunks]
        assert deltas[0]["role"] == "assistant"
        assert not any("role" in delta for delta in deltas[1:])
        assert "".join(delta.get("content", "") for delta in deltas) == "hello you"
        reasons = [chunk.data["choices"][0]["finish_reason"] for chunk in chunks]
        assert reasons == [None] * (len(chunks) - 1) + ["length"]
        assert [chunk.data["usage"] for chunk in chunks] == [None] * len(chunks)
        assert usage.data["choices"] == []
        assert usage.data["usage"] == whole["usage"]


async def test_events_say_where_they_are() -> None:
    async with serving() as (door, _):
        events = await streamed(door.client, COMPLETE, body(n=2, return_token_ids=True))
        ids: list[list[int]] = [[], []]
        text, ended = ["", ""], [False, False]
        for event in events[:-1]:
            (choice,) = event.data["choices"]
            index = choice["index"]
            ids[index] += choice["token_ids"]
            text[index] += choice["text"]
            ended[index] |= choice["finish_reason"] is not None
            number, positions = parse_event_id(event.id)
            assert number == event.data["id"].partition("-")[2]
            assert positions == tuple(
                KnownPosition(len(have), digest(have), len(said), over)
                for have, said, over in zip(ids, text, ended, strict=True)
            )
        assert ids == [list(TEXT)] * 2


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        ":",
        "g:",
        "g:1",
        f"g:1-{'0' * 16}",
        f"g:1-{'0' * 16}-1,",
        f" g:1-{'0' * 16}-1",
    ],
)
def test_what_is_no_events_id_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="last-event-id"):
        parse_event_id(text)


async def test_usage_may_come_with_every_chunk() -> None:
    async with serving() as (door, _):
        options = {"include_usage": True, "continuous_usage_stats": True}
        *chunks, last, _ = await streamed(door.client, COMPLETE, body(stream_options=options))
        counts = [chunk.data["usage"]["completion_tokens"] for chunk in chunks]
        assert counts == sorted(counts)
        assert counts[-1] == last.data["usage"]["completion_tokens"] == len(TEXT)


async def test_echo_and_logprobs_cover_prompt_and_output() -> None:
    async with serving() as (door, _):
        whole = (await door.client.post(COMPLETE, json=body(echo=True, logprobs=2))).json()
        (choice,) = whole["choices"]
        assert choice["text"] == "Sayhello you"
        logprobs = choice["logprobs"]
        assert "".join(logprobs["tokens"]) == choice["text"]
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["top_logprobs"][0] is None
        # As the script scores them: -id / 8.
        assert logprobs["token_logprobs"][1:] == [-ord(c) / 8 for c in choice["text"][1:]]
        assert logprobs["text_offset"] == list(range(len(choice["text"])))
        assert logprobs["top_logprobs"][1] == {"\x00": 0.0, "\x01": -0.25, "a": -97 / 8}
        events = await streamed(door.client, COMPLETE, body(echo=True, logprobs=2))
        parts = [event.data["choices"][0] for event in events[:-1]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            joined = [one for part in parts if part["logprobs"] for one in part["logprobs"][name]]
            assert joined == logprobs[name]


async def test_chat_logprobs() -> None:
    async with serving() as (door, _):
        whole = (await door.client.post(CHAT, json=chat(logprobs=True, top_logprobs=1))).json()
        entries = whole["choices"][0]["logprobs"]["content"]
        assert [entry["token"] for entry in entries] == list("hello you")
        best = {"token": "\x00", "logprob": 0.0, "bytes": [0]}
        first = {"token": "h", "logprob": -13.0, "bytes": [104], "top_logprobs": [best]}
        assert entries[0] == first


async def test_several_prompts_and_choices() -> None:
    async with serving() as (door, target):
        wanted = body(prompt=["Say", "Tell"], n=2)
        whole = (await door.client.post(COMPLETE, json=wanted)).json()
        assert [choice["index"] for choice in whole["choices"]] == [0, 1, 2, 3]
        assert whole["usage"]["prompt_tokens"] == len("SayTell")
        assert whole["usage"]["completion_tokens"] == 4 * len(TEXT)
        assert [bytes(spec.prompt) for spec in target.verifier.opens] == [
            *(b"Say", b"Say", b"Tell", b"Tell")
        ]
        events = await streamed(door.client, COMPLETE, wanted)
        texts = dict.fromkeys(range(4), "")
        for event in events[:-1]:
            texts[event.data["choices"][0]["index"]] += event.data["choices"][0]["text"]
        assert set(texts.values()) == {"hello you"}


# --- errors and endings -----------------------------------------------------------------------


async def test_errors_have_their_status() -> None:
    async with serving(driver=DriverConfig(sessions_max=1)) as (door, _):
        unknown = await door.client.post(COMPLETE, json=body(model="other"))
        assert unknown.status_code == 404
        assert unknown.json()["error"]["code"] == "model_not_found"
        assert (await door.client.get("/nowhere")).status_code == 404
        wrong = await door.client.get(COMPLETE)
        assert wrong.status_code == 405
        full = await door.client.post(COMPLETE, json=body(prompt=["a", "b"]))
        assert full.status_code == 400
        no_json = await door.client.post(
            COMPLETE, content=b"{}", headers={"content-type": "text/x"}
        )
        assert no_json.status_code == 415


async def test_no_room_is_429_and_says_when_to_return() -> None:
    async with (
        serving(endless, driver=DriverConfig(sessions_max=1)) as (door, _),
        door.client.stream("POST", COMPLETE, json=body(stream=True)) as response,
    ):
        assert response.status_code == 200
        refused = await door.client.post(COMPLETE, json=body())
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"


async def test_no_verifier_is_503_and_not_ready() -> None:
    async with http_door([], wait=False) as door:
        for response in (
            await door.client.post(COMPLETE, json=body()),
            await door.client.get("/health/ready"),
            await door.client.get("/health"),
        ):
            assert response.status_code == 503
            assert response.headers["retry-after"]
        assert (await door.client.get("/health/live")).status_code == 200


async def test_a_verifiers_refusal_names_the_clients_field() -> None:
    def refuse(spec: SessionSpec) -> Responses:
        name = "sampling.grammar.json_schema"
        return [rejection(spec, RejectionCode.INVALID, "cannot be compiled", name)]

    async with serving(refuse) as (door, _):
        wanted = body(response_format={"type": "json_object"})
        for stream in (False, True):
            response = await door.client.post(COMPLETE, json={**wanted, "stream": stream})
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "response_format"


async def test_an_error_after_the_first_output_is_an_event() -> None:
    def breaks(spec: SessionSpec) -> Responses:
        yield opened(spec)
        yield commit(spec, 0, b"so f")
        yield rejection(spec, RejectionCode.INVALID, "no more", "request")

    async with serving(breaks) as (door, _):
        events = await streamed(door.client, COMPLETE, body())
        assert events[0].data["choices"][0]["text"] == "so f"
        assert events[-2].data["error"]["message"] == "no more"
        assert events[-1].data == "[DONE]"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_frees_its_sessions(stream: bool) -> None:
    async with serving(endless) as (door, target):
        task = asyncio.create_task(
            door.client.post(COMPLETE, json=body(n=2, stream=stream), timeout=20)
        )

        async def under_way() -> bool:
            return len(target.verifier.opens) == 2

        await until(under_way, what="both sessions open")
        task.cancel()

        async def freed() -> bool:
            return len(target.verifier.aborts) == 2 and door.orchestrator.driver.load == 0

        await until(freed, what="both sessions aborted")
        metrics = (await door.client.get("/metrics")).text
        assert 'outrider_requests_total{outcome="abandoned"} 1.0' in metrics


async def test_draining_is_seen_from_outside() -> None:
    async with serving() as (door, _):
        await door.orchestrator.driver.drain(0)
        assert (await door.client.get("/health/ready")).status_code == 503
        assert (await door.client.get("/health/live")).status_code == 200
        response = await door.client.post(COMPLETE, json=body())
        assert response.status_code == 503
        assert response.headers["retry-after"]


async def test_models_and_version() -> None:
    async with serving() as (door, _):
        (card,) = (await door.client.get("/v1/models")).json()["data"]
        assert card["id"] == "scripted"
        assert (await door.client.get("/v1/models/scripted")).json() == card
        assert (await door.client.get("/v1/models/a/b")).status_code == 404
        assert (await door.client.get("/version")).json()["protocol_version"] == 1


# --- metrics ----------------------------------------------------------------------------------


async def test_documented_metrics_exist_and_no_others() -> None:
    async with serving(vllm_metrics=True) as (door, _):
        await door.client.post(COMPLETE, json=body())
        text = (await door.client.get("/metrics")).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        ours = {name for name in families if name.startswith(PREFIX)}
        assert ours == {PREFIX + name.removesuffix("_total") for name in NAMES}
        assert all(families[name].documentation for name in ours)
        samples = {
            (sample.name, *sample.labels.values()): sample.value
            for family in families.values()
            for sample in family.samples
        }
        steps = (len(TEXT) + 1) // 2
        assert samples["outrider_requests_total", "length"] == 1
        assert samples["outrider_completion_tokens_total",] == len(TEXT)
        assert samples["outrider_ttft_seconds_count",] == 1
        assert samples["outrider_itl_seconds_count",] == len(TEXT) - 2
        assert samples["outrider_accepted_tokens_per_position_total", "0"] == steps - 1
        assert samples["outrider_workers", "verifier", "ready"] == 1
        assert samples["vllm:spec_decode_num_accepted_tokens_per_pos_total", "0"] == steps - 1
        assert samples["vllm:time_to_first_token_seconds_count",] == 1


async def test_other_engines_names_are_off_by_default() -> None:
    async with serving() as (door, _):
        assert "vllm:" not in (await door.client.get("/metrics")).text


async def test_request_times_are_counted_once_for_all_choices() -> None:
    async with serving() as (door, _):
        await door.client.post(COMPLETE, json=body(n=3))
        meters = door.orchestrator.driver.meters
        assert dict(meters.requests) == {"length": 1}
        assert sum(meters.first_token_s.counts) == 3
        assert dataclasses.asdict(meters.ended)["verify_steps"] == 3


async def test_a_timeline_comes_with_the_metrics() -> None:
    async with serving() as (door, _):
        wanted = {"speculative": {"timeline": True}}
        whole = (await door.client.post(COMPLETE, json=body(**wanted))).json()
        names = {event["name"] for event in whole["metrics"]["timeline"]["traceEvents"]}
        assert {"process_name", "verifier chosen", "miss"} <= names
        options = {**wanted, "stream_options": {"include_usage": True}}
        told = await streamed(door.client, CHAT, chat(**options))
        assert told[-2].data["metrics"]["timeline"]["traceEvents"]
        plain = (await door.client.post(COMPLETE, json=body())).json()
        assert "timeline" not in plain["metrics"]


@pytest.mark.parametrize("options", [{"n": 2}, {"stream": True}, {"prompt": ["a", "b"]}])
async def test_a_timeline_that_would_be_lost_is_refused(options: dict[str, Any]) -> None:
    async with serving() as (door, _):
        wanted = body(**options, speculative={"timeline": True})
        response = await door.client.post(COMPLETE, json=wanted)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "speculative.timeline"
