"""Blocks of KV that sessions wait for while the edge fetches them from peers.

A session that is opened with a hint waits, computing nothing, for as long as fetching is expected
to be quicker than computing (`pull_policy`); sessions with the same beginning wait for the same
pull. Each block that comes is written into the pool, published, and adopted like any other, all at
once and on the engine's thread: so at no time is there a block that only a pull holds, and however
a pull ends, its sessions go on from where they are.
"""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from outrider.domain import PullOutcome, PullReport, SessionSpec
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.kv_transfer import HASHES_MAX
from outrider.model.block_bytes import BlockBytes
from outrider.model.kv_cache import KvPool
from verifier_service.config import EngineConfig
from verifier_service.messages import CallOff, Errand, PulledBlock, PullOrder, PullOver
from verifier_service.planning import Seat
from verifier_service.pull_policy import PeerRates, PullPlan, plan_pull, prefill_s
from verifier_service.step_times import StepTimes

_SIGN_OF_LIFE_S = 0.5

_log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Pull:
    order: PullOrder
    plan: PullPlan
    began_s: float
    first: bytes
    """Hash of the text's first block."""
    blocks_before: int
    """Of the text, that were here already."""
    leader: Seat
    """For whom it was begun."""
    seats: list[Seat]
    """Whoever waits for it."""
    arrived: deque[PulledBlock] = field(default_factory=deque)
    """Not taken in yet."""
    arrived_bytes: int = 0
    """Of all that has come."""
    taken: int = 0
    """Blocks that were taken in."""
    over: PullOver | None = None
    told_s: float = 0.0


@dataclass(slots=True)
class _Errand:
    """What the edge has been sent for, until it says that it is back."""

    address: str
    slow: bool = False
    """It was called off, as it took too long."""


class Pulls:
    """All pulls of a verifier. Belongs to the engine's thread, but for `connect`."""

    def __init__(self, pool: KvPool, times: StepTimes, config: EngineConfig) -> None:
        self._pool, self._times, self._config = pool, times, config
        self.rates = PeerRates()
        self.tokens_pulled = 0
        """Tokens whose KV came from peers so far."""
        self.bytes = self._block_bytes()
        """What peers may read; None: this verifier gives and takes nothing."""
        self._send: Callable[[Errand], None] | None = None
        self._incarnation = ""
        self._numbers = itertools.count(1)
        self._pulls: dict[int, _Pull] = {}
        self._errands: dict[int, _Errand] = {}

    def _block_bytes(self) -> BlockBytes | None:
        if not self._config.kv_pull or self._pool.shared_out:
            return None
        memory = BlockBytes(self._pool)
        return memory if memory.block_bytes else None

    def connect(self, send: Callable[[Errand], None], incarnation: str) -> None:
        """Say who runs errands, called on the engine's thread, and who this is. Before `start`."""
        self._send, self._incarnation = send, incarnation

    @property
    def active(self) -> int:
        """Pulls under way."""
        return len(self._pulls)

    def consider(self, seat: Seat, seats: Iterable[Seat], now_s: float) -> PullReport | None:
        """Let a new session wait for KV of a peer if that pays; a report if it does not.

        `seats` are all that there are.
        """
        session, peer = seat.session, seat.session.spec.kv_peer
        if peer is None or self._send is None or self.bytes is None:
            return None
        if peer.incarnation == self._incarnation:
            return None
        tokens = session.log.tokens
        before = session.cache.adopt(tokens) // BLOCK_TOKENS
        hashes = session.cache.shareable_hashes(tokens, peer.blocks)
        wanted = tuple(hashes[before : before + HASHES_MAX])
        if not wanted:
            return None
        for pull in self._pulls.values():
            if wanted[0] in pull.order.digests[pull.taken :]:
                pull.seats.append(seat)
                seat.pulling = True
                return None
        plan = self._plan(peer.address, len(wanted), seat, seats, now_s)
        if plan is None:
            return _report(session.spec, PullOutcome.DECLINED)
        order = PullOrder(next(self._numbers), peer, wanted, plan.wait_s)
        self._pulls[order.pull] = _Pull(
            order, plan, now_s, hashes[0], before, seat, [seat], told_s=now_s
        )
        self._errands[order.pull] = _Errand(peer.address)
        seat.pulling = True
        self._send(order)
        return None

    def _plan(
        self, address: str, blocks: int, seat: Seat, seats: Iterable[Seat], now_s: float
    ) -> PullPlan | None:
        # Errands that were called off are counted until the edge is back.
        if len(self._errands) >= self._config.kv_pulls_max or not self._times.measured:
            return None
        assert self.bytes is not None
        ahead, rows = 0, 0
        for other in seats:
            if other is seat or other.pulling:
                continue
            pending = len(other.session.log) - other.session.cache.prefix_length
            ahead += pending if pending > 1 else 0
            rows += pending == 1
        return plan_pull(
            blocks,
            self.bytes.block_bytes,
            transfer_s=self.rates.expected_s(address, blocks * self.bytes.block_bytes, now_s),
            latency_s=self.rates.latency_s(address),
            # Others' prompts come first: until they are done, waiting costs nothing.
            prefill_s=prefill_s(
                lambda tokens, prompt: self._times.predict(tokens, prefill_tokens=prompt),
                ahead + blocks * BLOCK_TOKENS,
                self._config.prefill_tokens_max,
                rows,
            ),
            wait_max_s=self._config.kv_pull_wait_s,
        )

    # --- what the edge brings ---

    def came(self, block: PulledBlock) -> None:
        """Note a block; it is taken in by `settle`."""
        pull = self._pulls.get(block.pull)
        if pull is None or pull.over is not None:
            block.taken()
            return
        pull.arrived.append(block)
        pull.arrived_bytes += len(block.data)

    def over(self, over: PullOver, now_s: float) -> None:
        """Note that the edge is back, and learn how quick the peer was."""
        errand = self._errands.pop(over.pull, None)
        pull = self._pulls.get(over.pull)
        if pull is not None:
            pull.over = over
        if errand is None:
            return
        if over.size_bytes:
            self.rates.observe(errand.address, over.size_bytes, over.first_s, over.took_s, now_s)
        failed = over.outcome in (PullOutcome.REFUSED, PullOutcome.FAILED, PullOutcome.CORRUPT)
        # One that was called off for other reasons says nothing of the peer.
        late = errand.slow or (pull is not None and over.outcome is PullOutcome.SLOW)
        if failed or (late and not over.size_bytes):
            self.rates.failed(errand.address, now_s)

    # --- what becomes of it ---

    def settle(
        self, now_s: Callable[[], float], budget_s: float
    ) -> Iterator[tuple[int, PullReport]]:
        """Take in what has come, for about `budget_s`, and end what is over or does not pay.

        Yields what is to be reported, and to which connection.
        """
        until_s = now_s() + budget_s
        for pull in list(self._pulls.values()):
            try:
                room = self._take_some(pull, now_s, until_s)
            except Exception:
                _log.exception("KV of %s could not be taken in", pull.order.peer.address)
                yield from self._end(pull, PullOutcome.FAILED, now_s())
                continue
            if room:
                yield from self._look(pull, now_s())
            else:
                yield from self._end(pull, PullOutcome.NO_ROOM, now_s())

    def _take_some(self, pull: _Pull, now_s: Callable[[], float], until_s: float) -> bool:
        """Take in blocks until then, one in any case; False if there is no room for them."""
        while pull.arrived:
            if not self._take_in(pull, pull.arrived.popleft()):
                return False
            if now_s() > until_s:
                break
        return True

    def _look(self, pull: _Pull, now_s: float) -> Iterator[tuple[int, PullReport]]:
        if pull.over is not None and not pull.arrived:
            yield from self._end(pull, pull.over.outcome, now_s)
        elif pull.over is None and not pull.plan.still_pays(
            now_s - pull.began_s, pull.arrived_bytes
        ):
            self._errands[pull.order.pull].slow = True
            yield from self._end(pull, PullOutcome.SLOW, now_s)
        elif now_s - pull.told_s >= _SIGN_OF_LIFE_S:
            pull.told_s = now_s
            yield from _signs_of_life(pull.seats)

    def _take_in(self, pull: _Pull, arrived: PulledBlock) -> bool:
        """Write a block, publish it and have the sessions adopt it; False if nobody could."""
        assert self.bytes is not None
        blocks = self._pool.blocks
        if not blocks.available:
            arrived.taken()
            return False
        (block,) = blocks.allocate(1)
        try:
            self.bytes.write(block, arrived.data)
            digest = pull.order.digests[pull.taken]
            blocks.publish(block, digest, pull.first)
        finally:
            # Idle now, or free if another session has computed the same meanwhile.
            blocks.release([block])
            arrived.taken()
        pull.taken += 1
        self.tokens_pulled += BLOCK_TOKENS
        for seat in list(pull.seats):
            held = seat.session.cache.adopt(seat.session.log.tokens)
            if held < (pull.blocks_before + pull.taken) * BLOCK_TOKENS:
                # It has lost its KV to another session, and takes its turn like others.
                seat.pulling = False
                pull.seats.remove(seat)
        return bool(pull.seats)

    def leave(self, seat: Seat) -> None:
        """A session is over; a pull that nobody waits for is called off."""
        if not seat.pulling:
            return
        seat.pulling = False
        for pull in list(self._pulls.values()):
            if seat in pull.seats:
                pull.seats.remove(seat)
                if not pull.seats:
                    self._drop(pull)

    def _drop(self, pull: _Pull) -> None:
        del self._pulls[pull.order.pull]
        for arrived in pull.arrived:
            arrived.taken()
        for seat in pull.seats:
            seat.pulling = False
        if pull.over is None and self._send is not None:
            self._send(CallOff(pull.order.pull))

    def _end(
        self, pull: _Pull, outcome: PullOutcome, now_s: float
    ) -> Iterator[tuple[int, PullReport]]:
        self._drop(pull)
        yield from _signs_of_life([seat for seat in pull.seats if seat is not pull.leader])
        session = pull.leader.session
        size_bytes = pull.taken * pull.plan.block_bytes
        report = _report(session.spec, outcome, pull.taken, size_bytes, now_s - pull.began_s)
        _log.info(
            "KV pull over",
            extra={
                "request_id": session.spec.origin.request_id,
                "session": f"{report.session:016x}",
                "peer": pull.order.peer.address,
                "end": outcome.value,
                "blocks": report.blocks,
                "blocks_wanted": len(pull.order.digests),
                "bytes": report.size_bytes,
                "took_s": round(report.duration_s, 6),
                "expected_s": round(pull.plan.transfer_s, 6),
                "prefill_s": round(pull.plan.prefill_s, 6),
            },
        )
        yield session.connection, report


def _signs_of_life(seats: Iterable[Seat]) -> Iterator[tuple[int, PullReport]]:
    return ((seat.session.connection, _report(seat.session.spec, None)) for seat in seats)


def _report(
    spec: SessionSpec,
    outcome: PullOutcome | None,
    blocks: int = 0,
    size_bytes: int = 0,
    duration_s: float = 0.0,
) -> PullReport:
    return PullReport(spec.session, spec.epoch, outcome, blocks, size_bytes, duration_s)
