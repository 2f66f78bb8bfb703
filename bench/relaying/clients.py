"""Clients of `bench.relay`: one `Generate` stream a session, all read by this process.

    python -m bench.relaying.clients --channels 8

Every message is noted with the nanosecond at which it was read and the number of its client's
tokens by then.
"""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Mapping
from typing import Any

import click
import grpc.aio
import numpy as np

from bench.relaying.control import obey
from bench.relaying.fakes import client_prompt
from outrider.v1 import (
    generation_pb2,
    generation_pb2_grpc,
    verifier_pb2,
    verifier_pb2_grpc,
)

_CHECKED = 16
"""Clients whose text is compared with their ids."""
_OPENING_MAX = 256
"""Streams that are being opened at once."""
_TOKENS_MAX = 1 << 24


class _Clients:
    def __init__(self, address: str, channels: int, probe: str) -> None:
        options = (
            # Without it channels with equal options share one connection.
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.max_receive_message_length", -1),
        )
        self._stubs = [
            generation_pb2_grpc.GenerationServiceStub(
                grpc.aio.insecure_channel(address, options=options)
            )
            for _ in range(channels)
        ]
        self._probe = verifier_pb2_grpc.VerifierServiceStub(
            grpc.aio.insecure_channel(probe, options=options)
        )
        self._tasks = [asyncio.create_task(self._watch())]
        self._own_ns: array[int] = array("q")
        """How long each message of the probe took."""
        self._read: array[int] = array("q")
        """Client, output tokens by then, tokens in the message, nanosecond: one after the other."""
        self._recording = False
        self._totals: list[int] = []
        self._outputs: list[tuple[list[int], list[str]]] = []
        self._errors: list[str] = []

    async def wait(self, workers: int) -> Mapping[str, Any]:
        """Wait until this many workers are ready."""
        request = generation_pb2.ListWorkersRequest()
        while True:
            answer = await self._stubs[0].ListWorkers(request, wait_for_ready=True)
            if sum(worker.state == "ready" for worker in answer.workers) == workers:
                return {}
            await asyncio.sleep(0.1)

    async def open(self, sessions: int, speculation: bool) -> Mapping[str, Any]:
        """Open streams; returns when each has had output."""
        self._totals = [0] * sessions
        self._outputs = [([], []) for _ in range(min(sessions, _CHECKED))]
        opening = asyncio.Semaphore(_OPENING_MAX)
        opened: list[asyncio.Event] = []
        for client in range(sessions):
            await opening.acquire()
            event = asyncio.Event()
            opened.append(event)
            task = asyncio.create_task(self._follow(client, speculation, event, opening))
            self._tasks.append(task)
        for event in opened:
            await event.wait()
        if self._errors:
            raise RuntimeError(f"{len(self._errors)} streams broke: {self._errors[0]}")
        return {}

    async def _follow(
        self, client: int, speculation: bool, opened: asyncio.Event, opening: asyncio.Semaphore
    ) -> None:
        request = generation_pb2.GenerateRequest(
            token_ids=generation_pb2.TokenIds(ids=client_prompt(client)),
            tokens_max=_TOKENS_MAX,
            ignore_eos=True,
            speculation=speculation,
            seed=client,
        )
        checked = self._outputs[client] if client < len(self._outputs) else None
        total = 0
        try:
            async for message in self._stubs[client % len(self._stubs)].Generate(request):
                now_ns = time.monotonic_ns()
                delta = message.delta
                count = len(delta.token_ids)
                if not count:
                    continue
                total += count
                self._totals[client] = total
                if self._recording:
                    self._read.extend((client, total, count, now_ns))
                if checked is not None:
                    checked[0].extend(delta.token_ids)
                    checked[1].append(delta.text)
                if not opened.is_set():
                    opened.set()
                    opening.release()
        except grpc.aio.AioRpcError as error:
            self._errors.append(f"{error.code()}: {error.details()}")
            opened.set()
            opening.release()

    async def _watch(self) -> None:
        async for message in self._probe.GetTokenizer(verifier_pb2.GetTokenizerRequest()):
            if self._recording:
                self._own_ns.append(time.monotonic_ns() - int.from_bytes(message.chunk, "big"))

    async def record(self) -> Mapping[str, Any]:
        """Note what arrives from now on."""
        self._recording = True
        return {}

    async def total(self) -> Mapping[str, Any]:
        """Output tokens read so far."""
        return {"tokens": sum(self._totals)}

    async def dump(self, path: str, own_path: str) -> Mapping[str, Any]:
        """Write what was noted, and forget it: of the streams, and of the probe."""
        self._recording = False
        np.save(own_path, np.array(self._own_ns, dtype=np.int64))
        self._own_ns = array("q")
        np.save(path, np.array(self._read, dtype=np.int64).reshape(-1, 4))
        self._read = array("q")
        if self._errors:
            raise RuntimeError(f"{len(self._errors)} streams broke: {self._errors[0]}")
        return {"tokens": sum(self._totals), "garbled": sum(map(_garbled, self._outputs))}


def _garbled(output: tuple[list[int], list[str]]) -> bool:
    """True unless the text is that of the ids; at the end a character may be incomplete."""
    ids, pieces = output
    expected, text = bytes(ids).decode(errors="ignore"), "".join(pieces)
    return text != expected


@click.command()
@click.option("--address", required=True)
@click.option("--channels", type=click.IntRange(min=1), required=True)
@click.option("--probe", required=True, help="Address that sends the time.")
def main(address: str, channels: int, probe: str) -> None:
    """Connect, and obey the lines on standard input."""
    asyncio.run(_run(address, channels, probe))


async def _run(address: str, channels: int, probe: str) -> None:
    clients = _Clients(address, channels, probe)
    await obey(
        {
            "wait": clients.wait,
            "open": clients.open,
            "record": clients.record,
            "total": clients.total,
            "dump": clients.dump,
        }
    )


if __name__ == "__main__":
    main()
