"""Tries grammars outside of this process before the engine sees them.

Compiling a hostile grammar can take exponential time and cannot be interrupted, but a process can
be killed. So each new grammar is compiled once by a helper (`grammar_trial`), with a deadline; only
what was fine there may be compiled here, where it costs a millisecond.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final, TypeAlias

from outrider.domain import Grammar, RejectionCode

HELPERS_MAX: Final = 2
"""Processes at once; the second starts when the first is busy."""
TRIALS_QUEUED_MAX: Final = 16
"""Grammars that may wait for a helper."""
VERDICTS_MAX: Final = 4_096
"""Verdicts remembered."""

_DOUBT_KEPT_S: Final = 60.0
"""How long a verdict is kept that another trial, on a machine less busy, might not confirm."""
_START_S: Final = 60.0
_ATTEMPTS: Final = 2
_CHUNK_BYTES: Final = 1 << 20

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of a grammar: fine, or why a session with it is refused."""

    code: RejectionCode | None = None
    """None: fine."""
    message: str = ""
    field: str = ""


FINE: Final = Verdict()


@dataclass(frozen=True, slots=True)
class GrammarModel:
    """What grammars are compiled for."""

    tokenizer_json: bytes | None
    vocabulary_size: int
    eos_ids: Collection[int]


_Key: TypeAlias = tuple[str, bytes]


@dataclass(slots=True)
class _Trial:
    grammar: Grammar
    verdict: asyncio.Future[Verdict]
    callers: int = 0


class GrammarGate:
    """Bounded trials of grammars; made and used on one event loop, which it never blocks.

    Equal grammars are tried once, and the verdict is remembered. Nothing is started before the
    first grammar comes.
    """

    def __init__(self, model: GrammarModel, *, timeout_s: float, callers_max: int) -> None:
        """`timeout_s` bounds one trial, `callers_max` how many may wait for verdicts."""
        self._callers_max = callers_max
        self._callers = 0
        self._verdicts = _Verdicts()
        self._queued: OrderedDict[_Key, _Trial] = OrderedDict()
        self._trials: dict[_Key, _Trial] = {}  # queued and running
        self._free = [_Helper(model, timeout_s) for _ in range(HELPERS_MAX)]
        self._helpers = tuple(self._free)
        self._running: set[asyncio.Task[None]] = set()

    @property
    def helper_pids(self) -> list[int]:
        """Process ids of the helpers that are up."""
        return [pid for helper in self._helpers if (pid := helper.pid) is not None]

    def known(self, grammar: Grammar) -> Verdict | None:
        """Return the verdict if the grammar was tried before."""
        return self._verdicts.get(_key(grammar))

    async def verdict(self, grammar: Grammar) -> Verdict:
        """Return what is known of a grammar, after a trial if nothing is.

        A caller may be cancelled: a trial that nobody waits for is not begun. One under way goes
        on to its end or its deadline, since its verdict will be of use and a new helper would
        cost more.
        """
        key = _key(grammar)
        known = self._verdicts.get(key)
        if known is not None:
            return known
        if self._callers >= self._callers_max:
            return _exhausted(f"{self._callers} sessions wait for their grammars to be tried")
        trial = self._trials.get(key)
        if trial is None:
            if len(self._queued) >= TRIALS_QUEUED_MAX:
                return _exhausted(f"{len(self._queued)} grammars wait to be tried")
            trial = _Trial(grammar, asyncio.get_running_loop().create_future())
            self._trials[key] = self._queued[key] = trial
            self._begin()
        self._callers += 1
        trial.callers += 1
        try:
            return await asyncio.shield(trial.verdict)
        finally:
            self._callers -= 1
            trial.callers -= 1
            if not trial.callers and self._queued.get(key) is trial:
                del self._queued[key], self._trials[key]

    async def close(self) -> None:
        """End all helpers; who still waits for a verdict is cancelled."""
        self._queued.clear()
        self._free.clear()
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        for trial in self._trials.values():
            trial.verdict.cancel()
        self._trials.clear()
        for helper in self._helpers:
            await helper.stop()

    def _begin(self) -> None:
        """Give waiting trials to free helpers."""
        while self._queued and self._free:
            key, trial = self._queued.popitem(last=False)
            # The one used last: it has started already.
            task = asyncio.create_task(self._run(key, trial, self._free.pop()))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _run(self, key: _Key, trial: _Trial, helper: _Helper) -> None:
        try:
            verdict, sure = await helper.tried(trial.grammar)
        except Exception:
            # Whatever it was, the sessions that wait must hear of it.
            _log.exception("the trial of a grammar failed")
            verdict, sure = _unavailable(trial.grammar), False
        tried = verdict.code is not RejectionCode.INTERNAL
        if tried:
            self._verdicts.put(key, verdict, None if sure else _DOUBT_KEPT_S)
        del self._trials[key]
        trial.verdict.set_result(verdict)
        if tried:
            # One that was killed is replaced now, not when the next grammar waits for it.
            await helper.start()
        self._free.append(helper)
        self._begin()


class _Verdicts:
    """The latest verdicts by use, each for as long as it is trusted."""

    def __init__(self) -> None:
        self._kept: OrderedDict[_Key, tuple[Verdict, float | None]] = OrderedDict()
        self._now_s = asyncio.get_running_loop().time

    def get(self, key: _Key) -> Verdict | None:
        verdict, until_s = self._kept.get(key, (None, None))
        if until_s is not None and self._now_s() >= until_s:
            del self._kept[key]
            return None
        if verdict is not None:
            self._kept.move_to_end(key)
        return verdict

    def put(self, key: _Key, verdict: Verdict, kept_s: float | None) -> None:
        self._kept[key] = verdict, None if kept_s is None else self._now_s() + kept_s
        self._kept.move_to_end(key)
        if len(self._kept) > VERDICTS_MAX:
            self._kept.popitem(last=False)


class _Helper:
    """One process of `grammar_trial`, started when needed and replaced when it ends."""

    def __init__(self, model: GrammarModel, timeout_s: float) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        process = self._process
        return None if process is None or process.returncode is not None else process.pid

    async def tried(self, grammar: Grammar) -> tuple[Verdict, bool]:
        """Return the verdict, and whether another trial would certainly give the same."""
        name = f"sampling.grammar.{grammar.kind.value}"
        request = _line({"kind": grammar.kind.value, "source": grammar.source})
        for _ in range(_ATTEMPTS):
            if not await self.start():
                return _unavailable(grammar), False
            try:
                async with asyncio.timeout(self._timeout_s):
                    answer = await self._ask(request)
            except TimeoutError:
                _log.warning("%s: a trial took too long and was ended", name)
                await self.stop()
                reason = (
                    f"takes longer than {self._timeout_s:g} s to compile here; simplify it: fewer "
                    "patterns that must hold at once, no multipleOf beside bounds, shorter repeats"
                )
                return Verdict(RejectionCode.INVALID, reason, name), False
            except (OSError, EOFError):
                # Perhaps somebody else ended the process: the grammar gets the benefit of doubt.
                _log.warning("%s: the process that tried it ended", name)
                await self.stop()
                continue
            if answer:
                return Verdict(RejectionCode.INVALID, answer["message"], answer["field"]), True
            return FINE, True
        reason = "the process that compiled it ended, twice; simplify it or try again later"
        return Verdict(RejectionCode.INVALID, reason, name), False

    async def start(self) -> bool:
        """Have a process that is ready; returns False if there can be none."""
        if self.pid is not None:
            return True
        await self.stop()
        model = self._model
        tokenizer = model.tokenizer_json
        setup = {
            "vocabulary_size": model.vocabulary_size,
            "eos_ids": sorted(model.eos_ids),
            "tokenizer_bytes": None if tokenizer is None else len(tokenizer),
        }
        try:
            async with asyncio.timeout(_START_S):
                self._process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-m", "verifier_service.grammar_trial"),
                    # The second bound is for a helper that has lost its parent.
                    *(str(os.getpid()), str(2 * self._timeout_s + 1)),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
                    # A terminal's Ctrl-C is for the parent, which ends its helpers.
                    start_new_session=True,
                )
                await self._ask(_line(setup), tokenizer or b"")
        except Exception as error:  # the platform's reasons are many
            _log.error("no process to try grammars in: %s: %s", type(error).__name__, error)
            await self.stop()
            return False
        return True

    async def stop(self) -> None:
        """Kill the process, if there is one, and wait for its end."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        # Reads what is left, so that both pipes are closed afterwards.
        await process.communicate()

    async def _ask(self, line: bytes, more: bytes = b"") -> dict[str, Any]:
        """Write a request and return the answer. Raises `OSError` or `EOFError`."""
        assert self._process is not None
        requests, answers = self._process.stdin, self._process.stdout
        assert requests is not None
        assert answers is not None
        requests.write(line)
        view = memoryview(more)
        for start in range(0, len(more), _CHUNK_BYTES):
            requests.write(view[start : start + _CHUNK_BYTES])
            await requests.drain()
        await requests.drain()
        answer = await answers.readline()
        if not answer.endswith(b"\n"):
            raise EOFError("the process ended")
        parsed: dict[str, Any] = json.loads(answer)
        return parsed


def _key(grammar: Grammar) -> _Key:
    return grammar.kind.value, sha256(grammar.source.encode()).digest()


def _line(request: dict[str, Any]) -> bytes:
    return json.dumps(request).encode() + b"\n"


def _exhausted(why: str) -> Verdict:
    return Verdict(RejectionCode.EXHAUSTED, f"{why}; try again later", "sampling.grammar")


def _unavailable(grammar: Grammar) -> Verdict:
    return Verdict(
        RejectionCode.INTERNAL,
        "this verifier cannot try grammars at the moment; try again later",
        f"sampling.grammar.{grammar.kind.value}",
    )
