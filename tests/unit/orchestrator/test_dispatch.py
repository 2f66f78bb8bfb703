"""What drafters are told of budgets: when measurements have changed, and only then."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from orchestrator.dispatch import Dispatch
from orchestrator.generation import Generation, Running
from orchestrator.messages import BindDrafter, OpenOnVerifier
from orchestrator.session import Session
from orchestrator.text import TextCodec, TextStream
from orchestrator.workers import DrafterLink, VerifierLink
from outrider.domain import (
    BindSpec,
    DraftBudget,
    GrowReport,
    KvPeer,
    ModelInfo,
    SamplingParams,
    SessionSpec,
    StepReport,
)
from outrider.tokenizer import byte_tokenizer

LIMITS = DraftBudget(nodes_max=64, depth_max=32, flush_interval_s=0.02, width_max=3)
INFO = ModelInfo(
    model="m",
    model_fingerprint="f",
    tokenizer_fingerprint="t",
    vocabulary_size=300,
    length_max=1_000,
    dtype="none",
)
CODEC = TextCodec(byte_tokenizer())


class Told(DrafterLink):
    """Remembers the budgets that it was to send."""

    def __init__(self, address: str) -> None:
        super().__init__(
            address, "o", source=1, on_change=lambda _: None, on_batch=lambda _, __: None
        )
        self.told: list[tuple[int, int, DraftBudget]] = []
        self.binds: list[BindSpec] = []

    def set_budget(self, session: int, binding: int, budget: DraftBudget) -> None:
        self.told.append((session, binding, budget))

    def bind(self, spec: BindSpec) -> None:
        self.binds.append(spec)


@dataclass
class Workers:
    """Stands for the fleet, of which only the links are looked at."""

    verifiers: dict[str, VerifierLink] = field(default_factory=dict)
    drafters: dict[str, DrafterLink] = field(default_factory=dict)


def verifier(step_s: float) -> VerifierLink:
    async def no_tokenizer(info: ModelInfo, files: dict[str, bytes]) -> None:
        """Nobody asks for one."""

    link = VerifierLink(
        "v:1",
        "o",
        on_change=lambda _: None,
        on_batch=lambda _, __: None,
        on_tokenizer=no_tokenizer,
        has_tokenizer=lambda _: True,
    )
    step(link, step_s)
    return link


def step(link: VerifierLink, duration_s: float, times: int = 1) -> None:
    for _ in range(times):
        link.took_step(StepReport(duration_s=duration_s, rows=1, tokens=8), 0.0)


def session(number: int) -> Running:
    spec = SessionSpec(
        session=number,
        epoch=1,
        prompt=(1,),
        committed=(),
        sampling=SamplingParams(),
        seed=1,
        tokens_max=10,
        stop_ids=frozenset(),
        ignore_eos=True,
    )
    inner = Session(spec, TextStream(CODEC), drafters_wanted=1, verifier="v:1")
    running = Running(Generation(INFO, 0.0), 0, inner, heard_s=0.0, progress_s=0.0)
    running.budgets[1] = LIMITS
    return running


def test_each_session_is_told_once_until_measurements_have_changed_by_much() -> None:
    link, drafter = verifier(0.02), Told("d:1")
    drafter.grow = GrowReport(0.002, 16, 0.0)
    fleet: Any = Workers({"v:1": link}, {"d:1": drafter})
    dispatch = Dispatch(fleet, LIMITS)
    sessions = [session(number) for number in (1, 2)]

    def review() -> list[int]:
        drafter.told.clear()
        dispatch.measure_anew()
        for running in sessions:
            dispatch.renew_budget(running, 1, drafter)
        return [number for number, _, _ in drafter.told]

    assert review() == [1, 2]
    assert sessions[0].budgets[1] is sessions[1].budgets[1]
    assert review() == []
    drafter.rtt_s = 0.000_1
    assert review() == []
    drafter.rtt_s = 0.1
    assert review() == [1, 2]
    latest = drafter.told[0][2]
    assert latest == sessions[0].budgets[1]
    # A late-comer is told what the others know.
    sessions.append(session(3))
    assert review() == [3]
    assert sessions[2].budgets[1] is latest


def test_measurements_are_looked_at_when_asked_for_and_for_each_pair() -> None:
    link, near, far = verifier(0.02), Told("d:1"), Told("d:2")
    near.grow = far.grow = GrowReport(0.002, 16, 0.0)
    far.rtt_s = 0.1
    fleet: Any = Workers({"v:1": link}, {"d:1": near, "d:2": far})
    dispatch = Dispatch(fleet, LIMITS)
    dispatch.renew_budget(session(1), 1, near)
    dispatch.renew_budget(session(2), 1, far)
    assert near.told[0][2].probability_min > far.told[0][2].probability_min
    near.rtt_s = 0.1
    late = session(3)
    dispatch.renew_budget(late, 1, near)
    assert near.told[-1][2] == near.told[0][2]
    dispatch.measure_anew()
    dispatch.renew_budget(late, 1, near)
    assert near.told[-1][2] == far.told[0][2]


def test_a_drafter_hears_whose_session_it_is_and_what_share_they_have() -> None:
    drafter = Told("d:1")
    fleet: Any = Workers({"v:1": verifier(0.02)}, {"d:1": drafter})
    dispatch = Dispatch(fleet, LIMITS, {"heavy": 2.5})
    for number, tenant in enumerate(("heavy", "other", "")):
        running = session(number)
        running.generation.tenant = tenant
        running.session.bindings[1] = "d:1"
        dispatch.bind(running, BindDrafter(1, 1, (9,)))
    shares = [(spec.tenant, spec.tenant_weight) for spec in drafter.binds]
    assert shares == [("heavy", 2.5), ("other", 1.0), ("", 1.0)]


def test_a_verifier_is_told_once_whom_it_might_ask_for_kv() -> None:
    link = verifier(0.02)
    opened: list[SessionSpec] = []
    link.open = opened.append  # type: ignore[method-assign]
    fleet: Any = Workers({"v:1": link}, {})
    dispatch, running = Dispatch(fleet, LIMITS), session(1)
    running.session.drafters_wanted = 0
    peer = running.kv_peer = KvPeer("v:2", "i", 3)
    command = OpenOnVerifier(running.session.spec)
    dispatch.to_verifier(running, command)
    dispatch.to_verifier(running, command)
    assert [spec.kv_peer for spec in opened] == [peer, None]
    assert replace(opened[0], kv_peer=None) == opened[1] == running.session.spec
