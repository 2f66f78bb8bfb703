"""The HTTP door before a whole fleet of tiny models: the same ids, speculated or not."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

import jsonschema
import openai
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fleet import DRAFT, TARGET, drafter, language_model, load, lookup, verifier
from tests.support.http_door import RunningDoor, http_door, streamed

COMPLETE, CHAT = "/v1/completions", "/v1/chat/completions"
TEXT = "def add(a, b):\n    return a + b\n\n\ndef subtract(a, b):\n    return a - b\n"


@contextlib.asynccontextmanager
async def fleet(*, drafters: bool = True) -> AsyncIterator[RunningDoor]:
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET)))
        addresses = []
        for proposer in (language_model(load(DRAFT)), lookup()) if drafters else ():
            addresses.append((await stack.enter_async_context(drafter(proposer))).address)
        yield await stack.enter_async_context(http_door([target.address], addresses))


async def complete(door: RunningDoor, **options: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 48, "return_token_ids": True, **options}
    response = await door.client.post(COMPLETE, json=body)
    assert response.status_code == 200, response.text
    answered: dict[str, Any] = response.json()
    return answered


def ids(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


PARAMETERS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.7, 1.5]),
        "top_p": st.sampled_from([0.5, 1.0]),
        "top_k": st.sampled_from([-1, 0, 5]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.0, 1.3]),
        "presence_penalty": st.sampled_from([-1.0, 1.0]),
        "frequency_penalty": st.sampled_from([-0.5, 0.5]),
        "logit_bias": st.sampled_from([{"65": 5.0}, {"10": -100, "32": 2}]),
        "min_tokens": st.sampled_from([0, 10]),
        "stop": st.sampled_from(["a", ["\n", "zz"]]),
        "stop_token_ids": st.sampled_from([[32], [10, 65]]),
        "ignore_eos": st.booleans(),
        "logprobs": st.sampled_from([0, 3]),
        "n": st.sampled_from([1, 2]),
        "echo": st.booleans(),
        "cache_salt": st.sampled_from(["", "x"]),
    },
)


async def test_every_parameter_gives_the_same_ids_speculated_or_not() -> None:
    async with fleet() as door:
        loop = asyncio.get_running_loop()
        seen = {"speculated": 0}

        async def compare(parameters: dict[str, Any], seed: int) -> None:
            plain = await complete(door, seed=seed, speculative={"enabled": False}, **parameters)
            fast = await complete(door, seed=seed, **parameters)
            assert ids(fast) == ids(plain)
            for left, right in zip(fast["choices"], plain["choices"], strict=True):
                assert left["text"] == right["text"]
                assert left["finish_reason"] == right["finish_reason"]
                if parameters.get("logprobs") is not None:
                    ours, theirs = left["logprobs"], right["logprobs"]
                    assert ours["tokens"] == theirs["tokens"]
                    pairs = zip(ours["token_logprobs"], theirs["token_logprobs"], strict=True)
                    assert all(a == b or abs(a - b) < 1e-3 for a, b in pairs)
            seen["speculated"] += sum(map(sum, (c["token_sources"] for c in fast["choices"]))) > 0
            assert not any(map(any, (c["token_sources"] for c in plain["choices"])))

        @settings(
            max_examples=25,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(PARAMETERS, st.integers(0, 2**63 - 1))
        def examples(parameters: dict[str, Any], seed: int) -> None:
            asyncio.run_coroutine_threadsafe(compare(parameters, seed), loop).result(60)

        await asyncio.to_thread(examples)
        assert seen["speculated"], "no guess was ever accepted, so nothing was tested"


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "count", "tags"],
    "additionalProperties": False,
}


async def test_a_schema_is_satisfied_speculated_or_not() -> None:
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
    }
    async with fleet() as door:
        for seed in range(4):
            options = {"seed": seed, "response_format": wanted, "max_tokens": 400}
            # White space without end is valid JSON, too.
            options["logit_bias"] = {str(byte): -100 for byte in b" \n\r\t"}
            plain = await complete(door, speculative={"enabled": False}, **options)
            fast = await complete(door, **options)
            assert ids(fast) == ids(plain)
            (choice,) = fast["choices"]
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["text"]), SCHEMA)


async def test_a_prediction_saves_steps_and_changes_nothing() -> None:
    async with fleet(drafters=False) as door:
        # Ids that are no text could not be predicted by text.
        readable = {str(token): -100 for token in range(128, 260)}
        options = {"temperature": 0, "max_tokens": 120, "ignore_eos": True, "logit_bias": readable}
        plain = await complete(door, **options)
        text, edited = plain["choices"][0]["text"], list(plain["choices"][0]["text"])
        edited[40] = "#" if edited[40] != "#" else "!"
        for predicted in (text, "".join(edited)):
            prediction = {"type": "content", "content": predicted}
            fast = await complete(door, prediction=prediction, **options)
            assert ids(fast) == ids(plain)
            steps = [
                answer["metrics"]["speculative_decoding"]["num_spec_steps"]
                for answer in (fast, plain)
            ]
            assert steps[0] * 3 <= steps[1] == 120, steps
            usage = fast["usage"]["completion_tokens_details"]
            assert usage["accepted_prediction_tokens"] > 80
            assert usage["rejected_prediction_tokens"] >= 0
        useless = {"type": "content", "content": "nothing of the kind"}
        assert ids(await complete(door, prediction=useless, **options)) == ids(plain)


async def test_sources_tell_who_guessed() -> None:
    async with fleet() as door:
        events = await streamed(
            door.client,
            COMPLETE,
            {"model": "tiny", "prompt": TEXT, "max_tokens": 100, "return_token_ids": True},
        )
        sources = {s for e in events[:-1] for s in e.data["choices"][0]["token_sources"]}
        workers = (await door.client.get("/fleet")).json()["workers"]
        drafters = {worker["source"] for worker in workers if worker["role"] == "drafter"}
        assert len(drafters) == 2
        assert 0 in sources
        assert sources - {0} <= drafters


async def test_the_openai_client_works_unmodified() -> None:
    async with fleet() as door:
        client = openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="unused", max_retries=0)
        async with client:
            assert [model.id async for model in client.models.list()] == ["tiny"]
            chat: Any = [{"role": "user", "content": "Hi"}]
            settings: Any = {"model": "tiny", "seed": 5, "max_completion_tokens": 24}
            whole = await client.chat.completions.create(messages=chat, **settings)
            assert whole.usage is not None
            assert whole.usage.completion_tokens <= 24
            stream = await client.chat.completions.create(
                messages=chat, stream=True, stream_options={"include_usage": True}, **settings
            )
            said, usage = "", None
            async for chunk in stream:
                said += "".join(choice.delta.content or "" for choice in chunk.choices)
                usage = chunk.usage or usage
            assert said == whole.choices[0].message.content
            assert usage is not None
            assert usage.total_tokens == whole.usage.total_tokens
            scored = await client.completions.create(
                model="tiny", prompt=TEXT, max_tokens=4, echo=True, logprobs=2, seed=5
            )
            assert scored.choices[0].text.startswith(TEXT)
            assert scored.choices[0].logprobs is not None
            predicted = await client.chat.completions.create(
                messages=chat,
                prediction={"type": "content", "content": said},
                extra_body={"speculative": {"enabled": True}},
                **settings,
            )
            assert predicted.choices[0].message.content == said
            with pytest.raises(openai.BadRequestError) as wrong:
                await client.completions.create(model="tiny", prompt="x", temperature=-1)
            assert wrong.value.param == "temperature"
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="other", prompt="x")
