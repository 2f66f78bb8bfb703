"""Where a client stands in a stream, as the id of an event says it.

`GENERATION:OFFSET-DIGEST-CHARACTERS[-end],...`, a part for each choice: output ids that it has, the
XXH3-64 over them (little-endian uint32, hexadecimal), code points of text, and whether it has the
end. It is all that a resumption needs to know, and a client only has to send it back.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import xxhash

from outrider.errors import InvalidRequest

_PART = re.compile(r"(\d{1,10})-([0-9a-f]{16})-(\d{1,10})(-end)?", re.ASCII)
_GENERATION = re.compile(r"[A-Za-z0-9_-]{1,64}")
_CHOICES_MAX = 128


@dataclass(slots=True)
class Position:
    """How far one choice has come; grows with what is said of it."""

    offset: int = 0
    characters: int = 0
    ended: bool = False
    _hasher: xxhash.xxh3_64 = field(default_factory=xxhash.xxh3_64)

    def advance(self, ids: Sequence[int], text: str) -> None:
        """Take in what has been said."""
        self.offset += len(ids)
        self.characters += len(text)
        self._hasher.update(struct.pack(f"<{len(ids)}I", *ids))

    def __str__(self) -> str:
        end = "-end" if self.ended else ""
        return f"{self.offset}-{self._hasher.hexdigest()}-{self.characters}{end}"


@dataclass(frozen=True, slots=True)
class KnownPosition:
    """What a client says of one choice."""

    offset: int
    digest: int
    characters: int
    ended: bool


def parse_event_id(text: str) -> tuple[str, tuple[KnownPosition, ...]]:
    """Read an event's id: the generation, and each choice's position. Raises `InvalidRequest`."""
    generation, _, rest = text.partition(":")
    parts = rest.split(",")
    matches = [match for part in parts if (match := _PART.fullmatch(part))]
    whole = len(matches) == len(parts) <= _CHOICES_MAX
    if not (whole and _GENERATION.fullmatch(generation)):
        raise InvalidRequest("last-event-id", "is not the id of an event of ours")
    return generation, tuple(
        KnownPosition(int(match[1]), int(match[2], 16), int(match[3]), bool(match[4]))
        for match in matches
    )
