"""Pieces add up, and what is wrong in one of them is in the report."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from tests.chaos.faults import MINUTE, Done, Fault, plan
from tests.chaos.history import Heard
from tests.chaos.load import Outcomes
from tests.chaos.report import Piece, Store, lines, moves_s, piece_of, results
from tests.chaos.witness import Seen

PIECE = Piece(
    number=1,
    settings={"each": 2},
    duration_s=60.0,
    counts={"kill verifier": 2, "flush redis": 1},
    in_flight={"kill verifier": 2},
    died={"verifier": 2},
    generations=40,
    mismatches=0,
    lost=0,
    doubled=0,
    contradictions=0,
    worker_commits=1_000,
    worker_contradictions=0,
    held_twice=0,
    takeovers=3,
    positions=6_400,
    ties=1,
    deliveries=5_000,
    moves_s=[0.5, 1.5],
    gaps_s=[0.2, 1.5],
    hits_back_s=[0.7],
)


def last_line(pieces: list[Piece]) -> dict[str, str]:
    words = lines(pieces)[-1].split()
    assert words[:2] == ["result:", "chaos"]
    return dict(word.split("=") for word in words[2:])


def test_a_run_is_kept_as_it_was(tmp_path: Path):
    done = Done(Counter({"kill verifier": 2}), Counter({"kill verifier": 1}), Counter(verifier=1))
    found = piece_of(3, {"each": 1}, 1.0, done, Outcomes(), Seen(), decided=[])
    Store(tmp_path / "chaos.json").add(found)
    assert Store(tmp_path / "chaos.json").pieces == {3: found}


def test_pieces_add_up_and_one_that_is_repeated_counts_once(tmp_path: Path):
    path = tmp_path / "chaos.json"
    Store(path).add(replace(PIECE, lost=7))
    Store(path).add(replace(PIECE, number=2, generations=2, moves_s=[9.0]))
    Store(path).add(PIECE)
    store = Store(path)
    said = last_line(list(store.pieces.values()))
    assert (said["faults"], said["generations"], said["lost"]) == ("6", "42", "0")
    assert (said["died_in_flight"], said["ttft_after_death_max_s"]) == ("4", "9.00")
    assert "| kill verifier | 4 | 4 |" in path.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    "name",
    [
        "mismatches",
        "lost",
        "doubled",
        "contradictions",
        "worker_contradictions",
        "hits_lost",
    ],
)
def test_nothing_wrong_is_good(name):
    assert PIECE.good
    assert not replace(PIECE, **{name: 1}).good


def test_what_could_not_have_been_is_a_mismatch():
    wrong = replace(PIECE, contradictions=2, worker_contradictions=3)
    assert last_line([wrong])["mismatches"] == "5"


def test_the_most_important_lines_come_last(tmp_path: Path):
    store = Store(tmp_path / "chaos.json")
    store.put("redis", ["result: redis a=1"])
    store.put("overload", ["result: overload a=1"])
    store.add(PIECE)
    store.put("placement", ["result: placement a=1"])
    kinds = [line.split()[1] for line in results(Store(tmp_path / "chaos.json"))]
    assert kinds == ["overload", "chaos", "placement", "redis"]


def test_a_move_lasts_until_the_last_generation_is_heard_again():
    def heard(at_s: float, name: str) -> Heard:
        return Heard(at_s, name, 1, 0, 0, (1,))

    history = [heard(at_s, "a") for at_s in (0.0, 1.0, 1.2, 3.0)]
    history += [heard(at_s, "b") for at_s in (0.0, 1.01, 2.5)]
    assert moves_s([1.0], history) == [pytest.approx(1.5)]
    assert moves_s([5.0], history) == []


def test_every_deed_happens_as_often_as_asked_in_an_order_of_its_own():
    faults = plan(2, 1, long_stops=1)
    counts = Counter(map(str, faults))
    assert all(
        counts[str(Fault(role, deed))] == 2
        for role in ("verifier", "drafter", "orchestrator", "redis")
        for deed in ("kill", "stop")
    )
    assert counts[f"{MINUTE} redis"] == counts["flush redis"] == counts["cut verifier"] == 1
    assert faults == plan(2, 1, long_stops=1)
    assert faults != plan(2, 2, long_stops=1)
