"""What placement makes of a fleet, without a socket: which workers are weighed, and what counts."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from orchestrator.fleet import SHORTLIST_MAX, Fleet
from orchestrator.jobs import Job
from orchestrator.placing import Placer
from orchestrator.prefix_memory import Prefix
from orchestrator.workers import LinkState, VerifierLink
from outrider.domain import KvPeer, ModelInfo, SamplingParams, SessionSpec
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.registry import WorkerRecord

TARGET = ModelInfo("big", "f-big", "tokens", 100, 1 << 20, "float32")
OTHER = ModelInfo("other", "f-other", "tokens", 100, 1 << 20, "float32")
PROMPT = tuple(range(3 * BLOCK_TOKENS + 1))


def ignore(*_: Any) -> None:
    pass


async def ignore_tokenizer(*_: Any) -> None:
    pass


def link(address: str, info: ModelInfo = TARGET, *, up: bool = True) -> VerifierLink:
    made = VerifierLink(
        address,
        "test",
        on_change=ignore,
        on_batch=ignore,
        on_tokenizer=ignore_tokenizer,
        has_tokenizer=lambda info: True,
    )
    made.info, made.sessions_max, made.incarnation = info, 10, f"i-{address}"
    made.state = LinkState.READY if up else LinkState.LOST
    return made


def fleet_of(links: Iterable[VerifierLink]) -> Fleet:
    fleet = Fleet("test")
    fleet.verifiers = {one.address: one for one in links}
    return fleet


def job_of(prompt: tuple[int, ...] = PROMPT, info: ModelInfo = TARGET, salt: str = "") -> Job:
    spec = SessionSpec(
        session=1, epoch=0, prompt=prompt, committed=(), sampling=SamplingParams(), seed=1,
        tokens_max=9, cache_salt=salt,
    )  # fmt: skip
    return Job(info, 1, (spec,), (), speculation=True)


def placer_of(fleet: Fleet) -> Placer:
    return Placer(fleet, draw=random.Random(1).randrange)


def placed(placer: Placer, job: Job, exclude: frozenset[str] = frozenset()) -> str | None:
    chosen = placer.verifier(placer.prefix(job), job.info.model, job.choices[0], exclude)
    return None if chosen is None else chosen.view.address


def record(address: str, **known: Any) -> WorkerRecord:
    fields: dict[str, Any] = {
        "role": "verifier", "worker": "w", "incarnation": f"i-{address}", "address": address,
        "model": "big", "model_fingerprint": "f-big", "capacity": 10, "load": 0, "state": "ready",
    }  # fmt: skip
    return WorkerRecord(**{**fields, **known})


def test_the_same_text_goes_to_the_same_verifier() -> None:
    fleet = fleet_of(link(f"h:{number}") for number in range(1, 200))
    placer = placer_of(fleet)
    first = placed(placer, job_of())
    assert first is not None
    assert [placed(placer, job_of()) for _ in range(9)] == [first] * 9
    # Longer ones, too, but nobody else's.
    assert placed(placer, job_of((*PROMPT, 7, 7))) == first
    others = {placed(placer, job_of(salt=str(number))) for number in range(9)}
    assert others != {first}
    # Restarted, it holds nothing.
    fleet.verifiers[first].incarnation = "reborn"
    weighed = placer.weigh(placer.prefix(job_of()), "big", len(PROMPT))
    assert {one.view.held_tokens for one in weighed} == {0}


def test_output_is_remembered_as_well() -> None:
    placer = placer_of(fleet_of([link("a:1"), link("b:1")]))
    job = job_of((1, 2, 3))
    address = placed(placer, job)
    assert address is not None
    output = list(range(2 * BLOCK_TOKENS))
    placer.ended(placer.prefix(job), job.choices[0], output, address)
    weighed = placer.weigh(placer.prefix(job_of((1, 2, 3, *output, 4))), "big", 99)
    held = {one.view.address: one.view.held_tokens for one in weighed}
    assert held[address] == 2 * BLOCK_TOKENS
    assert sum(held.values()) == 2 * BLOCK_TOKENS


def test_a_large_fleet_is_looked_at_in_part_unless_that_finds_nothing() -> None:
    links = [link(f"h:{number}") for number in range(1, 500)]
    placer = placer_of(fleet_of(links))
    assert len(placer.weigh(placer.prefix(job_of()), "big", 9)) == SHORTLIST_MAX
    only = link("only:1", OTHER)
    placer = placer_of(fleet_of([*links, only]))
    assert placed(placer, job_of(info=OTHER)) == "only:1"
    assert placed(placer, job_of(info=OTHER), frozenset(["only:1"])) is None
    down = [link(f"d:{number}", up=False) for number in range(1, 500)]
    assert placed(placer_of(fleet_of([*down, link("up:1")])), job_of()) == "up:1"


def test_what_others_do_to_a_worker_counts() -> None:
    fleet = fleet_of([link("a:1"), link("b:1"), link("c:1")])
    fleet.verifiers["a:1"].sessions.add(7)
    fleet.note(
        [
            record("a:1", load=4),
            record("b:1", kv_tokens_used=90, kv_tokens_max=100),
            record("c:1", load=9, incarnation="before"),
        ]
    )
    fleet.verifiers["a:1"].sessions.add(8)
    views = {view.address: view for view in fleet.verifier_views()}
    assert views["a:1"].sessions == 5
    assert views["b:1"].kv_share == 0.9
    assert views["c:1"].sessions == 0
    fleet.note([record("a:1", state="draining"), record("b:1", state="draining")])
    assert [view.address for view in fleet.verifier_views()] == ["c:1"]


# --- who might be asked for KV ----------------------------------------------------------------


def peer_of(
    placer: Placer, prefix: Prefix, job: Job, exclude: frozenset[str] = frozenset()
) -> tuple[str, KvPeer | None]:
    chosen = placer.verifier(prefix, job.info.model, job.choices[0], exclude)
    assert chosen is not None
    return chosen.view.address, placer.peer(prefix, chosen)


def test_who_holds_more_is_named_to_the_one_that_is_chosen() -> None:
    fleet = fleet_of([link("a:1"), link("b:1"), link("c:1")])
    placer, job = placer_of(fleet), job_of()
    first = placed(placer, job)
    assert first is not None
    prefix = placer.prefix(job)
    other, peer = peer_of(placer, prefix, job, frozenset([first]))
    assert other != first
    assert peer == KvPeer(first, f"i-{first}", 3)
    # That one holds as much now, as far as is known, and nobody more.
    again, peer = peer_of(placer, placer.prefix(job), job, frozenset([first]))
    assert (again, peer) == (other, None)


def test_who_holds_the_text_itself_needs_nobody() -> None:
    placer, job = placer_of(fleet_of([link("a:1"), link("b:1")])), job_of()
    first = placed(placer, job)
    assert peer_of(placer, placer.prefix(job), job) == (first, None)


def test_one_that_drains_may_be_asked_and_one_that_is_lost_or_another_may_not() -> None:
    gone, drains, strange = link("a:1", up=False), link("b:1"), link("c:1", OTHER)
    drains.state = LinkState.DRAINING
    full = link("d:1")
    placer, job = placer_of(fleet_of([gone, drains, strange, full])), job_of()
    held = {"i-a:1": 3, "i-b:1": 2, "i-c:1": 3, "somebody": 3}
    prefix = replace(placer.prefix(job), holders=held, looked_up=True)
    assert peer_of(placer, prefix, job) == ("d:1", KvPeer("b:1", "i-b:1", 2))


def test_among_equals_the_one_with_fewer_sessions_is_asked() -> None:
    links = [link("a:1"), link("b:1"), link("c:1")]
    links[0].sessions |= {1, 2}
    links[1].sessions |= {3}
    placer, job = placer_of(fleet_of(links)), job_of()
    prefix = replace(placer.prefix(job), holders={"i-a:1": 3, "i-b:1": 3}, looked_up=True)
    busy = frozenset(["a:1", "b:1"])
    assert peer_of(placer, prefix, job, busy) == ("c:1", KvPeer("b:1", "i-b:1", 3))


def test_a_block_more_is_not_worth_a_hint() -> None:
    placer, job = placer_of(fleet_of([link("a:1"), link("b:1")])), job_of()
    prefix = replace(placer.prefix(job), holders={"i-a:1": 1}, looked_up=True)
    assert peer_of(placer, prefix, job, frozenset(["a:1"])) == ("b:1", None)


def test_an_address_that_a_verifier_would_not_take_is_not_named() -> None:
    placer, job = placer_of(fleet_of([link("unix:/run/x"), link("b:1")])), job_of()
    prefix = replace(placer.prefix(job), holders={"i-unix:/run/x": 3}, looked_up=True)
    assert peer_of(placer, prefix, job, frozenset(["unix:/run/x"])) == ("b:1", None)
