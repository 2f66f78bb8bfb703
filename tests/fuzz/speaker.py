"""What a fuzz run says next: one message after the other, drawn from a seed and what was heard."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence

from outrider.v1 import types_pb2, verifier_pb2
from tests.fuzz import hostile_drafts, openings
from tests.fuzz.ledger import Ledger, Record
from tests.support.raw import HELLO
from tests.support.reference import Case, Expected

_EPOCHS = (0, 1, 2, 3, 2**31, 2**32 - 2, 2**32 - 1)
_HAVE = (0, 1, 2**31, 2**32 - 1)

Part = Callable[[verifier_pb2.VerifyRequest, int], None]


class Speaker:
    """Draws messages."""

    def __init__(
        self,
        draw: random.Random,
        ledger: Ledger,
        cases: Sequence[Case],
        expected: Sequence[Expected],
        sessions_max: int,
    ) -> None:
        self._draw = draw
        self._ledger = ledger
        self._cases, self._expected = cases, expected
        self._sessions_max = sessions_max
        self._sessions_wanted = 10
        self._number = 0
        self._said: deque[types_pb2.DraftRow] = deque(maxlen=16)
        self._opened: deque[verifier_pb2.OpenSession] = deque(maxlen=16)
        parts: dict[Part, int] = {
            self._sound: 12,
            self._spoilt_opening: 6,
            self._opened_again: 3,
            self._taken_over: 2,
            self._right_draft: 34,
            self._wrong_draft: 8,
            self._spoilt_draft: 20,
            self._garbled_draft: 8,
            self._said_again: 6,
            self._resync: 6,
            self._abort: 2,
            self._idle_abort: 4,
            self._hello: 1,
            self._nothing: 2,
        }
        self._parts, self._weights = list(parts), list(parts.values())

    def message(self, connection: int) -> bytes:
        """Say something, of one part or of several."""
        request = verifier_pb2.VerifyRequest()
        count = self._draw.choice((1, 1, 1, 1, 2, 5))
        for part in self._draw.choices(self._parts, self._weights, k=count):
            part(request, connection)
        data = request.SerializeToString()
        return hostile_drafts.garbled(self._draw, data) if self._draw.random() < 0.01 else data

    # --- openings ---

    def _fresh(self) -> int:
        self._number += 1
        # Numbers are any 64 bits.
        return self._number if self._draw.random() < 0.7 else 2**64 - self._number

    def _case(self, number: int, epoch: int) -> verifier_pb2.OpenSession:
        at = self._draw.randrange(len(self._cases))
        return openings.opening(self._draw, self._cases[at], self._expected[at], number, epoch)

    def _sound(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        if self._draw.random() < 0.05:
            self._sessions_wanted = self._draw.randint(4, self._sessions_max + 3)
        if len(self._ledger.live) >= self._sessions_wanted:
            self._right_draft(request, connection)
            return
        epoch = self._draw.choice((1, 1, 1, 7, 2**32 - 1))
        message = self._case(self._fresh(), epoch)
        self._opened.append(message)
        request.opens.append(message)

    def _spoilt_opening(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        message = self._case(self._fresh(), 1)
        openings.spoil_opening(self._draw, message)
        record = self._any()
        if record is not None and self._draw.random() < 0.2:
            message.session, message.epoch = record.key[1], self._draw.choice(_EPOCHS)
        self._opened.append(message)
        request.opens.append(message)

    def _opened_again(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        if self._opened:
            message = request.opens.add()
            message.CopyFrom(self._draw.choice(self._opened))
            message.epoch = min(message.epoch, self._draw.choice((2**32 - 1, message.epoch, 0, 1)))

    def _taken_over(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        """The same session under a newer epoch, with what it has by now."""
        record = self._any()
        if record is None or record.key[2] == 2**32 - 1:
            return
        message = request.opens.add()
        message.CopyFrom(record.message)
        message.epoch += self._draw.choice((1, min(2**32 - 1 - message.epoch, 1_000)))
        message.committed[:] = record.outputs
        self._opened.append(message)

    # --- drafts ---

    def _any(self) -> Record | None:
        live = self._ledger.live
        return self._draw.choice(list(live.values())) if live else None

    def _mine(self, connection: int) -> Record | None:
        """A session of this connection, and seldom one of another."""
        mine = [record for record in self._ledger.live.values() if record.key[0] == connection]
        return self._draw.choice(mine) if mine and self._draw.random() < 0.95 else self._any()

    def _row(
        self, request: verifier_pb2.VerifyRequest, session: int, draft: types_pb2.Draft | bytes
    ) -> None:
        data = draft if isinstance(draft, bytes) else draft.SerializeToString()
        number = hostile_drafts.source(self._draw)
        request.drafts.add(session=session, source=number, draft=data)
        self._said.append(request.drafts[-1])

    def _draft_for(self, record: Record) -> types_pb2.Draft:
        if record.case is None or self._draw.random() < 0.2:
            return hostile_drafts.wrong(self._draw, record.key[2], record.truth)
        upcoming = self._expected[record.case].ids[len(record.outputs) :]
        return hostile_drafts.right(self._draw, record.key[2], record.truth, upcoming)

    def _right_draft(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        record = self._mine(connection)
        if record is not None:
            self._row(request, record.key[1], self._draft_for(record))

    def _wrong_draft(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        record = self._mine(connection)
        if record is not None:
            draft = hostile_drafts.wrong(self._draw, record.key[2], record.truth)
            self._row(request, record.key[1], draft)

    def _spoilt_draft(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        record = self._mine(connection)
        if record is not None:
            draft = self._draft_for(record)
            if draft.tokens:
                self._row(request, record.key[1], hostile_drafts.spoilt(self._draw, draft))

    def _garbled_draft(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        record = self._mine(connection)
        if record is not None:
            data = self._draft_for(record).SerializeToString()
            self._row(request, record.key[1], hostile_drafts.garbled(self._draw, data))

    def _said_again(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        """A draft once more: perhaps late, perhaps for a session that nobody knows."""
        if self._said:
            row = request.drafts.add()
            row.CopyFrom(self._draw.choice(self._said))
            if self._draw.random() < 0.2:
                row.session = self._draw.choice((0, 2**64 - 1, self._draw.getrandbits(64)))

    # --- the rest ---

    def _resync(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        number = self._draw.choice((0, 2**64 - 1, self._number, max(1, self._number - 5)))
        record = self._mine(connection)
        have = self._draw.choice(_HAVE)
        if record is not None and self._draw.random() < 0.9:
            number = record.key[1]
            have = self._draw.choice((have, len(record.truth), self._draw.randint(0, 60)))
        epoch = self._draw.choice((1, *_EPOCHS))
        request.resyncs.add(session=number, epoch=epoch, have_length=have)

    def _abort(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        record = self._mine(connection)
        if record is not None:
            epoch = self._draw.choice((record.key[2], 2**32 - 1))
            request.aborts.add(session=record.key[1], epoch=epoch)

    def _idle_abort(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        """One that must not do anything: of another's session, an older epoch, or of nothing."""
        record = self._any()
        if record is None or self._draw.random() < 0.2:
            number, epoch = self._draw.choice((0, self._draw.getrandbits(64))), 2**32 - 1
        elif record.key[0] == connection:
            number, epoch = record.key[1], max(0, record.key[2] - self._draw.choice((1, 2**31)))
        else:
            number, epoch = record.key[1], 2**32 - 1
        request.aborts.add(session=number, epoch=epoch)

    def _hello(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        request.hello.CopyFrom(HELLO)
        request.hello.protocol_version = self._draw.choice((0, 1, 2**32 - 1))

    def _nothing(self, request: verifier_pb2.VerifyRequest, connection: int) -> None:
        """Say nothing."""
