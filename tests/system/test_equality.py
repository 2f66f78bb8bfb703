"""Lossless: ids through the services are those of a plain-transformers reference of the rule.

One verifier in float32, real sockets, all prompts at once, so that batches are mixed. The tiny
target would be done before a draft arrives; `step_delay_s` gives it the step time of a large one.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace

import pytest
import pytest_asyncio

from drafter_service.config import GrowingConfig
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.language_model import LanguageModelProposer
from orchestrator.config import DriverConfig
from outrider.client import AsyncClient, Completion, Request
from outrider.domain import FinishReason
from tests.support.cases import (
    SAMPLED,
    answers,
    cases,
    request,
    shortened,
    tau,
    totals,
    truth_of,
)
from tests.support.fleet import (
    DRAFT,
    TARGET,
    RunningVerifier,
    drafter,
    info_of,
    language_model,
    load,
    lookup,
    orchestrator,
    verifier,
)
from tests.support.hostile import (
    HOSTILE,
    Strategy,
    Tamper,
    Truth,
    drafter_relay,
    nothing,
    oracle,
    scrambled,
    scripted_drafter,
    verifier_relay,
)
from tests.support.reference import EOS_IDS, Case, Expected, Tally, expect, greedy_by_generate
from verifier_service.config import EngineConfig

_log = logging.getLogger(__name__)

pytestmark = pytest.mark.asyncio(loop_scope="module")

TOKENS_MAX = 28
TOKENS_HOSTILE = 10

ENGINE = EngineConfig(
    sessions_max=128,
    kv_tokens_max=1 << 20,
    step_nodes_max=128,
    prefill_tokens_max=48,  # the longest prompts take several steps
    step_delay_s=0.03,  # time enough for drafters that share the cores with it
    warm_up=False,
)


def option_cases() -> list[Case]:
    """Other request options, each with a prompt that others have too."""
    prompt = tuple(b"The quick brown fox jumps over the lazy dog.")
    greedy = expect(TARGET, Case(prompt, TOKENS_MAX))
    end = greedy.ids[9]
    return [
        Case(prompt, TOKENS_MAX, temperature=1.0, top_k=5, seed=1),
        Case(prompt, TOKENS_MAX, temperature=1.0, top_k=1, seed=2),
        Case(prompt, TOKENS_MAX, temperature=1.2, min_p=0.1, seed=3),
        Case(prompt, TOKENS_MAX, temperature=0.3, seed=4),
        Case(prompt, TOKENS_MAX, temperature=1.7, top_k=40, top_p=0.9, min_p=0.02, seed=5),
        Case(prompt, TOKENS_MAX, temperature=1.0, seed=2**64 - 1),
        Case(prompt, TOKENS_MAX, stop_ids=(end,)),
        Case(prompt, TOKENS_MAX, stop_ids=(end, 7, 259), seed=6, **SAMPLED),
        Case(prompt, 1),
        Case(prompt, 1, seed=7, **SAMPLED),
        Case(prompt, 2, seed=8, **SAMPLED),
        *ends_by_itself(),
    ]


def ends_by_itself() -> list[Case]:
    """A case that ends with an end-of-sequence id half-way, and the same going on after it."""
    for seed in range(100):
        case = Case(tuple(b"An early end"), TOKENS_MAX, temperature=2.0, seed=seed)
        ids = expect(TARGET, case).ids
        if ids[-1] in EOS_IDS and 8 < len(ids) < 20:
            return [case, replace(case, ignore_eos=True)]
    raise AssertionError("no seed ends early")


@dataclass(frozen=True, slots=True)
class Suite:
    """What is asked for, and what the rule says to it."""

    cases: list[Case]
    expected: list[Expected]

    @property
    def truth(self) -> Truth:
        """For oracles."""
        return truth_of(self.cases, self.expected)

    def short(self) -> Suite:
        """Every prompt once, with less output."""
        # Greedy and sampled alternate, in turns.
        picked = [2 * number + number % 2 for number in range(24)]
        pairs = [shortened(self.cases[i], self.expected[i], TOKENS_HOSTILE) for i in picked]
        return Suite([case for case, _ in pairs], [expected for _, expected in pairs])

    async def check(self, client: AsyncClient) -> list[Completion]:
        """Ask for everything at once and compare."""
        completions = await answers(client, self.cases)
        tally = Tally()
        for case, expected, found in zip(self.cases, self.expected, completions, strict=True):
            tally.check(TARGET, case, expected, found.token_ids)
            assert found.started.prompt_tokens == len(case.prompt)
            assert found.finished.usage.completion_tokens == len(found.token_ids)
            assert len(found.sources) == len(found.token_ids)
        tally.assert_identical()
        _log.info("%d positions, %d ties, %d flips", tally.positions, tally.ties, tally.flips)
        _log.info("tau %.2f, %s", tau(completions), totals(completions))
        return completions


def repeating() -> Suite:
    """Prompts that the target goes on repeating, so that looking up helps."""
    prompts = (b"the the the the the the the the the the the", b"abc" * 12)
    wanted = [Case(tuple(prompt), 72) for prompt in prompts]
    return Suite(wanted, [expect(TARGET, case) for case in wanted])


def draft_model() -> Proposer:
    """A draft model that keeps up with all sessions at once."""
    model = load(DRAFT)
    info = info_of(model, "tiny-draft", "language-model")
    return LanguageModelProposer(model, info, leaves_max=48)


@pytest.fixture(scope="module")
def suite() -> Suite:
    wanted = [*cases(TOKENS_MAX), *option_cases()]
    return Suite(wanted, [expect(TARGET, case) for case in wanted])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[RunningVerifier]:
    async with verifier(load(TARGET), config=ENGINE) as running:
        yield running


async def ready(stack: contextlib.AsyncExitStack, *addresses: str, target: str) -> AsyncClient:
    """An orchestrator's client, with these drafters."""
    config = DriverConfig(drafters_per_session=len(addresses))
    running = await stack.enter_async_context(orchestrator([target], addresses, config=config))
    return running.client


async def script(stack: contextlib.AsyncExitStack, strategy: Strategy, delay_s: float = 0.0) -> str:
    """Address of a scripted drafter."""
    running = await stack.enter_async_context(scripted_drafter(strategy, delay_s=delay_s))
    return running.address


# --- the reference itself -----------------------------------------------------------------------


async def test_the_greedy_reference_is_what_generate_gives(suite):
    greedy = [
        (case, expected)
        for case, expected in zip(suite.cases, suite.expected, strict=True)
        if case.temperature == 0.0 and not case.stop_ids
    ]
    assert len(greedy) >= 24
    for case, expected in greedy:
        assert greedy_by_generate(TARGET, case) == expected.ids


# --- nobody helps -------------------------------------------------------------------------------


async def test_no_drafter(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        completions = await suite.check(await ready(stack, target=target.address))
    assert totals(completions).received_draft_tokens == 0
    assert tau(completions) == 1.0


async def test_drafters_that_the_request_declines(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(scripted_drafter(oracle(suite.truth)))
        client = await ready(stack, running.address, target=target.address)
        short = suite.short()
        completions = await answers(client, short.cases, speculation=False)
        assert [c.token_ids for c in completions] == [e.ids for e in short.expected]
        assert not running.drafter.binds


async def test_a_silent_drafter(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, nothing)
        completions = await suite.check(await ready(stack, address, target=target.address))
    assert totals(completions).received_draft_tokens == 0


# --- drafters of ours ---------------------------------------------------------------------------


async def test_lookup(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(drafter(lookup()))
        client = await ready(stack, first.address, target=target.address)
        await suite.check(client)
        completions = await repeating().check(client)
    assert totals(completions).accepted_draft_tokens > 20
    assert tau(completions) > 1.1


async def test_language_model(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(drafter(draft_model()))
        completions = await suite.check(await ready(stack, first.address, target=target.address))
    assert totals(completions).accepted_draft_tokens > 100
    assert tau(completions) > 1.05


async def test_lookup_and_language_model_together(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(drafter(lookup()))
        second = await stack.enter_async_context(drafter(draft_model()))
        client = await ready(stack, first.address, second.address, target=target.address)
        await suite.check(client)
        completions = await repeating().check(client)
    accepted = totals(completions).accepted_by_source
    # Sources are attachments, numbered in the order in which a session got them.
    assert set(accepted) == {1, 2}
    assert sum(accepted.values()) == totals(completions).accepted_draft_tokens


async def test_a_slow_language_model(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        config = GrowingConfig(step_delay_s=0.06)
        slow = drafter(language_model(load(DRAFT)), config=config)
        first = await stack.enter_async_context(slow)
        completions = await suite.check(await ready(stack, first.address, target=target.address))
    assert totals(completions).received_draft_tokens > 0
    assert totals(completions).dropped_nodes.keys() & {"decided", "off_path"}


# --- drafters that know -------------------------------------------------------------------------


async def test_an_oracle(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, oracle(suite.truth))
        completions = await suite.check(await ready(stack, address, target=target.address))
    assert tau(completions) > 1.5
    assert totals(completions).acceptance_rate > 0.95


async def test_an_oracle_that_is_often_wrong(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, oracle(suite.truth, right=0.6))
        completions = await suite.check(await ready(stack, address, target=target.address))
    assert tau(completions) > 1.1
    assert totals(completions).dropped_nodes["missed"] > 0


async def test_an_oracle_that_is_late(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, oracle(suite.truth, depth=12), delay_s=0.05)
        completions = await suite.check(await ready(stack, address, target=target.address))
    assert totals(completions).accepted_draft_tokens > 0  # salvaged
    assert totals(completions).dropped_nodes["decided"] > 0


async def test_drafts_in_pieces_repeated_and_out_of_order(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, scrambled(suite.truth))
        completions = await suite.check(await ready(stack, address, target=target.address))
    assert tau(completions) > 1.5
    assert totals(completions).acceptance_rate > 0.95


# --- drafters that lie --------------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_drafter(suite, target, name):
    hostile = HOSTILE[name]
    async with contextlib.AsyncExitStack() as stack:
        running = await stack.enter_async_context(scripted_drafter(hostile.strategy))
        client = await ready(stack, running.address, target=target.address)
        completions = await suite.short().check(client)
        drafts_sent = running.drafter.drafts_sent
    counters = totals(completions)
    for reason in hostile.drafts:
        assert counters.dropped_drafts[reason] > 0
    for reason in hostile.nodes:
        assert counters.received_draft_tokens > 0
        assert counters.dropped_nodes[reason] > 0
    # Once its source is known for a liar, most of what it says is not even read.
    assert set(counters.dropped_drafts) - {"hopeless"} == set(hostile.drafts)
    if not hostile.nodes:
        assert counters.accepted_draft_tokens == 0
    if name == "impostor":  # stopped by the orchestrator, which knows who may speak for whom
        assert drafts_sent > 0
        assert counters.received_draft_tokens == 0
    if name == "confused":
        assert running.drafter.repeats_seen > 0  # asked for, if for no reason
        assert running.drafter.gaps_seen == 0


async def test_a_message_over_every_limit(suite, target):
    """It costs the drafter its stream; nothing else notices."""
    sent: list[int] = []

    def strategy(view):
        if not sent:
            sent.append(1)
            yield bytes(65 * 1024 * 1024)

    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, strategy)
        helper = await script(stack, oracle(suite.truth))
        client = await ready(stack, address, helper, target=target.address)
        completions = await suite.check(client)
        assert sent
    assert totals(completions).accepted_draft_tokens > 0


async def test_all_hostile_drafters_at_once_beside_an_honest_one(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        addresses = [await script(stack, oracle(suite.truth))]
        addresses += [await script(stack, hostile.strategy) for hostile in HOSTILE.values()]
        client = await ready(stack, *addresses, target=target.address)
        completions = await suite.short().check(client)
    reasons = {reason for hostile in HOSTILE.values() for reason in hostile.drafts}
    assert set(totals(completions).dropped_drafts) - {"hopeless"} == reasons
    assert totals(completions).accepted_draft_tokens > 0


# --- commits that get lost ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "tamper",
    [Tamper(lose_commit=2), Tamper(swap_commits=True), Tamper(twice=True), Tamper(delay_s=0.01)],
    ids=["lost", "swapped", "twice", "late"],
)
async def test_the_way_to_a_drafter(suite, target, tamper):
    async with contextlib.AsyncExitStack() as stack:
        first = await stack.enter_async_context(drafter(language_model(load(DRAFT))))
        relay = await stack.enter_async_context(drafter_relay(first.address, tamper))
        completions = await suite.check(await ready(stack, relay, target=target.address))
    assert totals(completions).accepted_draft_tokens > 0
    if tamper.lose_commit is not None:
        assert tamper.commits_lost >= 48
    if tamper.lose_commit is not None or tamper.swap_commits:
        assert tamper.resyncs >= 24  # some sessions end before the gap is seen


@pytest.mark.parametrize(
    "tamper",
    [Tamper(lose_commit=2), Tamper(swap_commits=True), Tamper(twice=True), Tamper(delay_s=0.01)],
    ids=["lost", "swapped", "twice", "late"],
)
async def test_the_way_from_the_verifier(suite, target, tamper):
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, oracle(suite.truth))
        relay = await stack.enter_async_context(verifier_relay(target.address, tamper))
        config = DriverConfig(silence_s=0.3, sweep_interval_s=0.05)
        running = await stack.enter_async_context(orchestrator([relay], [address], config=config))
        completions = await suite.check(running.client)
    assert totals(completions).accepted_draft_tokens > 0
    if tamper.lose_commit is not None:
        assert tamper.commits_lost >= 48
        assert tamper.resyncs >= 48


async def test_a_last_commit_that_is_lost_is_asked_for_again(suite, target):
    tamper = Tamper(lose_last=True)
    async with contextlib.AsyncExitStack() as stack:
        relay = await stack.enter_async_context(verifier_relay(target.address, tamper))
        config = DriverConfig(silence_s=0.3, sweep_interval_s=0.05)
        running = await stack.enter_async_context(orchestrator([relay], config=config))
        await suite.short().check(running.client)
    assert tamper.commits_lost == 24
    assert tamper.resyncs >= 24


# --- ends ---------------------------------------------------------------------------------------


async def test_ends_are_told_apart(suite, target):
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, oracle(suite.truth))
        client = await ready(stack, address, target=target.address)
        for case, expected in zip(suite.cases, suite.expected, strict=True):
            if not case.stop_ids and not case.ignore_eos and expected.ids[-1] not in EOS_IDS:
                continue
            (found,) = await answers(client, [case])
            stops = {*case.stop_ids, *(() if case.ignore_eos else EOS_IDS)}
            stopped = expected.ids[-1] in stops
            reason = FinishReason.STOP if stopped else FinishReason.LENGTH
            assert found.finished.reason is reason


async def test_stop_strings_cut_text_and_ids_alike_with_and_without_speculation(suite, target):
    prompt = b"To be, or not to be, that is the question"
    case = Case(tuple(prompt), 64, seed=11, **SAMPLED)
    ids = expect(TARGET, case).ids
    text = bytes(token for token in ids if token < 256).decode(errors="replace")
    stop = first_ascii_pair(ids)
    end = next(n for n in range(len(ids)) if bytes(ids[: n + 1]).endswith(stop)) + 1
    wanted = bytes(ids[: end - len(stop)]).decode(errors="replace")
    assert text.startswith(wanted)
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, oracle(truth_of([case], [expect(TARGET, case)])))
        client = await ready(stack, address, target=target.address)
        for speculation in (False, True):
            found = await client.complete(
                request(case, stop=[stop.decode(), "never found"], speculation=speculation)
            )
            assert found.token_ids == ids[:end]
            assert found.text == wanted
            assert found.finished.reason is FinishReason.STOP
            assert found.finished.usage.completion_tokens == end
        assert found.finished.speculation.accepted_draft_tokens > 0


def first_ascii_pair(ids: tuple[int, ...]) -> bytes:
    """The first two printable ASCII bytes in a row, not before the tenth id."""
    for at in range(10, len(ids) - 1):
        if all(33 <= token < 127 for token in ids[at : at + 2]):
            return bytes(ids[at : at + 2])
    raise AssertionError("the output has no two letters in a row")


async def test_a_text_prompt_means_the_same_as_its_ids(suite, target):
    text = "The quick brown fox jumps over the lazy dog."
    case = Case(tuple(text.encode()), TOKENS_MAX)
    async with contextlib.AsyncExitStack() as stack:
        address = await script(stack, oracle(suite.truth))
        client = await ready(stack, address, target=target.address)
        found = await client.complete(
            Request(prompt=text, temperature=0.0, tokens_max=TOKENS_MAX, model="tiny")
        )
        assert found.token_ids == expect(TARGET, case).ids
        turn = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        marks = {"<|im_start|>": 257, "<|im_end|>": 258}
        ids: list[int] = []
        while turn:
            mark = next((mark for mark in marks if turn.startswith(mark)), "")
            ids += [marks[mark]] if mark else turn[0].encode()
            turn = turn[len(mark) or 1 :]
        found = await client.complete(
            Request(chat=[("user", text)], temperature=0.0, tokens_max=TOKENS_MAX)
        )
        assert found.token_ids == expect(TARGET, Case(tuple(ids), TOKENS_MAX)).ids


async def test_up_to_the_end_of_the_context(target):
    """Drafters guess up to the last position and not beyond it."""
    spec = TARGET + "&length_max=64"
    draft = DRAFT + "&length_max=64"
    wanted = [
        Case(tuple(b"abcd" * 11), 20, ignore_eos=True),
        Case(tuple(b"abcd" * 11), 20, ignore_eos=True, seed=3, **SAMPLED),
        Case(tuple(b"xy" * 31 + b"z"), 1, ignore_eos=True),
        Case(tuple(b"xy" * 31), 2, ignore_eos=True),
    ]
    expected = [expect(spec, case) for case in wanted]
    async with contextlib.AsyncExitStack() as stack:
        end = await stack.enter_async_context(verifier(load(spec), config=ENGINE))
        addresses = [
            (await stack.enter_async_context(drafter(proposer))).address
            for proposer in (lookup(), language_model(load(draft)))
        ]
        addresses.append(await script(stack, oracle(truth_of(wanted, expected), depth=40)))
        addresses.append(await script(stack, HOSTILE["random ids"].strategy))
        client = await ready(stack, *addresses, target=end.address)
        completions = await answers(client, wanted, tokens_max=None)
    assert [found.token_ids for found in completions] == [answer.ids for answer in expected]
    for case, found in zip(wanted, completions, strict=True):
        assert len(case.prompt) + len(found.token_ids) == 64
        assert found.finished.reason is FinishReason.LENGTH
    assert totals(completions).accepted_draft_tokens > 0
