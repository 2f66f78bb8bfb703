"""The growing thread, driven from outside by commands alone, with a proposer that counts."""

from __future__ import annotations

import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest

from drafter_service.config import GrowingConfig
from drafter_service.growing import Grower, Swap
from drafter_service.messages import (
    Bind,
    Disconnect,
    Drain,
    Follow,
    Outputs,
    SetBudget,
    Unbind,
)
from drafter_service.mirror import Mirror
from outrider.committed import digest
from outrider.domain import (
    BindSpec,
    Candidates,
    Commit,
    Draft,
    DraftBudget,
    GrowReport,
    ModelInfo,
    RejectionCode,
    Resync,
    SamplingParams,
)
from outrider.draft_tree import Advance, Node, draft_fault
from outrider.errors import ConfigError

PATIENCE_S = 20.0
"""Nothing here takes this long unless it hangs."""
VOCABULARY = 50
FENCE = 999
"""A connection of its own for refusals that only mark a point in time."""


class CountingProposer:
    """Guesses that each token is followed by the next number, one token a step."""

    def __init__(self) -> None:
        self.info = ModelInfo("count", "count", "tokens", VOCABULARY, 0, "", proposer="count")
        self.opened: list[tuple[int, int]] = []
        self.closed: list[tuple[int, int]] = []
        self.advances: list[tuple[int, ...]] = []
        self.leaves_max = 7
        self.broken: set[str] = set()
        """Methods that raise."""

    def _check(self, method: str) -> None:
        if method in self.broken:
            raise RuntimeError(f"{method} is broken on purpose")

    def open(self, mirror: Mirror) -> None:
        self._check("open")
        self.opened.append(mirror.key)

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        self._check("advanced")
        self.advances.append(tuple(tokens))

    def close(self, mirror: Mirror) -> None:
        self.closed.append(mirror.key)
        self._check("close")

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        self._check("grow")
        return any([self._extend(mirror) for mirror in mirrors])

    def _extend(self, mirror: Mirror) -> bool:
        node: Node = mirror.tree.root
        while node.children:
            (node,) = node.children.values()
        if node.position - mirror.tree.root.position >= mirror.budget.depth_max:
            return False
        return mirror.attach(node, (node.token + 1) % VOCABULARY, -0.25) is not None


class Driven:
    """A running grower, and everything it has said, by connection."""

    def __init__(self, proposer: CountingProposer, config: GrowingConfig) -> None:
        self.proposer = proposer
        self.said: dict[int, Outputs] = {}
        self.steps: list[GrowReport] = []
        """Reported, to whomever."""
        self.grower = Grower(proposer, config, self._emit)
        self._arrived: queue.Queue[dict[int, Outputs]] = queue.Queue()
        self._fences = itertools.count(1)

    def _emit(self, outputs: dict[int, Outputs]) -> None:
        self._arrived.put(outputs)

    def submit(self, *commands: object) -> None:
        for command in commands:
            self.grower.submit(command)  # type: ignore[arg-type]

    def to(self, connection: int = 1) -> Outputs:
        return self.said.setdefault(connection, Outputs())

    def until(self, condition: Callable[[], bool]) -> None:
        """Take in what is said until the condition holds."""
        deadline_s = time.monotonic() + PATIENCE_S
        while not condition():
            left_s = deadline_s - time.monotonic()
            assert left_s > 0, f"never happened; said so far: {self.said}"
            with contextlib.suppress(queue.Empty):
                for connection, output in self._arrived.get(timeout=left_s).items():
                    said = self.to(connection)
                    said.bound += output.bound
                    said.rejections += output.rejections
                    said.drafts += output.drafts
                    said.resyncs += output.resyncs
                    if output.step is not None:
                        self.steps.append(output.step)

    def settle(self) -> None:
        """Wait until every earlier command has been carried out and answered."""
        number = next(self._fences)
        self.submit(Bind(FENCE, spec(session=number, prompt=(1 << 31,))))
        self.until(lambda: any(r.session == number for r in self.to(FENCE).rejections))

    def drafts(self, connection: int = 1) -> list[Draft]:
        return [draft for _, _, draft in self.to(connection).drafts]

    def reaches(self, length: int, connection: int = 1) -> None:
        """Wait until guesses cover the text up to this length."""
        self.until(
            lambda: any(
                draft.base_length + len(draft.tokens) >= length for draft in self.drafts(connection)
            )
        )


def spec(session: int = 1, binding: int = 1, **changes: object) -> BindSpec:
    plain = BindSpec(
        session=session,
        epoch=1,
        binding=binding,
        prompt=(1, 2),
        committed=(3,),
        sampling=SamplingParams(),
        seed=1,
        tokenizer_fingerprint="tokens",
        vocabulary_size=VOCABULARY,
        budget=DraftBudget(nodes_max=4, depth_max=4, flush_interval_s=0.0),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


@contextlib.contextmanager
def driven(proposer: CountingProposer | None = None, **config: object) -> Iterator[Driven]:
    it = Driven(proposer or CountingProposer(), GrowingConfig(**config))  # type: ignore[arg-type]
    it.grower.start()
    try:
        yield it
    finally:
        it.grower.stop(PATIENCE_S)


# --- growing ----------------------------------------------------------------------------------


def test_a_bound_session_is_guessed_for_up_to_its_budget() -> None:
    with driven() as it:
        it.submit(Bind(1, spec()))
        it.reaches(7)
        it.settle()
        assert it.to().bound == [(1, 1)]
        assert it.grower.load == 1
        for session, binding, draft in it.to().drafts:
            assert (session, binding) == (1, 1)
            assert draft_fault(draft, VOCABULARY, 4) is None
            assert (draft.epoch, draft.base_length) == (1, 3)
            assert draft.base_digest == digest([1, 2, 3])
        assert it.drafts()[-1].tokens == (4, 5, 6, 7)
        assert it.grower.steps >= 4


class LateProposer(CountingProposer):
    """Computes and computes, and has never anything to say."""

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        time.sleep(0.01)
        return True


def test_who_is_too_slow_to_say_anything_still_says_how_slow() -> None:
    with driven(LateProposer()) as it:
        it.submit(Bind(1, spec()))
        it.until(lambda: len(it.steps) >= 3)
        assert not it.drafts()
    assert all(step.duration_s >= 0.01 and step.leaves_max == 7 for step in it.steps)
    begins = [step.started_s for step in it.steps]
    assert all(after - before > 0.2 for before, after in itertools.pairwise(begins[1:]))


def test_commits_are_followed_and_growth_goes_on_below() -> None:
    with driven() as it:
        it.submit(Bind(1, spec()))
        it.reaches(7)
        it.submit(Follow(1, 1, Commit(1, 3, (4, 5))))
        it.reaches(9)
        last = it.drafts()[-1]
        assert (last.base_length, last.base_digest) == (5, digest([1, 2, 3, 4, 5]))
        assert last.tokens == (6, 7, 8, 9)
        it.submit(Follow(1, 1, Commit(1, 5, (40,))))
        it.reaches(10)
        assert it.drafts()[-1].tokens == (41, 42, 43, 44)
        assert it.proposer.advances == [(4, 5), (40,)]


def test_a_busy_proposers_guesses_are_joined() -> None:
    with driven() as it:
        it.submit(Bind(1, spec(budget=DraftBudget(4, 4, flush_interval_s=60.0))))
        it.reaches(7)
        # The first at once, then nothing while it grows and the interval runs, then the rest.
        assert [draft.tokens for draft in it.drafts()] == [(4,), (4, 5, 6, 7)]


def test_guesses_leave_while_the_next_step_computes() -> None:
    """And at once when there is no next step."""

    class Overlapping(CountingProposer):
        computing = False

        def overlap(self, work: Callable[[], None]) -> bool:
            self.work = work
            return True

        def _extend(self, mirror: Mirror) -> bool:
            if len(list(mirror.tree)) == mirror.budget.depth_max:
                return False
            self.computing = True
            self.work()
            self.computing = False
            return super()._extend(mirror)

    class Watched(Driven):
        def _emit(self, outputs: dict[int, Outputs]) -> None:
            if any(output.drafts for output in outputs.values()):
                while_computing.append(proposer.computing)
            super()._emit(outputs)

    while_computing: list[bool] = []
    proposer = Overlapping()
    it = Watched(proposer, GrowingConfig())
    it.grower.start()
    try:
        it.submit(Bind(1, spec()))
        it.reaches(7)
    finally:
        it.grower.stop(PATIENCE_S)
    assert [draft.tokens for draft in it.drafts()] == [(4,), (4, 5), (4, 5, 6), (4, 5, 6, 7)]
    assert while_computing == [True, True, True, False]


def test_the_house_bounds_every_budget() -> None:
    with driven(nodes_max=2, depth_max=3) as it:
        it.submit(Bind(1, spec(budget=DraftBudget(9, 9, 0.0))))
        it.reaches(5)
        it.submit(SetBudget(1, 1, 1, DraftBudget(99, 99, 0.0)))
        it.settle()
        assert it.drafts()[-1].tokens == (4, 5)


def test_a_new_budget_takes_effect() -> None:
    with driven() as it:
        it.submit(Bind(1, spec(budget=DraftBudget(1, 4, 0.0))))
        it.reaches(4)
        it.submit(SetBudget(1, 1, 7, DraftBudget(9, 9, 0.0)), SetBudget(1, 8, 1, DraftBudget()))
        it.settle()
        assert it.drafts()[-1].tokens == (4,), "another attachment's budget is not ours"
        it.submit(SetBudget(1, 1, 1, DraftBudget(3, 3, 0.0)))
        it.reaches(6)
        assert it.drafts()[-1].tokens == (4, 5, 6)


# --- following --------------------------------------------------------------------------------


def test_a_gap_is_asked_about_once_and_the_answer_ends_it() -> None:
    with driven() as it:
        it.submit(Bind(1, spec(binding=6)))
        for base in (5, 6, 7):
            it.submit(Follow(1, 1, Commit(1, base, (base + 1,))))
        it.settle()
        assert it.to().resyncs == [Resync(1, 1, 3, 6)]
        assert it.proposer.advances == []
        it.submit(Follow(1, 1, Commit(1, 3, (4, 5, 6, 7, 8))))
        it.reaches(12)
        assert it.proposer.advances == [(4, 5, 6, 7, 8)]
        # The next gap is another one.
        it.submit(Follow(1, 1, Commit(1, 10, (11,))))
        it.settle()
        assert it.to().resyncs[1:] == [Resync(1, 1, 8, 6)]


def test_commits_of_another_epoch_and_of_nobody_are_ignored() -> None:
    with driven() as it:
        it.submit(
            Bind(1, spec()),
            Follow(1, 1, Commit(2, 3, (4,))),
            Follow(1, 1, Commit(0, 9, (4,))),
            Follow(1, 2, Commit(1, 3, (4,))),
            Follow(2, 1, Commit(1, 3, (4,))),
            Follow(1, 1, None),
        )
        it.settle()
        assert it.proposer.advances == []
        assert (it.to().resyncs, it.to().rejections) == ([], [])
        assert it.grower.load == 1


def test_the_last_commit_ends_the_session() -> None:
    with driven() as it:
        it.submit(Bind(1, spec()), Follow(1, 1, Commit(1, 3, (4,), last=True)))
        it.settle()
        assert it.proposer.closed == [(1, 1)]


# --- attachments ------------------------------------------------------------------------------


def test_a_newer_binding_replaces_an_older_one() -> None:
    with driven() as it:
        it.submit(Bind(1, spec(binding=2)), Bind(1, spec(binding=5, committed=(3, 4, 5))))
        it.reaches(9)
        assert it.to().bound == [(1, 2), (1, 5)]
        assert (it.proposer.opened, it.proposer.closed) == ([(1, 1)] * 2, [(1, 1)])
        assert it.to().drafts[-1][1] == 5
        # Older and repeated ones come too late.
        it.submit(Bind(1, spec(binding=4)), Bind(1, spec(binding=5)))
        it.settle()
        assert it.to().bound == [(1, 2), (1, 5)]
        assert len(it.proposer.opened) == 2


def test_an_unbind_does_not_reach_a_newer_binding() -> None:
    with driven() as it:
        it.submit(Bind(1, spec(binding=5)), Unbind(1, 1, 4))
        it.settle()
        assert it.proposer.closed == []
        it.submit(Unbind(2, 1, 5), Unbind(1, 2, 5))
        it.settle()
        assert it.proposer.closed == []
        it.submit(Unbind(1, 1, 5), Unbind(1, 1, 5))
        it.settle()
        assert it.proposer.closed == [(1, 1)]


def test_a_lost_connection_takes_its_sessions_along() -> None:
    with driven() as it:
        # Connections choose their session numbers for themselves.
        it.submit(Bind(1, spec(session=1)), Bind(1, spec(session=2)), Bind(2, spec(session=1)))
        it.submit(Disconnect(1))
        it.settle()
        assert sorted(it.proposer.closed) == [(1, 1), (1, 2)]
        it.submit(Follow(2, 1, Commit(1, 3, (4,))))
        it.reaches(8, connection=2)


@pytest.mark.parametrize(
    ("wrong", "code", "field"),
    [
        ({"tokenizer_fingerprint": "other"}, RejectionCode.MISMATCH, "tokenizer_fingerprint"),
        ({"prompt": (1, VOCABULARY)}, RejectionCode.INVALID, "prompt"),
        ({"committed": (VOCABULARY,)}, RejectionCode.INVALID, "prompt"),
        # Known to the target, but not to a draft model with fewer ids.
        (
            {"prompt": (VOCABULARY,), "vocabulary_size": VOCABULARY + 1},
            RejectionCode.INVALID,
            "prompt",
        ),
        ({"prompt": (9,), "vocabulary_size": 9}, RejectionCode.INVALID, "prompt"),
    ],
)
def test_what_does_not_fit_is_refused(
    wrong: dict[str, object], code: RejectionCode, field: str
) -> None:
    with driven() as it:
        it.submit(Bind(1, spec(binding=3, **wrong)))
        it.settle()
        (rejection,) = it.to().rejections
        assert (rejection.code, rejection.field) == (code, field)
        assert (rejection.session, rejection.epoch, rejection.binding) == (1, 1, 3)
        assert (it.to().bound, it.proposer.opened, it.to().drafts) == ([], [], [])


def test_a_proposer_without_tokenizer_takes_any() -> None:
    with driven() as it:
        it.proposer.info = replace(it.proposer.info, tokenizer_fingerprint=None, vocabulary_size=0)
        it.submit(Bind(1, spec(tokenizer_fingerprint="other", vocabulary_size=1000, prompt=(999,))))
        it.settle()
        assert it.to().bound == [(1, 1)]


def test_a_full_drafter_refuses_and_takes_again_later() -> None:
    with driven(sessions_max=2) as it:
        it.submit(*(Bind(1, spec(session=number)) for number in (1, 2, 3)))
        it.until(lambda: bool(it.to().rejections))
        assert it.to().rejections[0].code is RejectionCode.EXHAUSTED
        assert it.to().rejections[0].session == 3
        it.submit(Unbind(1, 1, 1), Bind(1, spec(session=3, binding=2)))
        it.until(lambda: (3, 2) in it.to().bound)


def test_a_draining_drafter_keeps_what_it_has() -> None:
    with driven() as it:
        it.submit(Bind(1, spec()), Drain(), Bind(1, spec(session=2)))
        it.until(lambda: bool(it.to().rejections))
        assert it.to().rejections[0].code is RejectionCode.DRAINING
        it.submit(Follow(1, 1, Commit(1, 3, (4,))))
        it.reaches(8)


# --- faults -----------------------------------------------------------------------------------


def test_a_commit_of_unknown_ids_costs_its_own_session_only() -> None:
    with driven() as it:
        it.submit(Bind(1, spec(session=1)), Bind(2, spec(session=1)))
        it.submit(Follow(1, 1, Commit(1, 3, (4, VOCABULARY))))
        it.until(lambda: bool(it.to(1).rejections))
        assert it.to(1).rejections[0].code is RejectionCode.INVALID
        it.submit(Follow(2, 1, Commit(1, 3, (4,))))
        it.reaches(8, connection=2)
        assert (it.proposer.closed, it.proposer.advances) == ([(1, 1)], [(4,)])
        assert it.to(2).rejections == []


def test_a_failing_step_ends_its_sessions_and_the_thread_lives_on() -> None:
    with driven() as it:
        it.submit(Bind(1, spec(session=1)), Bind(2, spec(session=2)))
        it.settle()
        it.proposer.broken = {"grow", "close"}
        it.submit(Follow(1, 1, Commit(1, 3, (4,))))
        it.until(lambda: bool(it.to(1).rejections and it.to(2).rejections))
        for connection in (1, 2):
            (rejection,) = it.to(connection).rejections
            assert rejection.code is RejectionCode.INTERNAL
            assert (rejection.session, rejection.binding) == (connection, 1)
            assert "on purpose" not in rejection.message
        assert it.proposer.closed == [(1, 1), (2, 2)]
        it.proposer.broken = set()
        it.submit(Bind(1, spec(session=1, binding=2)))
        it.until(lambda: (1, 2) in it.to(1).bound)
        it.submit(Follow(1, 1, Commit(1, 3, (4,))))
        it.reaches(8)


@pytest.mark.parametrize("method", ["open", "advanced"])
def test_a_proposer_that_fails_for_one_session_ends_that_one(method: str) -> None:
    with driven() as it:
        it.submit(Bind(2, spec()))
        it.settle()
        it.proposer.broken = {method}
        it.submit(Bind(1, spec()), Follow(1, 1, Commit(1, 3, (4,))))
        it.until(lambda: bool(it.to(1).rejections))
        assert it.to(1).rejections[0].code is RejectionCode.INTERNAL
        assert it.grower.load == 1
        it.proposer.broken = set()
        it.submit(Follow(2, 1, Commit(1, 3, (4,))))
        it.reaches(8, connection=2)
        assert it.proposer.closed == [(1, 1)]


def test_stopping_ends_the_thread() -> None:
    with driven() as it:
        it.submit(Bind(1, spec()))
        it.settle()
        it.grower.stop(PATIENCE_S)
        assert "grow" not in {thread.name for thread in threading.enumerate()}
        it.submit(Bind(1, spec(session=2)))


# --- candidates -------------------------------------------------------------------------------


class TakingProposer(CountingProposer):
    """Notes what the target said."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[tuple[tuple[int, int], Candidates, int]] = []

    def take(self, mirror: Mirror, candidates: Candidates) -> None:
        self._check("take")
        self.taken.append((mirror.key, candidates, len(mirror.log)))


def test_candidates_come_before_the_commit_that_they_came_with() -> None:
    said = Candidates((3,), ((4, 9),))
    with driven(proposer=TakingProposer()) as it:
        it.submit(Bind(1, spec()), Follow(1, 1, Commit(1, 3, (4,)), said))
        it.submit(Follow(1, 1, None, said), Follow(1, 2, Commit(1, 3, (4,)), said))
        it.settle()
        assert it.proposer.taken == [((1, 1), said, 3), ((1, 1), said, 4)]
        assert it.proposer.advances == [(4,)]


def test_those_who_take_none_are_not_bothered() -> None:
    with driven() as it:
        it.submit(Bind(1, spec()), Follow(1, 1, Commit(1, 3, (4,)), Candidates((3,), ((4,),))))
        it.settle()
        assert it.proposer.advances == [(4,)]


# --- swapping ---------------------------------------------------------------------------------


class Backwards(CountingProposer):
    """Guesses that each token is followed by the number before."""

    def __init__(self) -> None:
        super().__init__()
        self.info = replace(self.info, model_fingerprint="backwards")

    def _extend(self, mirror: Mirror) -> bool:
        root = mirror.tree.root
        return not root.children and mirror.attach(root, root.token - 1, -0.25) is not None


def test_sessions_go_on_with_the_new_version() -> None:
    new, announced = Backwards(), []
    with driven() as it:
        it.submit(Bind(1, spec()), Bind(2, spec(session=5)))
        it.reaches(7)
        it.submit(Follow(1, 1, Commit(1, 3, (4, 30))))
        it.reaches(9)
        before = len(it.drafts())
        it.submit(Swap(lambda: new, lambda proposer: announced.append((proposer, new.opened[:]))))
        it.until(lambda: any(draft.tokens == (29,) for draft in it.drafts()))
        assert announced == [(new, [])], "told before anything is guessed"
        assert sorted(it.proposer.closed) == sorted(new.opened) == [(1, 1), (2, 5)]
        assert it.to().rejections == it.to(2).rejections == []
        assert {draft.base_length for draft in it.drafts()[before:]} == {5}
        # What it guessed is followed like anything else.
        it.submit(Follow(1, 1, Commit(1, 5, (29, 20))))
        it.until(lambda: it.drafts()[-1].tokens == (19,))
        assert new.advances == [(29, 20)]
        it.submit(Bind(1, spec(session=8)))
        it.settle()
        assert new.opened[-1] == (1, 8)
        assert it.grower.load == 3


def test_what_cannot_be_used_changes_nothing() -> None:
    def broken() -> CountingProposer:
        raise ConfigError("the folder is empty")

    other = Backwards()
    other.info = replace(other.info, tokenizer_fingerprint="others")
    with driven() as it:
        it.submit(Bind(1, spec()))
        it.reaches(7)
        for make in (broken, lambda: other):
            it.submit(Swap(make, lambda proposer: pytest.fail("nothing was swapped")))
        it.submit(Follow(1, 1, Commit(1, 3, (4, 5))))
        it.reaches(9)
        assert it.proposer.closed == other.opened == []
        assert it.to().rejections == []


def test_a_new_version_that_fails_for_a_session_costs_only_that() -> None:
    new = Backwards()
    new.broken = {"open"}
    with driven() as it:
        it.submit(Bind(1, spec()))
        it.reaches(7)
        it.submit(Swap(lambda: new, lambda proposer: None))
        it.until(lambda: bool(it.to().rejections))
        assert it.to().rejections[0].code is RejectionCode.INTERNAL
        assert it.grower.load == 0
        new.broken = set()
        it.submit(Bind(1, spec(session=2)))
        it.until(lambda: any(draft.tokens == (2,) for draft in it.drafts()))


def test_a_new_version_that_knows_fewer_ids_guesses_no_others() -> None:
    small = CountingProposer()
    small.info = replace(small.info, vocabulary_size=5)
    with driven() as it:
        it.submit(Bind(1, spec()))
        it.reaches(7)
        before = len(it.drafts())
        it.submit(Swap(lambda: small, lambda proposer: None))
        it.until(lambda: len(it.drafts()) > before)
        it.settle()
        assert {token for draft in it.drafts()[before:] for token in draft.tokens} == {4}
