"""Workers that are not ours: scripted drafters and relays in the middle, over real sockets.

A scripted drafter mirrors commits as a real one does, and answers each with whatever its strategy
makes of it. A relay stands between an orchestrator and a real worker, and loses, repeats, swaps
or delays what passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import grpc.aio

from outrider import wire
from outrider.committed import CommittedLog
from outrider.domain import BindSpec, Draft, ModelInfo
from outrider.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
    worker_pb2,
    worker_pb2_grpc,
)
from verifier_service.config import EngineConfig

_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))

IDS_ONLY = ModelInfo(
    model="scripted",
    model_fingerprint="scripted",
    tokenizer_fingerprint=None,
    vocabulary_size=0,
    length_max=0,
    dtype="",
    proposer="scripted",
)
"""A drafter that handles ids alone, and so fits every target."""


@contextlib.asynccontextmanager
async def _served(
    add: Callable[[grpc.aio.Server], None],
) -> AsyncIterator[tuple[str, grpc.aio.Server]]:
    server = grpc.aio.server(options=(*_UNLIMITED, ("grpc.so_reuseport", 0)))
    add(server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"127.0.0.1:{port}", server
    finally:
        await server.stop(0)


# --- scripted drafters ------------------------------------------------------------------------


@dataclass(slots=True)
class View:
    """A session as a drafter sees it."""

    spec: BindSpec
    log: CommittedLog
    random: random.Random

    @property
    def outputs(self) -> list[int]:
        """Tokens committed after the prompt."""
        return self.log.tokens[len(self.spec.prompt) :]

    def draft(
        self,
        tokens: Sequence[int],
        parents: Sequence[int] | None = None,
        accept_logprobs: Sequence[float] | None = None,
    ) -> Draft:
        """A draft rooted at the tip; by default a chain that is sure of itself."""
        length = len(self.log)
        digest = self.log.digest_at(length)
        assert digest is not None
        return Draft(
            self.spec.epoch,
            length,
            digest,
            tuple(tokens),
            tuple(range(-1, len(tokens) - 1)) if parents is None else tuple(parents),
            (-0.01,) * len(tokens) if accept_logprobs is None else tuple(accept_logprobs),
        )


Sent: TypeAlias = Draft | bytes | types_pb2.DraftRow | types_pb2.Resync | types_pb2.Rejection
"""What a strategy sends: drafts, bytes in place of one, or whole rows."""
Strategy: TypeAlias = Callable[[View], Iterable[Sent]]


class ScriptedDrafter(
    drafter_pb2_grpc.DrafterServiceServicer, worker_pb2_grpc.WorkerServiceServicer
):
    """Mirrors commits; after each, and after binding, it sends what the strategy says."""

    def __init__(self, strategy: Strategy, info: ModelInfo, delay_s: float, seed: int) -> None:
        self.drafts_sent = 0
        self.commits_seen = 0
        self.gaps_seen = 0
        self.repeats_seen = 0
        self.binds: list[BindSpec] = []
        self._strategy = strategy
        self._info = info
        self._delay_s = delay_s
        self._random = random.Random(seed)

    async def GetModelInfo(
        self, request: worker_pb2.GetModelInfoRequest, context: Any
    ) -> worker_pb2.GetModelInfoResponse:
        """Say who this is."""
        return worker_pb2.GetModelInfoResponse(
            info=wire.model_info_to_pb(self._info),
            incarnation=secrets.token_hex(8),
            sessions_max=1_000,
        )

    async def Propose(
        self, request_iterator: AsyncIterator[drafter_pb2.ProposeRequest], context: Any
    ) -> AsyncIterator[drafter_pb2.ProposeResponse]:
        """Serve one orchestrator."""
        yield drafter_pb2.ProposeResponse()
        views: dict[int, View] = {}
        async for request in request_iterator:
            response = drafter_pb2.ProposeResponse()
            for view in self._news(request, views):
                for sent in self._strategy(view):
                    self._add(response, view, sent)
            if self._delay_s:
                await asyncio.sleep(self._delay_s)
            yield response

    def _news(self, request: drafter_pb2.ProposeRequest, views: dict[int, View]) -> list[View]:
        """Follow a message; returns the sessions that it changed."""
        changed: dict[int, View] = {}
        for bind in request.binds:
            spec = wire.bind_from_pb(bind)
            self.binds.append(spec)
            log = CommittedLog((*spec.prompt, *spec.committed))
            changed[spec.session] = views[spec.session] = View(spec, log, self._random)
        for row in request.commits:
            commit = wire.commit_from_bytes(row.commit)
            known = views.get(row.session)
            if known is None or commit is None or commit.epoch != known.spec.epoch:
                continue
            self.commits_seen += 1
            overlap = len(known.log) - commit.base_length
            self.gaps_seen += overlap < 0
            self.repeats_seen += overlap > 0
            if overlap >= 0 and commit.tokens[overlap:]:
                known.log.append(commit.tokens[overlap:])
                changed[row.session] = known
        for unbind in request.unbinds:
            known = views.get(unbind.session)
            # A newer attachment may have come with the same message.
            if known is not None and known.spec.binding <= unbind.binding:
                del views[unbind.session]
                changed.pop(unbind.session, None)
        return list(changed.values())

    def _add(self, response: drafter_pb2.ProposeResponse, view: View, sent: Sent) -> None:
        spec = view.spec
        match sent:
            case types_pb2.Resync():
                response.resyncs.append(sent)
                return
            case types_pb2.Rejection():
                response.rejections.append(sent)
                return
            case Draft():
                sent = wire.draft_to_bytes(sent)
        if isinstance(sent, bytes):
            sent = types_pb2.DraftRow(session=spec.session, binding=spec.binding, draft=sent)
        self.drafts_sent += 1
        response.drafts.append(sent)


@dataclass(slots=True)
class RunningScript:
    """A scripted drafter that is being served."""

    address: str
    drafter: ScriptedDrafter
    server: grpc.aio.Server


@contextlib.asynccontextmanager
async def scripted_drafter(
    strategy: Strategy, *, info: ModelInfo = IDS_ONLY, delay_s: float = 0.0, seed: int = 1
) -> AsyncIterator[RunningScript]:
    """Serve a scripted drafter; `delay_s` passes before each of its answers."""
    drafter = ScriptedDrafter(strategy, info, delay_s, seed)

    def add(server: grpc.aio.Server) -> None:
        drafter_pb2_grpc.add_DrafterServiceServicer_to_server(drafter, server)
        worker_pb2_grpc.add_WorkerServiceServicer_to_server(drafter, server)

    async with _served(add) as (address, server):
        yield RunningScript(address, drafter, server)


# --- strategies -------------------------------------------------------------------------------

Truth: TypeAlias = Callable[[BindSpec], Sequence[int]]
"""What the target will say to a session: its whole output."""


def oracle(truth: Truth, *, depth: int = 6, right: float = 1.0) -> Strategy:
    """Chains of the target's own continuation; each token is right with probability `right`."""

    def strategy(view: View) -> Iterable[Sent]:
        done = len(view.outputs)
        chain = [
            token if view.random.random() < right else (token + view.random.randrange(1, 256)) % 256
            for token in truth(view.spec)[done : done + depth]
        ]
        if chain:
            yield view.draft(chain)

    return strategy


def scrambled(truth: Truth, *, depth: int = 6) -> Strategy:
    """The oracle's chain in pieces: deepest first, some twice, and again when they are stale."""
    stale: dict[int, Draft] = {}

    def strategy(view: View) -> Iterable[Sent]:
        chain = truth(view.spec)[len(view.outputs) :][:depth]
        pieces = [view.draft(chain[:count]) for count in range(len(chain), 0, -1)]
        yield from pieces
        yield from pieces[:2]
        older = stale.get(view.spec.session)
        if older is not None:
            yield older
        if pieces:
            stale[view.spec.session] = pieces[0]

    return strategy


def random_ids(view: View) -> Iterable[Sent]:
    """Trees of random ids, said to be certain."""
    size = view.spec.vocabulary_size
    tokens = [view.random.randrange(size) for _ in range(12)]
    parents = [view.random.randrange(-1, index) for index in range(12)]
    yield view.draft(tokens, parents, [0.0] * 12)


def flood(view: View) -> Iterable[Sent]:
    """Far more than anybody can use, after each commit."""
    size = view.spec.vocabulary_size
    for _ in range(12):
        tokens = [view.random.randrange(size) for _ in range(200)]
        parents = [view.random.randrange(-1, min(index, 24)) for index in range(200)]
        yield view.draft(tokens, parents, [0.0] * 200)


def altered(change: Callable[[View, Draft], Draft]) -> Strategy:
    """A draft of random ids with something wrong in it."""

    def strategy(view: View) -> Iterable[Sent]:
        tokens = [view.random.randrange(view.spec.vocabulary_size) for _ in range(4)]
        yield change(view, view.draft(tokens))

    return strategy


def garbage(view: View) -> Iterable[Sent]:
    """Bytes that are no draft, of several kinds."""
    yield b"\xff\xff\xff\xff"
    yield b"\x22\xff\x01garbage"
    yield b"\x0d"


def nothing(view: View) -> Iterable[Sent]:
    """Silence."""
    return ()


def impostor(view: View) -> Iterable[Sent]:
    """Certain nonsense in the name of other sessions and other attachments."""
    spec = view.spec
    draft = wire.draft_to_bytes(view.draft([view.random.randrange(256) for _ in range(4)]))
    other = view.random.getrandbits(64)
    yield types_pb2.DraftRow(session=other, binding=spec.binding, draft=draft)
    yield types_pb2.DraftRow(session=spec.session, binding=spec.binding + 7, source=0, draft=draft)
    yield types_pb2.Rejection(
        session=spec.session, epoch=spec.epoch, binding=spec.binding + 7, code=1, message="not mine"
    )


def confused(view: View) -> Iterable[Sent]:
    """Resyncs for gaps that are not there: from the future, the past and other epochs."""
    spec = view.spec
    for epoch, have_length in (
        (spec.epoch, len(view.log) + 1_000),
        (spec.epoch, 0),
        (spec.epoch, len(spec.prompt)),
        (spec.epoch + 1, len(view.log)),
    ):
        yield types_pb2.Resync(
            session=spec.session, epoch=epoch, have_length=have_length, binding=spec.binding
        )


@dataclass(frozen=True, slots=True)
class Hostile:
    """A strategy, and the reasons for which its drafts or nodes must have been dropped."""

    strategy: Strategy
    drafts: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()


def _scores(*values: float) -> Strategy:
    return altered(
        lambda view, draft: replace(draft, accept_logprobs=(*values, *[-1.0] * (4 - len(values))))
    )


def _tokens(token: int) -> Strategy:
    return altered(lambda view, draft: replace(draft, tokens=(*draft.tokens[:3], token)))


def _parents(*parents: int) -> Strategy:
    return altered(lambda view, draft: replace(draft, parents=parents))


def _oversize(view: View, draft: Draft) -> Draft:
    return view.draft([1] * (EngineConfig.tree_nodes_max + 1))


HOSTILE: dict[str, Hostile] = {
    "random ids": Hostile(random_ids, nodes=("off_path", "missed")),
    "flood": Hostile(flood, nodes=("hopeless",)),
    "wrong digest": Hostile(
        altered(lambda view, draft: replace(draft, base_digest=draft.base_digest ^ 1)), ("digest",)
    ),
    "old epoch": Hostile(
        altered(lambda view, draft: replace(draft, epoch=draft.epoch - 1)), ("epoch",)
    ),
    "new epoch": Hostile(
        altered(lambda view, draft: replace(draft, epoch=draft.epoch + 1)), ("epoch",)
    ),
    "base ahead": Hostile(
        altered(lambda view, draft: replace(draft, base_length=draft.base_length + 50)), ("ahead",)
    ),
    "base too old": Hostile(
        altered(lambda view, draft: replace(draft, base_length=0)), ("too_old",)
    ),
    "cyclic parents": Hostile(_parents(1, 0, 1, 2), ("parent",)),
    "self parent": Hostile(_parents(-1, 1, 1, 2), ("parent",)),
    "forward parent": Hostile(_parents(-1, 3, 1, 2), ("parent",)),
    "negative parent": Hostile(_parents(-1, -2, 1, 2), ("parent",)),
    "parent out of range": Hostile(_parents(-1, 0, 1, 2**31 - 1), ("parent",)),
    "too few parents": Hostile(_parents(-1, 0), ("lengths",)),
    "empty": Hostile(lambda view: [view.draft([])], ("empty",)),
    "oversize": Hostile(altered(_oversize), ("oversize",)),
    "NaN score": Hostile(_scores(-1.0, float("nan")), ("score",)),
    "infinite score": Hostile(_scores(float("inf")), ("score",)),
    "minus infinite score": Hostile(_scores(float("-inf")), ("score",)),
    "positive score": Hostile(_scores(5.0), ("score",)),
    "id outside": Hostile(_tokens(260), ("token",)),
    "id far outside": Hostile(_tokens(2**32 - 1), ("token",)),
    "garbage": Hostile(garbage, ("malformed",)),
    "impostor": Hostile(impostor),
    "confused": Hostile(confused),
}
"""Every way to be wrong that we know of, by name."""


# --- relays -----------------------------------------------------------------------------------


@dataclass(slots=True)
class Tamper:
    """What a relay does to what passes; counts what it sees."""

    lose_commit: int | None = None
    """Number of the commit that each session loses once, counted from 0."""
    lose_last: bool = False
    """Lose each session's last commit, once."""
    swap_commits: bool = False
    """Deliver a session's first two commits of the stream in the wrong order."""
    twice: bool = False
    """Deliver every message from the worker, and every commit to it, twice."""
    delay_s: float = 0.0
    """Every message in either direction takes this much longer."""
    hangs: bool = False
    """Nothing more comes from the worker, until this is False again."""
    opens: list[verifier_pb2.OpenSession] = field(default_factory=list)
    """Sessions that the verifier was asked to open."""
    commits_lost: int = 0
    resyncs: int = 0
    ended: set[int] = field(default_factory=set)
    held: dict[int, types_pb2.CommitRow] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)

    def commits(self, rows: Iterable[types_pb2.CommitRow]) -> list[types_pb2.CommitRow]:
        """Return the commits that get through, in the order in which they do."""
        passed: list[types_pb2.CommitRow] = []
        for row in rows:
            number = self.seen[row.session] = self.seen.get(row.session, -1) + 1
            if number == self.lose_commit:
                self.commits_lost += 1
                continue
            if self.lose_last and row.report.finish_reason and row.session not in self.ended:
                self.ended.add(row.session)
                self.commits_lost += 1
                continue
            if self.swap_commits and number == 0:
                self.held[row.session] = row
                continue
            passed += [row, row] if self.twice else [row]
            if row.session in self.held:
                passed.append(self.held.pop(row.session))
        return passed


class DrafterRelay(drafter_pb2_grpc.DrafterServiceServicer, worker_pb2_grpc.WorkerServiceServicer):
    """Stands before a drafter."""

    def __init__(self, upstream: grpc.aio.Channel, tamper: Tamper) -> None:
        self._worker = worker_pb2_grpc.WorkerServiceStub(upstream)
        self._drafter = drafter_pb2_grpc.DrafterServiceStub(upstream)
        self._tamper = tamper

    async def GetModelInfo(
        self, request: worker_pb2.GetModelInfoRequest, context: Any
    ) -> worker_pb2.GetModelInfoResponse:
        """Pass on."""
        return await self._worker.GetModelInfo(request)

    async def Propose(
        self, request_iterator: AsyncIterator[drafter_pb2.ProposeRequest], context: Any
    ) -> AsyncIterator[drafter_pb2.ProposeResponse]:
        """Pass on, tampering."""
        tamper = self._tamper

        async def requests() -> AsyncIterator[drafter_pb2.ProposeRequest]:
            async for request in request_iterator:
                rows = tamper.commits(request.commits)
                del request.commits[:]
                request.commits.extend(rows)
                await asyncio.sleep(tamper.delay_s)
                yield request

        async for response in self._drafter.Propose(requests()):
            tamper.resyncs += len(response.resyncs)
            await asyncio.sleep(tamper.delay_s)
            yield response
            if tamper.twice:
                yield response


class VerifierRelay(
    verifier_pb2_grpc.VerifierServiceServicer, worker_pb2_grpc.WorkerServiceServicer
):
    """Stands before a verifier."""

    def __init__(self, upstream: grpc.aio.Channel, tamper: Tamper) -> None:
        self._worker = worker_pb2_grpc.WorkerServiceStub(upstream)
        self._verifier = verifier_pb2_grpc.VerifierServiceStub(upstream)
        self._tamper = tamper

    async def GetModelInfo(
        self, request: worker_pb2.GetModelInfoRequest, context: Any
    ) -> worker_pb2.GetModelInfoResponse:
        """Pass on."""
        return await self._worker.GetModelInfo(request)

    async def GetTokenizer(
        self, request: verifier_pb2.GetTokenizerRequest, context: Any
    ) -> AsyncIterator[verifier_pb2.GetTokenizerResponse]:
        """Pass on."""
        async for response in self._verifier.GetTokenizer(request):
            yield response

    async def Verify(
        self, request_iterator: AsyncIterator[verifier_pb2.VerifyRequest], context: Any
    ) -> AsyncIterator[verifier_pb2.VerifyResponse]:
        """Pass on, tampering."""
        tamper = self._tamper

        async def requests() -> AsyncIterator[verifier_pb2.VerifyRequest]:
            async for request in request_iterator:
                tamper.opens += request.opens
                tamper.resyncs += len(request.resyncs)
                await asyncio.sleep(tamper.delay_s)
                yield request

        async for response in self._verifier.Verify(requests()):
            while tamper.hangs:  # noqa: ASYNC110 - a flag is plainer for tests than an event
                await asyncio.sleep(0.01)
            rows = tamper.commits(response.commits)
            del response.commits[:]
            response.commits.extend(rows)
            await asyncio.sleep(tamper.delay_s)
            yield response


@contextlib.asynccontextmanager
async def drafter_relay(upstream: str, tamper: Tamper) -> AsyncIterator[str]:
    """Serve a relay before a drafter; yields the address to use instead."""
    async with grpc.aio.insecure_channel(upstream, options=_UNLIMITED) as channel:
        relay = DrafterRelay(channel, tamper)

        def add(server: grpc.aio.Server) -> None:
            drafter_pb2_grpc.add_DrafterServiceServicer_to_server(relay, server)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(relay, server)

        async with _served(add) as (address, _):
            yield address


@contextlib.asynccontextmanager
async def verifier_relay(upstream: str, tamper: Tamper) -> AsyncIterator[str]:
    """Serve a relay before a verifier; yields the address to use instead."""
    async with grpc.aio.insecure_channel(upstream, options=_UNLIMITED) as channel:
        relay = VerifierRelay(channel, tamper)

        def add(server: grpc.aio.Server) -> None:
            verifier_pb2_grpc.add_VerifierServiceServicer_to_server(relay, server)
            worker_pb2_grpc.add_WorkerServiceServicer_to_server(relay, server)

        async with _served(add) as (address, _):
            yield address
