"""KV fetched from another verifier, over real sockets: the same ids, or the same ids a bit later.

Two verifiers with tiny models of one kind; a delay on each step makes prefill slow enough that
fetching pays.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from unittest.mock import ANY

import grpc
import grpc.aio
import pytest
import pytest_asyncio
import trustme

from orchestrator.config import DriverConfig
from orchestrator.http.metrics import Exposition
from orchestrator.workers import LinkState
from outrider import kv_transfer, wire
from outrider.client import Request
from outrider.domain import KvPeer, PullOutcome, PullReport
from outrider.kv_blocks import BLOCK_TOKENS, chain_hashes, chain_root
from outrider.kv_transfer import KvChunk, chunk_checksum
from outrider.model.language_model import LanguageModel
from outrider.v1 import kv_pb2, kv_pb2_grpc, verifier_pb2
from tests.support.certificates import identity
from tests.support.flat_times import FlatTimes
from tests.support.fleet import TARGET, RunningVerifier, load, orchestrator, until, verifier
from tests.support.kv_peers import MeddlingPeer, meddling_peer
from tests.support.raw import session, verifier_stream
from tests.support.reference import Case, expect
from verifier_service.config import EngineConfig
from verifier_service.messages import CallOff, Open, PullOrder, PullOver

PROMPT = bytes(range(32, 122)) * 4
"""360 tokens: 11 blocks that can be shared."""
BLOCKS = 11
IDS = expect(TARGET, Case(tuple(PROMPT), 16, ignore_eos=True)).ids
CONFIG = EngineConfig(warm_up=False, prefill_tokens_max=BLOCK_TOKENS, step_delay_s=0.005)

Response = kv_pb2.FetchBlocksResponse


class CountingTimes(FlatTimes):
    """Says how long steps take, and counts the tokens of prompts that were computed."""

    def __init__(self) -> None:
        super().__init__()
        self.prefilled = 0
        self.step_s = 1.0
        """What peers are measured by: even on a busy machine they are quicker."""

    def predict(
        self, tokens: int, *, kv_tokens: int | None = None, prefill_tokens: int = 0
    ) -> float:
        return self.step_s

    def observe(
        self, tokens: int, duration_s: float, *, kv_tokens: int = 0, prefill_tokens: int = 0
    ) -> None:
        self.prefilled += prefill_tokens
        super().observe(tokens, duration_s, kv_tokens=kv_tokens, prefill_tokens=prefill_tokens)


@dataclass(slots=True)
class Pair:
    """One verifier that has computed the prompt, and one that has not."""

    here: RunningVerifier
    there: RunningVerifier
    times: CountingTimes
    """Of `here`."""
    numbers: list[int] = field(default_factory=lambda: list(range(100, 0, -1)))

    def peer(self, address: str | None = None, blocks: int = BLOCKS) -> KvPeer:
        """A hint at `there`, or at whoever stands in front of it."""
        return KvPeer(address or self.there.address, self.there.service._incarnation, blocks)

    async def ask(
        self, peer: KvPeer | None, prompt: bytes = PROMPT, salt: str = ""
    ) -> tuple[tuple[int, ...], list[PullReport]]:
        """Have `here` decode; returns ids and what became of fetching."""
        number = self.numbers.pop()
        async with verifier_stream(self.here.address) as stream:
            await stream.open(session(number, prompt, kv_peer=peer, cache_salt=salt))
            return await stream.until_finished(number), stream.pulls

    async def idle(self) -> None:
        """Wait until nothing goes on, and check that nothing is held any more."""

        async def quiet() -> bool:
            here, there = self.here, self.there
            assert here.service.kv_fetching is not None
            assert there.service.kv_serving is not None
            return not (
                here.engine.load
                or here.engine.pulls.active
                or here.engine.pulls._errands
                or here.service.kv_fetching.under_way
                or there.service.kv_serving.serving
                or here.engine.pool.blocks.used
                or there.engine.pool.blocks.used
            )

        await until(quiet, what="all blocks given back")


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    return load(TARGET), load(TARGET)


@pytest_asyncio.fixture
async def pair(models: tuple[LanguageModel, LanguageModel]) -> AsyncIterator[Pair]:
    times = CountingTimes()
    # Something was measured.
    times.observe(BLOCK_TOKENS, 1.0, prefill_tokens=0)
    async with (
        verifier(models[0], config=CONFIG) as there,
        verifier(models[1], config=CONFIG, times=times) as here,
    ):
        async with verifier_stream(there.address) as stream:
            await stream.open(session(1, PROMPT))
            assert await stream.until_finished(1) == IDS
        yield Pair(here, there, times)


def outcomes(pulls: list[PullReport]) -> list[PullOutcome | None]:
    return [pull.outcome for pull in pulls]


# --- it works -------------------------------------------------------------------------------------


async def test_blocks_of_a_peer_are_used_instead_of_computing_them(pair: Pair) -> None:
    ids, pulls = await pair.ask(pair.peer())
    assert ids == IDS
    assert outcomes(pulls) == [PullOutcome.COMPLETE]
    memory = pair.here.engine.pulls.bytes
    assert memory is not None
    assert (pulls[0].blocks, pulls[0].size_bytes) == (BLOCKS, BLOCKS * memory.block_bytes)
    assert pair.here.engine.pulls.tokens_pulled == BLOCKS * BLOCK_TOKENS
    assert pair.there.service.kv_serving is not None
    assert pair.there.service.kv_serving.blocks_served == BLOCKS
    assert pair.times.prefilled == len(PROMPT) - BLOCKS * BLOCK_TOKENS
    await pair.idle()


async def test_without_a_hint_everything_is_computed(pair: Pair) -> None:
    ids, pulls = await pair.ask(None)
    assert (ids, pulls) == (IDS, [])
    assert pair.times.prefilled == len(PROMPT)


async def test_fetched_blocks_are_bit_for_bit_those_that_were_computed(pair: Pair) -> None:
    await pair.ask(pair.peer())
    here, there = pair.here.engine, pair.there.engine
    root = chain_root(here.pool.model_fingerprint, "")
    assert here.pulls.bytes is not None
    assert there.pulls.bytes is not None
    for digest in chain_hashes(root, PROMPT, BLOCKS):
        blocks = here.pool.blocks.share(digest), there.pool.blocks.share(digest)
        assert blocks[0] is not None
        assert blocks[1] is not None
        assert here.pulls.bytes.read(blocks[0]) == there.pulls.bytes.read(blocks[1])


async def test_what_was_fetched_serves_later_sessions_and_other_peers(pair: Pair) -> None:
    await pair.ask(pair.peer())
    prefilled = pair.times.prefilled
    ids, pulls = await pair.ask(pair.peer())
    assert (ids, pulls) == (IDS, []), "nothing was missing"
    assert pair.times.prefilled - prefilled == len(PROMPT) - BLOCKS * BLOCK_TOKENS
    await pair.idle()


async def test_sessions_with_the_same_beginning_share_one_pull(pair: Pair) -> None:
    specs = [session(number, PROMPT, kv_peer=pair.peer()) for number in (201, 202, 203)]
    async with verifier_stream(pair.here.address) as stream:
        await stream.open(*specs)
        for spec in specs:
            assert await stream.until_finished(spec.session) == IDS
        assert outcomes(stream.pulls) == [PullOutcome.COMPLETE]
    assert pair.here.engine.pulls.tokens_pulled == BLOCKS * BLOCK_TOKENS
    assert pair.there.service.kv_serving is not None
    assert pair.there.service.kv_serving.blocks_served == BLOCKS
    await pair.idle()


async def test_blocks_that_do_not_fit_a_message_come_in_pieces(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_transfer, "CHUNK_BYTES_MAX", 5_000)
    ids, pulls = await pair.ask(pair.peer())
    assert ids == IDS
    assert outcomes(pulls) == [PullOutcome.COMPLETE]


async def test_others_go_on_while_a_session_waits(pair: Pair) -> None:
    async def hold_up(peer: MeddlingPeer, number: int, answer: Response) -> None:
        if number == 3:
            peer.reached.set()
            await peer.for_ever.wait()

    async with meddling_peer(pair.there.address, hold_up) as (address, peer):
        async with verifier_stream(pair.here.address) as stream:
            await stream.open(session(301, PROMPT, kv_peer=pair.peer(address)))
            await peer.reached.wait()
            await stream.open(session(302, b"somebody else"))
            await stream.until_finished(302)
            assert stream.pulls == [], "it was waiting all the time"
            assert 301 not in stream.commits
            assert await stream.until_finished(301) == IDS
        await pair.idle()


# --- whatever goes wrong --------------------------------------------------------------------------


async def flip_a_bit(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 4:
        data = bytearray(answer.chunk.data)
        data[len(data) // 2] ^= 1
        answer.chunk.data = bytes(data)


async def repeat_a_block(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 4:
        answer.chunk.block -= 1


async def swap_blocks(peer: MeddlingPeer, number: int, answer: Response) -> None:
    """Whole and unchanged, but the one before, with a place that fits."""
    if number == 3:
        peer.kept = answer.chunk.data, answer.chunk.checksum  # type: ignore[attr-defined]
    if number == 4:
        answer.chunk.data, answer.chunk.checksum = peer.kept  # type: ignore[attr-defined]


async def send_no_chunk(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 4:
        answer.ClearField("chunk")


async def die(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 4:
        peer.stopping = asyncio.ensure_future(peer.server.stop(0))  # type: ignore[attr-defined]
        await peer.for_ever.wait()


async def fail(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 4:
        raise RuntimeError("a defect of the peer's")


async def stall(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 4:
        await peer.for_ever.wait()


@pytest.mark.parametrize(
    ("meddle", "outcome"),
    [
        (flip_a_bit, PullOutcome.CORRUPT),
        (repeat_a_block, PullOutcome.CORRUPT),
        (swap_blocks, PullOutcome.CORRUPT),
        (send_no_chunk, PullOutcome.CORRUPT),
        (die, PullOutcome.FAILED),
        (fail, PullOutcome.FAILED),
        (stall, PullOutcome.SLOW),
    ],
)
async def test_a_transfer_that_breaks_off_keeps_what_came_before(
    pair: Pair, meddle, outcome: PullOutcome
) -> None:
    pair.times.step_s = 0.6  # A quarter of a prefill is waited for in vain.
    async with meddling_peer(pair.there.address, meddle) as (address, _):
        ids, pulls = await pair.ask(pair.peer(address))
    assert ids == IDS
    assert outcomes(pulls) == [outcome]
    assert pulls[0].blocks == 3
    assert pair.times.prefilled == len(PROMPT) - 3 * BLOCK_TOKENS
    await pair.idle()


async def another_incarnation(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 0:
        answer.header.incarnation = "somebody else"


async def another_geometry(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 0:
        answer.header.geometry.dtype = "bfloat16"


async def no_header(peer: MeddlingPeer, number: int, answer: Response) -> None:
    if number == 0:
        answer.ClearField("header")


async def silence(peer: MeddlingPeer, number: int, answer: Response) -> None:
    await peer.for_ever.wait()


@pytest.mark.parametrize(
    ("meddle", "outcome"),
    [
        (another_incarnation, PullOutcome.REFUSED),
        (another_geometry, PullOutcome.REFUSED),
        (no_header, PullOutcome.CORRUPT),
        (silence, PullOutcome.SLOW),
    ],
)
async def test_a_peer_that_is_not_who_was_meant_costs_time_only(
    pair: Pair, meddle, outcome: PullOutcome
) -> None:
    pair.times.step_s = 0.6  # A quarter of a prefill is waited for in vain.
    async with meddling_peer(pair.there.address, meddle) as (address, peer):
        ids, pulls = await pair.ask(pair.peer(address))
        assert ids == IDS
        assert (outcomes(pulls), pulls[0].blocks) == ([outcome], 0)
        assert pair.times.prefilled == len(PROMPT)
        await pair.idle()
        ids, pulls = await pair.ask(pair.peer(address), prompt=PROMPT[::-1])
        assert outcomes(pulls) == [PullOutcome.DECLINED], "once is enough for a while"
        assert peer.requests == 1


async def test_a_verifier_that_was_restarted_is_not_who_was_meant(pair: Pair) -> None:
    ids, pulls = await pair.ask(replace(pair.peer(), incarnation="its former self"))
    assert ids == IDS
    assert (outcomes(pulls), pulls[0].blocks) == ([PullOutcome.REFUSED], 0)
    await pair.idle()


async def test_nobody_at_the_address(pair: Pair) -> None:
    ids, pulls = await pair.ask(pair.peer("127.0.0.1:1"))
    assert ids == IDS
    assert outcomes(pulls) in ([PullOutcome.FAILED], [PullOutcome.SLOW])
    await pair.idle()


async def test_a_peer_that_has_dropped_blocks(pair: Pair) -> None:
    longer = PROMPT + bytes(range(128))
    ids, pulls = await pair.ask(pair.peer(blocks=15), prompt=longer)
    assert ids == expect(TARGET, Case(tuple(longer), 16, ignore_eos=True)).ids
    assert (outcomes(pulls), pulls[0].blocks) == ([PullOutcome.SHORT], BLOCKS)
    assert pair.times.prefilled == len(longer) - BLOCKS * BLOCK_TOKENS
    await pair.idle()


async def test_a_peer_with_another_model(pair: Pair) -> None:
    async with verifier(load("random:tiny?seed=2"), config=CONFIG) as other:
        async with verifier_stream(other.address) as stream:
            await stream.open(session(1, PROMPT))
            await stream.until_finished(1)
        hint = KvPeer(other.address, other.service._incarnation, BLOCKS)
        ids, pulls = await pair.ask(hint)
    assert ids == IDS
    assert (outcomes(pulls), pulls[0].blocks) == ([PullOutcome.REFUSED], 0)


async def test_a_session_that_is_aborted_while_it_waits_leaves_nothing(pair: Pair) -> None:
    async def hold_up(peer: MeddlingPeer, number: int, answer: Response) -> None:
        if number == 5:
            peer.reached.set()
            await peer.for_ever.wait()

    async with (
        meddling_peer(pair.there.address, hold_up) as (address, peer),
        verifier_stream(pair.here.address) as stream,
    ):
        await stream.open(session(401, PROMPT, kv_peer=pair.peer(address)))
        await peer.reached.wait()

        async def some_came() -> bool:
            return pair.here.engine.pulls.tokens_pulled >= 4 * BLOCK_TOKENS

        await until(some_came, what="four blocks")
        assert pair.here.engine.pool.blocks.used == 4
        await stream.send(aborts=[verifier_pb2.AbortSession(session=401, epoch=1)])
        await pair.idle()
    # What had come is of use to the next one.
    ids, pulls = await pair.ask(pair.peer())
    assert ids == IDS
    assert (outcomes(pulls), pulls[0].blocks) == ([PullOutcome.COMPLETE], BLOCKS - 4)
    await pair.idle()


async def test_a_stream_that_breaks_while_a_session_waits_leaves_nothing(pair: Pair) -> None:
    async with meddling_peer(pair.there.address, stall) as (address, _):
        async with verifier_stream(pair.here.address) as stream:
            await stream.open(session(402, PROMPT, kv_peer=pair.peer(address)))

            async def some_came() -> bool:
                return bool(pair.here.engine.pulls.tokens_pulled)

            await until(some_came, what="a block")
        await pair.idle()


async def test_a_reader_that_leaves_leaves_nothing_with_the_peer(pair: Pair) -> None:
    request = honest_request(pair)
    async with grpc.aio.insecure_channel(pair.there.address) as channel:
        for _ in range(20):
            call = kv_pb2_grpc.KvServiceStub(channel).FetchBlocks(request, timeout=10.0)
            await call.read()
            call.cancel()
    await pair.idle()


@pytest.mark.parametrize(
    "address", ["unix:/tmp/x", "dns:///h:1", "h", "", "h:1/x", "a b:1", "[::1]", "h:1,g:2"]
)
async def test_a_hint_that_is_no_address_is_not_followed(pair: Pair, address: str) -> None:
    message = wire.session_to_pb(session(501, PROMPT, kv_peer=pair.peer()))
    message.kv_peer.address = address
    async with verifier_stream(pair.here.address) as stream:
        await stream.send(opens=[message])
        assert await stream.until_finished(501) == IDS
        assert stream.pulls == []


async def test_where_fetching_does_not_pay_nobody_is_asked(pair: Pair) -> None:
    pair.here.engine.pulls.rates.observe(pair.there.address, 1_000, 0.0, 10.0, 0.0)
    rates = pair.here.engine.pulls.rates
    rates._peer(pair.there.address).learnt_s = float("inf")
    ids, pulls = await pair.ask(pair.peer())
    assert ids == IDS
    assert outcomes(pulls) == [PullOutcome.DECLINED]
    assert pair.there.service.kv_serving is not None
    assert pair.there.service.kv_serving.blocks_served == 0


async def test_without_permission_nothing_is_exchanged(models, pair: Pair) -> None:
    config = replace(CONFIG, kv_pull=False)
    async with verifier(models[0], config=config) as other:
        async with verifier_stream(other.address) as stream:
            await stream.open(session(1, PROMPT, kv_peer=pair.peer()))
            assert await stream.until_finished(1) == IDS
            assert stream.pulls == []
        hint = KvPeer(other.address, other.service._incarnation, BLOCKS)
        ids, pulls = await pair.ask(hint)
    assert ids == IDS
    assert outcomes(pulls) == [PullOutcome.REFUSED]


# --- what peers are told --------------------------------------------------------------------------


def honest_request(pair: Pair, salt: str = "") -> kv_pb2.FetchBlocksRequest:
    memory = pair.there.engine.pulls.bytes
    assert memory is not None
    root = chain_root(memory.geometry.model_fingerprint, salt)
    return kv_pb2.FetchBlocksRequest(
        incarnation=pair.there.service._incarnation,
        geometry=wire.kv_geometry_to_pb(memory.geometry),
        hashes=chain_hashes(root, PROMPT, BLOCKS),
    )


async def fetched(
    address: str, request: kv_pb2.FetchBlocksRequest, timeout_s: float | None = 10.0
) -> list[Response]:
    async with grpc.aio.insecure_channel(address) as channel:
        call = kv_pb2_grpc.KvServiceStub(channel).FetchBlocks(request, timeout=timeout_s)
        return [answer async for answer in call]


async def test_what_a_peer_says(pair: Pair) -> None:
    request = honest_request(pair)
    header, *chunks = await fetched(pair.there.address, request)
    assert header.header.incarnation == request.incarnation
    assert header.header.geometry == request.geometry
    assert [answer.chunk.block for answer in chunks] == list(range(BLOCKS))
    for answer, digest in zip(chunks, request.hashes, strict=True):
        chunk: KvChunk = wire.kv_chunk_from_pb(answer.chunk)
        assert chunk.checksum == chunk_checksum(digest, 0, chunk.data)


async def test_kv_of_one_tenant_is_not_found_by_another(pair: Pair) -> None:
    """The salt is a part of every hash: who does not know it cannot name a block."""
    ids, pulls = await pair.ask(pair.peer(), salt="another tenant")
    assert ids == IDS
    assert (outcomes(pulls), pulls[0].blocks) == ([PullOutcome.SHORT], 0)
    assert pair.times.prefilled == len(PROMPT)
    assert len(await fetched(pair.there.address, honest_request(pair, "another"))) == 1
    await pair.idle()


async def test_kv_of_a_tenant_is_found_under_its_own_salt(pair: Pair) -> None:
    async with verifier_stream(pair.there.address) as stream:
        await stream.open(session(2, PROMPT, cache_salt="mine"))
        await stream.until_finished(2)
    ids, pulls = await pair.ask(pair.peer(), salt="mine")
    assert ids == IDS
    assert (outcomes(pulls), pulls[0].blocks) == ([PullOutcome.COMPLETE], BLOCKS)


@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        ({"incarnation": "former"}, grpc.StatusCode.FAILED_PRECONDITION, "incarnation"),
        ({"incarnation": ""}, grpc.StatusCode.FAILED_PRECONDITION, "incarnation"),
        ({"layers": 3}, grpc.StatusCode.FAILED_PRECONDITION, "geometry.layers"),
        ({"dtype": "float16"}, grpc.StatusCode.FAILED_PRECONDITION, "geometry.dtype"),
        ({"model_fingerprint": "x"}, grpc.StatusCode.FAILED_PRECONDITION, "geometry.model"),
        ({"hashes": [b"x" * 16]}, grpc.StatusCode.INVALID_ARGUMENT, "each has 32 bytes"),
        ({"hashes": [b"x" * 32] * 8_193}, grpc.StatusCode.INVALID_ARGUMENT, "at most 8192"),
    ],
    ids=["incarnation", "no incarnation", "layers", "dtype", "model", "short hash", "many hashes"],
)
async def test_what_a_peer_refuses(pair: Pair, change, code, words: str) -> None:
    request = honest_request(pair)
    for name, value in change.items():
        if name == "hashes":
            del request.hashes[:]
            request.hashes.extend(value)
        else:
            part = request if name == "incarnation" else request.geometry
            setattr(part, name, value)
    with pytest.raises(grpc.aio.AioRpcError, match=words) as caught:
        await fetched(pair.there.address, request)
    assert caught.value.code() is code


@pytest.mark.parametrize("timeout_s", [None, 3_600.0])
async def test_nobody_is_served_for_ever(pair: Pair, timeout_s: float | None) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="deadline") as caught:
        await fetched(pair.there.address, honest_request(pair), timeout_s)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_peer_serves_a_few_at_once(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = pair.there.service.kv_serving
    assert serving is not None
    monkeypatch.setattr(serving, "_serving", CONFIG.kv_serves_max)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await fetched(pair.there.address, honest_request(pair))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    ids, pulls = await pair.ask(pair.peer())
    assert ids == IDS
    assert outcomes(pulls) == [PullOutcome.REFUSED]
    monkeypatch.setattr(serving, "_serving", 0)
    await pair.idle()


async def test_verifiers_show_each_other_certificates(models, tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    ours = [identity(authority, tmp_path / name, "127.0.0.1") for name in "ab"]
    theirs = identity(stranger, tmp_path / "c", "127.0.0.1", trusted=authority)
    async with verifier(models[0], config=CONFIG, tls=ours[0]) as there:
        await alone(there)
        hint = KvPeer(there.address, there.service._incarnation, BLOCKS)
        for tls, blocks in ((ours[1], BLOCKS), (theirs, 0), (None, 0)):
            async with verifier(models[1], config=CONFIG, tls=tls) as here:
                here.engine.times.observe(BLOCK_TOKENS, 1.0)
                await alone(here, hint)
                assert here.engine.pulls.tokens_pulled == blocks * BLOCK_TOKENS


async def alone(running: RunningVerifier, peer: KvPeer | None = None) -> None:
    """Have a verifier decode, unheard."""
    running.engine.submit(Open(1, session(1, PROMPT, kv_peer=peer)))

    async def over() -> bool:
        return bool(running.engine.steps) and not running.engine.load

    await until(over, what="the end of a session", timeout_s=30.0)


async def test_an_errand_that_is_called_off_at_once_is_over_all_the_same(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its task has run a line."""
    fetching = pair.here.service.kv_fetching
    assert fetching is not None
    said: list[object] = []
    monkeypatch.setattr(pair.here.engine, "submit", said.append)
    fetching._run(PullOrder(7, pair.peer(), (b"x" * 32,), 1.0))
    fetching._run(CallOff(7))

    async def back() -> bool:
        return bool(said)

    await until(back, what="the edge is back")
    assert said == [PullOver(7, PullOutcome.SLOW, 0.0, ANY, 0)]
    assert fetching.under_way == 0


# --- a whole fleet --------------------------------------------------------------------------------


async def test_an_orchestrator_knows_whom_to_ask(pair: Pair) -> None:
    """What is held by a verifier that takes nothing new is fetched by the one that does."""
    verifiers = {running.address: running for running in (pair.there, pair.here)}
    prompt = tuple(PROMPT[::-1])
    request = Request(
        token_ids=prompt, model="tiny", tokens_max=16, temperature=0.0, ignore_eos=True
    )
    expected = expect(TARGET, Case(prompt, 16, ignore_eos=True)).ids
    async with orchestrator(list(verifiers), config=DriverConfig(rebalance=False)) as running:
        first = await running.client.complete(request)
        assert first.token_ids == expected
        (held,) = {next(iter(one)) for one in running.driver.placer._memory._holders.values()}
        (holder,) = [one for one in verifiers.values() if one.service._incarnation == held]
        (other,) = [one for one in verifiers.values() if one is not holder]
        holder.service.drain()

        async def draining() -> bool:
            return running.fleet.verifiers[holder.address].state is LinkState.DRAINING

        await until(draining, what="a draining verifier")
        second = await running.client.complete(request)
        assert second.token_ids == expected
        assert other.engine.pulls.tokens_pulled == BLOCKS * BLOCK_TOKENS
        meters = running.driver.meters
        assert meters.kv_pulls == {"complete": 1}
        assert sum(meters.kv_pull_s.counts) == 1
        memory = other.engine.pulls.bytes
        assert memory is not None
        text = Exposition(running.driver, running.fleet, {}, vllm_names=False).text().decode()
        assert 'outrider_kv_pulls_total{outcome="complete"} 1.0' in text
        assert f"outrider_kv_pulled_tokens_total {BLOCKS * BLOCK_TOKENS}.0" in text
        assert f"outrider_kv_pulled_bytes_total {BLOCKS * memory.block_bytes}.0" in text
