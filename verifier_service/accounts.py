"""What the edge notes of sessions, to tell of each when it ends: a line in the log, and spans.

Lives on the event loop. Of a session's commits it looks at the last one only, unless sessions are
traced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from outrider.domain import Origin, Rejection, SessionSpec, SpeculationCounters
from outrider.serving.telemetry import Attributes, Tracing
from verifier_service.messages import Outputs

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Account:
    connection: int
    epoch: int
    origin: Origin
    asked_s: float
    prompt_tokens: int
    length: int
    """Tokens that were committed before this opening, prompt included."""
    first_s: float | None = None
    """When the prompt had been computed; noted for traces only."""


class Accounts:
    """Sessions of all connections, from their opening to whatever ends them."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self._tracing = tracing
        self._open: dict[int, _Account] = {}

    def __len__(self) -> int:
        return len(self._open)

    def asked(self, connection: int, spec: SessionSpec) -> None:
        """A session is to be opened; an older opening of it is over."""
        self._open[spec.session] = _Account(
            connection,
            spec.epoch,
            spec.origin,
            time.monotonic(),
            len(spec.prompt),
            len(spec.prompt) + len(spec.committed),
        )

    def said(self, connection: int, outputs: Iterable[Outputs | None]) -> None:
        """Look at what is about to be said on a connection."""
        for output in outputs:
            if output is None:
                continue
            for rejection in output.rejections:
                self._refused(connection, rejection)
            for session, commit, report in output.commits:
                if self._tracing is not None:
                    self._note_first(session)
                if commit.last:
                    reason = report.finish_reason
                    length = commit.base_length + len(commit.tokens)
                    why = "ended" if reason is None else reason.value
                    self._over(connection, session, why, report.counters, length)

    def aborted(self, connection: int, session: int, epoch: int) -> None:
        """A session is not wanted any more."""
        account = self._open.get(session)
        if account is not None and account.epoch <= epoch:
            self._over(connection, session, "aborted")

    def disconnected(self, connection: int) -> None:
        """Nobody hears a connection's sessions any more."""
        for session in [s for s, one in self._open.items() if one.connection == connection]:
            self._over(connection, session, "disconnected")

    def _refused(self, connection: int, rejection: Rejection) -> None:
        account = self._open.get(rejection.session)
        if account is not None and account.epoch == rejection.epoch:
            self._over(connection, rejection.session, rejection.code.value)

    def _note_first(self, session: int) -> None:
        account = self._open.get(session)
        if account is not None and account.first_s is None:
            account.first_s = time.monotonic()

    def _over(
        self,
        connection: int,
        session: int,
        why: str,
        counters: SpeculationCounters | None = None,
        length: int | None = None,
    ) -> None:
        account = self._open.get(session)
        if account is None or account.connection != connection:
            return
        del self._open[session]
        now_s = time.monotonic()
        fields: dict[str, str | int | float] = {
            "session": f"{session:016x}",
            "epoch": account.epoch,
            "end": why,
            "prompt_tokens": account.prompt_tokens,
            "lasted_s": round(now_s - account.asked_s, 6),
        }
        if counters is not None and length is not None:
            fields["committed_tokens"] = length - account.length
            fields["verify_steps"] = counters.verify_steps
            fields["verified_draft_tokens"] = counters.verified_draft_tokens
            fields["accepted_draft_tokens"] = counters.accepted_draft_tokens
        _log.info("session over", extra={"request_id": account.origin.request_id, **fields})
        if self._tracing is not None and account.origin.traceparent:
            self._trace(self._tracing, account, now_s, fields)

    def _trace(self, tracing: Tracing, account: _Account, now_s: float, fields: Attributes) -> None:
        named = {f"outrider.{name}": value for name, value in fields.items()}
        computed_s = account.first_s or now_s
        prompt = {"outrider.prompt_tokens": account.prompt_tokens}
        tracing.record("prefill", account.origin, account.asked_s, computed_s, prompt)
        if account.first_s is not None:
            tracing.record("verify steps", account.origin, account.first_s, now_s, named)
