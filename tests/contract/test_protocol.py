"""What the services promise each other and whoever looks at them, by hand-driven streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import grpc.aio
import pytest
import pytest_asyncio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from orchestrator.config import DriverConfig
from orchestrator.text import TextCodec
from outrider import wire
from outrider.client import Request
from outrider.committed import digest
from outrider.domain import (
    PROTOCOL_VERSION,
    Draft,
    FinishReason,
    RejectionCode,
    Resync,
)
from outrider.errors import Exhausted, Unavailable
from outrider.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from tests.support.fleet import (
    TARGET,
    RunningDrafter,
    RunningVerifier,
    drafter,
    load,
    lookup,
    orchestrator,
    until,
    verifier,
)
from tests.support.raw import binding, drafter_stream, session, verifier_stream
from tests.support.reference import Case, expect
from verifier_service.config import EngineConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = b"The quick brown fox"
IDS = expect(TARGET, Case(tuple(PROMPT), 64, ignore_eos=True)).ids
SLOW = EngineConfig(step_delay_s=0.02, warm_up=False)

_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def target() -> AsyncIterator[RunningVerifier]:
    """Shared, so session numbers must differ: epochs are remembered beyond the end."""
    async with verifier(load(TARGET)) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def helper() -> AsyncIterator[RunningDrafter]:
    async with drafter(lookup()) as running:
        yield running


# --- what everybody answers -----------------------------------------------------------------------


async def health_of(address: str, service: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        request = health_pb2.HealthCheckRequest(service=service)
        return (await health_pb2_grpc.HealthStub(channel).Check(request)).status


async def services_at(address: str) -> set[str]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        call = stub.ServerReflectionInfo()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        answer = await call.read()
        await call.done_writing()
        return {service.name for service in answer.list_services_response.service}


async def test_liveness_and_readiness_differ(target, helper):
    for running, name in (
        (target, "outrider.v1.VerifierService"),
        (helper, "outrider.v1.DrafterService"),
    ):
        assert await health_of(running.address, "") == _SERVING
        assert await health_of(running.address, name) == _SERVING
        assert await health_of(running.address, "outrider.v1.WorkerService") == _SERVING
        await running.server.set_ready(False)
        assert await health_of(running.address, "") == _SERVING
        assert await health_of(running.address, name) == _NOT_SERVING
        await running.server.set_ready(True)
        assert await health_of(running.address, name) == _SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health_of(running.address, "no.such.Service")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_what_is_served(target, helper):
    common = {"grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    worker = common | {"outrider.v1.WorkerService"}
    verifier = {"outrider.v1.VerifierService", "outrider.v1.KvService"}
    assert await services_at(target.address) == worker | verifier
    assert await services_at(helper.address) == worker | {"outrider.v1.DrafterService"}
    async with orchestrator([target.address]) as running:
        assert await services_at(running.address) == common | {"outrider.v1.GenerationService"}
        assert await health_of(running.address, "outrider.v1.GenerationService") == _SERVING


async def test_a_target_says_what_it_is(target):
    model = load(TARGET)
    async with grpc.aio.insecure_channel(target.address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        answer = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest())
        again = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest())
    info = wire.model_info_from_pb(answer.info)
    assert (info.model, info.dtype, info.proposer) == ("tiny", "float32", "")
    assert (info.vocabulary_size, info.length_max, info.eos_ids) == (260, 2048, (256, 258))
    assert info.protocol_version == PROTOCOL_VERSION
    assert info.model_fingerprint == model.model_fingerprint
    assert info.tokenizer_fingerprint == model.tokenizer_fingerprint
    assert answer.incarnation == again.incarnation != ""
    assert answer.sessions_max > 0
    assert not answer.draining


async def test_a_lookup_drafter_fits_any_tokenizer(helper):
    async with grpc.aio.insecure_channel(helper.address) as channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        answer = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest())
    info = wire.model_info_from_pb(answer.info)
    assert info.tokenizer_fingerprint is None
    assert info.proposer == "lookup"


async def test_tokenizer_files_reproduce_the_fingerprint(target):
    files: dict[str, bytes] = {}
    async with grpc.aio.insecure_channel(target.address) as channel:
        stub = verifier_pb2_grpc.VerifierServiceStub(channel)
        async for piece in stub.GetTokenizer(verifier_pb2.GetTokenizerRequest()):
            files[piece.name] = files.get(piece.name, b"") + piece.chunk
    codec = TextCodec.from_files(files)
    assert codec.fingerprint == load(TARGET).tokenizer_fingerprint
    assert codec.encode("Hi") == (72, 105)
    assert codec.encode_chat([("user", "Hi")])[0] == 257


# --- the handshake --------------------------------------------------------------------------------


async def test_a_stream_begins_with_hello(target, helper):
    async with (
        grpc.aio.insecure_channel(target.address) as verifier_channel,
        grpc.aio.insecure_channel(helper.address) as drafter_channel,
    ):
        verify = verifier_pb2_grpc.VerifierServiceStub(verifier_channel).Verify()
        opens = [wire.session_to_pb(session(1, PROMPT))]
        await verify.write(verifier_pb2.VerifyRequest(opens=opens))
        propose = drafter_pb2_grpc.DrafterServiceStub(drafter_channel).Propose()
        binds = [wire.bind_to_pb(binding(1, PROMPT, ""))]
        await propose.write(drafter_pb2.ProposeRequest(binds=binds))
        for call in (verify, propose):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "hello" in caught.value.details()
    assert target.engine.load == 0
    assert helper.grower.load == 0


async def test_a_stream_that_says_nothing_is_refused(target):
    async with grpc.aio.insecure_channel(target.address) as channel:
        call = verifier_pb2_grpc.VerifierServiceStub(channel).Verify()
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


# --- sessions on a verifier -----------------------------------------------------------------------


async def test_commits_are_contiguous_and_the_last_one_says_so(target):
    async with verifier_stream(target.address) as stream:
        await stream.open(session(1, PROMPT))
        assert await stream.until_finished(1) == IDS[:16]
        assert stream.opened == [(1, 1)]
        length = len(PROMPT)
        for commit in stream.commits[1]:
            assert (commit.epoch, commit.base_length) == (1, length)
            length += len(commit.tokens)
        assert [commit.last for commit in stream.commits[1]] == [False] * 15 + [True]
        assert stream.reports[1].finish_reason == types_pb2.FINISH_REASON_LENGTH


async def test_a_session_is_continued_from_committed_tokens(target):
    async with verifier_stream(target.address) as stream:
        await stream.open(session(11, PROMPT, epoch=3, committed=IDS[:7]))
        assert await stream.until_finished(11) == IDS[7:16]
        assert stream.commits[11][0].base_length == len(PROMPT) + 7


async def test_an_older_epoch_cannot_open_a_session(target):
    async with verifier_stream(target.address) as stream:
        await stream.open(session(12, PROMPT, epoch=5, tokens_max=2))
        await stream.until_finished(12)
        for epoch in (4, 5):  # even after the end
            await stream.open(session(12, PROMPT, epoch=epoch))
            await stream.until(lambda: bool(stream.rejections))
            rejection = stream.rejections.pop()
            assert rejection.code is RejectionCode.STALE_EPOCH
            assert rejection.current_epoch == 5
            assert str(epoch) in rejection.message
        await stream.open(session(12, PROMPT, epoch=6, tokens_max=2))
        await stream.until(lambda: (12, 6) in stream.opened)


async def test_a_newer_epoch_takes_a_session_over():
    async with (
        verifier(load(TARGET), config=SLOW) as slow,
        verifier_stream(slow.address) as first,
        verifier_stream(slow.address) as second,
    ):
        await first.open(session(1, PROMPT))
        await first.until(lambda: len(first.commits.get(1, ())) >= 3)
        known = first.tokens(1)
        await second.open(session(1, PROMPT, epoch=2, committed=known))
        assert known + await second.until_finished(1) == IDS[:16]
        await first.until(lambda: bool(first.rejections))
        (rejection,) = first.rejections
        assert rejection.code is RejectionCode.STALE_EPOCH
        assert (rejection.epoch, rejection.current_epoch) == (1, 2)
        assert not any(commit.last for commit in first.commits[1])
        # The one who lost it cannot end it, nor speak for it.
        await second.open(session(2, PROMPT, epoch=2))
        await second.until(lambda: 2 in second.commits)
        await first.send(aborts=[verifier_pb2.AbortSession(session=2, epoch=9)])
        assert await second.until_finished(2) == IDS[:16]


async def test_an_abort_of_an_older_epoch_is_ignored():
    async with (
        verifier(load(TARGET), config=SLOW) as slow,
        verifier_stream(slow.address) as stream,
    ):
        await stream.open(session(1, PROMPT, epoch=2))
        await stream.send(aborts=[verifier_pb2.AbortSession(session=1, epoch=1)])
        assert await stream.until_finished(1) == IDS[:16]


async def test_drafts_of_an_older_epoch_are_dropped():
    good = Draft(
        epoch=2,
        base_length=len(PROMPT),
        base_digest=digest(PROMPT),
        tokens=IDS[:8],
        parents=tuple(range(-1, 7)),
        accept_logprobs=(-0.01,) * 8,
    )
    async with (
        verifier(load(TARGET), config=SLOW) as slow,
        verifier_stream(slow.address) as stream,
    ):
        # With its own session: drafts come with the opening, before the first step.
        for number, epoch in ((1, 1), (2, 2)):
            row = types_pb2.DraftRow(
                session=number, source=1, draft=wire.draft_to_bytes(replace(good, epoch=epoch))
            )
            opens = [wire.session_to_pb(session(number, PROMPT, epoch=2))]
            await stream.send(opens=opens, drafts=[row])
            assert await stream.until_finished(number) == IDS[:16]
        old, new = (stream.reports[number].counters for number in (1, 2))
    assert old.dropped_drafts == {"epoch": 1}
    assert old.accepted_draft_tokens == 0
    assert not new.dropped_drafts
    assert new.accepted_draft_tokens == 7  # the first of them came with the prompt's own step
    assert new.verify_steps < old.verify_steps


async def test_commits_can_be_repeated_after_the_end(target):
    async with verifier_stream(target.address) as stream:
        await stream.open(session(13, PROMPT))
        await stream.until_finished(13)
        for have in (0, 5, 16):
            stream.commits.clear()
            resync = Resync(13, 1, len(PROMPT) + have)
            await stream.send(resyncs=[wire.resync_to_pb(resync)])
            assert await stream.until_finished(13) == IDS[have:16]
            assert stream.commits[13][0].base_length == len(PROMPT) + have
            reason = wire.finish_reason_from_pb(stream.reports[13].finish_reason)
            assert reason is FinishReason.LENGTH


async def test_commits_can_be_repeated_half_way():
    async with (
        verifier(load(TARGET), config=SLOW) as slow,
        verifier_stream(slow.address) as stream,
    ):
        await stream.open(session(1, PROMPT))
        await stream.until(lambda: len(stream.commits.get(1, ())) >= 5)
        await stream.send(resyncs=[wire.resync_to_pb(Resync(1, 1, len(PROMPT)))])
        await stream.until_finished(1)
        repeated = [c for c in stream.commits[1][5:] if c.base_length == len(PROMPT)]
        assert len(repeated) == 1
        assert repeated[0].tokens == IDS[: len(repeated[0].tokens)]
        assert len(repeated[0].tokens) >= 5
        assert not repeated[0].last


async def test_nobody_else_can_ask_for_a_sessions_tokens(target):
    async with verifier_stream(target.address) as stream, verifier_stream(target.address) as other:
        await stream.open(session(14, PROMPT))
        await stream.until_finished(14)
        for number in (14, 99):
            await other.send(resyncs=[wire.resync_to_pb(Resync(number, 1, 0))])
            await other.until(lambda: bool(other.rejections))
            assert other.rejections.pop().code is RejectionCode.UNKNOWN_SESSION
        assert not other.commits


async def test_the_end_of_a_stream_frees_its_sessions():
    async with verifier(load(TARGET), config=SLOW) as slow:
        async with verifier_stream(slow.address) as other:
            async with verifier_stream(slow.address) as stream:
                await stream.open(*(session(n, PROMPT, tokens_max=1_500) for n in (1, 2)))
                await other.open(session(3, PROMPT, tokens_max=64))
                await stream.until(lambda: {1, 2} <= stream.commits.keys())

            async def freed() -> bool:
                return slow.engine.load == 1

            await until(freed, what="only the other's session is left")
            assert 0 < slow.engine.kv_tokens_used <= 96  # that of session 3
            assert await other.until_finished(3) == IDS
        assert slow.engine.kv_tokens_used == 0


async def test_the_end_of_a_stream_frees_mirrors(helper):
    async with drafter_stream(helper.address) as call:
        bind = wire.bind_to_pb(binding(1, PROMPT, "x"))
        await call.write(drafter_pb2.ProposeRequest(binds=[bind]))
        assert (await call.read()).bound[0].session == 1
        assert helper.grower.load == 1

    async def freed() -> bool:
        return helper.grower.load == 0

    await until(freed, what="the mirror is gone")


# --- no room --------------------------------------------------------------------------------------


async def test_a_verifier_that_is_full_says_so():
    config = replace(SLOW, sessions_max=1)
    async with (
        verifier(load(TARGET), config=config) as full,
        verifier_stream(full.address) as stream,
    ):
        await stream.open(session(1, PROMPT), session(2, PROMPT))
        await stream.until(lambda: bool(stream.rejections))
        (rejection,) = stream.rejections
        assert (rejection.session, rejection.code) == (2, RejectionCode.EXHAUSTED)
        assert rejection.message == "the verifier has its 1 sessions; try again later"
        assert await stream.until_finished(1) == IDS[:16]
        stream.rejections.clear()
        await stream.open(session(2, PROMPT))  # there is room again
        assert await stream.until_finished(2) == IDS[:16]


async def test_a_verifier_without_kv_to_spare_says_so():
    config = replace(SLOW, kv_tokens_max=64)
    async with (
        verifier(load(TARGET), config=config) as full,
        verifier_stream(full.address) as stream,
    ):
        await stream.open(*(session(number, PROMPT) for number in (1, 2, 3)))
        await stream.open(session(4, PROMPT, tokens_max=65 - len(PROMPT)))
        await stream.until(lambda: len(stream.rejections) == 2)
        later, never = stream.rejections
        assert (later.session, later.code) == (3, RejectionCode.EXHAUSTED)
        assert "128 of 128 are promised" in later.message
        assert (never.code, never.field) == (RejectionCode.INVALID, "tokens_max")
        # Both were admitted, though together they do not fit.
        assert await stream.until_finished(1) == IDS[:16]
        assert await stream.until_finished(2) == IDS[:16]


async def test_clients_learn_that_there_is_no_room():
    asked = Request(token_ids=PROMPT, temperature=0.0, tokens_max=24, ignore_eos=True)
    async with verifier(load(TARGET), config=replace(SLOW, sessions_max=1)) as full:
        for config, text in (
            (DriverConfig(), "the verifier has its 1 sessions; try again later"),
            (DriverConfig(sessions_max=1), "the orchestrator has 1 of its 1 sessions"),
        ):
            async with orchestrator([full.address], config=config) as running:
                first = running.client.generate(asked)
                await anext(first)
                with pytest.raises(Exhausted, match=text):
                    await running.client.complete(asked)
                ids = [token async for event in first for token in getattr(event, "token_ids", ())]
                assert tuple(ids) == IDS[: len(ids)]
                assert len(ids) >= 23  # one may have come with the first event


# --- draining -------------------------------------------------------------------------------------


async def test_a_draining_verifier_finishes_what_it_has():
    async with (
        verifier(load(TARGET), config=SLOW) as leaving,
        verifier_stream(leaving.address) as stream,
    ):
        await stream.open(session(1, PROMPT))
        await stream.until(lambda: 1 in stream.commits)
        leaving.service.drain()
        await stream.until(lambda: stream.draining)
        await stream.open(session(2, PROMPT))
        await stream.until(lambda: bool(stream.rejections))
        assert stream.rejections[0].code is RejectionCode.DRAINING
        assert await stream.until_finished(1) == IDS[:16]


async def test_an_orchestrator_goes_round_a_draining_verifier():
    asked = Request(token_ids=PROMPT, temperature=0.0, tokens_max=24, ignore_eos=True)
    async with (
        verifier(load(TARGET), config=SLOW) as leaving,
        orchestrator([leaving.address]) as running,
    ):
        old = running.client.generate(asked)
        await anext(old)
        leaving.service.drain()

        async def known() -> bool:
            return [worker.state for worker in await running.client.workers()] == ["draining"]

        await until(known, what="the orchestrator knows")
        with pytest.raises(Unavailable, match="no verifier is ready"):
            await running.client.complete(asked)
        ids = [token async for event in old for token in getattr(event, "token_ids", ())]
        assert tuple(ids) == IDS[24 - len(ids) : 24]
        assert len(ids) >= 23


async def test_a_draining_orchestrator_finishes_what_it_has(target):
    asked = Request(token_ids=PROMPT, temperature=0.0, tokens_max=24, ignore_eos=True)
    async with verifier(load(TARGET), config=SLOW) as slow, orchestrator([slow.address]) as running:
        old = running.client.generate(asked)
        await anext(old)
        drained = running.driver.drain(10)
        waiting = asyncio.create_task(drained)
        await asyncio.sleep(0)
        with pytest.raises(Unavailable, match="draining"):
            await running.client.complete(asked)
        assert not waiting.done()
        async for _ in old:
            pass
        await waiting
        assert running.driver.load == 0
