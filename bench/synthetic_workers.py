"""Synthetic workers that share a process: real services, whose models sleep instead of computing.

    python -m bench.synthetic_workers --verifier SPEC --drafter 16 SPEC --drafter 1 SPEC

Each has its own engine, model thread and port, and is put together as the services' own `app` does
it. Says the addresses on standard output when all listen, then takes commands on standard input,
a line of JSON each, and answers each with one (see `bench.children`):

    {"agreement": [0.05, 0, 0]}         from now on the draft models are right so often, by rank
    {"silent": true}                    the drafters guess nothing
    {"late_s": 0.3, "drafters": [1]}    the second drafter's answers come so much later
    {"slower": 10, "drafters": [2]}     the third one's steps take ten times as long
    {"reset": true}                     forget the steps so far
    {"steps": true}                     tell the steps since then: for each verifier a list of
                                        begin and end on the monotonic clock, and tokens; for each
                                        drafter how many, and seconds in all

A drafter that is made slower or late claims what it always did.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import sys
import threading
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from bench.worker_shaping import RecordingTimes, ShapedProposer
from drafter_service.config import GrowingConfig
from drafter_service.growing import Grower
from drafter_service.messages import Outputs as DrafterOutputs
from drafter_service.proposers.language_model import LanguageModelProposer
from drafter_service.service import SERVICE_NAMES as DRAFTER_NAMES
from drafter_service.service import DrafterService
from outrider.errors import OutriderError
from outrider.model.info import model_info
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model
from outrider.model.threads import set_threads
from outrider.serving.garbage import keep_what_is_loaded
from outrider.serving.logs import configure_logging
from outrider.serving.loops import run
from outrider.serving.server import Server, stop_requested
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.service import SERVICE_NAMES as VERIFIER_NAMES
from verifier_service.service import VerifierService

_LOOPBACK = "127.0.0.1"
_GRACE_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SyntheticVerifier:
    """A verifier of this process."""

    address: str
    times: RecordingTimes


@dataclass(slots=True)
class SyntheticDrafter:
    """A drafter of this process, and what can be changed about it."""

    address: str
    model: Any
    """A synthetic draft model, of which more can be changed than of others."""
    proposer: ShapedProposer
    late_s: float = 0.0


@contextlib.asynccontextmanager
async def synthetic_verifier(spec: str, config: EngineConfig) -> AsyncIterator[SyntheticVerifier]:
    """Run a verifier. Raises `ModelLoadError`."""
    model = _load(spec)
    info = model_info(model)
    service = VerifierService(
        info,
        model.tokenizer_files,
        incarnation=secrets.token_hex(16),
        sessions_max=config.sessions_max,
        grammar_timeout_s=config.grammar_timeout_s,
    )
    times = RecordingTimes()
    engine = Engine(model, config, service.emit, times=times)
    service.attach(engine)
    await asyncio.get_running_loop().run_in_executor(None, engine.warm_up)
    times.reset()
    engine.start()
    try:
        async with _listening(VERIFIER_NAMES, service) as address:
            _log.info("verifier %s on %s", info.model, address)
            yield SyntheticVerifier(address, times)
    finally:
        await service.close()
        engine.stop()


@contextlib.asynccontextmanager
async def synthetic_drafter(
    spec: str, leaves_max: int, kv_tokens_max: int, config: GrowingConfig
) -> AsyncIterator[SyntheticDrafter]:
    """Run a drafter. Raises `ModelLoadError`."""
    loop = asyncio.get_running_loop()
    model = _load(spec)
    info = model_info(model, proposer="language-model")
    proposer = ShapedProposer(
        LanguageModelProposer(model, info, leaves_max=leaves_max, kv_tokens_max=kv_tokens_max)
    )
    service = DrafterService(
        info, incarnation=secrets.token_hex(16), sessions_max=config.sessions_max
    )
    drafter = SyntheticDrafter("", model, proposer)

    def emit(outputs: dict[int, DrafterOutputs]) -> None:
        if not drafter.late_s:
            service.emit(outputs)
            return
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(loop.call_later, drafter.late_s, service.emit, outputs)

    grower = Grower(proposer, config, emit)
    service.attach(grower)
    grower.start()
    try:
        async with _listening(DRAFTER_NAMES, service) as address:
            _log.info("drafter %s on %s", info.model, address)
            drafter.address = address
            yield drafter
    finally:
        grower.stop()


def _load(spec: str) -> LanguageModel:
    return load_language_model(spec, dtype="float32", device="cpu", cache_dir=Path(os.devnull))


@contextlib.asynccontextmanager
async def _listening(
    names: tuple[str, ...], service: VerifierService | DrafterService
) -> AsyncIterator[str]:
    server = Server(names, host=_LOOPBACK, port=0)
    service.register(server)
    address = await server.start()
    await server.set_ready(True)
    try:
        yield address
    finally:
        await server.stop(_GRACE_S)


class Fleet:
    """The workers of this process; carries out commands."""

    def __init__(
        self, verifiers: list[SyntheticVerifier], drafters: list[SyntheticDrafter]
    ) -> None:
        self.verifiers, self.drafters = verifiers, drafters

    @property
    def addresses(self) -> dict[str, Any]:
        """Where all of them listen."""
        return {
            "verifiers": [verifier.address for verifier in self.verifiers],
            "drafters": [drafter.address for drafter in self.drafters],
        }

    def carry_out(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what a command says, for the drafters that it names or for all. See above.

        Raises ValueError, KeyError, TypeError or IndexError for what is none.
        """
        chosen = [self.drafters[i] for i in command.pop("drafters", range(len(self.drafters)))]
        answer: dict[str, Any] = {}
        for name, value in command.items():
            if name == "steps":
                answer["verifiers"] = [v.times.steps for v in self.verifiers]
                answer["drafters"] = [[d.proposer.steps, d.proposer.busy_s] for d in self.drafters]
            elif name == "reset":
                for verifier in self.verifiers:
                    verifier.times.reset()
                for drafter in self.drafters:
                    drafter.proposer.reset()
            else:
                for drafter in chosen:
                    _change(drafter, name, value)
        return answer


def _change(drafter: SyntheticDrafter, name: str, value: Any) -> None:
    match name:
        case "agreement":
            drafter.model.agreement = tuple(float(share) for share in value)
        case "silent":
            drafter.proposer.silent = bool(value)
        case "slower":
            drafter.proposer.slower = float(value)
        case "late_s":
            drafter.late_s = float(value)
        case _:
            raise ValueError(f"no such command: {name!r}")


def _obey(loop: asyncio.AbstractEventLoop, fleet: Fleet, ended: asyncio.Event) -> None:
    """Read commands until the pipe is closed; a thread of its own."""
    for line in sys.stdin:
        try:
            answer = fleet.carry_out(json.loads(line))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        print(json.dumps(answer), flush=True)
    loop.call_soon_threadsafe(ended.set)


async def _serve(
    verifiers: Sequence[str], drafters: Sequence[tuple[int, str]], kv_tokens_max: int
) -> None:
    set_threads(1)
    engine = EngineConfig(kv_tokens_max=kv_tokens_max)
    async with contextlib.AsyncExitStack() as stack:
        fleet = Fleet(
            [
                await stack.enter_async_context(synthetic_verifier(spec, engine))
                for spec in verifiers
            ],
            [
                await stack.enter_async_context(
                    synthetic_drafter(spec, leaves_max, kv_tokens_max, GrowingConfig())
                )
                for leaves_max, spec in drafters
            ],
        )
        keep_what_is_loaded()
        print(json.dumps(fleet.addresses), flush=True)
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        threading.Thread(target=_obey, args=(loop, fleet, ended), daemon=True).start()
        ways_out = [asyncio.create_task(way) for way in (ended.wait(), stop_requested())]
        await asyncio.wait(ways_out, return_when=asyncio.FIRST_COMPLETED)
        for way in ways_out:
            way.cancel()


@click.command()
@click.option("--verifier", "verifiers", multiple=True, help="Model spec; repeatable.")
@click.option(
    "--drafter",
    "drafters",
    type=(click.IntRange(min=1), str),
    multiple=True,
    help="Leaves a step, and model spec; repeatable.",
)
@click.option("--kv-tokens-max", type=click.IntRange(min=1), default=1 << 18, show_default=True)
def main(**options: Any) -> None:
    """Run synthetic workers until standard input is closed."""
    configure_logging("synthetic", level="info", fmt="text")
    try:
        run(_serve(**options))
    except OutriderError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
