"""Several choices of one request, through a real fleet: each is what its seed alone would say."""

from __future__ import annotations

import pytest

from outrider.client import Request
from outrider.domain import SamplingParams, session_seed
from tests.support.cases import SAMPLED, request
from tests.support.fleet import TARGET, drafter, load, lookup, orchestrator, verifier
from tests.support.raw import session, verifier_stream
from tests.support.reference import Case, expect
from verifier_service.config import EngineConfig

CASE = Case(tuple(b"The quick brown fox jumps over the lazy dog."), 24, seed=11, **SAMPLED)
ENGINE = EngineConfig(step_delay_s=0.005, warm_up=False)


@pytest.mark.parametrize("speculation", [True, False])
async def test_choices_are_single_sessions_with_derived_seeds(speculation: bool) -> None:
    async with (
        verifier(load(TARGET), config=ENGINE) as target,
        drafter(lookup()) as helper,
        orchestrator([target.address], [helper.address]) as running,
    ):
        asked = request(CASE, speculation=speculation)
        four = await running.client.complete_all(request(CASE, n=4, speculation=speculation))
        alone = await running.client.complete(asked)
        assert four[0].token_ids == alone.token_ids == expect(TARGET, CASE).ids
        assert len({completion.token_ids for completion in four}) == 4
        # The verifier itself, one session after the other.
        sampling = SamplingParams(**SAMPLED)
        async with verifier_stream(target.address) as stream:
            for choice, completion in enumerate(four):
                await stream.open(
                    session(
                        choice,
                        bytes(CASE.prompt),
                        sampling=sampling,
                        seed=session_seed(CASE.seed, choice),
                        tokens_max=CASE.tokens_max,
                        ignore_eos=CASE.ignore_eos,
                    )
                )
                assert await stream.until_finished(choice) == completion.token_ids
        assert running.driver.load == 0


async def test_greedy_choices_are_the_same() -> None:
    async with (
        verifier(load(TARGET), config=ENGINE) as target,
        orchestrator([target.address]) as running,
    ):
        three = await running.client.complete_all(
            Request(prompt="Hello", temperature=0, n=3, tokens_max=12)
        )
        assert len({completion.token_ids for completion in three}) == 1
        assert [completion.finished.choice for completion in three] == [0, 1, 2]
