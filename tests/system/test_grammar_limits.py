"""A grammar that breaks a limit in the middle of its output ends its own session and no other."""

from __future__ import annotations

from outrider.domain import FinishReason, Grammar, GrammarKind, RejectionCode
from tests.support.engine_runs import EngineRun
from tests.support.fleet import TARGET, load
from tests.support.reference import Case, expect
from tests.system.test_options_equality import ROOMY, TEXT, spec_of
from verifier_service import grammar


def test_a_limit_at_the_tip_spares_the_other_sessions(monkeypatch):
    limits = grammar.LLParserLimits(max_lexer_states=300, verbose_errors=False)
    monkeypatch.setattr(grammar, "_LIMITS", limits)
    bystander = Case(TEXT, 200, temperature=0.8, seed=3, ignore_eos=True)
    greedy = Case(TEXT, 400, grammar=Grammar(GrammarKind.REGEX, "(.{1,500}b){1,500}"))
    outcomes = EngineRun(load(TARGET), ROOMY).run([spec_of(0, bystander), spec_of(1, greedy)])
    refused = outcomes[1].rejection
    assert refused is not None
    assert (refused.code, refused.field) == (RejectionCode.INVALID, "sampling.grammar.regex")
    assert outcomes[1].ids
    assert outcomes[0].finish is FinishReason.LENGTH
    assert tuple(outcomes[0].ids) == expect(TARGET, bystander).ids
