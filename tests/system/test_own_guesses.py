"""A verifier's own guesses through a real fleet: asked for by the orchestrator, unless refused."""

from __future__ import annotations

import pytest

from orchestrator.config import DriverConfig
from outrider.domain import OWN_TEXT_SOURCE
from tests.support.cases import request
from tests.support.fleet import TARGET, load, orchestrator, verifier
from tests.support.reference import Case, expect
from verifier_service.config import EngineConfig

REPEATS = Case(tuple(b"The quick brown fox"), 40, logit_bias=((65, 50.0),), ignore_eos=True)


@pytest.mark.parametrize("allowed", [True, False])
@pytest.mark.parametrize(("asks", "speculation"), [(True, True), (True, False), (False, True)])
async def test_a_verifier_guesses_if_all_sides_will(
    allowed: bool, asks: bool, speculation: bool
) -> None:
    config = EngineConfig(own_guesses=allowed, warm_up=False)
    async with (
        verifier(load(TARGET), config=config) as target,
        orchestrator([target.address], config=DriverConfig(own_guesses=asks)) as running,
    ):
        found = await running.client.complete(request(REPEATS, speculation=speculation))
        assert found.token_ids == expect(TARGET, REPEATS).ids
        accepted = found.finished.speculation.accepted_by_source
        if allowed and asks and speculation:
            assert set(accepted) == {OWN_TEXT_SOURCE}
            assert accepted[OWN_TEXT_SOURCE] > 20
        else:
            assert found.finished.speculation.verified_draft_tokens == 0
