"""Every parameter in any company, at both routes, whole or streamed, speculated or not."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orchestrator.http.schemas import ChatCompletionRequest, CompletionRequest
from tests.support.http_door import RunningDoor, streamed
from tests.support.http_fleet import CHAT, COMPLETE, TEXT, http_fleet

# They ask for nothing, or are refused: see tests/service/test_http_parameters.py.
NOTHING_TO_COMPARE = frozenset(
    {
        *("best_of", "suffix", "tools", "tool_choice", "functions", "modalities"),
        *("service_tier", "store"),
    }
)
OBJECT = {
    "type": "object",
    "properties": {"count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["count"],
    "additionalProperties": False,
}
TURNS = [
    [{"role": "user", "content": TEXT}],
    [{"role": "system", "content": "be brief"}, {"role": "user", "content": "abcabcabc"}],
]
PARAMETERS = st.fixed_dictionaries(
    {"chat": st.booleans(), "stream": st.booleans()},
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
        "max_tokens": st.sampled_from([10, 70]),
        "stop": st.sampled_from(["a", ["\n", "zz"]]),
        "stop_token_ids": st.sampled_from([[32], [10, 65]]),
        "ignore_eos": st.booleans(),
        "response_format": st.sampled_from(
            [
                {"type": "text"},
                {"type": "json_object"},
                {"type": "json_schema", "json_schema": {"name": "it", "schema": OBJECT}},
            ]
        ),
        "prediction": st.sampled_from([TEXT, '{"count": 7}', "of no use"]),
        "logprobs": st.sampled_from([0, 3]),
        "n": st.sampled_from([1, 2]),
        "echo": st.booleans(),
        "cache_salt": st.sampled_from(["", "x"]),
        "user": st.just("somebody"),
    },
)


def body_of(parameters: dict[str, Any], seed: int) -> tuple[str, dict[str, Any]]:
    """A route and a body for it. For chats some have other names, and some exclude others."""
    wanted = {
        "model": "tiny",
        "max_tokens": 48,
        "return_token_ids": True,
        "seed": seed,
    } | parameters
    chat = wanted.pop("chat")
    if "prediction" in wanted:
        wanted["prediction"] = {"type": "content", "content": wanted["prediction"]}
    if wanted.get("response_format", {"type": "text"})["type"] != "text":
        wanted.pop("ignore_eos", None)  # A grammar ends by itself, or not at all.
    if not chat:
        return COMPLETE, {"prompt": TEXT, **wanted}
    wanted.pop("echo", None)
    wanted["max_completion_tokens"] = wanted.pop("max_tokens")
    if "logprobs" in wanted:
        wanted |= {"logprobs": True, "top_logprobs": wanted["logprobs"]}
    return CHAT, {"messages": TURNS[seed % 2], **wanted}


@dataclass
class Said:
    """A choice, however it came."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    sources: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    reason: str | None = None

    def take(self, choice: dict[str, Any]) -> None:
        """Take in a whole choice, or a piece of it."""
        spoken = choice.get("message") or choice.get("delta")
        self.text += choice["text"] if spoken is None else spoken.get("content", "")
        self.ids += choice["token_ids"]
        self.sources += choice["token_sources"]
        scored = choice["logprobs"] or {}
        self.logprobs += scored.get("token_logprobs", [])
        self.logprobs += [entry["logprob"] for entry in scored.get("content", [])]
        self.reason = choice["finish_reason"] or self.reason


async def say(door: RunningDoor, path: str, wanted: dict[str, Any]) -> list[Said]:
    """Ask, and put the answer together."""
    said = [Said() for _ in range(wanted.get("n", 1))]
    if wanted["stream"]:
        events = await streamed(door.client, path, wanted)
        assert events[-1].data == "[DONE]"
        answers = [event.data for event in events[:-1]]
    else:
        response = await door.client.post(path, json=wanted)
        assert response.status_code == 200, response.text
        answers = [response.json()]
    for answer in answers:
        for choice in answer["choices"]:
            said[choice["index"]].take(choice)
    return said


def same(fast: Said, plain: Said) -> None:
    """Speculation made no difference; log-probabilities are those of float32."""
    assert (fast.ids, fast.text, fast.reason) == (plain.ids, plain.text, plain.reason)
    pairs = zip(fast.logprobs, plain.logprobs, strict=True)
    assert all(a == b or abs(a - b) < 1e-3 for a, b in pairs if a is not None and b is not None)


@pytest.mark.slow
async def test_every_parameter_gives_the_same_ids_speculated_or_not() -> None:
    tested = set(CompletionRequest.model_fields) | set(ChatCompletionRequest.model_fields)
    tested -= {"stream_options", "speculative", *NOTHING_TO_COMPARE}
    async with http_fleet() as door:
        loop = asyncio.get_running_loop()
        speculated: set[str] = set()
        """Parameters of requests of which a guess was accepted."""

        async def compare(parameters: dict[str, Any], seed: int) -> None:
            path, wanted = body_of(parameters, seed)
            fast = await say(door, path, wanted)
            wanted.pop("prediction", None)
            plain = await say(door, path, {**wanted, "speculative": {"enabled": False}})
            for one, other in zip(fast, plain, strict=True):
                same(one, other)
                assert not any(other.sources)
            if any(any(one.sources) for one in fast):
                speculated.update(parameters, wanted)

        @settings(
            max_examples=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(PARAMETERS, st.integers(0, 2**63 - 1))
        def examples(parameters: dict[str, Any], seed: int) -> None:
            asyncio.run_coroutine_threadsafe(compare(parameters, seed), loop).result(60)

        await asyncio.to_thread(examples)
        assert tested <= speculated, f"never speculated with {sorted(tested - speculated)}"
