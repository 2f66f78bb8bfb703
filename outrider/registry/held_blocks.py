"""What a worker holds, and what of it has not been told yet: between its threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

NEWS_MAX: Final = 65_536
"""Changes that wait for Redis; if there are more, all that is held is told again instead."""


@dataclass(frozen=True, slots=True)
class News:
    """What to tell: hashes of blocks, each with the hash of its text's first block."""

    held: dict[bytes, bytes]
    dropped: dict[bytes, bytes]


class HeldBlocks:
    """What a worker holds, and what of it Redis has not been told yet. For any thread.

    A `kv_blocks.BlockListener`.
    """

    def __init__(self, news_max: int = NEWS_MAX) -> None:
        self._news_max = news_max
        self._lock = threading.Lock()
        self._held: dict[bytes, bytes] = {}
        """Hash of each block to that of its text's first block; oldest news first."""
        self._new: dict[bytes, None] = {}
        self._gone: dict[bytes, bytes] = {}
        self.overflowed = False
        """News was lost; whoever tells Redis everything again sets it back."""

    def __len__(self) -> int:
        return len(self._held)

    def held(self, digest: bytes, first: bytes) -> None:
        """A block is held from now on."""
        with self._lock:
            self._held[digest] = first
            self._gone.pop(digest, None)
            self._new[digest] = None
            self._bound()

    def dropped(self, digest: bytes) -> None:
        """A block is held no longer."""
        with self._lock:
            first = self._held.pop(digest, None)
            if first is None:
                return
            self._new.pop(digest, None)
            self._gone[digest] = first
            self._bound()

    def take(self, count: int) -> News:
        """Take up to `count` pieces of news, drops first: they mislead."""
        with self._lock:
            dropped = _pop(self._gone, count)
            new = _pop(self._new, count - len(dropped))
            return News({digest: self._held[digest] for digest in new}, dropped)

    def give_back(self, news: News) -> None:
        """Take drops again that could not be told."""
        with self._lock:
            for digest, first in news.dropped.items():
                if digest not in self._held:
                    self._gone[digest] = first
            self._bound()

    def everything(self) -> list[bytes]:
        """Return the hashes of all that is held."""
        with self._lock:
            return list(self._held)

    def still_held(self, digests: list[bytes]) -> dict[bytes, bytes]:
        """Return those that are still held, with the hash of the text's first block."""
        with self._lock:
            return {digest: self._held[digest] for digest in digests if digest in self._held}

    def _bound(self) -> None:
        if len(self._new) + len(self._gone) > self._news_max:
            # Blocks that were dropped unheard of mislead until they expire: that costs a hit.
            self._new.clear()
            self._gone.clear()
            self.overflowed = True


def _pop(news: dict[bytes, Any], count: int) -> dict[bytes, Any]:
    return {digest: news.pop(digest) for digest in list(_first(news, count))}


def _first(news: dict[bytes, Any], count: int) -> Iterator[bytes]:
    return (digest for digest, _ in zip(news, range(count), strict=False))
