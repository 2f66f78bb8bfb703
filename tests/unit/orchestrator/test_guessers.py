"""Who is behind a source number, and what of the target's candidates is asked for."""

from __future__ import annotations

from typing import Any

import pytest

from orchestrator.fleet import Fleet, Guesser, Listener
from orchestrator.workers import DrafterLink, LinkState
from outrider.domain import CANDIDATES_MAX, OWN_TEXT_SOURCE, ModelInfo

TARGET = ModelInfo("m", "f", "t", 300, 1_000, "none")


def info(proposer: str, version: str, *, candidates: int = 0, tokenizer: str | None = None) -> Any:
    return ModelInfo("d", version, tokenizer, 0, 0, "", proposer=proposer, candidates=candidates)


class Rig:
    """A fleet whose links are told by hand what they would hear."""

    def __init__(self) -> None:
        self.heard: list[tuple[str, int]] = []
        self.fleet = Fleet("o")
        self.fleet._listener = Listener(
            verifier_changed=lambda _: None,
            verifier_batch=lambda _, __: None,
            drafter_changed=lambda link: self.heard.append((link.address, link.source)),
            drafter_batch=lambda _, __: None,
        )

    def drafter(self, address: str, known: ModelInfo) -> DrafterLink:
        link = DrafterLink(
            address,
            "o",
            source=next(self.fleet._sources),
            on_change=self.fleet._drafter_changed,
            on_batch=lambda _, __: None,
        )
        self.fleet.drafters[address] = link
        self.ready(link, known)
        return link

    def ready(self, link: DrafterLink, known: ModelInfo) -> None:
        link.state = LinkState.LOST
        link.info = known
        link._set(LinkState.READY, "")


def test_every_source_has_a_name() -> None:
    rig = Rig()
    lookup = rig.drafter("d:1", info("lookup", "lookup"))
    model = rig.drafter("d:2", info("language-model", "abc"))
    prediction = rig.fleet.prediction_source
    assert rig.fleet.guessers == {
        lookup.source: Guesser("lookup", "lookup"),
        model.source: Guesser("language-model", "abc"),
        prediction: Guesser("prediction", ""),
        OWN_TEXT_SOURCE: Guesser("own-text", ""),
    }
    wanted = (0, prediction, lookup.source, OWN_TEXT_SOURCE, 99)
    assert rig.fleet.proposers(wanted) == {
        prediction: "prediction",
        lookup.source: "lookup",
        OWN_TEXT_SOURCE: "own-text",
    }


def test_what_comes_back_the_same_keeps_its_number() -> None:
    rig = Rig()
    link = rig.drafter("d:1", info("language-model", "abc"))
    before = link.source
    rig.ready(link, info("language-model", "abc"))
    assert link.source == before


def test_other_weights_are_another_source() -> None:
    rig = Rig()
    link = rig.drafter("d:1", info("language-model", "abc"))
    before = link.source
    rig.ready(link, info("language-model", "def"))
    assert link.source != before
    assert rig.fleet.guessers[before].version == "abc"
    assert rig.fleet.guessers[link.source].version == "def"
    assert rig.heard[-1] == ("d:1", link.source), "the driver hears of it afterwards"


def test_too_many_numbers_cost_no_name_that_is_no_drafters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.fleet.GUESSERS_MAX", 4)
    rig = Rig()
    prediction = rig.fleet.prediction_source
    sources = [rig.drafter(f"d:{n}", info("lookup", f"v{n}")).source for n in range(6)]
    assert set(rig.fleet.guessers) == {OWN_TEXT_SOURCE, prediction, *sources[-2:]}


def test_candidates_are_asked_for_if_a_fitting_drafter_wants_them() -> None:
    rig = Rig()
    assert rig.fleet.candidates_wanted(TARGET) == 0
    rig.drafter("d:1", info("lookup", "lookup"))
    assert rig.fleet.candidates_wanted(TARGET) == 0
    rig.drafter("d:2", info("cascade", "x", candidates=20, tokenizer="other"))
    assert rig.fleet.candidates_wanted(TARGET) == 0
    wanting = rig.drafter("d:3", info("recycling", "recycling", candidates=8))
    rig.drafter("d:4", info("cascade", "y", candidates=4, tokenizer="t"))
    assert rig.fleet.candidates_wanted(TARGET) == 8
    greedy = rig.drafter("d:5", info("recycling", "z", candidates=1 << 31))
    assert rig.fleet.candidates_wanted(TARGET) == CANDIDATES_MAX
    for link in (wanting, greedy):
        link.state = LinkState.DRAINING
    assert rig.fleet.candidates_wanted(TARGET) == 4


def test_candidates_go_to_those_who_ask_for_them() -> None:
    rig = Rig()
    without = rig.drafter("d:1", info("lookup", "lookup"))
    wanting = rig.drafter("d:2", info("recycling", "recycling", candidates=8))
    for link in (without, wanting):
        link.commit(7, b"commit", b"candidates")
    assert [row.candidates for row in without._pending.commits] == [b""]
    assert [row.candidates for row in wanting._pending.commits] == [b"candidates"]
