"""Tests of the tests: a wrong rule of acceptance must be found out by each of them.

The rule is the classic mistake: the first guess is accepted without asking the target.
"""

from __future__ import annotations

import contextlib
import io

import pytest
from rich.console import Console

from outrider.client import Completion
from outrider.demo import Run, Series, report
from tests.support.cases import answers, cases, truth_of
from tests.support.draws import (
    Exact,
    draw,
    first_child_always,
    helpful,
    most_probable,
    never_the_sample,
    siblings,
)
from tests.support.fleet import TARGET, load, orchestrator, verifier
from tests.support.hostile import Strategy, oracle, scripted_drafter
from tests.support.reference import Tally, expect
from verifier_service.acceptance import AcceptRule, accept_path
from verifier_service.config import EngineConfig

CASES = cases(12)[:12]
EXPECTED = [expect(TARGET, case) for case in CASES]
TREACHEROUS = oracle(truth_of(CASES, EXPECTED), right=0.6)
"""Guesses that have no chance are seldom verified; these begin well."""


async def generate(
    rule: AcceptRule, strategy: Strategy, *, speculation: bool = True
) -> list[Completion]:
    """Answers of a fleet with this rule and this drafter."""
    async with contextlib.AsyncExitStack() as stack:
        config = EngineConfig(step_delay_s=0.01, warm_up=False)
        target = await stack.enter_async_context(verifier(load(TARGET), config=config, rule=rule))
        helper = await stack.enter_async_context(scripted_drafter(strategy))
        fleet = await stack.enter_async_context(orchestrator([target.address], [helper.address]))
        return await answers(fleet.client, CASES, speculation=speculation)


def tally(completions: list[Completion]) -> Tally:
    found = Tally()
    for case, expected, completion in zip(CASES, EXPECTED, completions, strict=True):
        found.check(TARGET, case, expected, completion.token_ids)
    return found


async def test_equality_finds_a_broken_rule():
    found = tally(await generate(first_child_always, TREACHEROUS))
    assert len(found.faults) > len(CASES) // 2
    with pytest.raises(AssertionError, match="outputs differ"):
        found.assert_identical()


async def test_equality_is_content_with_the_rule():
    tally(await generate(accept_path, TREACHEROUS)).assert_identical()


async def test_a_broken_rule_goes_unnoticed_where_all_guesses_are_right():
    """That is why hostile drafters are needed."""
    tally(await generate(first_child_always, oracle(truth_of(CASES, EXPECTED)))).assert_identical()


def first_difference(plain: list[Completion], speculated: list[Completion]) -> tuple[Run, Run]:
    """Runs of the first prompt to which the answers differ, or else of the last."""
    pairs = list(zip(plain, speculated, strict=True))
    one, two = next((p for p in pairs if p[0].token_ids != p[1].token_ids), pairs[-1])
    return Run(one), Run(two)


@pytest.mark.parametrize("guesser", [most_probable, never_the_sample, siblings])
def test_the_distribution_finds_a_broken_rule(guesser):
    exact = Exact.of_case()
    draws = draw(exact, guesser, sessions=1_024, rule=first_child_always)
    assert draws.counters.accepted_draft_tokens >= draws.counts.total()
    assert draws.p_value(exact) < 1e-12
    assert draw(exact, guesser, sessions=1_024).p_value(exact) > 1e-4


def test_the_distribution_alone_would_not_find_it_with_a_helpful_drafter():
    exact = Exact.of_case()
    draws = draw(exact, helpful, sessions=1_024, rule=first_child_always)
    assert draws.p_value(exact) > 1e-4


@pytest.mark.parametrize(
    ("rule", "status", "word"), [(first_child_always, 1, "no"), (accept_path, 0, "yes")]
)
async def test_the_demo_finds_a_broken_rule(rule, status, word, capsys):
    plain = await generate(rule, TREACHEROUS, speculation=False)
    speculated = await generate(rule, TREACHEROUS)
    console = Console(file=io.StringIO(), width=200)
    first, second = first_difference(plain, speculated)
    assert report(console, Series([first]), Series([second])) == status
    assert f"identical: {word}" in console.file.getvalue()
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("result: demo speedup=")
    assert last.endswith(f"identical={word}")


async def test_the_demo_compares_every_run():
    plain = await generate(accept_path, TREACHEROUS, speculation=False)
    speculated = await generate(first_child_always, TREACHEROUS)
    good, bad = first_difference(plain, speculated)
    console = Console(file=io.StringIO())
    assert report(console, Series([good, good]), Series([bad, good])) == 1
    assert report(console, Series([good, good]), Series([good, good])) == 0
