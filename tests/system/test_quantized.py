"""Speculation changes nothing about the output of a quantized target either."""

from __future__ import annotations

from pathlib import Path

from outrider.model.loading import load_language_model
from outrider.model.threads import set_threads
from tests.support.cases import answers, cases, totals, truth_of
from tests.support.fleet import TARGET, orchestrator, verifier
from tests.support.hostile import oracle, scripted_drafter
from tests.support.reference import Expected
from verifier_service.config import EngineConfig

ENGINE = EngineConfig(step_nodes_max=64, step_delay_s=0.01, warm_up=False)


async def test_speculated_and_unspeculated_ids_are_the_same():
    set_threads(1)
    target = load_language_model(
        TARGET, quantize="int8", device="cpu", cache_dir=Path("/nonexistent")
    )
    wanted = cases(24)[:16]
    async with verifier(target, config=ENGINE) as judge, orchestrator([judge.address]) as alone:
        plain = await answers(alone.client, wanted)
    truth = truth_of(wanted, [Expected(found.token_ids, ()) for found in plain])
    async with (
        verifier(target, config=ENGINE) as judge,
        scripted_drafter(oracle(truth, right=0.8)) as helper,
        orchestrator([judge.address], [helper.address]) as helped,
    ):
        speculated = await answers(helped.client, wanted)
    assert totals(plain).accepted_draft_tokens == 0
    assert totals(speculated).accepted_draft_tokens > 50
    assert totals(speculated).verified_draft_tokens > totals(speculated).accepted_draft_tokens
    assert [found.token_ids for found in speculated] == [found.token_ids for found in plain]
