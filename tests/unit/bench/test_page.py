"""The results page and README's table are written from results, real and synthetic apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.load_results import write_load
from bench.machine import origin
from bench.page import BEGIN, END, between_markers, command
from bench.spec.identity import Difference, Identity
from bench.spec.publishing import ours_over
from bench.spec.report import markdown, result_line
from bench.spec.results import Results, read_results, write_results
from bench.spec.statistics import by_round, summarize
from outrider.errors import ConfigError
from tests.unit.bench.test_load_results import RESULTS as LOAD
from tests.unit.bench.test_spec_statistics import answer

README = Path(__file__).parents[3] / "README.md"
_ANSWERS = [
    answer(number, name, seconds, lengths, category=category)
    for number, category in enumerate(("qa", "rag", "writing"))
    for name, seconds, lengths in (
        ("target-only", 2.0, (1, 1, 1, 1)),
        ("outrider", 1.0 / (1 + number), (1, 3)),
        ("vllm", 1.0, (1, 1, 1, 1)),
    )
]


def _results() -> Results:
    rounds = by_round(_ANSWERS, 0.0)
    summaries = [
        summarize(rounds, name, "target-only", 0.0) for name in ("outrider", "vllm", "target-only")
    ]
    return Results(
        origin(["outrider", "bench", "spec-bench"]),
        {"model": "tiny", "dtype": "bfloat16", "tokens_max": 4},
        3,
        tuple(summary for summary in summaries if summary is not None),
        Identity("float32", 24, 3, 2, (Difference(1, 0, 7, 2e-4),)),
        {"vllm": {"vllm": "0.1", "speculative": None}},
        {"openvino": "not installed"},
        ours_over(_ANSWERS),
    )


def test_results_survive_the_file(tmp_path: Path) -> None:
    write_results(_results(), tmp_path / "new" / "spec_bench.json")
    assert read_results(tmp_path / "new" / "spec_bench.json") == _results()
    (tmp_path / "bad.json").write_text("[]")
    with pytest.raises(ConfigError, match="no results of this version"):
        read_results(tmp_path / "bad.json")


def test_the_last_line_compares_with_peers_and_says_what_is_missing() -> None:
    line = result_line(_results())
    # Speeds are 4, 8 and 12 of ours, 2 of target-only and 4 of vLLM.
    assert line.startswith("result: spec-bench overall=4.00 vs_vllm=2.00 vs_vllm_ngram=na")
    assert "min_category=2.00 tau=2.00 identical=2/3" in line


def test_tables_say_ties_and_what_was_not_measured() -> None:
    text = markdown(_results())
    assert "question 1, turn 1: a tie at output token 7" in text
    assert "- openvino: not measured (not installed)" in text
    assert "| vllm | 2.00 | 2.00 | 2.00 | 2.00 (2.00-2.00) |" in text
    nothing = replace(_results(), summaries=(), identity=None, unavailable={})
    assert markdown(nothing) == ""
    assert "overall=na" in result_line(nothing)


def test_the_page_keeps_real_and_synthetic_apart(tmp_path: Path) -> None:
    results, docs, readme = tmp_path / "results", tmp_path / "docs", tmp_path / "README.md"
    docs.mkdir()
    write_results(_results(), results / "spec_bench.json")
    write_load(LOAD, results / "load.json")
    (results / "pipeline.md").write_text("| a synthetic table |\n")
    (results / "drafting.md").write_text("| taus |\n")
    readme.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    arguments = ["--results-dir", str(results), "--docs", str(docs), "--readme", str(readme)]
    answer = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    page = (docs / "benchmarks.md").read_text()
    real, synthetic = page.split("## Synthetic models")
    assert "outrider bench spec-bench" in real
    assert "### Load" in real
    assert "a synthetic table" not in real
    drafters = real.split("## Drafters")[1]
    assert "`make bench-drafters`" in drafters
    assert "| taus |" in drafters
    assert "a synthetic table" in synthetic
    text = readme.read_text()
    assert text.startswith(f"before\n{BEGIN}\n`outrider bench spec-bench`")
    assert text.endswith(f"{END}\nafter\n")
    assert "old" not in text
    assert "| outrider | 6.00 | 2.00 | 4.00 | 4.00 |" in text


def test_a_readme_without_markers_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no lines"):
        between_markers("nothing here", "table")
    assert BEGIN in README.read_text()
    assert END in README.read_text()
