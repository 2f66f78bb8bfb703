"""Drafters for the engine driven in process: hopeless, silent and honest ones.

Each lives on a thread of its own, as a verifier's edge does, hears of commits, and answers with
serialized drafts.
"""

from __future__ import annotations

import math
import random
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import Protocol

from bench.engine_driver import EngineDriver, Trace
from outrider.committed import CommittedLog
from outrider.domain import Commit, Draft
from outrider.wire import draft_to_bytes

TREE_NODES = 256
_CLAIM = math.log(0.9)
_EPOCH = 1
_ROOTS = 16


class Policy(Protocol):
    """What a drafter says after a commit."""

    def draft(self, log: CommittedLog) -> bytes | None:
        """Return a serialized draft for the present tip, or None to stay silent."""


class WrongTrees:
    """A full tree after each commit, every node claiming 0.9 and none of them right.

    Sixteen chains of sixteen random ids: that one is right by accident has probability
    16 / vocabulary. The trees are made beforehand: only their base changes, which is appended,
    since in protobuf the last value of a field counts. So this costs the process what receiving
    such drafts costs, not what making them does.
    """

    def __init__(self, vocabulary_size: int, count: int = 64) -> None:
        chance = random.Random(1)
        depth = TREE_NODES // _ROOTS
        parents = tuple(
            -1 if level == 0 else root * depth + level - 1
            for root in range(_ROOTS)
            for level in range(depth)
        )
        self._bodies = [
            draft_to_bytes(
                Draft(
                    0,
                    0,
                    0,
                    tuple(chance.sample(range(vocabulary_size), TREE_NODES)),
                    parents,
                    (_CLAIM,) * TREE_NODES,
                )
            )
            for _ in range(count)
        ]
        self._next = 0

    def draft(self, log: CommittedLog) -> bytes:
        """Return the next tree, rooted at the tip."""
        self._next = (self._next + 1) % len(self._bodies)
        return self._bodies[self._next] + _base(log)


class Unheard:
    """Does all the work of another and sends nothing.

    Drafters run elsewhere. What making and addressing drafts takes of the cores here is no cost of
    the verifier's, so those that a drafter is compared with are to pay it as well.
    """

    def __init__(self, other: Policy) -> None:
        self._other = other

    def draft(self, log: CommittedLog) -> None:
        """Have the other make a draft, and keep it."""
        self._other.draft(log)


class Silent:
    """Says one thing to each session, then nothing any more, though it goes on working."""

    def __init__(self, vocabulary_size: int) -> None:
        self._wrong = WrongTrees(vocabulary_size, 1)
        self._greeted: set[int] = set()

    def draft(self, log: CommittedLog) -> bytes | None:
        """Return a draft on a session's first commit only."""
        draft = self._wrong.draft(log)
        if id(log) in self._greeted:
            return None
        self._greeted.add(id(log))
        return draft


class Honest:
    """Knows the continuation and drafts the next tokens of it as a chain."""

    def __init__(self, text: Sequence[int], depth: int = 16) -> None:
        self._text = list(text)
        self._depth = depth
        self.diverged = False
        """The session has left the known text, so that nothing more can be said."""

    def draft(self, log: CommittedLog) -> bytes | None:
        """Return a chain of what comes next."""
        length = len(log)
        if log.tokens != self._text[:length]:
            self.diverged = True
            return None
        ahead = self._text[length : length + self._depth]
        if not ahead:
            return None
        parents = tuple(range(-1, len(ahead) - 1))
        draft = Draft(0, 0, 0, tuple(ahead), parents, (_CLAIM,) * len(ahead))
        return draft_to_bytes(draft) + _base(log)


def _base(log: CommittedLog) -> bytes:
    digest = log.digest_at(len(log))
    assert digest is not None, "the present length is known"
    return draft_to_bytes(Draft(_EPOCH, len(log), digest, (), (), ()))


class Drafter:
    """One drafter for all sessions of an engine; `policy` may be exchanged while it runs."""

    def __init__(self, driver: EngineDriver, policy: Policy | None) -> None:
        self.policy = policy
        """None: it listens and says nothing, which costs the engine nothing."""
        self._driver = driver
        self._steps: SimpleQueue[list[tuple[int, Commit, Trace]] | None] = SimpleQueue()
        """What steps committed: one entry a step, as there is one message a step to an edge."""
        self._logs: dict[int, CommittedLog] = {}
        self._thread = threading.Thread(target=self._run, name="drafter", daemon=True)
        self._thread.start()
        driver.on_commits = self._steps.put

    def close(self) -> None:
        """Hear no more and end the thread."""
        self._driver.on_commits = None
        self._steps.put(None)
        self._thread.join()

    def _run(self) -> None:
        while (step := self._steps.get()) is not None:
            for session, commit, trace in step:
                self._answer(session, commit, trace)

    def _answer(self, session: int, commit: Commit, trace: Trace) -> None:
        log = self._logs.get(session)
        if log is None:
            log = self._logs[session] = CommittedLog(trace.prompt)
        log.append(commit.tokens)
        data = self.policy.draft(log) if self.policy is not None else None
        if data is not None and not commit.last:
            self._driver.offer(session, data)
