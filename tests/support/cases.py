"""Prompts for the whole system, and answers to them through it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from typing import Any

from outrider.client import AsyncClient, Completion, Delta, Event, Finished, Request, Started
from outrider.domain import BindSpec, SpeculationCounters
from tests.support.hostile import Truth
from tests.support.reference import Case, Expected

PROMPTS: tuple[bytes, ...] = (
    b"a",
    b"Hi",
    b"One, two, three",
    b"The quick brown fox jumps over the lazy dog.",
    b"the the the the the the the the the the the",
    b"abcabcabcabcabcabcabcabcabcabcabcabc",
    b"0101010101010101",
    b"x = 1\ny = 2\nz = 3\nx = 1\ny = 2\nz =",
    b"To be, or not to be, that is the question: to be, or not to be",
    b"\x00\x01\x02\x03\x04\x05",
    bytes(range(256)),
    b"  leading spaces, trailing spaces  ",
    b"def f(x):\n    return x + 1\n\ndef g(x):\n    return x + 1\n",
    b"Lorem ipsum dolor sit amet, consectetur adipiscing elit",
    b"\xc3\xa4\xc3\xb6\xc3\xbc \xe2\x82\xac \xf0\x9f\x98\x80",
    b"{'key': [1, 2, 3], 'key': [1, 2, 3]}",
    b"SELECT a, b FROM t WHERE a = b AND b = a",
    b"...",
    b"A man, a plan, a canal: Panama",
    b"1234567890" * 9,
    b"Meeting notes. The team met on Tuesday. The team will meet on Tuesday. " * 4,
    b"What is the answer?",
    b"\n\n\n",
    b"zyxwvutsrqponmlkjihgfedcba",
)
"""Of 1 to 284 bytes, some of which repeat themselves. Ids of the tiny models are bytes."""

SAMPLED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95}


def cases(tokens_max: int) -> list[Case]:
    """Each prompt greedy and sampled, with lengths and seeds that differ."""
    found = []
    for number, prompt in enumerate(PROMPTS):
        length = tokens_max - number % 5
        found.append(Case(tuple(prompt), length))
        found.append(Case(tuple(prompt), length, seed=1_000 + number, **SAMPLED))
    return found


def shortened(case: Case, expected: Expected, tokens_max: int) -> tuple[Case, Expected]:
    """The same with less output."""
    ids, margins = expected.ids[:tokens_max], expected.margins[:tokens_max]
    return replace(case, tokens_max=min(tokens_max, case.tokens_max)), Expected(ids, margins)


def request(case: Case, **changes: Any) -> Request:
    """What a client sends for a case."""
    assert case.grammar is None, "say the schema or expression yourself"
    return replace(
        Request(
            token_ids=case.prompt,
            temperature=case.temperature,
            top_k=case.top_k,
            top_p=case.top_p,
            min_p=case.min_p,
            seed=case.seed,
            tokens_max=case.tokens_max,
            stop_ids=case.stop_ids,
            ignore_eos=case.ignore_eos,
            repetition_penalty=case.repetition_penalty,
            presence_penalty=case.presence_penalty,
            frequency_penalty=case.frequency_penalty,
            logit_bias=dict(case.logit_bias),
            tokens_min=case.tokens_min,
        ),
        **changes,
    )


async def answers(client: AsyncClient, wanted: Sequence[Case], **changes: Any) -> list[Completion]:
    """Generate all cases at once."""
    calls = [client.complete(request(case, **changes), timeout_s=60) for case in wanted]
    return list(await asyncio.gather(*calls))


def totals(completions: Sequence[Completion]) -> SpeculationCounters:
    """Counters of many sessions together."""
    total = SpeculationCounters()
    for completion in completions:
        total = total.plus(completion.finished.speculation)
    return total


def tau(completions: Sequence[Completion]) -> float:
    """Tokens committed per verify step and session."""
    tokens = sum(len(completion.token_ids) for completion in completions)
    return tokens / totals(completions).verify_steps


def truth_of(wanted: Sequence[Case], expected: Sequence[Expected]) -> Truth:
    """What an oracle knows of these cases; of others it knows nothing."""
    known = {
        _key(case.prompt, case.temperature, case.session_seed): answer.ids
        for case, answer in zip(wanted, expected, strict=True)
    }

    def truth(spec: BindSpec) -> Sequence[int]:
        return known.get(_key(spec.prompt, spec.sampling.temperature, spec.seed), ())

    return truth


def _key(prompt: tuple[int, ...], temperature: float, seed: int) -> tuple[object, ...]:
    return prompt, temperature, seed


class Listener:
    """One generation, event by event."""

    def __init__(self, events: AsyncGenerator[Event]) -> None:
        self._events = events
        self.ids: list[int] = []
        self.text = ""
        self.sources: list[int] = []
        self.started: Started | None = None
        self.finished: Finished | None = None

    async def close(self) -> None:
        """Leave."""
        await self._events.aclose()

    async def until_ids(self, count: int) -> None:
        """Listen until so many ids have come."""
        while len(self.ids) < count:
            self._take(await anext(self._events))

    async def until_end(self) -> Finished:
        """Listen to the end."""
        async for event in self._events:
            self._take(event)
        assert self.finished is not None
        return self.finished

    def _take(self, event: Event) -> None:
        match event:
            case Started():
                self.started = event
            case Delta():
                self.ids.extend(event.token_ids)
                self.text += event.text
                self.sources.extend(event.sources)
            case Finished():
                self.finished = event


def listen(client: AsyncClient, case: Case) -> Listener:
    """Begin one generation."""
    return Listener(client.generate(request(case), timeout_s=60))
