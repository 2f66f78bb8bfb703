"""Where beginnings of texts were computed of late, as this orchestrator saw itself. Pure.

Redis knows more, but it may be gone, and it hears of a block only once it is computed and told.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

BLOCKS_MAX = 65_536
"""Blocks remembered; of more, those used least recently are forgotten."""
HOLDERS_MAX = 4
"""Holders remembered for a block: the latest ones."""


@dataclass(frozen=True, slots=True)
class Prefix:
    """What is known of the beginning of a text."""

    root: bytes | None = None
    """What its blocks are chained to; None: it shares nothing."""
    hashes: tuple[bytes, ...] = ()
    """Of its blocks."""
    drafted: Mapping[str, tuple[bytes, ...]] = field(default_factory=dict)
    """Of the same blocks under the fingerprints of draft models."""
    holders: Mapping[str, int] = field(default_factory=dict)
    """Blocks by incarnation, as Redis said at admission."""
    looked_up: bool = False
    """Redis answered in time."""


class PrefixMemory:
    """Which incarnations of workers computed which blocks; see `outrider.kv_blocks`."""

    def __init__(self, blocks_max: int = BLOCKS_MAX) -> None:
        self._blocks_max = blocks_max
        self._holders: OrderedDict[bytes, dict[str, float]] = OrderedDict()
        """Hash to incarnation to time."""

    def __len__(self) -> int:
        return len(self._holders)

    def remember(self, hashes: Sequence[bytes], incarnation: str, now_s: float) -> None:
        """Take note that a worker computes a text's blocks."""
        # The first block last, so that the end of a text is forgotten before its beginning.
        for digest in reversed(hashes):
            holders = self._holders.get(digest)
            if holders is None:
                self._holders[digest] = {incarnation: now_s}
                continue
            self._holders.move_to_end(digest)
            if len(holders) > 1:
                holders.pop(incarnation, None)
            holders[incarnation] = now_s
            if len(holders) > HOLDERS_MAX:
                del holders[next(iter(holders))]
        while len(self._holders) > self._blocks_max:
            self._holders.popitem(last=False)

    def holders(self, hashes: Sequence[bytes], since_s: float) -> dict[str, int]:
        """Return by incarnation how many of a text's first blocks it computed after `since_s`."""
        found: dict[str, int] = {}
        for count in range(len(hashes), 0, -1):
            for incarnation, when_s in self._holders.get(hashes[count - 1], {}).items():
                if when_s >= since_s and incarnation not in found:
                    found[incarnation] = count
        return found
