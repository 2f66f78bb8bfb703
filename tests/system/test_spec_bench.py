"""Spec-Bench's program over a real orchestrator, verifier and drafter with tiny models."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.spec.answers import Answer, from_line, lengths_of_sources
from bench.spec.contenders import BASELINE
from bench.spec.identity import Difference
from bench.spec.questions import Question
from bench.spec_bench import command
from outrider.client import Request
from tests.support.draws import first_child_always
from tests.support.fleet import (
    TARGET,
    RunningOrchestrator,
    drafter,
    load,
    lookup,
    orchestrator,
    verifier,
)

QUESTIONS = [
    Question(1, "writing", ("abcabcabcabc", "again")),
    Question(2, "rag", ("xyxyxyxyxyxyxyxy",)),
    Question(3, "rag", ("one two one two one two",)),
]


@pytest.fixture(name="fleet")
async def _fleet() -> AsyncIterator[RunningOrchestrator]:
    async with (
        verifier(load(TARGET)) as target,
        drafter(lookup()) as guesser,
        orchestrator([target.address], [guesser.address]) as running,
    ):
        yield running


@pytest.fixture(name="questions")
def _questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    entries = (
        {"question_id": q.question_id, "category": q.category, "turns": q.turns} for q in QUESTIONS
    )
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


async def _run(fleet: RunningOrchestrator, questions: Path, *more: str) -> str:
    arguments = ["--endpoint", fleet.address, "--questions", str(questions)]
    arguments += ["--results-dir", str(questions.parent / "results"), "--max-tokens", "12"]
    arguments += ["--identity-tokens", "8", *more]
    answer = await asyncio.to_thread(CliRunner().invoke, command, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    return answer.output


async def test_questions_are_answered_compared_and_written_down(
    fleet: RunningOrchestrator, questions: Path
) -> None:
    output = await _run(fleet, questions)
    folder = questions.parent / "results"
    store = folder / "spec_bench"
    assert len(list(store.glob("*-temperature-*.jsonl"))) == 4
    for kind in ("0", "1"):
        ours = _answers(store / f"outrider-temperature-{kind}.jsonl")
        base = _answers(store / f"{BASELINE}-temperature-{kind}.jsonl")
        assert set(ours) == set(base) == {1, 2, 3}
        for name, answer in ours.items():
            # The same request and the same past: in float32 the same ids, greedy and sampled.
            assert [t.token_ids for t in answer.turns] == [t.token_ids for t in base[name].turns]
            assert sum(answer.accept_lengths) == answer.tokens == base[name].tokens
            assert set(base[name].accept_lengths) == {1}
            assert answer.round == base[name].round
        assert len(ours[1].turns) == 2
        assert ours[1].turns[1].prompt_tokens > ours[1].turns[0].prompt_tokens
    last = output.strip().splitlines()[-1]
    assert last.startswith("result: spec-bench overall=")
    assert last.endswith("identical=3/3")
    assert "vs_vllm=na" in last
    record = json.loads((folder / "spec_bench.json").read_text())
    assert record["synthetic"] is False
    assert {s["contender"] for s in record["summaries"]} == {"outrider", BASELINE}


async def test_a_run_goes_on_where_it_was_broken_off(
    fleet: RunningOrchestrator, questions: Path
) -> None:
    output = await _run(fleet, questions, "--minutes", "0.000001", "--parts", "speed")
    assert "the same command goes on" in output
    store = questions.parent / "results" / "spec_bench"
    first = _lines(store)
    assert len(first) == 2  # one question by two contenders
    await _run(fleet, questions, "--parts", "speed")
    second = _lines(store)
    assert len(second) == 3 * 2 * 2
    assert first <= second
    output = await _run(fleet, questions, "--parts", "speed")
    assert "answered already" in output
    assert _lines(store) == second
    output = await _run(fleet, questions, "--parts", "speed", "--json")
    said = json.loads(output[output.index("{") :])
    assert said == json.loads((store.parent / "spec_bench.json").read_text())


async def test_steps_told_by_sources_are_those_that_the_verifier_counted(
    fleet: RunningOrchestrator,
) -> None:
    request = Request(chat=[("user", "abababababababab")], temperature=0.0, tokens_max=60)
    completion = await fleet.client.complete(request)
    lengths = lengths_of_sources(completion.sources)
    assert len(lengths) == completion.finished.speculation.verify_steps
    assert sum(lengths) == len(completion.token_ids)


async def test_answers_that_differ_are_found(questions: Path) -> None:
    """The rule of this verifier is broken: it accepts first guesses unseen."""
    async with (
        verifier(load(TARGET), rule=first_child_always) as target,
        drafter(lookup()) as guesser,
        orchestrator([target.address], [guesser.address]) as fleet,
    ):
        output = await _run(fleet, questions, "--parts", "identity", "--identity-tokens", "40")
    assert "result: spec-bench" in output
    assert "identical=3/3" not in output
    assert "a difference at output token" in output


def test_a_tie_is_no_difference() -> None:
    assert Difference(1, 0, 3, 5e-4).tie
    assert not Difference(1, 0, 3, 5e-3).tie
    assert not Difference(1, 0, 3, None).tie


def _answers(path: Path) -> dict[int, Answer]:
    return {a.question_id: a for a in map(from_line, path.read_text().splitlines())}


def _lines(store: Path) -> set[str]:
    files = store.glob("*-temperature-*.jsonl")
    return {line for path in files for line in path.read_text().splitlines()}
