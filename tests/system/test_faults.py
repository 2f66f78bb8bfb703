"""Faults, and what the user sees of them: DESIGN section 7, over real sockets in one process."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import replace

import pytest

from orchestrator.config import DriverConfig
from outrider.client import AsyncClient, Request
from outrider.domain import TARGET_SOURCE, FinishReason
from outrider.errors import OutriderError, Unavailable
from tests.support.cases import SAMPLED, answers, listen, request, totals, truth_of
from tests.support.fleet import (
    DRAFT,
    TARGET,
    RunningDrafter,
    RunningVerifier,
    drafter,
    language_model,
    load,
    lookup,
    orchestrator,
    until,
    verifier,
)
from tests.support.hostile import (
    RunningScript,
    Tamper,
    oracle,
    scripted_drafter,
    verifier_relay,
)
from tests.support.reference import Case, Tally, expect
from verifier_service.config import EngineConfig

ENGINE = EngineConfig(step_delay_s=0.01, warm_up=False)

CASES = [
    Case(tuple(b"The quick brown fox jumps over the lazy dog."), 96, ignore_eos=True),
    Case(tuple(b"A different story"), 96, ignore_eos=True, seed=3, **SAMPLED),
]
EXPECTED = [expect(TARGET, case) for case in CASES]
LONG = replace(CASES[1], tokens_max=1_500)
"""Does not end by itself while a test lasts."""
ORACLE = oracle(truth_of(CASES, EXPECTED), depth=3)
"""Knows everything, but does not say much at a time, so that there is a middle of the stream."""

IMPATIENT = DriverConfig(failover_wait_s=0.0)


def check(case: Case, ids: list[int]) -> None:
    """None lost, none doubled, none changed."""
    tally = Tally()
    tally.check(TARGET, case, EXPECTED[CASES.index(case)], ids)
    assert not tally.faults


async def freed(*workers: RunningVerifier | RunningDrafter) -> None:
    """Wait until workers hold nothing any more."""

    async def empty() -> bool:
        return all(
            worker.engine.load == worker.engine.kv_tokens_used == 0
            if isinstance(worker, RunningVerifier)
            else worker.grower.load == 0
            for worker in workers
        )

    await until(empty, what="nothing is held", timeout_s=4)


# --- drafters ---------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=["greedy", "sampled"])
async def test_killing_the_drafter_changes_nothing(case):
    async with contextlib.AsyncExitStack() as stack, contextlib.AsyncExitStack() as doomed:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        helper = await doomed.enter_async_context(drafter(language_model(load(DRAFT))))
        fleet = await stack.enter_async_context(orchestrator([target.address], [helper.address]))
        listener = listen(fleet.client, case)
        await listener.until_ids(24)
        await helper.server.stop(0)
        heard = len(listener.ids)
        assert heard < 80
        assert any(listener.sources), "it had not helped before"
        finished = await listener.until_end()
        check(case, listener.ids)
        assert finished.reason is FinishReason.LENGTH
        assert listener.sources[-8:] == [0] * 8
        states = {worker.role: worker.state for worker in await fleet.client.workers()}
        assert states == {"verifier": "ready", "drafter": "lost"}
        await freed(target)


@pytest.mark.parametrize("case", CASES, ids=["greedy", "sampled"])
async def test_a_session_is_bound_to_another_drafter(case):
    async with contextlib.AsyncExitStack() as stack, contextlib.AsyncExitStack() as doomed:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        spare = await stack.enter_async_context(scripted_drafter(ORACLE))
        first = await doomed.enter_async_context(scripted_drafter(ORACLE))
        config = DriverConfig(drafters_per_session=1)
        addresses = [first.address, spare.address]
        fleet = await stack.enter_async_context(
            orchestrator([target.address], addresses, config=config)
        )
        listener = listen(fleet.client, case)
        await listener.until_ids(16)
        if not first.drafter.binds:  # which of the two is asked first does not matter
            first, spare = spare, first
            await stop(first)
        else:
            await doomed.aclose()
        before = len(listener.ids)
        (lost,) = set(listener.sources) - {TARGET_SOURCE}
        finished = await listener.until_end()
        check(case, listener.ids)
        assert set(listener.sources[before:]) - {TARGET_SOURCE, lost}
        assert set(finished.speculation.accepted_by_source) == {1, 2}
        (bind,) = spare.drafter.binds
        assert bind.binding == 2
        assert bind.epoch == 1  # a drafter's end does not touch the fence
        assert bind.committed == EXPECTED[CASES.index(case)].ids[: len(bind.committed)]
        assert len(bind.committed) >= 16


async def stop(script: RunningScript) -> None:
    await script.server.stop(0)


async def test_all_drafters_die_one_after_the_other():
    case = CASES[0]
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        scripts = [await stack.enter_async_context(scripted_drafter(ORACLE)) for _ in range(4)]
        fleet = await stack.enter_async_context(
            orchestrator([target.address], [script.address for script in scripts])
        )
        listener = listen(fleet.client, case)
        for number, script in enumerate(scripts, start=1):
            await listener.until_ids(12 * number)
            await stop(script)
        await listener.until_end()
        check(case, listener.ids)


async def test_a_drafter_that_breaks_inside_costs_only_its_help():
    """An exception in a proposer ends its sessions, not the drafter."""

    class Broken:
        def __init__(self) -> None:
            self.inner = lookup()
            self.info = self.inner.info
            self.open, self.close = self.inner.open, self.inner.close
            self.calls = 0

        def advanced(self, mirror, tokens, advance):
            self.calls += 1
            if self.calls == 5:
                raise ValueError("a defect")
            self.inner.advanced(mirror, tokens, advance)

        def grow(self, mirrors):
            return self.inner.grow(mirrors)

    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        helper = await stack.enter_async_context(drafter(Broken()))
        fleet = await stack.enter_async_context(orchestrator([target.address], [helper.address]))
        completions = await answers(fleet.client, CASES)
        for case, found in zip(CASES, completions, strict=True):
            check(case, list(found.token_ids))
        await freed(target, helper)
        states = {worker.role: worker.state for worker in await fleet.client.workers()}
        assert states["drafter"] == "ready"


# --- clients ----------------------------------------------------------------------------------


async def test_a_client_that_leaves_frees_both_fleets():
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        first = await stack.enter_async_context(drafter(lookup()))
        second = await stack.enter_async_context(drafter(language_model(load(DRAFT))))
        fleet = await stack.enter_async_context(
            orchestrator([target.address], [first.address, second.address])
        )
        stays = listen(fleet.client, CASES[0])
        leaves = fleet.client.generate(request(LONG))
        for _ in range(5):
            await anext(leaves)
        await stays.until_ids(2)
        assert target.engine.load == first.grower.load == second.grower.load == 2
        await leaves.aclose()

        async def one_left() -> bool:
            return target.engine.load == first.grower.load == second.grower.load == 1

        await until(one_left, what="the session is gone everywhere", timeout_s=5)
        assert 0 < target.engine.kv_tokens_used <= len(CASES[0].prompt) + CASES[0].tokens_max + 32
        assert fleet.driver.load == 1
        assert len(stays.ids) < CASES[0].tokens_max
        await stays.until_end()
        check(CASES[0], stays.ids)
        await freed(target, first, second)
        assert [worker.sessions for worker in await fleet.client.workers()] == [0, 0, 0]


async def test_a_client_that_leaves_during_prefill_frees_everything():
    config = replace(ENGINE, prefill_tokens_max=8)
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=config))
        helper = await stack.enter_async_context(drafter(language_model(load(DRAFT))))
        fleet = await stack.enter_async_context(orchestrator([target.address], [helper.address]))
        asked = Request(prompt="x" * 1_000, tokens_max=16)
        call = asyncio.create_task(fleet.client.complete(asked))

        async def opened() -> bool:
            return target.engine.load == helper.grower.load == 1

        await until(opened, what="both fleets have it")
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await freed(target, helper)
        assert target.engine.steps < 100  # it was not prefilled to the end


async def test_a_deadline_frees_everything():
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        helper = await stack.enter_async_context(drafter(lookup()))
        fleet = await stack.enter_async_context(orchestrator([target.address], [helper.address]))
        with pytest.raises(Unavailable):
            await fleet.client.complete(request(LONG), timeout_s=0.3)
        await freed(target, helper)
        assert fleet.driver.load == 0


# --- verifiers --------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=["greedy", "sampled"])
async def test_a_verifier_that_dies_is_replaced(case):
    async with contextlib.AsyncExitStack() as stack:
        model = load(TARGET)
        targets = [
            await stack.enter_async_context(verifier(model_, config=ENGINE))
            for model_ in (model, load(TARGET))
        ]
        script = await stack.enter_async_context(scripted_drafter(ORACLE))
        fleet = await stack.enter_async_context(
            orchestrator([target.address for target in targets], [script.address])
        )
        listener = listen(fleet.client, case)
        await listener.until_ids(30)
        serving = next(target for target in targets if target.engine.load == 1)
        other = next(target for target in targets if target is not serving)
        await serving.server.stop(0)
        heard = len(listener.ids)
        assert heard < 80
        finished = await listener.until_end()
        check(case, listener.ids)
        assert finished.usage.completion_tokens == len(listener.ids)
        # Both spells count.
        steps = finished.speculation.verify_steps
        assert steps + finished.speculation.accepted_draft_tokens >= len(listener.ids)
        assert [bind.epoch for bind in script.drafter.binds] == [1, 2]
        assert len(script.drafter.binds[1].committed) >= 30
        assert any(listener.sources[heard + 8 :])  # speculation goes on there
        await freed(other)


async def test_a_verifier_that_hangs_is_replaced():
    case, tamper = CASES[0], Tamper()
    async with contextlib.AsyncExitStack() as stack:
        hanging = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        relay = await stack.enter_async_context(verifier_relay(hanging.address, tamper))
        config = DriverConfig(verifier_timeout_s=0.5, silence_s=0.2, sweep_interval_s=0.05)
        fleet = await stack.enter_async_context(orchestrator([relay], config=config))
        listener = listen(fleet.client, case)
        await listener.until_ids(20)
        tamper.hangs = True
        # It is the only one until now.
        spare = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        record = Tamper()
        to_spare = await stack.enter_async_context(verifier_relay(spare.address, record))
        fleet.fleet.update(verifiers=[to_spare], drafters=[])
        await listener.until_end()
        check(case, listener.ids)
        (again,) = record.opens
        assert (again.epoch, tuple(again.prompt)) == (2, case.prompt)
        assert len(again.committed) >= 20  # delivered once, never computed again
        assert tuple(again.committed) == EXPECTED[0].ids[: len(again.committed)]
        tamper.hangs = False
        await freed(hanging, spare)


@pytest.mark.parametrize("many", [1, 3])
async def test_the_only_verifier_dies(many):
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        helper = await stack.enter_async_context(drafter(lookup()))
        fleet = await stack.enter_async_context(
            orchestrator([target.address], [helper.address], config=IMPATIENT)
        )
        listeners = [listen(fleet.client, CASES[0]) for _ in range(many)]
        for listener in listeners:
            await listener.until_ids(8)
        await target.server.stop(0)
        for listener in listeners:
            with pytest.raises(Unavailable, match="verifier was lost"):
                await listener.until_end()
            assert tuple(listener.ids) == EXPECTED[0].ids[: len(listener.ids)]
        assert fleet.driver.load == 0
        await freed(helper)
        with pytest.raises(Unavailable, match="no verifier is ready"):
            await fleet.client.complete(request(CASES[0]))


async def test_a_step_that_fails_ends_its_sessions_and_nothing_else():
    """A defect in the model's forward pass: sessions move on, the verifier lives."""

    class Stumbling:
        def __init__(self) -> None:
            self.inner = load(TARGET)
            self.calls = 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def forward(self, rows, meanwhile=None):
            self.calls += 1
            if self.calls == 20:
                raise RuntimeError("out of memory, say")
            return self.inner.forward(rows, meanwhile)

    async with contextlib.AsyncExitStack() as stack:
        stumbling = await stack.enter_async_context(verifier(Stumbling(), config=ENGINE))
        fleet = await stack.enter_async_context(orchestrator([stumbling.address], config=IMPATIENT))
        with pytest.raises(Unavailable, match="the verify step failed"):
            await fleet.client.complete(request(CASES[0]))
        await freed(stumbling)
        (again,) = await answers(fleet.client, CASES[:1])
        check(CASES[0], list(again.token_ids))
        spare = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        fleet.fleet.update(verifiers=[spare.address], drafters=[])

        async def known() -> bool:
            return sum(worker.state == "ready" for worker in await fleet.client.workers()) == 2

        await until(known, what="both verifiers are ready")
        stumbling.engine.model.calls = 0
        completions = await answers(fleet.client, CASES)
        for case, found in zip(CASES, completions, strict=True):
            check(case, list(found.token_ids))
        assert totals(completions).verify_steps >= 192
        await freed(stumbling, spare)


# --- orchestrators ----------------------------------------------------------------------------


async def test_an_orchestrator_that_stops_aborts_what_it_has():
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        helper = await stack.enter_async_context(drafter(lookup()))
        async with contextlib.AsyncExitStack() as doomed:
            fleet = await doomed.enter_async_context(
                orchestrator([target.address], [helper.address])
            )
            other = await stack.enter_async_context(
                orchestrator([target.address], [helper.address])
            )
            client = await stack.enter_async_context(AsyncClient(fleet.address))
            listener = listen(client, LONG)
            survivor = listen(other.client, CASES[1])
            await listener.until_ids(8)
            await survivor.until_ids(8)
        with pytest.raises(OutriderError) as caught:
            await listener.until_end()
        assert isinstance(caught.value, Unavailable)
        assert tuple(listener.ids[:96]) == EXPECTED[1].ids[: len(listener.ids)]
        # The other orchestrator's session on the same workers is left alone.
        await survivor.until_end()
        check(CASES[1], survivor.ids)
        await freed(target, helper)


async def test_the_same_output_through_any_orchestrator():
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        fleets = [await stack.enter_async_context(orchestrator([target.address])) for _ in range(2)]
        for fleet in fleets:
            for case, found in zip(CASES, await answers(fleet.client, CASES), strict=True):
                check(case, list(found.token_ids))
