"""Request options through client, front door and driver, before a verifier that is a script."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Iterable

import pytest

from orchestrator import jobs
from orchestrator.config import DriverConfig
from orchestrator.placing import Placer
from orchestrator.prefix_memory import Prefix
from outrider.client import (
    Client,
    Collector,
    Delta,
    Event,
    Finished,
    PromptTokens,
    Request,
    Started,
)
from outrider.domain import (
    FinishReason,
    Grammar,
    GrammarKind,
    RejectionCode,
    SamplingParams,
    SessionSpec,
    session_seed,
)
from outrider.errors import Exhausted, InternalError, InvalidRequest, Unavailable
from outrider.v1 import verifier_pb2
from tests.support.fleet import RunningOrchestrator, orchestrator, until
from tests.support.scripted_verifier import (
    INFO,
    RunningScript,
    Script,
    answer,
    commit,
    opened,
    prompt_scores,
    rejection,
    scored,
    scripted_verifier,
)

Responses = Iterable[verifier_pb2.VerifyResponse]

PROMPT = tuple(b"Say it")
SEED = 7
SEEDS = [session_seed(SEED, choice) for choice in range(16)]
TEXTS = [b"zero, the first", b"one", b"two words", b"three"]


def text_of(spec: SessionSpec) -> bytes:
    """What each choice says."""
    return TEXTS[SEEDS.index(spec.seed)]


def honest(spec: SessionSpec) -> Responses:
    return answer(spec, text_of(spec))


def endless(spec: SessionSpec) -> Responses:
    """Begins, and never ends."""
    return [opened(spec), commit(spec, 0, b"on and on")]


def wanted(**options: object) -> Request:
    return Request(token_ids=PROMPT, seed=SEED, **options)


@contextlib.asynccontextmanager
async def fleet(
    script: Script, config: DriverConfig | None = None
) -> AsyncIterator[tuple[RunningOrchestrator, RunningScript]]:
    async with (
        scripted_verifier(script) as target,
        orchestrator([target.address], config=config) as running,
    ):
        yield running, target


async def heard(running: RunningOrchestrator, request: Request) -> list[Event]:
    return [event async for event in running.client.generate(request, timeout_s=20)]


def prompt_entries(top: int) -> tuple[object, ...]:
    return tuple(scored(token, top) for token in PROMPT[1:])


def entries(text: bytes, top: int) -> tuple[object, ...]:
    return tuple(scored(token, top) for token in text)


# --- options ----------------------------------------------------------------------------------


async def test_every_option_reaches_the_verifier() -> None:
    async with fleet(honest) as (running, target):
        schema = {"type": "object", "required": ["name"]}
        await running.client.complete(
            wanted(
                temperature=0.5,
                top_k=3,
                top_p=0.75,
                min_p=0.25,
                repetition_penalty=1.25,
                presence_penalty=-0.5,
                frequency_penalty=1.5,
                logit_bias={9: -100, 2: 1.5},
                tokens_min=4,
                json_schema=schema,
                tokens_max=40,
                stop_ids=[5],
                logprobs=0,
                prompt_logprobs=2,
                cache_salt="tenant",
            )
        )
        (spec,) = target.verifier.opens
        assert spec == SessionSpec(
            session=spec.session,
            epoch=1,
            prompt=PROMPT,
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
            seed=SEEDS[0],
            tokens_max=40,
            stop_ids=frozenset({5}),
            logprobs=0,
            prompt_logprobs=2,
            cache_salt="tenant",
            origin=spec.origin,
            own_guesses=True,
        )


async def test_what_is_not_asked_for_is_not_sent() -> None:
    async with fleet(honest) as (running, target):
        completion = await running.client.complete(wanted(ignore_eos=True, regex=None))
        (spec,) = target.verifier.opens
        assert spec.sampling == SamplingParams()
        assert (spec.logprobs, spec.prompt_logprobs, spec.cache_salt) == (None, None, "")
        assert spec.ignore_eos
        assert (completion.logprobs, completion.prompt_logprobs) == ((), ())
        await running.client.complete(wanted(regex="[a-z]+"))
        assert target.verifier.opens[1].sampling.grammar == Grammar(GrammarKind.REGEX, "[a-z]+")


async def test_a_grammar_that_the_verifier_cannot_compile_is_the_callers_fault() -> None:
    field = "sampling.grammar.regex"

    def picky(spec: SessionSpec) -> Responses:
        if spec.seed == SEEDS[0]:
            return [rejection(spec, RejectionCode.INVALID, "unclosed group at 3", field)]
        return endless(spec)

    async with fleet(picky) as (running, target):
        for n in (1, 3):
            target.verifier.opens.clear()
            target.verifier.aborts.clear()
            with pytest.raises(InvalidRequest) as caught:
                await running.client.complete_all(wanted(regex="abc(", n=n))
            assert (caught.value.field, caught.value.message) == (field, "unclosed group at 3")
            assert running.driver.load == 0


@pytest.mark.parametrize("method", ["complete", "generate"])
def test_two_grammars_are_refused_before_anything_is_sent(method: str) -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(InvalidRequest) as caught:
        list(getattr(client, method)(wanted(regex="a", json_schema="{}")))
    assert caught.value.field == "sampling.grammar"


# --- log-probabilities ------------------------------------------------------------------------


async def test_log_probabilities_come_with_their_ids() -> None:
    async with fleet(honest) as (running, _):
        events = await heard(running, wanted(logprobs=3, prompt_logprobs=1))
        assert isinstance(events[0], Started)
        assert events[1] == PromptTokens(prompt_entries(1))
        deltas = events[2:-1]
        assert len(deltas) > 1
        for delta in deltas:
            assert isinstance(delta, Delta)
            assert delta.logprobs == entries(bytes(delta.token_ids), 3)
        assert isinstance(events[-1], Finished)
        completion = await running.client.complete(wanted(logprobs=3, prompt_logprobs=1))
        assert completion.logprobs == entries(TEXTS[0], 3)
        assert completion.prompt_logprobs == prompt_entries(1)


async def test_a_stop_string_cuts_them_like_the_ids() -> None:
    def long_commits(spec: SessionSpec) -> Responses:
        yield opened(spec)
        yield commit(spec, 0, b"zero")
        yield commit(spec, 4, b" one END two", FinishReason.LENGTH)

    async with fleet(long_commits) as (running, _):
        completion = await running.client.complete(wanted(logprobs=1, stop=["END"]))
        assert completion.text == "zero one "
        assert completion.logprobs == entries(b"zero one END", 1)
        assert bytes(completion.token_ids) == b"zero one END"


async def test_a_commit_that_is_repeated_says_nothing_twice() -> None:
    def stutter(spec: SessionSpec) -> Responses:
        yield opened(spec)
        yield commit(spec, 0, b"abc")
        yield commit(spec, 0, b"abc")
        yield commit(spec, 1, b"bcdef")
        yield commit(spec, 0, b"abcdefgh", FinishReason.LENGTH)

    async with fleet(stutter) as (running, _):
        completion = await running.client.complete(wanted(logprobs=1))
        assert completion.text == "abcdefgh"
        assert completion.logprobs == entries(b"abcdefgh", 1)


async def test_a_prompt_of_one_token_has_no_log_probabilities_but_says_so() -> None:
    async with fleet(honest) as (running, _):
        events = await heard(running, Request(token_ids=[65], seed=SEED, prompt_logprobs=1))
        assert events[1] == PromptTokens(())
        assert [type(event) for event in events].count(PromptTokens) == 1


def silent_on_output(spec: SessionSpec) -> Responses:
    return [opened(spec), commit(spec, 0, b"abc", with_logprobs=False)]


def silent_on_prompt(spec: SessionSpec) -> Responses:
    return [opened(spec), prompt_scores(spec, 1, 3), commit(spec, 0, b"abc")]


@pytest.mark.parametrize("script", [silent_on_output, silent_on_prompt])
async def test_a_verifier_that_keeps_them_to_itself_is_at_fault(script: Script) -> None:
    async with fleet(script) as (running, target):
        with pytest.raises(InternalError, match="log-probabilities of"):
            await running.client.complete(wanted(logprobs=1, prompt_logprobs=1))
        assert running.driver.load == 0

        async def told() -> bool:
            return len(target.verifier.aborts) == 1

        await until(told, what="the verifier is freed")


# --- several choices --------------------------------------------------------------------------


async def test_choices_have_seeds_of_their_own_and_one_stream() -> None:
    async with fleet(honest) as (running, target):
        request = wanted(n=4, logprobs=1, prompt_logprobs=2, cache_salt="tenant")
        events = await heard(running, request)
        assert isinstance(events[0], Started)
        assert [type(event) for event in events].count(Started) == 1
        assert events[1] == PromptTokens(prompt_entries(2))
        assert [type(event) for event in events].count(PromptTokens) == 1
        finished = [event for event in events if isinstance(event, Finished)]
        assert sorted(event.choice for event in finished) == [0, 1, 2, 3]
        completions = await running.client.complete_all(request)
        for choice, completion in enumerate(completions):
            assert completion.text == TEXTS[choice].decode()
            assert completion.logprobs == entries(TEXTS[choice], 1)
            assert completion.finished.choice == choice
            assert completion.finished.usage.completion_tokens == len(TEXTS[choice])
            assert completion.started.seed == SEED
        specs = sorted(target.verifier.opens[4:], key=lambda spec: SEEDS.index(spec.seed))
        assert [spec.seed for spec in specs] == SEEDS[:4]
        assert len({spec.session for spec in specs}) == 4
        # The prompt is scored once for all.
        assert [spec.prompt_logprobs for spec in specs] == [2, None, None, None]
        assert {(spec.prompt, spec.logprobs, spec.cache_salt) for spec in specs} == {
            (PROMPT, 1, "tenant")
        }


async def test_quick_choices_wait_for_the_prompts_log_probabilities() -> None:
    slow: list[SessionSpec] = []

    def others_first(spec: SessionSpec) -> Responses:
        if spec.prompt_logprobs is not None:
            slow.append(spec)
            yield opened(spec)
            return
        yield from honest(spec)
        if spec.seed == SEEDS[2]:
            yield from list(honest(slow[0]))[1:]

    async with fleet(others_first) as (running, _):
        events = await heard(running, wanted(n=3, prompt_logprobs=0))
        assert [type(event) for event in events[:3]] == [Started, PromptTokens, Delta]
        collector = Collector()
        for event in events:
            collector.add(event)
        for choice, completion in enumerate(collector.completions(3)):
            assert completion.text == TEXTS[choice].decode()
        # Nothing was reordered within what had been held back.
        assert [e.choice for e in events if isinstance(e, Finished)] == [1, 2, 0]


async def test_one_request_may_not_take_two_answers_for_one() -> None:
    async with fleet(honest) as (running, target):
        with pytest.raises(InvalidRequest, match="complete_all") as caught:
            await running.client.complete(wanted(n=2))
        assert caught.value.field == "n"
        with Client(running.address) as client:
            with pytest.raises(InvalidRequest, match="complete_all"):
                await asyncio.to_thread(client.complete, wanted(n=2))
            assert not target.verifier.opens
            completions = await asyncio.to_thread(client.complete_all, wanted(n=2))
            assert [completion.text for completion in completions] == ["zero, the first", "one"]


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_a_choice_that_fails_takes_the_others_along(failing: int) -> None:
    def script(spec: SessionSpec) -> Responses:
        yield from endless(spec)
        if SEEDS.index(spec.seed) == failing:
            yield rejection(spec, RejectionCode.INTERNAL, "the step failed")

    async with fleet(script) as (running, target):
        with pytest.raises(Unavailable, match="the step failed"):
            await running.client.complete_all(wanted(n=3), timeout_s=20)
        assert running.driver.load == 0

        async def freed() -> bool:
            opens = {(spec.session, spec.epoch) for spec in target.verifier.opens}
            return opens == set(target.verifier.aborts)

        await until(freed, what="every session that was opened is aborted")
        assert [worker.sessions for worker in await running.client.workers()] == [0]


async def test_a_generation_that_fails_is_freed_even_if_nobody_reads_it() -> None:
    def script(spec: SessionSpec) -> Responses:
        yield from endless(spec)
        if spec.seed == SEEDS[1]:
            yield rejection(spec, RejectionCode.INTERNAL, "the step failed")

    async with fleet(script) as (running, _):
        asked = jobs.Request(seed=SEED, token_ids=PROMPT, n=3)
        job = jobs.job_of(asked, INFO, running.fleet.codec(INFO), DriverConfig())
        generation = running.driver.generate(job)
        assert running.driver.load == 3

        async def freed() -> bool:
            return running.driver.load == 0

        await until(freed, what="all choices are gone")
        outputs = [output async for output in generation.outputs()]
        assert isinstance(outputs[-1], Unavailable)


async def test_all_choices_or_none() -> None:
    """A verifier with room for two of three: the caller hears why, and the two are freed."""

    def full(spec: SessionSpec) -> Responses:
        if spec.seed == SEEDS[2]:
            return [rejection(spec, RejectionCode.EXHAUSTED, "the verifier has its 2 sessions")]
        return endless(spec)

    async with fleet(full) as (running, target):
        with pytest.raises(Exhausted, match="has its 2 sessions"):
            await running.client.complete_all(wanted(n=3), timeout_s=20)
        assert running.driver.load == 0

        async def freed() -> bool:
            return len(target.verifier.aborts) == 3

        await until(freed, what="the choices that were opened are aborted")
        events = running.client.generate(wanted(n=2))
        await anext(events)
        await events.aclose()


async def test_choices_that_find_no_verifier_fail_together() -> None:
    async with fleet(endless) as (running, target):
        asked = jobs.Request(seed=SEED, token_ids=PROMPT, n=3)
        job = jobs.job_of(asked, INFO, running.fleet.codec(INFO), DriverConfig())
        elsewhere = dataclasses.replace(job, info=dataclasses.replace(INFO, model="other"))
        generation = running.driver.generate(elsewhere)
        assert running.driver.load == 0
        (error,) = [output async for output in generation.outputs()]
        assert isinstance(error, Unavailable)
        assert not target.verifier.opens


async def test_a_finished_choice_does_not_end_the_others() -> None:
    def script(spec: SessionSpec) -> Responses:
        return honest(spec) if spec.seed == SEEDS[1] else endless(spec)

    async with fleet(script) as (running, target):
        events = running.client.generate(wanted(n=2), timeout_s=20)
        async for event in events:
            if isinstance(event, Finished):
                break
        assert isinstance(event, Finished)
        assert event.choice == 1
        assert running.driver.load == 1
        await events.aclose()

        async def freed() -> bool:
            return running.driver.load == 0 and len(target.verifier.aborts) == 1

        await until(freed, what="the choice that was still going is aborted")


async def test_a_client_that_leaves_ends_all_choices() -> None:
    async with fleet(endless) as (running, target):
        events = running.client.generate(wanted(n=4))
        choices = set()
        while choices != {0, 1, 2, 3}:
            event = await anext(events)
            if isinstance(event, Delta):
                choices.add(event.choice)
        assert running.driver.load == 4
        await events.aclose()

        async def freed() -> bool:
            return running.driver.load == 0 and len(target.verifier.aborts) == 4

        await until(freed, what="all choices are aborted")


async def test_every_choice_counts_against_the_limit() -> None:
    async with fleet(endless, DriverConfig(sessions_max=5)) as (running, target):
        events = running.client.generate(wanted(n=3))
        await anext(events)
        with pytest.raises(Exhausted, match="3 of its 5 sessions and was asked for 3 more"):
            await running.client.complete_all(wanted(n=3))
        assert len(target.verifier.opens) <= 3
        more = running.client.generate(wanted(n=2))
        await anext(more)
        assert running.driver.load == 5
        # What never fits is no matter of trying again.
        with pytest.raises(InvalidRequest, match="between 1 and 5"):
            await running.client.complete_all(wanted(n=6))
        await events.aclose()
        await more.aclose()


class Counting(Placer):
    """Counts the prompts that are looked at."""

    asked = 0

    async def find(self, job: jobs.Job) -> Prefix:
        self.asked += 1
        return await super().find(job)


async def test_what_there_is_no_room_for_is_not_even_read() -> None:
    async with fleet(endless, DriverConfig(sessions_max=1)) as (running, _):
        placer = running.driver.placer = Counting(running.fleet)
        events = running.client.generate(wanted())
        await anext(events)
        assert placer.asked == 1
        for _ in range(5):
            with pytest.raises(Exhausted) as caught:
                await running.client.complete(wanted())
            assert caught.value.retry_after_s is not None
        assert placer.asked == 1
        await events.aclose()


async def test_stop_strings_end_each_choice_by_itself() -> None:
    async with fleet(honest) as (running, _):
        completions = await running.client.complete_all(wanted(n=3, stop=["o w"]))
        assert [completion.text for completion in completions] == ["zero, the first", "one", "tw"]
        reasons = [completion.finished.reason for completion in completions]
        assert reasons == [FinishReason.LENGTH, FinishReason.LENGTH, FinishReason.STOP]


async def test_an_orchestrator_that_stops_fails_a_generation_once() -> None:
    async with fleet(endless) as (running, _):
        events = running.client.generate(wanted(n=2))
        await anext(events)
        await running.driver.close()
        with pytest.raises(Unavailable, match="stopping"):
            async for _ in events:
                pass
        assert running.driver.load == 0


# --- workers ----------------------------------------------------------------------------------


async def test_a_verifiers_load_is_shown() -> None:
    step = verifier_pb2.StepReport(duration_s=0.25, rows=1, tokens=3, kv_tokens_used=77, waiting=2)

    def reporting(spec: SessionSpec) -> Responses:
        return [opened(spec), commit(spec, 0, b"abc", FinishReason.LENGTH, step=step)]

    async with fleet(reporting) as (running, _):
        (before,) = await running.client.workers()
        assert (before.step_s, before.kv_tokens_used, before.waiting) == (0, 0, 0)
        await running.client.complete(wanted())
        (after,) = await running.client.workers()
        assert (after.step_s, after.kv_tokens_used, after.waiting) == (0.25, 77, 2)
