"""What the edge notes of attachments, to tell of each when it ends: a line in the log, a span.

Lives on the event loop. Drafts are counted only if sessions are traced.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

from drafter_service.messages import Outputs
from outrider.domain import BindSpec, Origin
from outrider.serving.telemetry import Tracing

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Account:
    connection: int
    binding: int
    origin: Origin
    bound_s: float
    drafts: int = 0
    nodes: int = 0


class Accounts:
    """Attachments of all connections, from their binding to whatever ends them."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self._tracing = tracing
        self._bound: dict[int, _Account] = {}

    def __len__(self) -> int:
        return len(self._bound)

    def bound(self, connection: int, spec: BindSpec) -> None:
        """A session is to be mirrored; an older attachment to it is over."""
        self._over(spec.session, "rebound")
        self._bound[spec.session] = _Account(
            connection, spec.binding, spec.origin, time.monotonic()
        )

    def said(self, outputs: Iterable[Outputs | None]) -> None:
        """Look at what is about to be said."""
        for output in outputs:
            if output is None:
                continue
            for rejection in output.rejections:
                account = self._bound.get(rejection.session)
                if account is not None and account.binding == rejection.binding:
                    self._over(rejection.session, rejection.code.value)
            if self._tracing is None:
                continue
            for session, _, draft in output.drafts:
                account = self._bound.get(session)
                if account is not None:
                    account.drafts += 1
                    account.nodes += len(draft.tokens)

    def unbound(self, connection: int, session: int, binding: int) -> None:
        """An attachment is not wanted any more, or the session has ended."""
        account = self._bound.get(session)
        if account is not None and (account.connection, account.binding) == (connection, binding):
            self._over(session, "unbound")

    def ended(self, connection: int, session: int) -> None:
        """The session's last commit has come."""
        account = self._bound.get(session)
        if account is not None and account.connection == connection:
            self._over(session, "ended")

    def disconnected(self, connection: int) -> None:
        """Nobody wants a connection's attachments any more."""
        for session in [s for s, one in self._bound.items() if one.connection == connection]:
            self._over(session, "disconnected")

    def _over(self, session: int, why: str) -> None:
        account = self._bound.pop(session, None)
        if account is None:
            return
        now_s = time.monotonic()
        fields: dict[str, str | int | float] = {
            "session": f"{session:016x}",
            "binding": account.binding,
            "end": why,
            "lasted_s": round(now_s - account.bound_s, 6),
        }
        # Attachments come and go: in a large fleet there are many a second.
        _log.debug("attachment over", extra={"request_id": account.origin.request_id, **fields})
        if self._tracing is not None and account.origin.traceparent:
            counted = {"drafts": account.drafts, "draft_tokens": account.nodes}
            attributes = {f"outrider.{name}": value for name, value in (fields | counted).items()}
            tracing, origin = self._tracing, account.origin
            tracing.record("draft", origin, account.bound_s, now_s, attributes)
