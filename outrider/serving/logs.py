"""Logging of a service process: one line an event, for people or for machines.

What belongs to a request names it: `_log.info("...", extra={"request_id": number})`, or, in a
door's task, whatever is logged within `request_named`. Other values of `extra` become fields of
their own.

No prompt and no output is logged. Messages never hold any; exceptions might, which is why those
that quote the value at fault are logged without their words.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, Literal

LogFormat = Literal["text", "json"]

_QUOTING = (ValueError, LookupError)
"""Errors whose messages quote the value at fault, with all that derive from them: a parser's, a
validator's."""
_OWN = frozenset((*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"))
"""What every record has; all else came by `extra`."""
_request_id: ContextVar[str] = ContextVar("request_id", default="")


@contextlib.contextmanager
def request_named(request_id: str) -> Iterator[None]:
    """Have whatever this task logs meanwhile name the request."""
    token = _request_id.set(request_id)
    try:
        yield
    finally:
        _request_id.reset(token)


def _name_request(record: logging.LogRecord) -> bool:
    number = _request_id.get()
    if number and not hasattr(record, "request_id"):
        record.request_id = number
    # asyncio's own complaints go on with the representation of tasks, errors included.
    if record.name == "asyncio" and isinstance(record.msg, str):
        record.msg, record.args = record.getMessage().partition("\n")[0], None
    return True


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    fields = {name: value for name, value in vars(record).items() if name not in _OWN}
    number = fields.pop("request_id", "")
    return {"request_id": number, **fields} if number else fields


def _failure(error: BaseException) -> str:
    """A traceback, oldest cause first, without messages that may quote what was asked."""
    chain: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in chain:
        chain.append(one)
        one = one.__cause__ or (None if one.__suppress_context__ else one.__context__)
    lines: list[str] = []
    for one in reversed(chain):
        lines += traceback.format_tb(one.__traceback__)
        words = "" if isinstance(one, _QUOTING) else f": {one}"
        lines.append(f"{type(one).__name__}{words}\n")
    return "".join(lines).rstrip()


class _Formatter(logging.Formatter):
    def formatException(self, ei: Any) -> str:
        return _failure(ei[1]) if ei[1] is not None else ""


class _TextFormatter(_Formatter):
    """A line for people: fields follow the message."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        fields = "".join(f" {name}={value}" for name, value in _fields(record).items())
        return super().formatMessage(record) + fields


class _JsonFormatter(_Formatter):
    """One JSON object a line."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_fields(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def configure_logging(service: str, *, level: str = "INFO", fmt: LogFormat = "text") -> None:
    """Send the process's logs to standard error. Called once, by `__main__`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter(service) if fmt == "json" else _TextFormatter(service))
    handler.addFilter(_name_request)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    # Libraries talk about each request; that is for debugging them, not us.
    for noisy in ("httpx", "urllib3", "filelock", "transformers", "asyncio", "httpcore", "grpc"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
