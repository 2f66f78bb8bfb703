"""Every request option, speculated in a ragged batch under KV pressure, equals its solo run.

The reference is independent of the engine: transformers' own attention, token by token, and the
rule written a second time. Drafts are what the reference says, beside wrong siblings, so a test
can also demand that they were accepted while the option was in force.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from outrider.domain import OWN_TEXT_SOURCE, FinishReason, Grammar, GrammarKind, SessionSpec
from tests.support.engine_runs import EngineRun, Outcome, oracle
from tests.support.fleet import TARGET, load
from tests.support.reference import Case, Expected, Tally, expect, plain_module
from verifier_service.config import EngineConfig

SCHEMA = Grammar(
    GrammarKind.JSON_SCHEMA,
    json.dumps(
        {
            "type": "object",
            "properties": {
                "a": {"type": "integer", "minimum": 0, "maximum": 9999},
                "b": {"type": "string", "maxLength": 6, "pattern": "^[a-z]*$"},
            },
            "required": ["a", "b"],
            "additionalProperties": False,
            "x-guidance": {"whitespace_flexible": False},
        }
    ),
)
REGEX = Grammar(GrammarKind.REGEX, r"(ab|cd|[0-9]{2}){6,12}")
TEXT = tuple(b"The quick brown fox jumps over the lazy dog. ")

NAMED: dict[str, Case] = {
    "greedy": Case(TEXT, 24),
    "long": Case(TEXT, 90, ignore_eos=True),
    "long, sampled": Case(TEXT, 90, temperature=0.8, seed=4, ignore_eos=True),
    "long, hot": Case(TEXT, 90, temperature=1.4, seed=3, ignore_eos=True),
    "temperature": Case(TEXT, 24, temperature=0.9, seed=5),
    "top_k": Case(TEXT, 24, temperature=1.2, top_k=7, seed=6),
    "top_p": Case(TEXT, 24, temperature=1.0, top_p=0.8, seed=7),
    "min_p": Case(TEXT, 24, temperature=1.3, min_p=0.05, seed=8),
    "repetition": Case(TEXT, 24, repetition_penalty=1.7),
    "repetition below 1": Case(TEXT, 24, temperature=0.7, repetition_penalty=0.6, seed=9),
    "presence": Case(TEXT, 24, presence_penalty=1.9),
    "frequency": Case(TEXT, 24, temperature=0.8, frequency_penalty=1.2, seed=10),
    "bias": Case(TEXT, 24, logit_bias=((65, 4.0), (66, -100.0), (258, -100.0))),
    "minimum length": Case(TEXT, 24, stop_ids=tuple(range(0, 256, 3)), tokens_min=12),
    "stop ids": Case(TEXT, 24, stop_ids=tuple(range(0, 256, 9))),
    "ignore eos": Case(TEXT, 24, temperature=1.5, seed=11, ignore_eos=True),
    "schema": Case(TEXT, 40, grammar=SCHEMA),
    "schema, sampled": Case(TEXT, 40, temperature=1.1, seed=12, grammar=SCHEMA),
    "regex": Case(TEXT, 32, temperature=0.9, seed=13, grammar=REGEX),
    "all": Case(
        TEXT,
        24,
        temperature=0.9,
        top_k=40,
        top_p=0.9,
        min_p=0.01,
        seed=14,
        repetition_penalty=1.2,
        presence_penalty=0.4,
        frequency_penalty=0.3,
        logit_bias=((70, 2.0),),
        tokens_min=5,
    ),
}

ROOMY = EngineConfig(kv_tokens_max=1 << 16, warm_up=False)
TIGHT = EngineConfig(kv_tokens_max=320, kv_overcommit=100.0, prefill_tokens_max=24, warm_up=False)


@pytest.fixture(scope="module")
def model():
    return load(TARGET)


def spec_of(number: int, case: Case, **changes: object) -> SessionSpec:
    spec = SessionSpec(
        session=number,
        epoch=1,
        prompt=case.prompt,
        committed=(),
        sampling=case.sampling,
        seed=case.session_seed,
        tokens_max=case.tokens_max,
        stop_ids=frozenset(case.stop_ids),
        ignore_eos=case.ignore_eos,
        logprobs=2,
    )
    return replace(spec, **changes)


def check(cases: list[Case], expected: list[Expected], found: dict[int, Outcome]) -> None:
    tally = Tally()
    for number, (case, truth) in enumerate(zip(cases, expected, strict=True)):
        outcome = found[number]
        assert outcome.rejection is None
        tally.check(TARGET, case, truth, outcome.ids)
        assert [entry.token for entry in outcome.logprobs] == outcome.ids
        if tuple(outcome.ids) == truth.ids:
            np.testing.assert_allclose(
                [entry.logprob for entry in outcome.logprobs], truth.logprobs, atol=1e-4
            )
        for entry in outcome.logprobs:
            assert len(entry.top) == 2
            assert entry.top[0][1] >= entry.top[1][1]
            assert entry.logprob <= entry.top[0][1] + 1e-6
    tally.assert_identical()


def run(
    model, cases: list[Case], config: EngineConfig, **changes: object
) -> tuple[EngineRun, list[Expected]]:
    expected = [expect(TARGET, case) for case in cases]
    truth = {number: one.ids for number, one in enumerate(expected)}
    engine_run = EngineRun(model, config, oracle(truth))
    engine_run.run([spec_of(number, case, **changes) for number, case in enumerate(cases)])
    return engine_run, expected


@pytest.mark.parametrize("config", [ROOMY, TIGHT], ids=["roomy", "tight"])
def test_every_option_at_once(model, config):
    cases = list(NAMED.values())
    engine_run, expected = run(model, cases, config)
    check(cases, expected, engine_run.outcomes)
    assert engine_run.engine.pool.tokens_used == 0
    if config is TIGHT:
        assert engine_run.engine.preemptions > 0
    for (name, case), outcome in zip(NAMED.items(), engine_run.outcomes.values(), strict=True):
        if len(outcome.ids) > 4:
            assert outcome.counters.accepted_draft_tokens > 0, name
        if case.grammar is SCHEMA:
            assert outcome.finish is FinishReason.STOP
            json.loads(bytes(outcome.ids[:-1]))


def test_a_verifiers_own_guesses_make_no_difference(model):
    repeats = Case(TEXT, 60, logit_bias=((65, 50.0),), ignore_eos=True)
    cases = [*NAMED.values(), repeats]
    expected = [expect(TARGET, case) for case in cases]
    engine_run = EngineRun(model, replace(ROOMY, own_guesses=True))
    engine_run.run([spec_of(n, case, own_guesses=True) for n, case in enumerate(cases)])
    check(cases, expected, engine_run.outcomes)
    accepted = [
        outcome.counters.accepted_by_source.get(OWN_TEXT_SOURCE, 0)
        for outcome in engine_run.outcomes.values()
    ]
    assert accepted[-1] > 40, accepted
    assert sum(accepted[:-1]) > 0, accepted


def test_a_verifier_that_may_not_guess_does_not(model):
    cases = [NAMED["long"]]
    allowed = replace(ROOMY, own_guesses=True)
    for config, wanted in ((ROOMY, True), (allowed, False)):
        outcome = EngineRun(model, config).run([spec_of(0, cases[0], own_guesses=wanted)])[0]
        assert outcome.counters.verified_draft_tokens == 0
        assert outcome.ids


@pytest.mark.parametrize("name", NAMED)
def test_speculation_makes_no_difference(model, name):
    case = NAMED[name]
    plain = EngineRun(model, ROOMY).run([spec_of(0, case)])[0]
    assert plain.counters.verified_draft_tokens == 0
    truth = {0: tuple(plain.ids)}
    speculated = EngineRun(model, ROOMY, oracle(truth)).run([spec_of(0, case)])[0]
    assert speculated.ids == plain.ids
    assert speculated.finish is plain.finish
    # Each commit but the first one, and those cut at an end, takes four guesses and one more.
    assert speculated.commits < plain.commits or len(plain.ids) < 3
    np.testing.assert_allclose(
        [entry.logprob for entry in speculated.logprobs],
        [entry.logprob for entry in plain.logprobs],
        atol=1e-4,
    )


@st.composite
def some_cases(draw: st.DrawFn) -> list[Case]:
    byte = st.integers(0, 255)
    shared = draw(st.lists(byte, min_size=1, max_size=80))
    cases = []
    for _ in range(draw(st.integers(1, 16))):
        own = draw(st.lists(byte, max_size=40))
        cases.append(
            Case(
                prompt=tuple(shared + own),
                tokens_max=draw(st.integers(1, 16)),
                temperature=draw(st.sampled_from([0.0, 0.7, 1.0, 1.6])),
                top_k=draw(st.sampled_from([0, 1, 5, 60])),
                top_p=draw(st.sampled_from([1.0, 0.95, 0.5])),
                min_p=draw(st.sampled_from([0.0, 0.02, 0.3])),
                seed=draw(st.integers(0, 2**32)),
                stop_ids=tuple(draw(st.lists(byte, max_size=6))),
                ignore_eos=draw(st.booleans()),
                repetition_penalty=draw(st.sampled_from([1.0, 1.3, 0.8])),
                presence_penalty=draw(st.sampled_from([0.0, 1.0, -1.0])),
                frequency_penalty=draw(st.sampled_from([0.0, 0.5, -0.5])),
                logit_bias=tuple(
                    sorted(draw(st.dictionaries(byte, st.floats(-8, 8), max_size=4)).items())
                ),
            )
        )
        if draw(st.booleans()):
            most = cases[-1].tokens_max
            cases[-1] = replace(cases[-1], tokens_min=draw(st.integers(0, most)))
        if draw(st.integers(0, 5)) == 0:
            cases[-1] = replace(cases[-1], ignore_eos=False, grammar=REGEX)
    return cases


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases=some_cases(), tokens=st.sampled_from([160, 256, 1024]), chunk=st.integers(1, 64))
def test_any_options_in_any_batch(model, cases, tokens, chunk):
    config = replace(TIGHT, kv_tokens_max=tokens, prefill_tokens_max=chunk)
    engine_run, expected = run(model, cases, config)
    check(cases, expected, engine_run.outcomes)
    assert engine_run.engine.pool.tokens_used == 0


def test_prompt_logprobs(model):
    cases = [Case(TEXT * 3, 6), Case(TEXT[:1], 6), Case(TEXT * 2, 6, temperature=1.0, seed=3)]
    engine_run, expected = run(model, cases, TIGHT, prompt_logprobs=3)
    check(cases, expected, engine_run.outcomes)
    for number, case in enumerate(cases):
        pieces = engine_run.outcomes[number].prompt_logprobs
        with torch.inference_mode():
            logits = plain_module(TARGET)(input_ids=torch.tensor([case.prompt])).logits[0]
        truth = logits.double().log_softmax(-1)
        found = {piece.start + at: e for piece in pieces for at, e in enumerate(piece.tokens)}
        assert sorted(found) == list(range(1, len(case.prompt)))
        assert sum(len(piece.tokens) for piece in pieces) == len(case.prompt) - 1
        for at, entry in found.items():
            assert entry.token == case.prompt[at]
            assert entry.logprob == pytest.approx(float(truth[at - 1, entry.token]), abs=1e-4)
            best = truth[at - 1].topk(3).values.tolist()
            assert [score for _, score in entry.top] == pytest.approx(best, abs=1e-4)
    # Nothing of a prompt that is scored is shared, and it was computed in more than one piece.
    assert len(engine_run.outcomes[0].prompt_logprobs) > 3


def test_a_grammar_that_does_not_compile_is_refused(model):
    case = Case(TEXT, 8, grammar=Grammar(GrammarKind.REGEX, "(unclosed"))
    outcome = EngineRun(model, ROOMY).run([spec_of(0, case)])[0]
    assert outcome.rejection is not None
    assert outcome.rejection.field == "sampling.grammar.regex"


def test_a_session_that_moves_goes_on_with_its_options(model):
    """Opened again with what was committed, as after a failover: counts and grammar go on."""
    cases = list(NAMED.values())
    expected = [expect(TARGET, case) for case in cases]
    specs = [
        spec_of(number, case, committed=truth.ids[: len(truth.ids) // 2])
        for number, (case, truth) in enumerate(zip(cases, expected, strict=True))
    ]
    truth_ids = {number: one.ids for number, one in enumerate(expected)}
    outcomes = EngineRun(model, ROOMY, oracle(truth_ids)).run(specs)
    for number, truth in enumerate(expected):
        assert tuple(outcomes[number].ids) == truth.ids
        assert len(outcomes[number].logprobs) == len(truth.ids) - len(specs[number].committed)
