"""Which event loop a service runs on."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType

import pytest

from outrider.serving.loops import run


async def _note(loops: list[asyncio.AbstractEventLoop]) -> None:
    loops.append(asyncio.get_running_loop())


def test_without_uvloop_it_is_asyncio_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    loops: list[asyncio.AbstractEventLoop] = []
    run(_note(loops))
    assert isinstance(loops[0], asyncio.BaseEventLoop)


def test_uvloop_is_used_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[asyncio.AbstractEventLoop] = []

    def new_event_loop() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        return made[-1]

    uvloop = ModuleType("uvloop")
    monkeypatch.setattr(uvloop, "new_event_loop", new_event_loop, raising=False)
    monkeypatch.setitem(sys.modules, "uvloop", uvloop)
    loops: list[asyncio.AbstractEventLoop] = []
    run(_note(loops))
    assert loops == made
    assert made[0].is_closed()
