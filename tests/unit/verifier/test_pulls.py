"""Sessions that wait for KV of peers: whatever comes, each gets its own tokens, and nothing leaks.

The engine's loop is turned by hand, and the edge is a list of errands; the blocks are those of
another engine.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.domain import KvPeer, PullOutcome, PullReport, SamplingParams, SessionSpec
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model
from tests.support.flat_times import FlatTimes
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.messages import (
    Abort,
    CallOff,
    Errand,
    GiveBack,
    Lend,
    Open,
    Outputs,
    PulledBlock,
    PullOrder,
    PullOver,
)
from verifier_service.step_times import StepTimes

LONG = tuple((index * 37 + index // 7) % 256 for index in range(200))
"""Six blocks that can be shared."""
BLOCKS = 6


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@functools.cache
def model() -> LanguageModel:
    return load_language_model(
        "random:tiny?seed=1&layers=1&hidden=32&length_max=512",
        device="cpu",
        cache_dir=Path("/nonexistent"),
    )


class Rig:
    """An engine without its thread, and what it said."""

    def __init__(self, blocks: int = 64, times: StepTimes | None = None, **config: Any) -> None:
        config = {"kv_overcommit": 99.0, "warm_up": False, **config}
        self.engine = Engine(
            model(),
            EngineConfig(kv_tokens_max=BLOCK_TOKENS * blocks, **config),
            self._take,
            times=times or FlatTimes(),
        )
        self.engine.times.observe(1, 1.0)
        self.errands: list[Errand] = []
        self.engine.pulls.connect(self.errands.append, "me")
        self.outputs: dict[int, list[int]] = {}
        self.ended: set[int] = set()
        self.reports: list[PullReport] = []
        self.brought = 0
        self.taken = 0
        """Blocks of them that the engine has said it needs no longer."""

    def _take(self, outputs: dict[int, Outputs]) -> None:
        for said in outputs.values():
            assert not said.rejections
            self.reports += said.kv_pulls
            for number, commit, report in said.commits:
                self.outputs[number] += commit.tokens
                if report.finish_reason is not None:
                    self.ended.add(number)

    def open(
        self,
        number: int,
        prompt: Sequence[int] = LONG,
        tokens_max: int = 4,
        blocks: int = BLOCKS,
        **options: Any,
    ) -> None:
        spec = SessionSpec(
            session=number, epoch=1, prompt=tuple(prompt), committed=(), seed=0,
            sampling=SamplingParams(temperature=0.0), tokens_max=tokens_max, ignore_eos=True,
            **{"kv_peer": KvPeer("peer:1", "other", blocks) if blocks else None, **options},
        )  # fmt: skip
        self.outputs[number] = []
        self.engine.submit(Open(1, spec))

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            self.engine._turn(0.0)

    def run(self) -> None:
        for _ in range(400):
            self.turn()
            if not self.engine.load:
                return
        raise AssertionError(f"sessions {list(self.engine._seats)} do not end")

    @property
    def orders(self) -> list[PullOrder]:
        return [errand for errand in self.errands if isinstance(errand, PullOrder)]

    @property
    def called_off(self) -> list[int]:
        return [errand.pull for errand in self.errands if isinstance(errand, CallOff)]

    def bring(self, order: PullOrder, index: int) -> None:
        """A block comes."""

        def taken() -> None:
            self.taken += 1

        self.brought += 1
        data = bytearray(donated()[order.digests[index]])
        self.engine.submit(PulledBlock(order.pull, data, taken))

    def back(self, order: PullOrder, outcome: PullOutcome, count: int) -> None:
        """The edge is back, with so many blocks."""
        memory = self.engine.pulls.bytes
        assert memory is not None
        size_bytes = count * memory.block_bytes
        self.engine.submit(PullOver(order.pull, outcome, 0.01, 0.02, size_bytes))

    def pulling(self) -> list[bool]:
        return [seat.pulling for seat in self.engine._seats.values()]

    def check(self) -> None:
        """All that ended got what it gets alone; nothing is held any more."""
        assert self.engine.load == 0
        assert self.engine.pulls.active == 0
        assert self.engine.pool.blocks.used == 0

    def outcomes(self) -> list[PullOutcome]:
        """Signs of life left out."""
        return [report.outcome for report in self.reports if report.outcome is not None]


@functools.cache
def donated() -> dict[bytes, bytes]:
    """The blocks of an engine that has computed the text, by hash."""
    rig = Rig()
    rig.open(1, blocks=0)
    rig.run()
    pool, memory = rig.engine.pool, rig.engine.pulls.bytes
    assert memory is not None
    found = {}
    for digest in pool.new_cache("").shareable_hashes(LONG, BLOCKS):
        block = pool.blocks.share(digest)
        assert block is not None
        found[digest] = bytes(memory.read(block))
    return found


@functools.cache
def alone(tokens_max: int = 4, length: int = len(LONG)) -> list[int]:
    """What a session commits that computes everything."""
    rig = Rig()
    rig.open(1, LONG[:length], tokens_max, blocks=0)
    rig.run()
    return rig.outputs[1]


# --- waiting --------------------------------------------------------------------------------------


def test_a_session_waits_and_goes_on_with_what_came() -> None:
    rig = Rig()
    rig.open(1)
    rig.turn()
    (order,) = rig.orders
    assert order.digests == tuple(donated())
    rig.turn(3)
    assert (rig.engine.steps, rig.pulling()) == (0, [True])
    for index in range(4):
        rig.bring(order, index)
    rig.turn()
    assert rig.engine.pool.blocks.used == 4
    assert rig.engine.pool.blocks.published == 4
    rig.back(order, PullOutcome.SHORT, 4)
    rig.run()
    assert rig.outputs[1] == alone()
    (report,) = rig.reports
    assert (report.outcome, report.blocks) == (PullOutcome.SHORT, 4)
    assert report.size_bytes == sum(map(len, list(donated().values())[:4]))
    assert (rig.taken, rig.called_off) == (4, [])
    rig.check()


def test_nothing_is_said_of_waiting_for_room() -> None:
    """Who waits for a peer is no sign of a verifier that is full."""
    rig = Rig()
    rig.open(1)
    rig.turn()
    rig.open(2, (1, 2, 3), blocks=0)
    steps = []
    rig.engine._emit = lambda outputs: steps.extend(said.step for said in outputs.values())
    rig.turn()
    assert [step.waiting for step in steps if step is not None] == [0]


def test_only_what_is_missing_is_asked_for() -> None:
    rig = Rig()
    rig.open(1, LONG[:100], blocks=0)
    rig.run()
    rig.open(2)
    rig.turn()
    (order,) = rig.orders
    assert order.digests == tuple(donated())[3:]
    for index in range(3):
        rig.bring(order, index)
    rig.back(order, PullOutcome.COMPLETE, 3)
    rig.run()
    assert rig.outputs[2] == alone()
    rig.check()


def test_sessions_with_the_same_beginning_wait_for_one_pull() -> None:
    rig = Rig()
    for number in range(3):
        rig.open(number)
    rig.turn()
    (order,) = rig.orders
    rig.bring(order, 0)
    rig.turn()
    rig.open(3)
    rig.turn()
    assert rig.pulling() == [True] * 4
    assert len(rig.orders) == 1
    assert rig.engine.pool.blocks.used == 1
    for index in range(1, BLOCKS):
        rig.bring(order, index)
    rig.back(order, PullOutcome.COMPLETE, BLOCKS)
    rig.run()
    assert list(rig.outputs.values()) == [alone()] * 4
    assert rig.outcomes() == [PullOutcome.COMPLETE]
    rig.check()


@pytest.mark.parametrize("leaver", [0, 1])
def test_one_of_them_leaves_and_the_other_goes_on(leaver: int) -> None:
    rig = Rig()
    rig.open(0)
    rig.open(1)
    rig.turn()
    (order,) = rig.orders
    rig.bring(order, 0)
    rig.turn()
    rig.engine.submit(Abort(1, leaver, 1))
    rig.turn()
    assert rig.called_off == []
    for index in range(1, BLOCKS):
        rig.bring(order, index)
    rig.back(order, PullOutcome.COMPLETE, BLOCKS)
    rig.run()
    assert rig.outputs[1 - leaver] == alone()
    rig.check()


def test_who_leaves_alone_calls_it_off() -> None:
    rig = Rig()
    rig.open(1)
    rig.turn()
    (order,) = rig.orders
    rig.bring(order, 0)
    rig.turn()
    rig.bring(order, 1)
    rig.engine.submit(Abort(1, 1, 1))
    rig.turn()
    assert rig.called_off == [order.pull]
    rig.check()
    # What still comes is thanked for and thrown away.
    rig.bring(order, 2)
    rig.back(order, PullOutcome.SLOW, 3)
    rig.turn()
    assert (rig.taken, rig.engine.pulls._errands) == (3, {})
    assert rig.engine.pool.blocks.published == 1
    rig.check()


def test_a_few_at_once() -> None:
    rig = Rig(kv_pulls_max=1)
    rig.open(1)
    rig.open(2, cache_salt="other")
    rig.turn()
    (order,) = rig.orders
    assert rig.outcomes() == [PullOutcome.DECLINED]
    rig.engine.submit(Abort(1, 1, 1))
    rig.open(3, cache_salt="third")
    rig.turn()
    assert len(rig.orders) == 1, "the edge is not back yet"
    rig.back(order, PullOutcome.SLOW, 0)
    rig.open(4, cache_salt="fourth")
    rig.turn()
    assert len(rig.orders) == 2


@pytest.mark.parametrize(
    "options",
    [
        {"blocks": 0},
        {"kv_peer": KvPeer("peer:1", "me", BLOCKS)},
        {"prompt": LONG[:BLOCK_TOKENS]},
        {"prompt_logprobs": 0},
    ],
    ids=["no hint", "itself", "too short", "all must be computed"],
)
def test_hints_that_are_of_no_use(options: dict[str, Any]) -> None:
    rig = Rig()
    rig.open(1, **options)
    rig.run()
    assert (rig.errands, rig.reports) == ([], [])


def test_before_anything_was_measured_everything_is_computed() -> None:
    rig = Rig()
    rig.engine.pulls._times = StepTimes()
    rig.open(1)
    rig.run()
    assert rig.errands == []
    assert rig.outcomes() == [PullOutcome.DECLINED]


def test_prompts_that_come_first_are_a_reason_to_fetch() -> None:
    """A transfer of 5 ms is no gain over six steps of 1 ms, unless others' steps come first."""

    class Quick(FlatTimes):
        def predict(
            self, tokens: int, *, kv_tokens: int | None = None, prefill_tokens: int = 0
        ) -> float:
            return 0.001

    rig = Rig(times=Quick(), prefill_tokens_max=BLOCK_TOKENS)
    rig.open(1)
    rig.turn()
    assert rig.outcomes() == [PullOutcome.DECLINED]
    rig.open(2, cache_salt="other")
    rig.turn()
    assert len(rig.orders) == 1


# --- it ends early --------------------------------------------------------------------------------


def test_what_takes_too_long_is_called_off() -> None:
    rig = Rig()
    rig.open(1)
    rig.turn()
    (order,) = rig.orders
    rig.bring(order, 0)
    rig.turn()
    assert rig.engine.pulls.active
    (pull,) = rig.engine.pulls._pulls.values()
    pull.began_s -= 100.0
    rig.run()
    assert rig.outputs[1] == alone()
    assert rig.outcomes() == [PullOutcome.SLOW]
    assert rig.called_off == [order.pull]
    # It brought something: how slow it was is known, and it is not shunned.
    rig.engine.submit(PullOver(order.pull, PullOutcome.SLOW, 1.0, 100.0, 1_000))
    rig.turn()
    assert rig.engine.pulls.rates.expected_s("peer:1", 1_000, 0.0) > 10.0
    rig.check()


@pytest.mark.parametrize(
    "outcome", [PullOutcome.FAILED, PullOutcome.REFUSED, PullOutcome.CORRUPT, PullOutcome.SLOW]
)
def test_after_a_failure_a_peer_is_left_alone(outcome: PullOutcome) -> None:
    rig = Rig()
    rig.open(1)
    rig.turn()
    rig.back(rig.orders[0], outcome, 0)
    rig.run()
    assert rig.outputs[1] == alone()
    rig.open(2, cache_salt="other")
    rig.run()
    assert rig.outcomes() == [outcome, PullOutcome.DECLINED]
    rig.check()


def test_one_that_has_nothing_is_not_to_blame() -> None:
    rig = Rig()
    rig.open(1)
    rig.turn()
    rig.back(rig.orders[0], PullOutcome.SHORT, 0)
    rig.run()
    rig.open(2, cache_salt="other")
    rig.turn()
    assert len(rig.orders) == 2


def test_where_there_is_no_room_nobody_gives_way() -> None:
    rig = Rig(blocks=9)
    rig.open(1, LONG[:150][::-1], 100, blocks=0)
    rig.turn(2)
    rig.open(2)
    rig.turn()
    (order,) = rig.orders
    # Five or six of nine are the first one's.
    for index in range(BLOCKS):
        rig.bring(order, index)
    rig.turn(BLOCKS + 1)
    assert rig.outcomes() == [PullOutcome.NO_ROOM]
    assert rig.engine.preemptions == 0
    assert rig.called_off == [order.pull]
    rig.run()
    assert rig.outputs[2] == alone()
    assert rig.taken == BLOCKS
    rig.check()


def test_who_loses_its_kv_while_it_waits_takes_its_turn() -> None:
    rig = Rig(blocks=9)
    rig.open(1, LONG[:90][::-1], 150, blocks=0)
    rig.turn(2)
    rig.open(2)
    rig.turn()
    (order,) = rig.orders
    for index in range(5):
        rig.bring(order, index)
    rig.turn(6)
    assert rig.pulling() == [False, True]
    # The first one grows, and takes the second one's room.
    for _ in range(100):
        if not rig.engine._seats[2].session.cache.blocks:
            break
        rig.turn()
    assert rig.engine.preemptions == 0, "it had not begun"
    rig.bring(order, 5)
    rig.turn()
    assert rig.pulling() == [False, False]
    assert rig.outcomes() == [PullOutcome.NO_ROOM]
    rig.run()
    assert rig.outputs[2] == alone()
    rig.check()


def test_all_wait_for_the_room_that_one_who_waits_holds() -> None:
    """Nobody can compute: no step is taken, and none fails."""
    rig = Rig(blocks=7)
    rig.open(1)
    rig.turn()
    (order,) = rig.orders
    for index in range(BLOCKS):
        rig.bring(order, index)
    rig.turn(BLOCKS)
    rig.open(2, LONG[:60][::-1], 4, blocks=0)
    rig.turn(2)
    assert rig.pulling() == [True, False]
    rig.back(order, PullOutcome.COMPLETE, BLOCKS)
    rig.run()
    assert rig.outputs[1] == alone()
    assert rig.ended == {1, 2}
    rig.check()


def test_beside_sessions_that_compute_a_little_is_taken_at_a_time() -> None:
    rig = Rig()
    rig.open(1)
    rig.turn()
    (order,) = rig.orders
    rig.open(2, (1, 2, 3), 50, blocks=0)
    rig.turn()
    rig.engine._step_s = 0.0
    for index in range(3):
        rig.bring(order, index)
    rig.turn()
    rig.engine._step_s = 0.0
    assert rig.engine.pulls.tokens_pulled == BLOCK_TOKENS
    rig.turn()
    rig.engine._step_s = 1e6
    assert rig.engine.pulls.tokens_pulled == 2 * BLOCK_TOKENS
    for index in range(3, BLOCKS):
        rig.bring(order, index)
    rig.turn()
    assert rig.engine.pulls.tokens_pulled == BLOCKS * BLOCK_TOKENS


def test_a_block_that_cannot_be_written_ends_a_pull_and_nothing_else() -> None:
    rig = Rig()
    rig.open(1)
    rig.turn()
    (order,) = rig.orders
    rig.engine.submit(PulledBlock(order.pull, bytearray(b"short"), lambda: None))
    rig.run()
    assert rig.outputs[1] == alone()
    assert rig.outcomes() == [PullOutcome.FAILED]
    rig.check()


def test_now_and_then_it_is_said_that_a_session_still_waits() -> None:
    rig = Rig()
    rig.open(1)
    rig.turn(3)
    assert rig.reports == []
    (pull,) = rig.engine.pulls._pulls.values()
    pull.told_s -= 1.0
    rig.turn(3)
    assert [report.outcome for report in rig.reports] == [None]


# --- lending --------------------------------------------------------------------------------------


def test_what_is_lent_is_held_until_it_is_given_back() -> None:
    rig = Rig(blocks=8)
    rig.open(1, blocks=0)
    rig.run()
    digest = next(iter(donated()))
    got: list[int | None] = []

    def keep(block: int | None) -> bool:
        got.append(block)
        return True

    rig.engine.submit(Lend(digest, keep))
    rig.turn()
    (block,) = got
    assert block is not None
    assert rig.engine.pool.blocks.used == 1
    # Others may have all but this.
    rig.open(2, LONG[:180][::-1], 4, blocks=0)
    rig.run()
    assert rig.engine.pool.blocks.share(digest) == block
    rig.engine.pool.blocks.release([block])
    rig.engine.submit(GiveBack(block))
    rig.turn()
    rig.check()


def test_what_nobody_waits_for_any_more_is_not_held() -> None:
    rig = Rig()
    rig.open(1, blocks=0)
    rig.run()
    rig.engine.submit(Lend(next(iter(donated())), lambda block: False))
    rig.engine.submit(Lend(b"unknown", lambda block: False))
    rig.turn()
    rig.check()


def test_a_loan_is_made_while_the_model_computes() -> None:
    rig = Rig()
    rig.open(1, blocks=0)
    rig.run()
    got: list[int | None] = []

    def keep(block: int | None) -> bool:
        got.append(block)
        return True

    rig.engine._lent = True
    rig.engine.submit(Lend(next(iter(donated())), keep))
    assert got[0] is not None
    rig.engine.submit(GiveBack(got[0]))
    assert rig.engine.pool.blocks.used == 0
    rig.engine._lent = False


def test_an_engine_that_has_stopped_lends_nothing() -> None:
    rig = Rig()
    rig.engine._inbox.close()
    got: list[int | None] = []
    rig.engine.submit(Lend(b"x", lambda block: got.append(block) is None))
    assert got == [None]


# --- anything, in any order -----------------------------------------------------------------------


class Anything(RuleBasedStateMachine):
    """Sessions, blocks, ends and loans in any order, in a pool that is too small."""

    def __init__(self) -> None:
        super().__init__()
        self.rig = Rig(blocks=12, prefill_tokens_max=64)
        self.rig.engine.pulls.rates.failed = lambda address, now_s: None  # type: ignore[method-assign]
        self.numbers = iter(range(1, 1_000))
        self.brought: dict[int, int] = {}
        self.open_orders: dict[int, PullOrder] = {}
        self.lent: list[int] = []
        self.lengths: dict[int, int] = {}

    @rule(length=st.sampled_from([70, 120, 200]), hinted=st.booleans())
    def open(self, length: int, hinted: bool) -> None:
        number = next(self.numbers)
        self.lengths[number] = length
        self.rig.open(number, LONG[:length], blocks=BLOCKS if hinted else 0)

    @rule()
    def turn(self) -> None:
        self.rig.turn()
        for order in self.rig.orders:
            self.open_orders.setdefault(order.pull, order)

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def bring(self, data: st.DataObject) -> None:
        order = data.draw(st.sampled_from(self.waiting()))
        index = self.brought.get(order.pull, 0)
        if index < len(order.digests):
            self.rig.bring(order, index)
            self.brought[order.pull] = index + 1

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), outcome=st.sampled_from(list(PullOutcome)))
    def back(self, data: st.DataObject, outcome: PullOutcome) -> None:
        order = data.draw(st.sampled_from(self.waiting()))
        self.rig.back(order, outcome, self.brought.get(order.pull, 0))
        self.brought[order.pull] = -1

    @rule(number=st.integers(1, 20))
    def abort(self, number: int) -> None:
        self.rig.engine.submit(Abort(1, number, 1))

    @rule(index=st.integers(0, BLOCKS - 1))
    def lend(self, index: int) -> None:
        def keep(block: int | None) -> bool:
            if block is not None:
                self.lent.append(block)
            return True

        if len(self.lent) < 2:
            self.rig.engine.submit(Lend(list(donated())[index], keep))

    @precondition(lambda self: self.lent)
    @rule()
    def give_back(self) -> None:
        self.rig.engine.submit(GiveBack(self.lent.pop()))

    def waiting(self) -> list[PullOrder]:
        """Errands that the edge is not back from."""
        return [o for o in self.open_orders.values() if self.brought.get(o.pull, 0) >= 0]

    @invariant()
    def nobody_got_another_ones_tokens(self) -> None:
        for number, output in self.rig.outputs.items():
            expected = alone(4, self.lengths[number])
            assert output == expected[: len(output)]
            assert number not in self.rig.ended or output == expected

    def teardown(self) -> None:
        self.turn()
        for order in self.waiting():
            self.rig.back(order, PullOutcome.FAILED, 0)
        while self.lent:
            self.give_back()
        self.rig.turn()
        while self.lent:
            self.give_back()
        self.rig.run()
        self.rig.turn()
        self.rig.check()
        assert self.rig.engine.pulls._errands == {}
        assert self.rig.taken == self.rig.brought, "the edge waits for none"


TestAnything = Anything.TestCase
TestAnything.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, derandomize=True
)
