"""Generations that outlive their orchestrator: journal, take-over, fence, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace

import pytest

from orchestrator.config import DriverConfig, JournalConfig
from outrider.client import AsyncClient, Client, Finished, Request
from outrider.domain import FinishReason
from outrider.errors import (
    InvalidRequest,
    Mismatch,
    OutriderError,
    RegistryUnavailable,
    StaleEpoch,
    Unavailable,
    UnknownGeneration,
)
from outrider.journal import Journaled, Outcome, Write
from outrider.redis_server import RedisServer, start_redis
from outrider.registry import Connection, Leases
from outrider.v1 import generation_pb2, generation_pb2_grpc
from tests.support.cases import SAMPLED, Listener, listen, request
from tests.support.fleet import (
    DRAFT,
    TARGET,
    RunningOrchestrator,
    RunningVerifier,
    drafter,
    language_model,
    load,
    orchestrator,
    until,
    verifier,
)
from tests.support.reference import Case, Tally, expect
from verifier_service.config import EngineConfig

ENGINE = EngineConfig(step_delay_s=0.01, warm_up=False)
CASES = [
    Case(tuple(b"The quick brown fox jumps over the lazy dog."), 96, ignore_eos=True),
    Case(tuple(b"A different story"), 96, ignore_eos=True, seed=3, **SAMPLED),
]
EXPECTED = [expect(TARGET, case) for case in CASES]
PATIENT = JournalConfig(deadline_s=5.0)
"""A busy machine is no reason to go on without a journal."""


def check(case: Case, ids: Sequence[int]) -> None:
    """None lost, none doubled, none changed."""
    tally = Tally()
    tally.check(TARGET, case, EXPECTED[CASES.index(case)], ids)
    assert not tally.faults


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(None, tmp_path_factory.mktemp("redis") / "log") as running:
        yield running


class Store(Leases):
    """A journal that can be held up, as by a machine that stands still, or fail."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self.open = asyncio.Event()
        self.open.set()
        self.gone = False
        self.appends = 0

    async def append(self, writes: Sequence[Write], timeout_s: float = 2.0) -> list[Outcome]:
        await self.open.wait()
        if self.gone:
            raise RegistryUnavailable("gone, for the test")
        self.appends += 1
        return await super().append(writes, timeout_s)

    async def read(self, generation: str) -> Journaled | None:
        if self.gone:
            raise RegistryUnavailable("gone, for the test")
        return await super().read(generation)


class Fleet:
    """Two orchestrators over the same workers and the same Redis."""

    def __init__(
        self,
        workers: list[RunningVerifier],
        orchestrators: list[RunningOrchestrator],
        stores: list[Store],
        client: AsyncClient,
    ) -> None:
        self.workers, self.orchestrators, self.stores = workers, orchestrators, stores
        self.client = client
        """Knows both, the first one first."""

    async def kill(self, which: int) -> None:
        """End an orchestrator as a crash would: nothing is said, no stream is ended in order."""
        dying = self.orchestrators[which]
        await dying.server.stop(0)

    async def settled(self) -> None:
        """Wait until workers hold nothing."""

        async def empty() -> bool:
            return all(worker.engine.load == 0 for worker in self.workers)

        await until(empty, what="nothing is held", timeout_s=5)


@contextlib.asynccontextmanager
async def fleet_of_two(
    server: RedisServer, *, verifiers: int = 1, journal: JournalConfig = PATIENT
) -> AsyncIterator[Fleet]:
    async with contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
            for _ in range(verifiers)
        ]
        helper = await stack.enter_async_context(drafter(language_model(load(DRAFT))))
        connections = [Connection(server.url) for _ in range(2)]
        for connection in connections:
            stack.push_async_callback(connection.close)
        stores = [Store(connection) for connection in connections]
        orchestrators = [
            await stack.enter_async_context(
                orchestrator(
                    [worker.address for worker in workers],
                    [helper.address],
                    store=store,
                    journal=journal,
                    config=DriverConfig(failover_wait_s=0.0),
                )
            )
            for store in stores
        ]
        client = AsyncClient(*(running.address for running in orchestrators))
        stack.push_async_callback(client.close)
        try:
            yield Fleet(workers, orchestrators, stores, client)
        finally:
            for store in stores:
                store.open.set()


def resume_request(listener: Listener, count: int | None = None) -> generation_pb2.ResumeRequest:
    """What a client asks that has all that came, or so many ids and no idea of their text."""
    from outrider.committed import digest

    assert listener.started is not None
    ids = listener.ids[:count]
    characters = len(listener.text) if count is None else None
    return generation_pb2.ResumeRequest(
        generation_id=listener.started.generation_id,
        prompt_logprobs_known=True,
        choices=[
            generation_pb2.ResumePoint(
                choice=0, offset=len(ids), digest=digest(ids), characters=characters
            )
        ],
    )


async def resumed(
    address: str, message: generation_pb2.ResumeRequest, tenant: str = ""
) -> tuple[list[int], str]:
    """Resume by hand; returns what came."""
    import grpc.aio

    from outrider.serving.status import error_of_status

    ids: list[int] = []
    text = ""
    async with grpc.aio.insecure_channel(address) as channel:
        stub = generation_pb2_grpc.GenerationServiceStub(channel)
        try:
            async for response in stub.Resume(message, metadata=(("outrider-tenant", tenant),)):
                ids += response.response.delta.token_ids
                text += response.response.delta.text
        except grpc.aio.AioRpcError as error:
            raise error_of_status(error) from None
    return ids, text


@pytest.mark.parametrize("case", CASES, ids=["greedy", "sampled"])
async def test_a_stream_outlives_its_orchestrator(case, server):
    async with fleet_of_two(server) as fleet:
        undisturbed = await fleet.client.complete(request(case))
        listener = listen(fleet.client, case)
        await listener.until_ids(24)
        await fleet.kill(0)
        assert len(listener.ids) < 80
        finished = await listener.until_end()
        check(case, listener.ids)
        assert finished.reason is FinishReason.LENGTH
        assert finished.usage.completion_tokens == 96
        assert listener.text == undisturbed.text
        await fleet.settled()


async def test_the_blocking_client_resumes_too(server):
    case = CASES[1]
    async with fleet_of_two(server) as fleet:
        first, second = (running.address for running in fleet.orchestrators)
        loop = asyncio.get_running_loop()

        def listen_blocking() -> list[int]:
            ids: list[int] = []
            killed = False
            with Client(first, second) as client:
                for event in client.generate(request(case)):
                    ids += getattr(event, "token_ids", ())
                    if len(ids) >= 24 and not killed:
                        killed = True
                        asyncio.run_coroutine_threadsafe(fleet.kill(0), loop).result(10)
            return ids

        check(case, await asyncio.to_thread(listen_blocking))


async def test_choices_and_log_probabilities_are_resumed(server):
    asked = Request(
        prompt="Several", n=3, logprobs=2, prompt_logprobs=1, tokens_max=48, seed=5, ignore_eos=True
    )
    async with fleet_of_two(server) as fleet:
        expected = await fleet.client.complete_all(asked)
        collector = None
        from outrider.client import Collector, Delta

        collector, heard, killed = Collector(), 0, False
        async for event in fleet.client.generate(asked):
            collector.add(event)
            heard += len(event.token_ids) if isinstance(event, Delta) else 0
            if heard >= 24 and not killed:
                killed = True
                await fleet.kill(0)
        for found, wanted in zip(collector.completions(3), expected, strict=True):
            assert found.token_ids == wanted.token_ids
            assert found.text == wanted.text
            assert len(found.logprobs) == len(wanted.logprobs) == 48
            for a, b in zip(found.logprobs, wanted.logprobs, strict=True):
                assert (a.token, len(a.top)) == (b.token, len(b.top))
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)
            assert [score.token for score in found.prompt_logprobs] == [
                score.token for score in wanted.prompt_logprobs
            ]


async def test_only_the_same_tenant_resumes_what_was_said(server):
    case = CASES[0]
    async with fleet_of_two(server) as fleet:
        listener = listen(fleet.client, case)
        await listener.until_ids(24)
        other = fleet.orchestrators[1].address
        message = resume_request(listener, 10)
        with pytest.raises(UnknownGeneration, match="no generation"):
            await resumed(other, message, tenant="stranger")
        message.choices[0].digest ^= 1
        with pytest.raises(InvalidRequest, match="differs from that of the first 10 ids"):
            await resumed(other, message)
        message.generation_id = "gen-unknown"
        with pytest.raises(UnknownGeneration):
            await resumed(other, message)
        # None of that has disturbed it.
        await listener.until_end()
        check(case, listener.ids)
        # And what has ended is replayed from wherever.
        ids, text = await resumed(other, resume_request(listener, 10))
        assert ids == listener.ids[10:]
        assert listener.text.endswith(text)
        assert await resumed(other, resume_request(listener)) == ([], "")


async def test_whoever_lost_a_generation_says_nothing_more(server):
    """An orchestrator that stands still while its generation is taken over."""
    case = CASES[1]
    async with fleet_of_two(server, verifiers=2) as fleet:
        listener = listen(fleet.client, case)
        await listener.until_ids(16)
        fleet.stores[0].open.clear()
        heard = len(listener.ids)
        rest, _ = await resumed(fleet.orchestrators[1].address, resume_request(listener, heard))
        check(case, listener.ids[:heard] + rest)
        fleet.stores[0].open.set()
        with pytest.raises(StaleEpoch, match="another orchestrator"):
            await listener.until_end()
        # What was journaled before it stood still may have been on its way.
        assert tuple(listener.ids) == EXPECTED[1].ids[: len(listener.ids)]
        assert len(listener.ids) <= heard + 16
        await fleet.settled()


async def test_with_redis_gone_output_goes_on_and_is_made_up_for(server):
    case = CASES[0]
    async with fleet_of_two(server, journal=replace(PATIENT, retry_s=0.05)) as fleet:
        listener = listen(fleet.client, case)
        await listener.until_ids(8)
        fleet.stores[0].gone = True
        await listener.until_ids(40)
        message = resume_request(listener)
        with pytest.raises(Mismatch, match="Redis was away"):
            await resumed(fleet.orchestrators[1].address, message)
        # Redis comes back, and it has lost everything.
        connection = Connection(server.url)
        await connection.redis.flushall()
        await connection.close()
        fleet.stores[0].gone = False

        async def caught_up() -> bool:
            journaled = await fleet.stores[1].read(message.generation_id)
            if journaled is None:
                return False
            return sum(len(entry.tokens) for entry in journaled.entries) >= len(listener.ids)

        await until(caught_up, what="the journal is complete again")
        await listener.until_ids(len(listener.ids) + 1)
        assert len(listener.ids) < 90
        await fleet.kill(0)
        await listener.until_end()
        check(case, listener.ids)


async def test_a_slow_redis_delays_output_by_its_deadline_and_no_more(server):
    case = CASES[0]
    config = JournalConfig(deadline_s=0.05, retry_s=0.05)
    async with fleet_of_two(server, journal=config) as fleet:
        fleet.stores[0].gone = True  # from the very first
        found = await fleet.client.complete(request(case))
        check(case, found.token_ids)
        assert fleet.stores[0].appends == 0


async def test_a_request_that_keeps_out_of_redis(server):
    case = CASES[0]
    async with fleet_of_two(server) as fleet:
        found = await fleet.client.complete(request(case, resumable=False))
        check(case, found.token_ids)
        assert not found.started.resumable
        assert await fleet.stores[0].read(found.started.generation_id) is None
        listener = listen(fleet.client, replace(case))
        await listener.until_ids(1)
        assert listener.started is not None
        assert listener.started.resumable
        await listener.close()


async def test_many_commits_share_a_batch(server):
    async with fleet_of_two(server) as fleet:
        asked = Request(prompt="x", n=8, tokens_max=64, ignore_eos=True, seed=1)
        events = [event async for event in fleet.client.generate(asked)]
        assert sum(isinstance(event, Finished) for event in events) == 8
        assert fleet.stores[0].appends < 200  # of more than 8 * 64 / tau entries


async def test_without_a_journal_nothing_is_resumed():
    async with contextlib.AsyncExitStack() as stack:
        target = await stack.enter_async_context(verifier(load(TARGET), config=ENGINE))
        fleet = await stack.enter_async_context(orchestrator([target.address]))
        listener = listen(fleet.client, CASES[0])
        await listener.until_ids(8)
        with pytest.raises(Mismatch, match="keeps no journal"):
            await resumed(fleet.address, resume_request(listener))
        await fleet.server.stop(0)
        with pytest.raises((Unavailable, OutriderError)):
            await listener.until_end()
