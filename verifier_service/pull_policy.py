"""Whether KV is fetched from a peer or computed: what is expected to be there sooner. Pure.

Both sides are measured. How long a prefill takes follows from the verifier's own steps
(`step_times`), how long a transfer takes from earlier ones from the same address. Of a peer that
is not known yet something ordinary is assumed, and a transfer that turns out slow is broken off:
what it has brought is kept, and it has cost no more than the prefill that it should have saved.
"""

from __future__ import annotations

import math
import statistics
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

BLOCKS_MIN = 2
"""Fewer are computed: a step more or less."""
GAIN_MIN = 1.25
"""How many times as long a prefill must take as a transfer: neither is known exactly."""
PATIENCE_SHARE = 0.25
"""Of the prefill that would be saved: for so long a transfer may bring nothing before it counts as
slow. What a dead or slow peer costs at most, unless its round trip is longer."""
PATIENCE_MIN_S = 0.02

ASSUMED_LATENCY_S = 0.005
ASSUMED_BYTES_PER_S = 125e6
"""Of a peer of whom nothing is known, where nothing is known of any other."""
_LEARNT_SHARE = 0.5
_STALE_S = 60.0
"""What was learnt so long ago is not believed: whoever was slow is tried again."""
_BACK_OFF_MIN_S = 1.0
_BACK_OFF_MAX_S = 60.0
_PEERS_MAX = 1_024


@dataclass(slots=True)
class _Peer:
    latency_s: float = 0.0
    bytes_per_s: float = 0.0
    """0 while nothing is known."""
    learnt_s: float = -math.inf
    failures: int = 0
    """In a row."""
    shunned_until_s: float = -math.inf


class PeerRates:
    """How quickly peers hand out KV, by address."""

    def __init__(self) -> None:
        self._peers: OrderedDict[str, _Peer] = OrderedDict()

    def expected_s(self, address: str, size_bytes: int, now_s: float) -> float:
        """How long a transfer will take; infinity if the peer had better be left alone."""
        peer = self._peers.get(address)
        if peer is not None and now_s < peer.shunned_until_s:
            return math.inf
        if peer is None or not _fresh(peer, now_s):
            return ASSUMED_LATENCY_S + size_bytes / self._ordinary(now_s)
        return peer.latency_s + size_bytes / peer.bytes_per_s

    def latency_s(self, address: str) -> float:
        """How long a peer takes to answer, as far as known."""
        peer = self._peers.get(address)
        return peer.latency_s if peer is not None and peer.bytes_per_s else ASSUMED_LATENCY_S

    def observe(
        self, address: str, size_bytes: int, first_s: float, took_s: float, now_s: float
    ) -> None:
        """Learn from a transfer that brought something: `first_s` passed before the answer."""
        if size_bytes <= 0 or not 0.0 <= first_s <= took_s:
            return
        peer = self._peer(address)
        peer.failures = 0
        bytes_per_s = size_bytes / max(1e-6, took_s - first_s)
        if not _fresh(peer, now_s):
            peer.latency_s, peer.bytes_per_s = first_s, bytes_per_s
        else:
            peer.latency_s += _LEARNT_SHARE * (first_s - peer.latency_s)
            peer.bytes_per_s *= (bytes_per_s / peer.bytes_per_s) ** _LEARNT_SHARE
        peer.learnt_s = now_s

    def failed(self, address: str, now_s: float) -> None:
        """Leave a peer alone for a while, longer each time in a row."""
        peer = self._peer(address)
        wait_s = min(_BACK_OFF_MAX_S, _BACK_OFF_MIN_S * 2.0 ** min(peer.failures, 16))
        peer.failures += 1
        peer.shunned_until_s = now_s + wait_s

    def _ordinary(self, now_s: float) -> float:
        """What peers manage, of whom something is known."""
        known = [peer.bytes_per_s for peer in self._peers.values() if _fresh(peer, now_s)]
        return statistics.median(known) if known else ASSUMED_BYTES_PER_S

    def _peer(self, address: str) -> _Peer:
        peer = self._peers.setdefault(address, _Peer())
        self._peers.move_to_end(address)
        if len(self._peers) > _PEERS_MAX:
            self._peers.popitem(last=False)
        return peer


def _fresh(peer: _Peer, now_s: float) -> bool:
    return bool(peer.bytes_per_s) and now_s - peer.learnt_s <= _STALE_S


def prefill_s(
    predict: Callable[[int, int], float], tokens: int, chunk_tokens: int, rows: int
) -> float:
    """How long `tokens` of prompt take, in chunks beside `rows` decoding rows.

    `predict(tokens, prefill_tokens)` is the time of a step.
    """
    chunks, rest = divmod(tokens, chunk_tokens)
    total_s = chunks * predict(chunk_tokens + rows, chunk_tokens) if chunks else 0.0
    return total_s + (predict(rest + rows, rest) if rest else 0.0)


@dataclass(frozen=True, slots=True)
class PullPlan:
    """A transfer that should pay."""

    blocks: int
    block_bytes: int
    transfer_s: float
    """Expected."""
    prefill_s: float
    """That it saves."""
    patience_s: float
    """For so long nothing needs to come."""
    wait_s: float
    """Whoever waits for it waits no longer."""

    def still_pays(self, waited_s: float, arrived_bytes: int) -> bool:
        """Whether to go on, so long after the start, with so much having come."""
        share = arrived_bytes / (self.blocks * self.block_bytes)
        if share >= 1.0:
            return True
        if waited_s > self.wait_s:
            return False
        # The rest will take as long for each byte as what has come so far, stalls included.
        return waited_s <= self.patience_s or waited_s < self.prefill_s * share


def plan_pull(
    blocks: int,
    block_bytes: int,
    *,
    transfer_s: float,
    latency_s: float,
    prefill_s: float,
    wait_max_s: float,
) -> PullPlan | None:
    """Decide whether to fetch blocks; None: computing them is expected to be as quick."""
    # Written so that NaN declines.
    if blocks < BLOCKS_MIN or not transfer_s * GAIN_MIN < prefill_s:
        return None
    return PullPlan(
        blocks,
        block_bytes,
        transfer_s,
        prefill_s,
        patience_s=max(PATIENCE_MIN_S, 2.0 * latency_s, PATIENCE_SHARE * prefill_s),
        wait_s=min(wait_max_s, prefill_s),
    )
