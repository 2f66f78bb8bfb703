"""Pipelining over real sockets with synthetic models: waits, budgets, useless drafters, traces."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from bench.worker_shaping import ShapedProposer
from drafter_service.growing import Grower
from drafter_service.proposers.language_model import LanguageModelProposer
from orchestrator.config import DriverConfig
from outrider.client import Completion, Delta, Request, Started
from outrider.domain import DraftBudget
from outrider.model.info import model_info
from outrider.model.loading import load_language_model
from outrider.model.synthetic import SyntheticModel
from outrider.timeline import read_trace
from tests.support.fleet import (
    RunningDrafter,
    RunningOrchestrator,
    RunningVerifier,
    drafter,
    orchestrator,
    until,
    verifier,
)
from verifier_service.config import EngineConfig
from verifier_service.step_times import StepTimes

STEP_MS = 20
TARGET = f"synthetic:target?seed=3&step=1:{STEP_MS}"
DRAFT = "synthetic:draft?seed=3&step=1:2&agree=0.8,0.1,0.05"
HOPELESS = (0.02, 0.0, 0.0)


def load(spec: str) -> SyntheticModel:
    model = load_language_model(spec, cache_dir=Path("/nonexistent"))
    assert isinstance(model, SyntheticModel)
    return model


def known_times() -> StepTimes:
    """What a warm-up would have shown."""
    times = StepTimes()
    for tokens in (1, 2, 4, 8, 16, 32, 64):
        times.observe(tokens, STEP_MS / 1e3)
    return times


@dataclass(slots=True)
class Pipeline:
    """A fleet of one of each."""

    target: RunningVerifier
    helper: RunningDrafter
    draft_model: SyntheticModel
    fleet: RunningOrchestrator

    @property
    def bound(self) -> int:
        return self.helper.grower.load


@contextlib.asynccontextmanager
async def pipeline(
    draft: str = DRAFT, *, engine: EngineConfig | None = None, **options: Any
) -> AsyncIterator[Pipeline]:
    model = load(draft)
    proposer = LanguageModelProposer(model, model_info(model, proposer="language-model"))
    config = DriverConfig(sweep_interval_s=0.1, **options)
    async with (
        verifier(
            load(TARGET), name="synthetic:target", config=engine, times=known_times()
        ) as target,
        drafter(proposer) as helper,
        orchestrator([target.address], [helper.address], config=config) as fleet,
    ):
        yield Pipeline(target, helper, model, fleet)


def request(tokens: int, **options: Any) -> Request:
    return Request(
        prompt="Hide the network.", temperature=0.0, tokens_max=tokens, ignore_eos=True, **options
    )


async def alone(run: Pipeline, tokens: int) -> Completion:
    return await run.fleet.client.complete(request(tokens, speculation=False))


async def test_the_timeline_of_a_session_shows_who_did_what() -> None:
    async with pipeline() as run:
        found = await run.fleet.client.complete(request(120, trace=True))
        plain = await alone(run, 120)
    assert found.token_ids == plain.token_ids
    assert plain.finished.trace == b""
    trace = json.loads(found.finished.trace)
    lanes = {
        event["pid"]: event["args"]["name"] for event in trace["traceEvents"] if event["ph"] == "M"
    }
    assert {run.target.address, run.helper.address, "network", "session"} == set(lanes.values())
    events = [event for event in trace["traceEvents"] if event["ph"] != "M"]
    steps = [event for event in events if event["name"] == "verify step"]
    assert len(steps) == found.finished.speculation.verify_steps
    assert sum(step["args"]["committed"] for step in steps) == 120
    guessed = sum(step["args"]["guessed"] for step in steps)
    assert guessed == found.finished.speculation.accepted_draft_tokens > 20
    # One clock: steps follow each other, and last as long as they were told to.
    steps.sort(key=lambda step: step["ts"])
    for before, after in itertools.pairwise(steps):
        assert before["dur"] >= 1e3 * STEP_MS
        assert after["ts"] >= before["ts"] + before["dur"] - 1e3
    names = {event["name"] for event in events}
    assert {"draft step", "draft", "commit", "miss", "drafter bound"} <= names
    assert any(name.startswith("hit") for name in names)
    assert all(event["dur"] >= 0 for event in events if event["ph"] == "X")


async def test_a_timeline_can_be_read_back(tmp_path: Path) -> None:
    async with pipeline() as run:
        found = await run.fleet.client.complete(request(20, trace=True))
    path = tmp_path / "trace.json"
    path.write_bytes(found.finished.trace)
    timeline = read_trace(path)
    steps = [span for span in timeline.spans if span.name == "verify step"]
    assert len(steps) == found.finished.speculation.verify_steps
    assert any(mark.name == "miss" or mark.name.startswith("hit") for mark in timeline.marks)


async def test_useless_drafters_are_unbound_and_tried_again() -> None:
    async with pipeline() as run:
        run.draft_model.agreement = HOPELESS
        stream = run.fleet.client.generate(request(100_000 // STEP_MS))
        assert isinstance(await anext(stream), Started)
        tokens: list[int] = []

        async def listen() -> None:
            async for event in stream:
                assert isinstance(event, Delta)
                tokens.extend(event.token_ids)

        listener = asyncio.create_task(listen())

        async def bound() -> bool:
            return run.bound == 1

        async def unbound() -> bool:
            return run.bound == 0

        await until(bound, what="the drafter is bound")
        await until(unbound, what="a useless drafter is unbound")
        await until(bound, what="it is tried again")
        await until(unbound, what="and unbound again")
        run.draft_model.agreement = (0.8, 0.1, 0.05)
        await until(bound, what="it is tried once more")
        (running,) = run.fleet.driver._running.values()
        before = running.session.spell_counters

        async def paying() -> bool:
            now = running.session.spell_counters
            steps = now.verify_steps - before.verify_steps
            won = now.accepted_draft_tokens - before.accepted_draft_tokens
            return steps > 150 and won > 1.2 * steps

        await until(paying, what="its guesses are accepted again", timeout_s=20.0)
        assert run.bound == 1, "and stays"
        listener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listener
        await stream.aclose()


async def test_budgets_follow_what_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[DraftBudget] = []
    apply = Grower._apply

    def watch(grower: Grower, command: Any) -> None:
        if type(command).__name__ == "SetBudget":
            told.append(command.budget)
        apply(grower, command)

    monkeypatch.setattr(Grower, "_apply", watch)
    limits = replace(DriverConfig().budget_limits, nodes_max=300)
    async with pipeline(budget_limits=limits) as run:
        found = await run.fleet.client.complete(request(300))
        link = run.fleet.fleet.drafters[run.helper.address]
        assert 0.0 < link.rtt_s < 0.2
        assert link.grow is not None
        assert link.grow.duration_s >= 0.002
        assert link.grow.leaves_max == 8
    assert found.finished.speculation.accepted_draft_tokens > 100
    assert told, "no budget was renewed"
    assert all(budget.nodes_max <= 300 for budget in told)
    # About a quarter of the step that was measured.
    assert told[-1].flush_interval_s == pytest.approx(STEP_MS / 4e3, rel=0.5)


async def test_a_spare_drafter_is_left_to_whoever_needs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A spare that wins nothing would be left for that reason.
    monkeypatch.setattr("orchestrator.engagement._WINDOW_STEPS", 100_000)
    config = DriverConfig(sweep_interval_s=0.1)
    models = [load(DRAFT), load(DRAFT)]
    helpers = [LanguageModelProposer(m, model_info(m, proposer="language-model")) for m in models]
    async with (
        verifier(load(TARGET), name="synthetic:target", times=known_times()) as target,
        drafter(helpers[0]) as one,
        drafter(helpers[1]) as other,
        orchestrator([target.address], [one.address, other.address], config=config) as fleet,
        asyncio.TaskGroup() as group,
    ):
        first = group.create_task(fleet.client.complete(request(700)))

        async def loads(*expected: int) -> bool:
            return sorted((one.grower.load, other.grower.load)) == list(expected)

        await until(lambda: loads(1, 1), what="an idle drafter is a spare")
        spares = [len(link.spares) for link in fleet.fleet.drafters.values()]
        assert sorted(spares) == [0, 1]
        second = group.create_task(fleet.client.complete(request(300, seed=2)))
        await until(lambda: loads(1, 1), what="each session has one drafter")
        # Whether the second one has begun: both of them would have three drafters then.

        async def both() -> bool:
            running = list(fleet.driver._running.values())
            return len(running) == 2 and all(one.session.bindings for one in running)

        await until(both, what="both sessions are guessed for")
        await until(lambda: loads(1, 1), what="nobody shares a drafter")
        assert not any(link.spares for link in fleet.fleet.drafters.values())
        assert fleet.driver.meters.migrations["drafter", "spare"] == 1
        for found in (await first, await second):
            assert found.finished.speculation.accepted_draft_tokens > 0.5 * len(found.token_ids)


async def test_a_drafter_that_slows_down_is_left_for_its_peers() -> None:
    config = DriverConfig(sweep_interval_s=0.1, drafters_per_session=1)
    shaped = []
    for _ in range(2):
        model = load(DRAFT)
        inner = LanguageModelProposer(model, model_info(model, proposer="language-model"))
        shaped.append(ShapedProposer(inner))
    async with (
        verifier(load(TARGET), name="synthetic:target", times=known_times()) as target,
        drafter(shaped[0]) as one,
        drafter(shaped[1]) as other,
        orchestrator([target.address], [one.address, other.address], config=config) as fleet,
        asyncio.TaskGroup() as group,
    ):
        sessions = [
            group.create_task(fleet.client.complete(request(1_500, seed=seed))) for seed in (1, 2)
        ]

        async def apart() -> bool:
            return one.grower.load == other.grower.load == 1

        async def left() -> bool:
            return (one.grower.load, other.grower.load) == (0, 2)

        await until(apart, what="each session has one drafter")
        for _ in range(20):
            await asyncio.sleep(0.1)
            assert await apart(), "drafters that are alike keep their sessions"
        shaped[0].slower = 10.0
        await until(left, what="the slow drafter is left")
        await asyncio.sleep(1.0)
        assert await left(), "and nobody comes back"
        assert fleet.driver.meters.migrations["drafter", "outpaced"] == 1
        for task in sessions:
            found = await task
            assert found.finished.speculation.accepted_draft_tokens > 0.5 * len(found.token_ids)
