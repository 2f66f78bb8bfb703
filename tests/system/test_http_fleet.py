"""The HTTP door before a whole fleet of tiny models: the same ids, speculated or not."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import openai
import pytest

from tests.support.http_door import RunningDoor, streamed
from tests.support.http_fleet import COMPLETE, TEXT, http_fleet


async def complete(door: RunningDoor, **options: Any) -> dict[str, Any]:
    body = {"model": "tiny", "prompt": TEXT, "max_tokens": 48, "return_token_ids": True, **options}
    response = await door.client.post(COMPLETE, json=body)
    assert response.status_code == 200, response.text
    answered: dict[str, Any] = response.json()
    if answered["metrics"] is not None:
        agree(answered["metrics"]["speculative_decoding"])
    return answered


def agree(said: dict[str, Any]) -> None:
    """Check what aiperf checks before it believes such figures."""
    histogram = said["acceptance_histogram"]
    assert said["num_spec_steps"] == sum(histogram)
    accepted = sum(count * steps for count, steps in enumerate(histogram))
    assert said["num_accepted_draft_tokens"] == accepted <= said["num_draft_tokens"]
    assert len(histogram) == said["num_spec_tokens"] + 1
    assert said["mean_acceptance_length"] == pytest.approx(1 + accepted / sum(histogram))


def ids(answer: dict[str, Any]) -> list[list[int]]:
    return [choice["token_ids"] for choice in answer["choices"]]


SCHEMAS: list[dict[str, Any]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "count": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
        },
        "required": ["name", "count", "tags"],
        "additionalProperties": False,
    },
    {
        "type": "array",
        "items": {"$ref": "#/$defs/point"},
        "minItems": 2,
        "maxItems": 2,
        "$defs": {
            "point": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}, "y": {"enum": [None, 1, "up"]}},
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        },
    },
    {
        "anyOf": [
            {"type": "string", "pattern": "^[A-C]{3}-[0-9]{2}$"},
            {"type": "integer", "minimum": 10, "maximum": 20},
        ]
    },
    {
        "type": "object",
        "properties": {"tree": {"type": "object", "properties": {"leaf": {"const": "green"}}}},
        "required": ["tree"],
        "additionalProperties": False,
    },
]
SCHEMAS[3]["properties"]["tree"] |= {"required": ["leaf"], "additionalProperties": False}


@pytest.mark.parametrize("schema", SCHEMAS)
async def test_a_schema_is_satisfied_speculated_or_not(schema: dict[str, Any]) -> None:
    wanted = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "schema": schema, "strict": True},
    }
    async with http_fleet() as door:
        for seed in range(4):
            options = {"seed": seed, "response_format": wanted, "max_tokens": 400}
            # White space without end is valid JSON, too.
            options["logit_bias"] = {str(byte): -100 for byte in b" \n\r\t"}
            plain = await complete(door, speculative={"enabled": False}, **options)
            fast = await complete(door, **options)
            assert ids(fast) == ids(plain)
            (choice,) = fast["choices"]
            assert choice["finish_reason"] == "stop"
            jsonschema.validate(json.loads(choice["text"]), schema)


async def test_a_prediction_saves_steps_and_changes_nothing() -> None:
    async with http_fleet(drafters=False) as door:
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
    async with http_fleet() as door:
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
    async with http_fleet() as door:
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
