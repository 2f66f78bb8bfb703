"""What the benchmark of drafters makes of its measurements."""

from __future__ import annotations

import math

import pytest

from bench.calibrated import Decile, deciles, worst
from bench.coupling import Coupling
from bench.drafting_results import (
    Ahead,
    Calibrated,
    Results,
    Run,
    Tau,
    acceptance_by_depth,
    lines,
    markdown,
    result_line,
    taus_of,
    union_gains,
)
from bench.sharing import Sharing


def run(contender: str, category: str, *accepted: int, temperature: float = 0.0) -> Run:
    tokens = sum(accepted) + len(accepted)
    return Run(contender, category, 1, temperature, tokens, tokens / 10, accepted, 2.5)


def test_acceptance_by_depth_is_of_those_that_got_so_far() -> None:
    found = acceptance_by_depth([0, 1, 3, 3])
    assert list(found[:4]) == pytest.approx([0.75, 2 / 3, 1.0, 0.0])
    assert found[4:] == (None,) * 4
    assert acceptance_by_depth([]) == (None,) * 8


def test_runs_are_summed_up_by_contender_category_and_temperature() -> None:
    runs = [
        run("target", "rag", 0, 0),
        run("lookup", "rag", 1, 3),
        run("lookup", "rag", 2),
        run("lookup", "rag", 7, temperature=0.8),
        run("lookup", "code", 0),
    ]
    found = {(x.contender, x.category, x.temperature): x for x in lines(runs)}
    assert len(found) == 4
    assert found["lookup", "rag", 0.0].tau == pytest.approx(3.0)
    assert found["lookup", "rag", 0.0].runs == 2
    assert found["lookup", "rag", 0.8].tau == pytest.approx(8.0)
    assert found["target", "rag", 0.0].tau == 1.0
    assert found["lookup", "code", 0.0].tokens_per_s == pytest.approx(10.0)


def test_the_union_is_compared_with_the_better_one() -> None:
    runs = [
        *(run("lookup", c, a) for c, a in (("rag", 3), ("writing", 0))),
        *(run("model", c, a) for c, a in (("rag", 1), ("writing", 1))),
        *(run("union", c, a) for c, a in (("rag", 3), ("writing", 0))),
    ]
    assert union_gains(taus_of(Results(runs=runs))) == {"rag at 0": 1.0, "writing at 0": 0.5}
    assert "union_worst_gain=0.500" in result_line(Results(runs=runs))


def test_taus_of_known_texts_come_before_those_of_the_clock() -> None:
    results = Results(
        runs=[run("lookup", "rag", 1), run("model", "writing", 1)],
        taus=[
            Tau("lookup", "rag", 0.0, (3, 4)),
            Tau("lookup", "rag", 0.0, (8,)),
            Tau("union", "rag", 0.8, ()),
        ],
    )
    assert taus_of(results) == {("rag", 0.0, "lookup"): 6.0}
    said = result_line(results)
    assert "lookup_tau_rag=6.000 model_tau_writing=na" in said
    assert "| 0 | rag | 6.00 | - |" in markdown(results)


def test_what_was_not_measured_is_na() -> None:
    assert result_line(Results()) == (
        "result: drafters lookup_tau_summarization=na lookup_tau_rag=na model_tau_writing=na"
        " union_worst_gain=na coupling_gap=na ahead_ready=na claims_off=na"
    )


def test_everything_measured_is_told() -> None:
    results = Results(
        runs=[
            run("target", "summarization", 0),
            run("lookup", "summarization", 2),
            run("lookup", "rag", 4),
            run("model", "writing", 1),
        ],
        couplings={"a, b": Coupling(10, 1_000, 0.5, 0.51, 0.3, 0.6)},
        calibrated=[
            Calibrated("model", 1.0, (Decile(3, 500, 0.35, 0.45),)),
            Calibrated("model", 1.0, (Decile(3, 500, 0.35, 0.43), Decile(4, 9, 0.4, 0.9)), True),
        ],
        ahead=[Ahead("0.8", 20.0, 2.5, 100, 3.0, 0.7, 0.9)],
        sharing=Sharing(200, 16, 9, 300, 200, 0.2, 0.1, {"one": (0.25, 0.26)}),
        unavailable={"union": "for a reason"},
    )
    text = markdown(results)
    for part in (
        "| lookup |",
        "0.5100",
        "0.450",
        "0.900",
        "| nothing |",
        "| best first | 300 | 0.20 |",
        "0.260",
    ):
        assert part in text
    assert "na: union: for a reason" in text
    assert results.sharing is not None
    assert results.sharing.gain == 1.5
    assert result_line(results) == (
        "result: drafters lookup_tau_summarization=3.000 lookup_tau_rag=5.000"
        " model_tau_writing=2.000 union_worst_gain=na coupling_gap=0.100 ahead_ready=0.900"
        " claims_off=0.080"
    )


def test_claims_are_sorted_into_tenths() -> None:
    claims = [(math.log(0.31), True), (math.log(0.39), False), (0.0, True), (-99.0, False)]
    found = deciles(claims)
    assert [(one.tenth, one.count, one.observed) for one in found] == [
        (0, 1, 0.0),
        (3, 2, 0.5),
        (9, 1, 1.0),
    ]
    assert found[1].claimed == pytest.approx(0.35)
    assert worst(found, 2) == pytest.approx(0.15)
    assert worst(found, 3) is None
