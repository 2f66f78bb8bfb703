"""Process of `bench.relay`: the verifiers and drafters of `fakes`, and what sets their pace.

python -m bench.relaying.workers --verifiers 1 --drafters 2 --rows 8
"""

from __future__ import annotations

import asyncio
import itertools
import random
import sys
import threading
import time
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import click
import numpy as np

from bench.relaying.control import obey
from bench.relaying.fakes import COMMIT_TOKENS, Drafter, Probe, Verifier
from bench.texts import Texts
from outrider.serving.server import Server
from outrider.tokenizer import byte_tokenizer_files
from outrider.v1 import drafter_pb2_grpc, verifier_pb2_grpc, worker_pb2_grpc


class _Pacer:
    """Calls the verifiers in turn, each at a random time within its slot.

    A thread, since an event loop's timers are late by a millisecond or two.
    """

    def __init__(self, verifiers: Sequence[Verifier], interval_s: float) -> None:
        self._stopped = False
        self._loop = asyncio.get_running_loop()
        arguments = (verifiers, interval_s)
        self._thread = threading.Thread(target=self._run, args=arguments, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopped = True
        self._thread.join()

    def _run(self, verifiers: Sequence[Verifier], interval_s: float) -> None:
        draw = random.Random(1)
        slot_s = time.monotonic()
        for verifier in itertools.cycle(verifiers):
            slot_s += interval_s
            time.sleep(max(0.0, slot_s + draw.random() * interval_s - time.monotonic()))
            if self._stopped:
                return
            self._loop.call_soon_threadsafe(verifier.step)


class _Workers:
    """What the parent may ask for."""

    def __init__(self, verifiers: Sequence[Verifier], drafters: Sequence[Drafter], rows: int):
        self._verifiers, self._drafters, self._rows = verifiers, drafters, rows
        self._pacer: _Pacer | None = None

    async def pace(self, tokens_per_s: float) -> Mapping[str, Any]:
        """Commit at this rate, all sessions together."""
        await self.stop()
        mean_tokens = sum(COMMIT_TOKENS) / len(COMMIT_TOKENS)
        self._pacer = _Pacer(self._verifiers, self._rows * mean_tokens / tokens_per_s)
        return {}

    async def flood(self) -> Mapping[str, Any]:
        """Commit as fast as flow control allows."""
        await self.stop()
        for verifier in self._verifiers:
            verifier.flood(True)
        return {}

    async def stop(self) -> Mapping[str, Any]:
        """Commit nothing more."""
        if self._pacer is not None:
            self._pacer.stop()
            self._pacer = None
        for verifier in self._verifiers:
            verifier.flood(False)
        return {}

    async def record(self) -> Mapping[str, Any]:
        """Note what is sent from now on."""
        for verifier in self._verifiers:
            verifier.recording = True
        return {}

    async def dump(self, path: str) -> Mapping[str, Any]:
        """Write what was noted, and forget it."""
        sent: array[int] = array("q")
        for verifier in self._verifiers:
            sent.extend(verifier.sent)
            verifier.sent = array("q")
            verifier.recording = False
        np.save(path, np.array(sent, dtype=np.int64).reshape(-1, 3))
        return await self.counts()

    async def counts(self) -> Mapping[str, Any]:
        """What was committed, and what came from the drafters, since the start."""
        return {
            "tokens": sum(verifier.tokens for verifier in self._verifiers),
            "drafts": sum(verifier.drafts for verifier in self._verifiers),
        }


@click.command()
@click.option("--verifiers", "verifier_count", type=click.IntRange(min=1), required=True)
@click.option("--drafters", "drafter_count", type=click.IntRange(min=0), required=True)
@click.option("--rows", type=click.IntRange(min=1), required=True, help="Commits a message.")
def main(verifier_count: int, drafter_count: int, rows: int) -> None:
    """Serve, and obey the lines on standard input."""
    # The pacer's thread must not wait long for the loop's.
    sys.setswitchinterval(0.0002)
    asyncio.run(_serve(verifier_count, drafter_count, rows))


async def _serve(verifier_count: int, drafter_count: int, rows: int) -> None:
    text = Texts(byte_tokenizer_files()).take(0, 4_096)
    verifiers = [Verifier(rows, text, seed) for seed in range(verifier_count)]
    drafters = [Drafter() for _ in range(drafter_count)]
    addresses: dict[str, list[str]] = {"verifiers": [], "drafters": [], "probes": []}
    servers = []  # Kept, as a server ends when nobody holds it.
    for verifier in verifiers:
        servers.append(server := Server((), host="127.0.0.1", port=0))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(verifier, server.grpc)
        verifier_pb2_grpc.add_VerifierServiceServicer_to_server(verifier, server.grpc)
        addresses["verifiers"].append(await server.start())
    for drafter in drafters:
        servers.append(server := Server((), host="127.0.0.1", port=0))
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(drafter, server.grpc)
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(drafter, server.grpc)
        addresses["drafters"].append(await server.start())
    servers.append(server := Server((), host="127.0.0.1", port=0))
    verifier_pb2_grpc.add_VerifierServiceServicer_to_server(Probe(), server.grpc)
    addresses["probes"].append(await server.start())

    async def where() -> Mapping[str, Any]:
        return addresses

    workers = _Workers(verifiers, drafters, rows)
    await obey(
        {
            "where": where,
            "pace": workers.pace,
            "flood": workers.flood,
            "stop": workers.stop,
            "record": workers.record,
            "counts": workers.counts,
            "dump": workers.dump,
        }
    )


if __name__ == "__main__":
    main()
