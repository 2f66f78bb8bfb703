"""What must hold of a verifier's stream, whatever was sent: a reference model of the edge.

It reads every message that was sent and everything that came back. A session is *sound* if its
request is one of the known cases: then its output must be the reference's. Of all others commits
must be contiguous, within their limits, and end.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass

from outrider import wire
from outrider.domain import Commit
from outrider.v1 import types_pb2, verifier_pb2
from tests.support.fleet import TARGET
from tests.support.reference import Case, Expected, Tally, expect

Key = tuple[int, int, int]
"""(connection, session, epoch)"""

_VOCABULARY = 260
_BESIDE_CONTENT = ("logprobs", "prompt_logprobs", "cache_salt", "own_guesses")
"""Fields of an opening that do not change the output."""


def content_of(message: verifier_pb2.OpenSession) -> bytes:
    """What alone decides the output of a session."""
    bare = verifier_pb2.OpenSession()
    bare.CopyFrom(message)
    for name in ("session", "epoch", "committed", *_BESIDE_CONTENT):
        bare.ClearField(name)  # type: ignore[arg-type]  # only literals are
    return bare.SerializeToString(deterministic=True)


@dataclass(slots=True)
class Attempt:
    """An opening that was not answered yet."""

    message: verifier_pb2.OpenSession
    excused: bool = False
    """It was aborted, or its connection left: perhaps it is never answered."""
    alone: bool = True
    """No other one was under way: what comes back is the answer to it."""


@dataclass(slots=True)
class Record:
    """A session that was opened."""

    key: Key
    message: verifier_pb2.OpenSession
    case: int | None
    """Which of the known cases it is."""
    certain: bool
    """False if it cannot be told which of several openings was taken."""
    base: int
    truth: list[int]
    fate: str = ""
    """Empty while it lives; then "finished", "released", "taken" or "refused"."""
    prompt_scored: int = 1

    @property
    def outputs(self) -> list[int]:
        """All output, what was committed at the opening included."""
        return self.truth[len(self.message.prompt) :]


class Ledger:
    """Follows a run."""

    def __init__(self, cases: Sequence[Case], expected: Sequence[Expected]) -> None:
        self.cases, self.expected = cases, expected
        self.contents: dict[bytes, int] = {}
        self.faults: list[str] = []
        self.counts: Counter[str] = Counter()
        self.attempts: dict[Key, deque[Attempt]] = {}
        self.records: dict[Key, Record] = {}
        self.live: dict[Key, Record] = {}
        """Sessions whose end must still come."""
        self.tally = Tally()
        self._by_session: dict[int, list[Record]] = {}
        self._resyncs: Counter[Key] = Counter()
        """By connection, session and length."""
        self._unanswered: Counter[tuple[int, int]] = Counter()
        """Resyncs that must be answered, by connection and session."""
        self._left: set[int] = set()

    # --- what was sent ---

    def sent(self, connection: int, request: verifier_pb2.VerifyRequest) -> None:
        """Take note of a message, in the order in which its parts are applied."""
        for message in request.opens:
            key = connection, message.session, message.epoch
            attempts = self.attempts.setdefault(key, deque())
            attempts.append(Attempt(message))
            if len(attempts) > 1:
                # Answers overtake each other: what cannot be read is refused at once.
                for attempt in attempts:
                    attempt.alone = False
        for resync in request.resyncs:
            self._resyncs[connection, resync.session, resync.have_length] += 1
            # While an opening waits for its grammar, nobody is asked.
            if not any(key[1] == resync.session for key in self.attempts):
                self._unanswered[connection, resync.session] += 1
        for abort in request.aborts:
            self._abort(connection, abort)

    def _abort(self, connection: int, abort: verifier_pb2.AbortSession) -> None:
        for record in self._by_session.get(abort.session, ()):
            if record.key[0] == connection and record.key[2] <= abort.epoch and not record.fate:
                self._end(record, "released")
        for key, attempts in self.attempts.items():
            if key[:2] == (connection, abort.session) and key[2] <= abort.epoch:
                for attempt in attempts:
                    attempt.excused = True

    def left(self, connection: int) -> None:
        """A connection is gone."""
        self._left.add(connection)
        for record in list(self.live.values()):
            if record.key[0] == connection:
                self._end(record, "released")
        for key in [key for key in self.attempts if key[0] == connection]:
            del self.attempts[key]
        for pair in [pair for pair in self._unanswered if pair[0] == connection]:
            del self._unanswered[pair]

    # --- what came back ---

    def heard(self, connection: int, strict: bool, response: verifier_pb2.VerifyResponse) -> None:
        """Check a response."""
        if connection in self._left:
            return
        for opened in response.opened:
            self._opened((connection, opened.session, opened.epoch))
        for rejection in response.rejections:
            self._rejected(connection, rejection)
        for piece in response.prompt_logprobs:
            self._prompt_scored(connection, piece)
        for row in response.commits:
            commit = wire.commit_from_bytes(row.commit)
            if commit is None:
                self._fault("a commit does not parse")
                continue
            self._committed((connection, row.session, commit.epoch), commit, row.report, strict)

    def _opened(self, key: Key) -> None:
        attempts = self.attempts.get(key)
        if not attempts:
            self._fault(f"{key} was opened without being asked for")
            return
        attempt = attempts.popleft()
        # What is still on its way may be of the one before.
        certain = attempt.alone and key not in self.records
        if not attempts:
            del self.attempts[key]
        message = attempt.message
        case = self._case_of(message) if certain else None
        truth = [*message.prompt, *message.committed]
        record = Record(key, message, case, certain, len(truth), truth)
        for older in self._by_session.get(key[1], ()):
            if not older.fate and older.key[2] < key[2]:
                self._end(older, "taken")
        self._by_session.setdefault(key[1], []).append(record)
        self.records[key] = self.live[key] = record
        self.counts["opened"] += 1
        self.counts["sound" if case is not None else "wild"] += 1
        if attempt.excused:
            self._end(record, "released")

    def _case_of(self, message: verifier_pb2.OpenSession) -> int | None:
        case = self.contents.get(content_of(message))
        if case is None:
            return None
        expected, committed = self.expected[case].ids, tuple(message.committed)
        sound = len(committed) < len(expected) and committed == expected[: len(committed)]
        return case if sound else None

    def _rejected(self, connection: int, rejection: types_pb2.Rejection) -> None:
        code = wire.rejection_from_pb(rejection).code.value
        self.counts[f"rejected: {code}"] += 1
        if code == "internal":
            self._fault(f"session {rejection.session}: internal error: {rejection.message}")
        if not rejection.message:
            self._fault(f"session {rejection.session}: {code} without a word")
        key = connection, rejection.session, rejection.epoch
        if code == "unknown_session":
            self._answered(connection, rejection.session)
            return
        record, attempts = self.records.get(key), self.attempts.get(key)
        if record is not None and not record.fate:
            if code == "stale_epoch" and rejection.current_epoch > rejection.epoch:
                self._end(record, "taken")
                return
            limit = code == "invalid" and record.case is None and not attempts
            if limit and record.message.sampling.HasField("grammar"):
                self._end(record, "refused")
                return
        if attempts:
            attempt = attempts.popleft()
            if not attempts:
                del self.attempts[key]
            clear = attempt.alone and rejection.field not in _BESIDE_CONTENT
            if code == "invalid" and clear and self._case_of(attempt.message) is not None:
                self._fault(f"{key}: a sound request was refused: {rejection.message}")
        elif record is None:
            self._fault(f"{key} was refused without being asked for: {rejection.message}")

    def _prompt_scored(self, connection: int, piece: verifier_pb2.PromptLogprobsRow) -> None:
        record = self.records.get((connection, piece.session, piece.epoch))
        if record is None or not record.certain:
            return
        end = piece.start + len(piece.tokens)
        tokens = [entry.token for entry in piece.tokens]
        wanted = list(record.message.prompt[piece.start : end])
        if piece.start != record.prompt_scored or tokens != wanted:
            self._fault(f"{record.key}: log-probabilities of other prompt tokens than its next")
        record.prompt_scored = end

    def _committed(
        self, key: Key, commit: Commit, report: types_pb2.CommitReport, strict: bool
    ) -> None:
        record = self.records.get(key)
        asked = (*key[:2], commit.base_length)
        if record is None or not record.certain:
            # Of a session that ended before the last rest, or nobody can tell of which one.
            if self._resyncs[asked]:
                self._resyncs[asked] -= 1
                self._answered(*key[:2])
            elif record is None:
                self._fault(f"a commit for {key}, which is not open")
            if record is not None and commit.last and not record.fate:
                self._end(record, "finished")
            return
        tokens, length = commit.tokens, len(record.truth)
        if not tokens or commit.base_length < length:
            self._repeated(record, commit, report)
        elif commit.base_length > length:
            self._fault(f"{key}: a gap: {length} tokens are known, {commit.base_length} follow")
        elif record.fate == "finished" or (record.fate and strict):
            self._fault(f"{key}: a commit although it was {record.fate}")
        else:
            self._extended(record, commit, report)

    def _repeated(self, record: Record, commit: Commit, report: types_pb2.CommitReport) -> None:
        """Check an answer to a resync."""
        have = commit.base_length
        asked = (*record.key[:2], have)
        if not self._resyncs[asked]:
            self._fault(f"{record.key}: repeats from {have} without being asked")
            return
        self._resyncs[asked] -= 1
        self._answered(*record.key[:2])
        self.counts["repeats"] += 1
        if list(commit.tokens) != record.truth[have:]:
            self._fault(f"{record.key}: the repeat from {have} is not what was said before")
        if record.fate in ("", "finished") and commit.last != bool(record.fate):
            self._fault(f"{record.key}: a repeat says last={commit.last}, it is {record.fate!r}")
        scored = len(record.truth) - max(have, record.base)
        if record.message.HasField("logprobs") and len(report.logprobs) != max(0, scored):
            self._fault(f"{record.key}: a repeat with {len(report.logprobs)} log-probabilities")

    def _answered(self, connection: int, session: int) -> None:
        self._unanswered[connection, session] -= 1
        if self._unanswered[connection, session] <= 0:
            del self._unanswered[connection, session]

    def _extended(self, record: Record, commit: Commit, report: types_pb2.CommitReport) -> None:
        message, tokens = record.message, commit.tokens
        record.truth += tokens
        self.counts["commits"] += 1
        self.counts["tokens"] += len(tokens)
        self.counts["accepted"] += sum(source != 0 for source in report.sources)
        faults = {
            "more output than was asked for": len(record.outputs) > message.tokens_max,
            "ids outside of the vocabulary": max(tokens) >= _VOCABULARY,
            "a source for each token": len(report.sources) != len(tokens),
            "a finish reason with the last commit alone": bool(report.finish_reason) != commit.last,
            "log-probabilities of other tokens": [entry.token for entry in report.logprobs]
            != (list(tokens) if message.HasField("logprobs") else []),
            "more accepted than verified": report.counters.accepted_draft_tokens
            > report.counters.verified_draft_tokens,
            "a commit before its prompt's log-probabilities": message.HasField("prompt_logprobs")
            and record.prompt_scored != len(message.prompt),
        }
        for text, broken in faults.items():
            if broken:
                self._fault(f"{record.key}: {text}")
        if commit.last and not record.fate:
            self._end(record, "finished")

    def _end(self, record: Record, fate: str) -> None:
        record.fate = fate
        self.live.pop(record.key, None)
        self.counts[fate] += 1
        if record.case is None:
            return
        case, expected, found = self.cases[record.case], self.expected[record.case], record.outputs
        if fate == "refused":
            self._fault(f"{record.key}: a sound request was refused")
        if tuple(found) != expected.ids[: len(found)]:
            # At a tie of the two best the one that was chosen is followed.
            expected = expect(TARGET, case, followed=found)
        if fate == "finished":
            self.tally.check(TARGET, case, expected, found)
        elif tuple(found) != expected.ids[: len(found)]:
            self._fault(f"{record.key}: other output than the reference's: {found}")

    def _fault(self, text: str) -> None:
        # The first ones tell; a broken verifier has thousands.
        if len(self.faults) < 20:
            self.faults.append(text)
        self.counts["faults"] += 1

    # --- at rest ---

    @property
    def open_questions(self) -> list[str]:
        """What must be answered and was not."""
        found = [f"{record.key} has not ended" for record in self.live.values()]
        for key, attempts in self.attempts.items():
            found += [f"{key} was never answered" for one in attempts if not one.excused]
        found += [f"resync of {pair} was never answered" for pair in self._unanswered]
        return found

    def forget(self) -> None:
        """Begin anew, once nothing is open."""
        self.records.clear()
        self._by_session.clear()
        self.attempts.clear()
        self._unanswered.clear()
        self._resyncs.clear()
