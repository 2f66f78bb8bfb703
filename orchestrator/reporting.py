"""What is told of a session when it has ended: a line in the log, and spans for whoever traces."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from orchestrator.generation import Running
from outrider.domain import Origin
from outrider.serving.telemetry import Attributes, Tracing

_log = logging.getLogger(__name__)


class Reporter:
    """Names sessions after the request that they are for, and tells of them."""

    def __init__(self, tracing: Tracing | None = None) -> None:
        self._tracing = tracing

    def begun(self, running: Running, origin: Origin) -> None:
        """Before the session is opened anywhere: workers learn whose it is."""
        if self._tracing is not None:
            running.span = self._tracing.begin("session", origin)
            origin = running.span.origin
        session = running.session
        session.spec = replace(session.spec, origin=origin)

    def opened(self, running: Running, now_s: float) -> None:
        """A verifier has taken the session."""
        if self._tracing is not None:
            origin, asked_s = running.session.spec.origin, running.asked_s
            attributes: Attributes = {
                "outrider.verifier": running.session.verifier or "",
                "outrider.epoch": running.session.epoch,
            }
            self._tracing.record("placement", origin, asked_s, now_s, attributes)

    def ended(self, running: Running) -> None:
        """Nothing more will happen to the session."""
        generation, session = running.generation, running.session
        counters = session.counters
        fields: dict[str, str | int | float] = {
            "generation": generation.id,
            "session": f"{running.number:016x}",
            "choice": running.choice,
            "end": running.end,
            "model": generation.info.model,
            "verifier": session.verifier or "",
            "epoch": session.epoch,
            "prompt_tokens": len(session.spec.prompt),
            "completion_tokens": len(session.output),
            "verify_steps": counters.verify_steps,
            "accepted_draft_tokens": counters.accepted_draft_tokens,
            "first_token_s": round(running.first_token_s or 0.0, 6),
            "total_s": round(time.monotonic() - generation.started_s, 6),
        }
        origin = session.spec.origin
        _log.info("session ended", extra={"request_id": origin.request_id, **fields})
        if running.span is not None:
            running.span.tell(
                {
                    "gen_ai.operation.name": "text_completion",
                    "gen_ai.request.model": generation.info.model,
                    "gen_ai.usage.input_tokens": len(session.spec.prompt),
                    "gen_ai.usage.output_tokens": len(session.output),
                    **{f"outrider.{name}": value for name, value in fields.items()},
                }
            )
            failed = running.end not in ("stop", "length", "left")
            running.span.end(running.end if failed else "")
