"""Grammars that never finish compiling cost their own session, and nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import pytest_asyncio

from outrider.domain import (
    Grammar,
    GrammarKind,
    RejectionCode,
    Resync,
    SamplingParams,
    SessionSpec,
)
from outrider.errors import InvalidRequest
from outrider.model.language_model import LanguageModel
from outrider.tokenizer import byte_tokenizer_files
from outrider.wire import resync_to_pb
from tests.support.fleet import TARGET, RunningVerifier, load, until, verifier
from tests.support.raw import VerifierStream, session, verifier_stream
from verifier_service import grammar_gate
from verifier_service.config import EngineConfig
from verifier_service.grammar import GrammarCompiler
from verifier_service.grammar_gate import FINE, GrammarGate, GrammarModel

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.skipif(sys.platform != "linux", reason="looks at processes through /proc"),
]

JSON, REGEX = GrammarKind.JSON_SCHEMA, GrammarKind.REGEX
PATTERNS = [{"pattern": f"^(.*a.{{{number}}}b.*|c)$"} for number in range(5, 25)]
HOSTILE = {
    "patterns": Grammar(JSON, json.dumps({"type": "string", "allOf": PATTERNS})),
    "multiple": Grammar(JSON, '{"type": "integer", "minimum": 0, "multipleOf": 123456789}'),
}
PERSON = Grammar(JSON, '{"type": "object", "properties": {"name": {"type": "string"}}}')
QUICK = EngineConfig(grammar_timeout_s=0.5, warm_up=False)
PATIENT = EngineConfig(grammar_timeout_s=60.0, warm_up=False)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load(TARGET)


@pytest_asyncio.fixture(loop_scope="module")
async def quick(model: LanguageModel) -> AsyncIterator[RunningVerifier]:
    async with verifier(model, config=replace(QUICK, step_delay_s=0.005)) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def patient(model: LanguageModel) -> AsyncIterator[RunningVerifier]:
    async with verifier(model, config=PATIENT) as running:
        yield running


def asking(number: int, grammar: Grammar, **changes: object) -> SessionSpec:
    sampling = SamplingParams(temperature=0.0, grammar=grammar)
    return session(number, b"Ask", sampling=sampling, ignore_eos=False, **changes)


def regex(number: int) -> Grammar:
    return Grammar(REGEX, f"[a-z]{{{number}}}")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def libraries_of(pid: int) -> str:
    return Path(f"/proc/{pid}/maps").read_text()


async def gone(pid: int) -> None:
    async def ended() -> bool:
        return not alive(pid)

    await until(ended, what=f"the end of process {pid}")


def children() -> set[int]:
    """Helpers that this process has."""
    found = set()
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            pid = int(folder.name)
            words = (folder / "stat").read_text().rpartition(")")[2].split()
            command = (folder / "cmdline").read_bytes()
            if int(words[1]) == os.getpid() and b"grammar_trial" in command and alive(pid):
                found.add(pid)
    return found


async def helper_of(running: RunningVerifier, stream: VerifierStream, number: int = 900) -> int:
    """Have a helper started by an ordinary grammar; returns its process id."""
    await stream.open(asking(number, regex(number)))
    await stream.until(lambda: (number, 1) in stream.opened)
    (pid,) = running.service.grammar_gate.helper_pids
    return pid


@contextlib.contextmanager
def halted(pid: int) -> Iterator[None]:
    """Trials take as long as the test wants."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


async def heard(stream: VerifierStream, number: int) -> None:
    """Return when all that was sent before has been read: this session comes after it."""
    await stream.open(session(number, b"Plain"))
    await stream.until(lambda: (number, 1) in stream.opened)


# --- grammars that are no good --------------------------------------------------------------------


@pytest.mark.parametrize("name", HOSTILE)
async def test_a_hostile_grammar_is_refused_while_others_stream(quick, name):
    async with verifier_stream(quick.address) as stream:
        await stream.open(session(1, b"Somebody else", tokens_max=1500))
        await stream.until(lambda: 1 in stream.commits)
        await stream.open(asking(2, HOSTILE[name]), session(3, b"No grammar"))
        await stream.until(lambda: (3, 1) in stream.opened)
        assert not stream.rejections
        messages = 0
        while not stream.rejections:
            seen = len(stream.commits[1])
            await stream.until(lambda seen=seen: len(stream.commits[1]) > seen)
            messages += 1
        # In half a second. An event loop that was blocked would have sent them all as one.
        assert messages > 10
        (rejection,) = stream.rejections
        assert (rejection.session, rejection.epoch) == (2, 1)
        assert rejection.code is RejectionCode.INVALID
        assert rejection.field == "sampling.grammar.json_schema"
        assert re.match(r"takes longer than 0\.5 s to compile here; simplify", rejection.message)
        assert (2, 1) not in stream.opened
        # Good ones are served as before.
        await stream.open(asking(4, PERSON))
        await stream.until_finished(4)


async def test_equal_grammars_are_tried_once(quick, monkeypatch):
    tried: list[Grammar] = []
    original = grammar_gate._Helper.tried

    def counted(helper, grammar):
        tried.append(grammar)
        return original(helper, grammar)

    monkeypatch.setattr(grammar_gate._Helper, "tried", counted)
    async with verifier_stream(quick.address) as stream:
        # Four at once, as for n=4; and one more when the verdict is known.
        await stream.open(*(asking(number, HOSTILE["multiple"]) for number in range(1, 5)))
        await stream.open(*(asking(number, PERSON) for number in range(11, 15)))
        await stream.until(lambda: len(stream.rejections) == 4 and len(stream.opened) == 4)
        await stream.open(asking(5, HOSTILE["multiple"]), asking(15, PERSON))
        await stream.until(lambda: len(stream.rejections) == 5 and len(stream.opened) == 5)
    assert [rejection.session for rejection in stream.rejections] == [1, 2, 3, 4, 5]
    assert {rejection.code for rejection in stream.rejections} == {RejectionCode.INVALID}
    assert tried == [HOSTILE["multiple"], PERSON]


@pytest.mark.parametrize(
    "grammar",
    [
        Grammar(REGEX, "(unfinished"),
        Grammar(JSON, "{"),
        Grammar(JSON, '{"type": "strong"}'),
        Grammar(JSON, '{"type": "string", "minLength": 3, "maxLength": 2}'),
    ],
    ids=lambda grammar: grammar.source,
)
async def test_what_the_library_refuses(quick, model, grammar):
    compiler = GrammarCompiler(model.tokenizer_files, model.vocabulary_size, model.eos_ids)
    with pytest.raises(InvalidRequest) as caught:
        compiler.compile(grammar)
    async with verifier_stream(quick.address) as stream:
        for number in (1, 2):  # tried, and remembered
            await stream.open(asking(number, grammar))
            await stream.until(lambda number=number: len(stream.rejections) == number)
        for rejection in stream.rejections:
            assert rejection.code is RejectionCode.INVALID
            assert rejection.field == caught.value.field
            assert rejection.message == caught.value.message


# --- sessions whose grammar is being tried --------------------------------------------------------


async def test_an_abort_during_the_trial(patient):
    async with verifier_stream(patient.address) as stream:
        with halted(await helper_of(patient, stream)):
            await stream.open(asking(1, PERSON, epoch=2), asking(2, PERSON))
            await stream.send(
                aborts=[
                    {"session": 1, "epoch": 1},  # of an older epoch: no effect
                    {"session": 2, "epoch": 1},
                ]
            )
            await heard(stream, 10)
        await stream.until(lambda: (1, 2) in stream.opened)
        await stream.open(asking(3, PERSON))
        await stream.until(lambda: (3, 1) in stream.opened)
        assert (2, 1) not in stream.opened
        assert not stream.rejections


async def test_a_disconnect_during_the_trial(patient):
    async with verifier_stream(patient.address) as stream:
        with halted(await helper_of(patient, stream)):
            async with verifier_stream(patient.address) as other:
                await other.open(asking(1, PERSON), asking(2, regex(5)))
                await heard(other, 11)

            async def alone() -> bool:
                return patient.engine.load == 0

            await until(alone, what="the other stream's sessions are aborted")
            await stream.open(asking(3, PERSON))
            await heard(stream, 12)
        await stream.until_finished(3)
        # Session 1 never came, or its epoch would be known.
        await stream.open(asking(1, PERSON))
        await stream.until(lambda: (1, 1) in stream.opened)
        assert not stream.rejections


async def test_a_newer_epoch_during_the_trial(patient):
    async with (
        verifier_stream(patient.address) as first,
        verifier_stream(patient.address) as second,
    ):
        with halted(await helper_of(patient, first)):
            await first.open(asking(1, PERSON, epoch=2))
            await first.open(asking(1, PERSON, epoch=2), session(1, b"older", epoch=1))
            await first.until(lambda: len(first.rejections) == 2)
            assert [r.code for r in first.rejections] == [RejectionCode.STALE_EPOCH] * 2
            assert [r.current_epoch for r in first.rejections] == [2, 2]
            await second.open(session(1, b"Without a grammar", epoch=3))
            await second.until(lambda: (1, 3) in second.opened)
            await first.until(lambda: len(first.rejections) == 3)
            stale = first.rejections[2]
            assert stale.code is RejectionCode.STALE_EPOCH
            assert (stale.session, stale.epoch, stale.current_epoch) == (1, 2, 3)
        await first.open(asking(2, PERSON))
        await first.until(lambda: (2, 1) in first.opened)
        assert (1, 2) not in first.opened
        assert len(first.rejections) == 3


async def test_an_impatient_orchestrator_during_the_trial(patient):
    async with verifier_stream(patient.address) as stream:
        with halted(await helper_of(patient, stream)):
            await stream.open(asking(1, PERSON))
            await stream.send(resyncs=[resync_to_pb(Resync(1, 1, 3))])
            await stream.send(resyncs=[resync_to_pb(Resync(2, 1, 3))])
            await stream.until(lambda: bool(stream.rejections))
        await stream.until_finished(1)
        assert [rejection.session for rejection in stream.rejections] == [2]


async def test_a_drain_during_the_trial(model):
    async with (
        verifier(model, config=PATIENT) as running,
        verifier_stream(running.address) as stream,
    ):
        with halted(await helper_of(running, stream)):
            await stream.open(asking(1, PERSON))
            await heard(stream, 10)
            running.service.drain()
            await stream.open(asking(2, PERSON), asking(3, HOSTILE["patterns"]))
            await stream.until(lambda: len(stream.rejections) == 3)
        assert [r.session for r in stream.rejections] == [1, 2, 3]
        assert {r.code for r in stream.rejections} == {RejectionCode.DRAINING}


async def test_no_more_wait_than_may_be_admitted(model):
    config = replace(PATIENT, sessions_max=2)
    async with verifier(model, config=config) as running, verifier_stream(running.address) as s:
        with halted(await helper_of(running, s)):
            await s.until_finished(900)
            await s.open(asking(1, PERSON), asking(2, PERSON), asking(3, PERSON))
            await s.until(lambda: bool(s.rejections))
            (rejection,) = s.rejections
            assert (rejection.session, rejection.code) == (3, RejectionCode.EXHAUSTED)
            assert "try again later" in rejection.message
        await s.until(lambda: {(1, 1), (2, 1)} <= set(s.opened))


# --- the helpers ----------------------------------------------------------------------------------


async def test_a_helper_that_was_killed_is_replaced(patient):
    async with verifier_stream(patient.address) as stream:
        idle = await helper_of(patient, stream, 900)
        os.kill(idle, signal.SIGKILL)
        busy = await helper_of(patient, stream, 901)
        assert busy != idle
        with halted(busy):
            await stream.open(asking(1, PERSON))
            await heard(stream, 10)
            os.kill(busy, signal.SIGKILL)
            await stream.until(lambda: (1, 1) in stream.opened)
        assert not stream.rejections


async def test_helpers_are_small_and_end_with_the_service(model):
    async with verifier(model, config=QUICK) as running:
        assert not children()
        async with verifier_stream(running.address) as stream:
            await stream.open(session(1, b"No grammar"))
            await stream.until_finished(1)
            assert not children()
            pid = await helper_of(running, stream)
            assert children() == {pid}
            assert "torch" not in libraries_of(pid)
            # Both are busy when the service ends.
            await stream.open(*(asking(9 + i, g) for i, g in enumerate(HOSTILE.values())))
            await stream.until(lambda: len(children()) == 2)
    assert not children()


_PARENT = """
import asyncio
from outrider.domain import Grammar, GrammarKind
from outrider.tokenizer import byte_tokenizer_files
from verifier_service.grammar_gate import GrammarGate, GrammarModel

async def main():
    model = GrammarModel(byte_tokenizer_files()["tokenizer.json"], 260, [256])
    gate = GrammarGate(model, timeout_s=60.0, callers_max=4)
    await gate.verdict(Grammar(GrammarKind.REGEX, "a"))
    hostile = '{"type": "integer", "minimum": 0, "multipleOf": 123456789}'
    task = asyncio.create_task(gate.verdict(Grammar(GrammarKind.JSON_SCHEMA, hostile)))
    for _ in range(20):  # until the request lies in the pipe
        await asyncio.sleep(0)
    print(*gate.helper_pids, flush=True)
    await task

asyncio.run(main())
"""


async def test_a_helper_dies_with_its_parent():
    parent = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", _PARENT), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    await parent.communicate()
    await gone(pid)


# --- the gate by itself ---------------------------------------------------------------------------

BYTES = GrammarModel(byte_tokenizer_files()["tokenizer.json"], 260, [256])


@contextlib.asynccontextmanager
async def gate(
    model: GrammarModel = BYTES, *, timeout_s: float = 60.0, callers_max: int = 64
) -> AsyncIterator[GrammarGate]:
    made = GrammarGate(model, timeout_s=timeout_s, callers_max=callers_max)
    try:
        yield made
    finally:
        await made.close()


async def test_a_queue_of_trials_has_a_bound(monkeypatch):
    monkeypatch.setattr(grammar_gate, "HELPERS_MAX", 1)
    monkeypatch.setattr(grammar_gate, "TRIALS_QUEUED_MAX", 1)
    async with gate() as tried:
        assert await tried.verdict(PERSON) == FINE
        with halted(tried.helper_pids[0]):
            running = asyncio.create_task(tried.verdict(regex(1)))
            queued = asyncio.create_task(tried.verdict(regex(2)))
            await asyncio.sleep(0)
            assert (await tried.verdict(regex(3))).code is RejectionCode.EXHAUSTED
            assert await tried.verdict(PERSON) == FINE  # needs no trial
            again = asyncio.create_task(tried.verdict(regex(2)))  # joins
            for task in (queued, again):
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
            # Nobody waits for it any more: there is room.
            other = asyncio.create_task(tried.verdict(regex(4)))
            await asyncio.sleep(0)
            assert not other.done()
        assert await asyncio.gather(running, other) == [FINE, FINE]
        assert tried.known(regex(2)) is None


async def test_a_trial_goes_on_without_its_caller():
    async with gate() as tried:
        assert await tried.verdict(PERSON) == FINE
        with halted(tried.helper_pids[0]):
            task = asyncio.create_task(tried.verdict(regex(1)))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

        async def known() -> bool:
            return tried.known(regex(1)) is not None

        await until(known, what="the verdict of a trial that nobody waits for")
        pids = tried.helper_pids
        assert await tried.verdict(regex(2)) == FINE
        assert tried.helper_pids == pids


async def test_a_grammar_that_ends_its_helper_is_not_tried_for_ever():
    async with gate() as tried:
        assert await tried.verdict(PERSON) == FINE
        first = tried.helper_pids
        os.kill(first[0], signal.SIGSTOP)
        task = asyncio.create_task(tried.verdict(HOSTILE["multiple"]))
        await asyncio.sleep(0)
        os.kill(first[0], signal.SIGKILL)

        async def replaced() -> bool:
            return tried.helper_pids not in ([], first)

        await until(replaced, what="another helper")
        os.kill(tried.helper_pids[0], signal.SIGKILL)
        verdict = await task
        # Killed while starting it would count as a fault of ours.
        assert verdict.code in (RejectionCode.INVALID, RejectionCode.INTERNAL)
        assert await tried.verdict(regex(1)) == FINE


async def test_doubtful_verdicts_are_forgotten(monkeypatch):
    monkeypatch.setattr(grammar_gate, "_DOUBT_KEPT_S", 0.0)
    async with gate(timeout_s=0.2) as tried:
        verdict = await tried.verdict(HOSTILE["multiple"])
        assert verdict.code is RejectionCode.INVALID
        assert tried.known(HOSTILE["multiple"]) is None
        assert await tried.verdict(PERSON) == FINE
        assert tried.known(PERSON) == FINE


async def test_only_the_latest_verdicts_are_kept(monkeypatch):
    monkeypatch.setattr(grammar_gate, "VERDICTS_MAX", 2)
    async with gate() as tried:
        for number in (1, 2, 1, 3):
            assert await tried.verdict(regex(number)) == FINE
        assert [tried.known(regex(n)) for n in (1, 2, 3)] == [FINE, None, FINE]


async def test_a_model_that_cannot_follow_grammars():
    async with gate(GrammarModel(None, 260, [256])) as tried:
        verdict = await tried.verdict(PERSON)
    assert verdict.code is RejectionCode.INVALID
    assert "this model cannot follow a grammar" in verdict.message


async def test_no_process_can_be_started(monkeypatch):
    async with gate() as tried:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nonexistent/python")
            verdict = await tried.verdict(PERSON)
        assert verdict.code is RejectionCode.INTERNAL
        assert "cannot try grammars" in verdict.message
        assert await tried.verdict(PERSON) == FINE
