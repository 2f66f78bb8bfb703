"""Which sessions compute what in a step, and whose KV makes room for it.

Every decoding session joins every step. Prefill takes turns in the order of admission, bounded per
step, so that a long prompt delays others by no more than that. When the KV budget is short, draft
nodes go first; then the session admitted last loses its KV and waits: tokens are the truth, and it
prefills again, from whatever prefix is still held. The session admitted first always runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from outrider.draft_tree import Node
from outrider.errors import InvalidRequest
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.model.kv_cache import KvPool
from outrider.model.language_model import Row
from verifier_service.calibration import Calibrations
from verifier_service.config import EngineConfig
from verifier_service.deciding import Decider, Mask
from verifier_service.scheduling import choose_nodes
from verifier_service.session import Session
from verifier_service.step_times import StepTimes


@dataclass(slots=True, eq=False)
class Seat:
    """An admitted session, running or waiting for KV."""

    session: Session
    decider: Decider
    waiting: bool = True
    """It computes nothing, and holds at most blocks that it found computed by others."""
    pulling: bool = False
    """Moreover, it waits for blocks that a peer has computed; see `verifier_service.pulls`."""
    preemptions: int = 0


@dataclass(frozen=True, slots=True)
class RowPlan:
    """What a step computes for one session."""

    seat: Seat
    tokens: tuple[int, ...]
    """Committed tokens without KV: the tip alone, or a chunk of prefill."""
    nodes: tuple[Node, ...] = ()
    masks: tuple[Mask | None, ...] = (None,)
    """What the grammar allows at the tip and at each node."""
    decodes: bool = True
    """The logits of the last token and of the nodes decide tokens."""
    prefills: bool = False
    """`tokens` is a chunk of prefill, though perhaps one of a single token."""
    scored: tuple[int, ...] = ()
    """Indices into `tokens` whose logits score the prompt token after them."""

    @property
    def size(self) -> int:
        """Tokens computed."""
        return len(self.tokens) + len(self.nodes)

    def row(self) -> Row:
        """Lay it out: a chain straight into the prefix, or the tip and its nodes as a tree."""
        cache = self.seat.session.cache
        if not self.nodes:
            wanted = [*self.scored, len(self.tokens) - 1] if self.decodes else self.scored
            return Row(cache, self.tokens, None, wanted)
        slot_of: dict[Node, int] = {self.seat.session.tree.root: 0}
        parents = [-1]
        for slot, node in enumerate(self.nodes, start=1):
            assert node.parent is not None, "chosen nodes descend from the root"
            parents.append(slot_of[node.parent])
            slot_of[node] = slot
        tokens = (*self.tokens, *(node.token for node in self.nodes))
        return Row(cache, tokens, parents, range(len(tokens)))


class Planner:
    """Plans steps within a KV budget."""

    def __init__(
        self, pool: KvPool, times: StepTimes, config: EngineConfig, calibrations: Calibrations
    ) -> None:
        self._pool = pool
        self._times = times
        self._config = config
        self._calibrations = calibrations
        self.preemptions = 0
        self.refused: list[tuple[Seat, InvalidRequest]] = []
        """Sessions left out of the last plan, since their own grammar broke a limit; they end."""

    def plan(self, seats: Iterable[Seat]) -> list[RowPlan]:
        """Plan a step over `seats`, in the order of their admission; room for it is reserved."""
        seats = list(seats)
        self.refused = []
        decoding = self._seat_decoding(seats)
        chunks = self._chunks(seats)
        decoding = [seat for seat in decoding if not seat.waiting]  # prefill may have taken it
        prefill = sum(plan.size for plan in chunks)
        choice = choose_nodes(
            [seat.session.tree for seat in decoding],
            [seat.session.tokens_left - 1 for seat in decoding],
            self._times,
            other_tokens=prefill,
            nodes_max=self._config.step_nodes_max,
            kv_tokens=sum(seat.session.cache.prefix_length for seat in decoding),
        )
        # What could not pay now is not even read when it arrives.
        self._calibrations.pay_min = choice.pay_min
        self._calibrations.rows = len(decoding)
        plans = []
        for seat, nodes in zip(decoding, choice.nodes, strict=True):
            try:
                plans.append(self._decoding_row(seat, nodes))
            except InvalidRequest as error:
                self.refused.append((seat, error))
        return plans + chunks

    # --- decoding ---

    def _seat_decoding(self, seats: Sequence[Seat]) -> list[Seat]:
        """Return the sessions that decode, each with room for its tip."""
        decoding = []
        queued = False
        for index, seat in enumerate(seats):
            if seat.pulling:
                continue
            if len(seat.session.pending) != 1 or (seat.waiting and queued):
                queued |= seat.waiting
                continue
            cache = seat.session.cache
            if self._make_room(seat, 1, seats[index + 1 :]):
                cache.reserve(cache.prefix_length + 1)
                seat.waiting = False
                decoding.append(seat)
            elif seat.waiting:
                queued = True
            else:
                self._preempt(seat)
        return decoding

    def _decoding_row(self, seat: Seat, nodes: Sequence[Node]) -> RowPlan:
        session = seat.session
        allowed = seat.decider.allow(session.tree.root, nodes)
        chosen, masks = allowed.nodes, allowed.masks
        cache = session.cache
        # Guesses never cost anybody's KV: those for which there is no room are left out.
        while chosen and cache.blocks_needed(1 + len(chosen)) > self._pool.blocks.available:
            chosen, masks = chosen[:-1], masks[:-1]
        cache.reserve(cache.prefix_length + 1 + len(chosen))
        return RowPlan(seat, (session.log.tip,), chosen, masks)

    # --- prefill ---

    def _chunks(self, seats: Sequence[Seat]) -> list[RowPlan]:
        left = self._config.prefill_tokens_max
        chunks: list[RowPlan] = []
        computing: set[bytes] = set()
        blocked = False
        for index, seat in enumerate(seats):
            if left <= 0:
                break
            session = seat.session
            if seat.pulling or (not seat.waiting and len(session.pending) == 1):
                continue
            if seat.waiting and (blocked or not self._can_start(seat, seats[:index])):
                # In the order of admission: nobody overtakes one that waits for room.
                blocked = True
                continue
            cache = session.cache
            cache.adopt(session.log.tokens)
            upcoming = cache.next_hash(session.log.tokens)
            if upcoming is not None and upcoming in computing:
                # Another session computes just this block in this step: share it in the next.
                continue
            chunk = tuple(session.pending[:left])
            if not self._make_room(seat, len(chunk), seats[index + 1 :]):
                fits = self._room(seat)
                if not fits:
                    continue
                chunk = chunk[:fits]
            cache.reserve(cache.prefix_length + len(chunk))
            if upcoming is not None:
                computing.add(upcoming)
            seat.waiting = False
            try:
                chunks.append(_chunk_plan(seat, chunk))
            except InvalidRequest as error:
                self.refused.append((seat, error))
                continue
            left -= len(chunk)
        return chunks

    def _can_start(self, seat: Seat, before: Sequence[Seat]) -> bool:
        """True if there is room for all that a waiting session must compute first."""
        if all(other.waiting for other in before):
            return True
        needed = -(-len(seat.session.log) // BLOCK_TOKENS) + 1
        return needed <= self._pool.blocks.available

    # --- room ---

    def _room(self, seat: Seat) -> int:
        """Tokens that still fit into a session's cache."""
        cache = seat.session.cache
        slack = len(cache.slots) - cache.prefix_length - cache.tree_size
        return slack + self._pool.tokens_available

    def _make_room(self, seat: Seat, tokens: int, later: Sequence[Seat]) -> bool:
        """Preempt sessions admitted later, the last first, until `tokens` more fit."""
        needed = seat.session.cache.blocks_needed(tokens)
        for victim in reversed(later):
            if needed <= self._pool.blocks.available:
                return True
            # One that waits may hold what it shares: a block that others have given up since.
            if victim.session.cache.blocks:
                self._preempt(victim)
        return needed <= self._pool.blocks.available

    def _preempt(self, seat: Seat) -> None:
        seat.session.cache.clear()
        if not seat.waiting:
            seat.waiting = True
            seat.preemptions += 1
            self.preemptions += 1


def _chunk_plan(seat: Seat, chunk: tuple[int, ...]) -> RowPlan:
    session, spec = seat.session, seat.session.spec
    start = session.cache.prefix_length
    scored: tuple[int, ...] = ()
    if spec.prompt_logprobs is not None:
        first, end = seat.decider.prompt_scored, min(len(spec.prompt), start + len(chunk) + 1)
        scored = tuple(range(max(first - 1 - start, 0), max(0, end - 1 - start)))
    # The last chunk ends with the tip: its logits decide the first token.
    decodes = len(chunk) == len(session.pending)
    masks = seat.decider.allow(session.tree.root, ()).masks if decodes else (None,)
    return RowPlan(seat, chunk, (), masks, decodes, prefills=True, scored=scored)


def kv_read(plans: Sequence[RowPlan]) -> int:
    """Return how many tokens of KV the decoding rows of a step attend to."""
    return sum(plan.seat.session.cache.prefix_length for plan in plans if not plan.prefills)
