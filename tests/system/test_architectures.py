"""Each architecture that is promised, through the services, against transformers' own generate."""

from __future__ import annotations

import contextlib

import pytest

from orchestrator.config import DriverConfig
from tests.support.cases import PROMPTS, answers, totals, truth_of
from tests.support.fleet import TARGET, load, orchestrator, verifier
from tests.support.hostile import oracle, scripted_drafter
from tests.support.reference import Case, Tally, expect, greedy_by_generate
from verifier_service.config import EngineConfig

ENGINE = EngineConfig(step_nodes_max=64, step_delay_s=0.01, warm_up=False)
WANTED = [Case(tuple(prompt), 24) for prompt in PROMPTS[2:10]]


@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3", "mistral"])
async def test_greedy_ids_are_those_of_generate(arch):
    spec = f"{TARGET}&arch={arch}"
    expected = [expect(spec, case) for case in WANTED]
    assert [greedy_by_generate(spec, case) for case in WANTED] == [found.ids for found in expected]
    truth = truth_of(WANTED, expected)
    async with contextlib.AsyncExitStack() as stack:
        judge = await stack.enter_async_context(verifier(load(spec), config=ENGINE))
        # Two that err differently: together their chains are trees.
        helpers = [
            await stack.enter_async_context(scripted_drafter(oracle(truth, right=0.7), seed=seed))
            for seed in (1, 2)
        ]
        running = await stack.enter_async_context(
            orchestrator(
                [judge.address],
                [helper.address for helper in helpers],
                config=DriverConfig(drafters_per_session=2),
            )
        )
        found = await answers(running.client, WANTED)
    tally = Tally()
    for case, reference, completion in zip(WANTED, expected, found, strict=True):
        tally.check(spec, case, reference, completion.token_ids)
    tally.assert_identical()
    assert totals(found).accepted_draft_tokens > 20
    assert totals(found).verified_draft_tokens > totals(found).accepted_draft_tokens
