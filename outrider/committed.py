"""Committed tokens of one session, with a digest for every length it has had.

The token list is the truth of a session; everything else (KV, trees, text) is a cache of it.
Each holder of a copy (verifier, drafter, orchestrator) keeps one log of its own.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

import xxhash


def digest(tokens: Sequence[int]) -> int:
    """XXH3-64 over token ids as little-endian uint32."""
    return xxhash.xxh3_64_intdigest(struct.pack(f"<{len(tokens)}I", *tokens))


class CommittedLog:
    """Append-only token list that knows the digest of each prefix since it was opened.

    `digest_at(n)` is O(1) for every length from the initial one on; shorter prefixes are unknown
    on purpose, since no draft can be rooted before the session was opened.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        if not tokens:
            raise ValueError("a session has at least one committed token")
        self.tokens: list[int] = list(tokens)
        self._first_length = len(tokens)
        self._hasher = xxhash.xxh3_64(struct.pack(f"<{len(tokens)}I", *tokens))
        self._digests: list[int] = [self._hasher.intdigest()]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def tip(self) -> int:
        """The last committed token."""
        return self.tokens[-1]

    def append(self, tokens: Sequence[int]) -> None:
        """Add decided tokens."""
        for token in tokens:
            self._hasher.update(struct.pack("<I", token))
            self._digests.append(self._hasher.intdigest())
        self.tokens.extend(tokens)

    def digest_at(self, length: int) -> int | None:
        """Digest of the first `length` tokens, or None if that length is unknown here."""
        index = length - self._first_length
        return self._digests[index] if 0 <= index < len(self._digests) else None

    def since(self, length: int) -> list[int]:
        """Tokens committed after the first `length`."""
        return self.tokens[length:]
