"""Who computes what when KV is short; whatever happens, each session gets its own tokens.

The engine's loop is turned by hand, so that each step can be looked at.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from outrider.domain import Draft, RejectionCode, SamplingParams, SessionSpec
from outrider.model.kv_cache import KvPool
from outrider.model.language_model import LanguageModel, Row
from outrider.model.loading import load_language_model
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.messages import Abort, Command, Disconnect, Offer, Open, Outputs
from verifier_service.planning import RowPlan, Seat, kv_read

GREEDY = SamplingParams(temperature=0.0)
LONG = tuple((index * 37 + index // 7) % 256 for index in range(120))


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


class Watched:
    """A model that notes what each pass computes, and fails when it is told to."""

    def __init__(self) -> None:
        self.passes: list[list[int]] = []
        """Tokens of each row, pass by pass."""
        self.failing = False

    def __getattr__(self, name: str) -> Any:
        return getattr(model(), name)

    def forward(self, rows: Sequence[Row]) -> torch.Tensor:
        if self.failing:
            raise RuntimeError("the device is gone")
        tables = [set(row.cache.blocks[row.cache.prefix_length // 32 :]) for row in rows]
        assert not any(a & b for a, b in itertools.combinations(tables, 2)), "a block is shared"
        self.passes.append([len(row.tokens) for row in rows])
        return model().forward(rows)


class Driven:
    """An engine without its thread, and what it said."""

    def __init__(self, blocks: int, **config: Any) -> None:
        config = {"kv_overcommit": 99.0, "warm_up": False, **config}
        self.watched = Watched()
        self.engine = Engine(
            self.watched, EngineConfig(kv_tokens_max=32 * blocks, **config), self._take
        )
        self.specs: dict[int, SessionSpec] = {}
        self.outputs: dict[int, list[int]] = {}
        self.ended: dict[int, RejectionCode | None] = {}
        """How sessions ended, in that order; None: with their last token."""
        self.started: list[int] = []
        """Sessions in the order of their first tokens."""

    @property
    def pool(self) -> KvPool:
        return self.engine.pool

    @property
    def seats(self) -> list[Seat]:
        return list(self.engine._seats.values())

    @property
    def numbers(self) -> list[int]:
        return list(self.engine._seats)

    def _take(self, outputs: dict[int, Outputs]) -> None:
        for said in outputs.values():
            for number, commit, report in said.commits:
                spec = self.specs[number]
                assert number not in self.ended
                assert commit.base_length == len(spec.prompt) + len(self.outputs[number])
                if not self.outputs[number]:
                    self.started.append(number)
                self.outputs[number] += commit.tokens
                if report.finish_reason is not None:
                    self.ended[number] = None
            for rejection in said.rejections:
                self.ended[rejection.session] = rejection.code

    def open(self, number: int, prompt: Sequence[int], tokens_max: int, **options: Any) -> None:
        spec = SessionSpec(
            session=number,
            epoch=1,
            prompt=tuple(prompt),
            committed=(),
            sampling=options.pop("sampling", GREEDY),
            seed=options.pop("seed", 0),
            tokens_max=tokens_max,
            ignore_eos=True,
            **{"cache_salt": str(number), **options},
        )
        self.specs[number] = spec
        self.outputs[number] = []
        self.apply(Open(number % 2, spec))

    def apply(self, command: Command) -> None:
        self.engine._apply(command)
        self.engine._flush()

    def offer(self, number: int, tokens: Sequence[int]) -> None:
        """A chain of guesses, claimed to be certain."""
        log = self.engine._seats[number].session.log
        digest = log.digest_at(len(log))
        assert digest is not None
        parents = tuple(range(-1, len(tokens) - 1))
        draft = Draft(1, len(log), digest, tuple(tokens), parents, (0.0,) * len(tokens))
        self.apply(Offer(number % 2, number, 1, draft))

    def step(self) -> list[int]:
        """Returns the tokens of each row computed."""
        before = len(self.watched.passes)
        self.engine._step()
        self.engine._flush()
        return [size for sizes in self.watched.passes[before:] for size in sizes]

    def plan(self) -> list[RowPlan]:
        return self.engine._planner.plan(self.engine._seats.values())

    def run(self, steps_max: int = 2_000) -> None:
        for _ in range(steps_max):
            if not self.engine.load:
                return
            self.step()
        raise AssertionError(f"sessions {self.numbers} do not end")

    def check(self) -> None:
        """What was committed is what each session gets by itself; nothing is held any more."""
        for number, output in self.outputs.items():
            expected = alone(replace(self.specs[number], session=0, cache_salt=""))
            if number in self.ended and self.ended[number] is None:
                assert output == expected, f"session {number}"
            else:
                assert output == expected[: len(output)], f"session {number}"
        assert self.engine.load == 0
        assert self.engine.kv_tokens_used == self.pool.tokens_used == 0


@functools.cache
def alone(spec: SessionSpec) -> list[int]:
    """What a session commits with all the room there is, and no guesses."""
    driven = Driven(32)
    driven.open(0, spec.prompt, spec.tokens_max, sampling=spec.sampling, seed=spec.seed)
    driven.run()
    return driven.outputs[0]


def flat_times(driven: Driven) -> None:
    """Guesses cost nothing."""
    for size in (1, 2, 4, 8, 16, 32, 64, 256):
        driven.engine.times.observe(size, 0.01)


def prompts(count: int, length: int) -> list[tuple[int, ...]]:
    return [tuple((n * 50 + index * 3) % 256 for index in range(length)) for n in range(count)]


# --- prefill ----------------------------------------------------------------------------------


def test_prompts_are_computed_in_the_order_of_admission_within_the_bound() -> None:
    driven = Driven(32, prefill_tokens_max=50)
    for number, prompt in enumerate(prompts(3, 70)):
        driven.open(number, prompt, 20)
    passes = [driven.step() for _ in range(5)]
    # Whoever decodes joins each step with one token; the rest is the bounded prefill.
    assert passes == [[50], [20, 30], [1, 40, 10], [1, 1, 50], [1, 1, 10]]
    driven.run()
    assert list(driven.ended) == [0, 1, 2]
    driven.check()


def test_a_prompt_may_end_with_a_chunk_of_one() -> None:
    driven = Driven(8, prefill_tokens_max=16)
    driven.open(0, LONG[:33], 4, prompt_logprobs=0)
    assert [driven.step() for _ in range(4)] == [[16], [16], [1], [1]]
    driven.run()
    driven.check()


def test_equal_prompts_opened_together_are_computed_once() -> None:
    driven = Driven(32)
    for number in range(4):
        driven.open(number, LONG[:100], 8, cache_salt="same", seed=number)
    assert driven.step() == [100]
    # The others share all that is full, and compute the rest.
    assert sorted(driven.step()) == [1, 4, 4, 4]
    assert driven.pool.blocks.used == 3 + 4
    driven.run()
    driven.check()


def test_equal_prompts_longer_than_a_step_are_computed_once() -> None:
    driven = Driven(32, prefill_tokens_max=40)
    for number in range(3):
        driven.open(number, LONG, 8, cache_salt="same")
    driven.run()
    computed = sum(sum(sizes) for sizes in driven.watched.passes)
    # 24 after the blocks are each one's own, and so are the output's tokens.
    assert computed <= 120 + 2 * 24 + 3 * 7
    driven.check()


@pytest.mark.parametrize("options", [{}, {"cache_salt": "same", "prompt_logprobs": 0}])
def test_nothing_is_shared_across_salts_nor_where_all_logits_are_wanted(
    options: dict[str, Any],
) -> None:
    driven = Driven(32)
    for number in range(2):
        driven.open(number, LONG[:100], 8, **options)
    assert driven.step() == [100, 100]
    driven.run()
    driven.check()


def test_a_prompt_known_from_before_is_not_computed_again() -> None:
    driven = Driven(32)
    driven.open(0, LONG[:100], 8, cache_salt="same")
    driven.run()
    driven.open(1, LONG[:100], 8, cache_salt="same")
    assert driven.step() == [4]
    driven.run()
    driven.check()


# --- too little room --------------------------------------------------------------------------


def test_who_came_first_is_served_first() -> None:
    driven = Driven(5)
    for number, prompt in enumerate(prompts(4, 90)):
        driven.open(number, prompt, 60)
    driven.open(9, (1, 2, 3), 20)
    driven.step()
    # The last would have room, but nobody overtakes one that waits.
    assert [seat.waiting for seat in driven.seats] == [False, True, True, True, True]
    driven.run()
    assert driven.started == [0, 1, 2, 3, 9]
    assert driven.engine.preemptions == 0
    driven.check()


def test_who_came_last_gives_way() -> None:
    driven = Driven(7)
    for number, prompt in enumerate(prompts(3, 40)):
        driven.open(number, prompt, 60)
    driven.step()
    # Two blocks each and none left: the first is the first to need another.
    other = driven.pool.new_cache()
    other.reserve(1)
    while not driven.engine.preemptions:
        driven.step()
    other.release()
    first, second, last = driven.seats
    assert (first.waiting, second.waiting, last.waiting) == (False, False, True)
    assert (last.preemptions, last.session.cache.blocks) == (1, ())
    assert len(driven.outputs[2]) > 0
    driven.run()
    assert list(driven.ended) == [0, 1, 2]
    assert driven.engine.preemptions == sum(seat.preemptions for seat in (first, second, last))
    driven.check()


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0)], ids=str)
@pytest.mark.parametrize("blocks", [4, 5, 7])
def test_who_was_preempted_goes_on_with_the_same_tokens(
    blocks: int, sampling: SamplingParams
) -> None:
    driven = Driven(blocks, prefill_tokens_max=24)
    for number, prompt in enumerate(prompts(4, 20)):
        driven.open(number, prompt, 90, sampling=sampling, seed=number)
    driven.run()
    assert driven.engine.preemptions > 0
    assert list(driven.ended.values()) == [None] * 4
    driven.check()


def test_log_probabilities_of_a_prompt_are_reported_once() -> None:
    driven = Driven(4, prefill_tokens_max=24)
    starts: list[tuple[int, int]] = []
    emit = driven.engine._emit

    def watch(outputs: dict[int, Outputs]) -> None:
        for said in outputs.values():
            for part in said.prompt_logprobs:
                if part.session == 1:
                    starts.append((part.start, len(part.tokens)))
        emit(outputs)

    driven.engine._emit = watch
    driven.open(0, prompts(1, 20)[0], 100)
    driven.open(1, LONG[:60], 40, prompt_logprobs=0)
    driven.run()
    assert driven.engine.preemptions > 0
    assert _contiguous(starts, 60)
    driven.check()


def _contiguous(parts: Sequence[tuple[int, int]], end: int) -> bool:
    at = 1
    for start, count in parts:
        if start != at:
            return False
        at += count
    return at == end


def test_guesses_go_before_anybody_loses_its_kv() -> None:
    driven = Driven(5, step_nodes_max=64)
    flat_times(driven)
    for number, prompt in enumerate(prompts(2, 40)):
        driven.open(number, prompt, 70)
    for _ in range(2):
        driven.step()
    flat_times(driven)
    guesses = [alone(replace(driven.specs[n], session=0, cache_salt=""))[2:] for n in (0, 1)]
    for number in (0, 1):
        driven.offer(number, guesses[number][:30])
    other = driven.pool.new_cache()
    other.reserve(1)
    # Both stand at 42 tokens with two blocks each: room for 22 guesses, and for no block more.
    plans = driven.plan()
    assert driven.engine.preemptions == 0
    assert sum(len(plan.nodes) for plan in plans) > 0
    assert all(len(plan.nodes) <= 22 for plan in plans)
    assert max(len(plan.nodes) for plan in plans) == 22
    assert all(len(plan.masks) == 1 + len(plan.nodes) for plan in plans)
    assert [seat.waiting for seat in driven.seats] == [False, False]
    assert kv_read(plans) == sum(seat.session.cache.prefix_length for seat in driven.seats)
    other.release()
    driven.run()
    driven.check()


def test_what_waits_holds_nothing_that_the_first_needs() -> None:
    driven = Driven(9, prefill_tokens_max=50)
    driven.open(0, prompts(1, 40)[0], 248)
    while driven.seats[0].session.cache.prefix_length < 62:
        driven.step()
    for number in (1, 2):
        driven.open(number, LONG[:80], 200, cache_salt="same")
    # While one computes a block, the other takes the block before it, and waits for that one. Then
    # its room is gone, and all that it holds is a block that the first will need in the end.
    for _ in range(3):
        driven.step()
    assert [seat.waiting for seat in driven.seats] == [False, False, True]
    assert len(driven.seats[2].session.cache.blocks) == 1
    driven.run()
    assert list(driven.ended) == [0, 1, 2]
    driven.check()


# --- anything ---------------------------------------------------------------------------------


class Traffic(RuleBasedStateMachine):
    """Sessions come, guess, go and fail in a pool that is too small for them."""

    def __init__(self) -> None:
        super().__init__()
        self.driven = Driven(6, prefill_tokens_max=40, step_nodes_max=8)
        flat_times(self.driven)
        self.opened = 0

    @rule(
        length=st.sampled_from([1, 5, 32, 33, 64, 70, 97]),
        text=st.integers(0, 1),
        tokens_max=st.sampled_from([1, 7, 40, 90]),
        sampled=st.booleans(),
        scored=st.booleans(),
    )
    def open(self, length: int, text: int, tokens_max: int, sampled: bool, scored: bool) -> None:
        prompt = [token ^ text for token in LONG[:length]]
        self.driven.open(
            self.opened,
            prompt,
            tokens_max,
            sampling=SamplingParams(temperature=1.0) if sampled else GREEDY,
            cache_salt="",
            prompt_logprobs=0 if scored else None,
        )
        self.opened += 1

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(self.driven.numbers), label="session")

    @precondition(lambda self: self.driven.engine.load)
    @rule(data=st.data(), right=st.integers(0, 9), wrong=st.integers(0, 3))
    def offer(self, data: st.DataObject, right: int, wrong: int) -> None:
        number = self.pick(data)
        done = len(self.driven.outputs[number])
        text = alone(replace(self.driven.specs[number], session=0, cache_salt=""))
        guesses = [*text[done : done + right], *[7] * wrong]
        if guesses:
            self.driven.offer(number, guesses)

    @precondition(lambda self: self.driven.engine.load)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        number = self.pick(data)
        self.driven.apply(Abort(number % 2, number, 1))
        assert number not in self.driven.numbers

    @rule(connection=st.integers(0, 1))
    def disconnect(self, connection: int) -> None:
        self.driven.apply(Disconnect(connection))
        assert all(number % 2 != connection for number in self.driven.numbers)

    @precondition(lambda self: self.driven.engine.load)
    @rule()
    def fail(self) -> None:
        computing = [seat for seat in self.driven.seats if not seat.waiting]
        self.driven.watched.failing = True
        logging.disable(logging.CRITICAL)
        try:
            self.driven.step()
        finally:
            logging.disable(logging.NOTSET)
            self.driven.watched.failing = False
        # Who took part ends, or had to give way; the first was never waiting.
        for seat in computing:
            number = seat.session.spec.session
            ended = self.driven.ended.get(number) is RejectionCode.INTERNAL
            assert ended or self.driven.engine._seats[number].session.spec is seat.session.spec
        assert RejectionCode.INTERNAL in self.driven.ended.values()

    @precondition(lambda self: self.driven.engine.load)
    @rule(count=st.integers(1, 30))
    def steps(self, count: int) -> None:
        for _ in range(count):
            if not self.driven.engine.load:
                return
            first = self.driven.seats[0]
            before = (len(first.session.log), first.session.cache.prefix_length)
            self.driven.step()
            if first.session.spec.session in self.driven.numbers:
                after = (len(first.session.log), first.session.cache.prefix_length)
                assert after > before, "the first makes no progress"

    @invariant()
    def blocks_are_held_by_sessions(self) -> None:
        held = {block for seat in self.driven.seats for block in seat.session.cache.blocks}
        assert self.driven.pool.blocks.used == len(held)

    def teardown(self) -> None:
        self.driven.run()
        self.driven.check()


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, derandomize=True
)
