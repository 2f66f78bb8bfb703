"""Log lines: one each, with a request's name, without what was asked or answered."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import pydantic
import pytest

from outrider.serving.logs import LogFormat, configure_logging, request_named

_log = logging.getLogger("some.module")


@pytest.fixture(autouse=True)
def _root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().err.splitlines()]


def test_a_json_line_has_what_machines_look_for(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("verifier", level="info", fmt="json")
    _log.debug("unheard")
    _log.warning("so %s", "it is", extra={"session": "00ff", "steps": 3})
    (line,) = lines(capsys)
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "warning",
        "service": "verifier",
        "logger": "some.module",
        "message": "so it is",
        "session": "00ff",
        "steps": 3,
    }


def test_people_see_fields_after_the_message(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("drafter", fmt="text")
    _log.info("done", extra={"steps": 3, "request_id": "r-1"})
    text = capsys.readouterr().err
    assert text.endswith("INFO    drafter some.module: done request_id=r-1 steps=3\n")


async def test_a_tasks_lines_name_its_request(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("orchestrator", fmt="json")

    async def answer(number: str) -> None:
        with request_named(number):
            await asyncio.sleep(0)
            _log.info("within")
        _log.info("outside")

    await asyncio.gather(answer("one"), answer("two"))
    told = sorted((line["message"], line.get("request_id", "")) for line in lines(capsys))
    assert told == [("outside", ""), ("outside", ""), ("within", "one"), ("within", "two")]


class Body(pydantic.BaseModel):
    number: int


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_errors_are_logged_without_the_value_that_they_quote(
    capsys: pytest.CaptureFixture[str], fmt: LogFormat
) -> None:
    configure_logging("orchestrator", fmt=fmt)
    secret = "parsley"
    try:
        try:
            try:
                Body.model_validate({"number": secret})
            except ValueError as error:
                raise KeyError(secret) from error
        except KeyError:
            raise RuntimeError("out of memory") from None
    except RuntimeError:
        _log.exception("a step failed")
    try:
        Body.model_validate({"number": secret})
    except ValueError:
        _log.exception("a body failed")
    text = capsys.readouterr().err
    assert secret not in text
    assert "RuntimeError: out of memory" in text
    assert "ValidationError" in text
    assert "test_logs.py" in text


async def test_asyncios_own_complaints_quote_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("orchestrator", fmt="json")

    async def fail(word: str) -> None:
        raise ValueError(word)

    task = asyncio.create_task(fail("parsley"))
    await asyncio.wait([task])
    del task
    (line,) = lines(capsys)
    assert line["message"] == "Task exception was never retrieved"
    assert "parsley" not in json.dumps(line)
    assert "ValueError" in line["exception"]
