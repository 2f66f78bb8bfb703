"""A corpus that can be searched for what followed a text: one file, memory-mapped, read-only.

    magic | header length, u32 LE | header, JSON | tokens, u32 BE | suffixes, u32 LE | digest

`tokens` are the documents' ids, each document followed by the separator, which is no id: no match
and no continuation crosses it. They are big-endian, so that comparing bytes compares ids in order.
`suffixes` is the suffix array (Manber and Myers, 1990): where suffixes begin, sorted by their first
`MATCH_MAX` ids, which is as far as anything is looked for. The digest is XXH3-128 over all before.

Processes that open the same file share its pages. No torch is needed, nor a tokenizer: the header
names the one whose ids these are by its fingerprint.
"""

from __future__ import annotations

import bisect
import json
import mmap
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from outrider.errors import ConfigError

MAGIC = b"OUTRIDER STORE\r\n"
"""Line ends, which a transfer as text would change."""
VERSION = 1
MATCH_MAX = 16
"""Ids of a context that are looked for at most. Part of the format: suffixes are sorted by it."""
TOKENS_MAX = (1 << 32) - 1
_HEADER_BYTES_MAX = 1 << 16
_DIGEST_BYTES = 16
_ID_BYTES = 4

Tokens = NDArray[np.uint32]


@dataclass(frozen=True, slots=True)
class Header:
    """What a datastore says of itself."""

    version: int
    tokenizer_fingerprint: str
    vocabulary_size: int
    """Ids are below; it is also the separator."""
    tokens: int
    """Entries of the store: ids and one separator a document."""
    documents: int


@dataclass(frozen=True, slots=True)
class Match:
    """Where the end of a context occurs in the corpus."""

    length: int
    """Ids of the context that agree; 0 if none does."""
    first: int
    end: int
    """Range of the suffix array."""

    @property
    def count(self) -> int:
        """Occurrences."""
        return self.end - self.first


NO_MATCH = Match(0, 0, 0)


class Datastore:
    """An open datastore. Read-only, and safe to share between threads."""

    def __init__(self, path: Path, header: Header, data: mmap.mmap, start: int) -> None:
        """Use `open_datastore`, which checks what is given here."""
        self.path = path
        self.header = header
        self.digest = data[len(data) - _DIGEST_BYTES :].hex()
        self._data = data
        self._start = start
        middle = start + _ID_BYTES * header.tokens
        self._tokens = np.frombuffer(data, ">u4", header.tokens, start)
        self._suffixes = np.frombuffer(data, "<u4", header.tokens, middle)

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self._data)

    def longest_match(self, context: Sequence[int], *, shortest: int = 1) -> Match:
        """Find the longest end of `context` that occurs, of `MATCH_MAX` ids at most.

        Ends are backed off to by halving, since whatever holds a long end holds the shorter ones.
        Ids outside the vocabulary never match.
        """
        known = self._known(context[-MATCH_MAX:])
        best, low, high = NO_MATCH, shortest, len(known)
        while low <= high:
            length = (low + high) // 2
            found = self._occurrences(known[len(known) - length :])
            if found.count:
                best, low = found, length + 1
            else:
                high = length - 1
        return best

    def _known(self, context: Sequence[int]) -> Sequence[int]:
        """The end of a context behind its last id that the corpus cannot have."""
        size = self.header.vocabulary_size
        for index in range(len(context) - 1, -1, -1):
            if not 0 <= context[index] < size:
                return context[index + 1 :]
        return context

    def _occurrences(self, wanted: Sequence[int]) -> Match:
        pattern = struct.pack(f">{len(wanted)}I", *wanted)
        data, start, width = self._data, self._start, len(pattern)

        def prefix(suffix: np.uint32) -> bytes:
            at = start + _ID_BYTES * int(suffix)
            # Behind the last document come bytes that are none of ids, after its separator.
            return data[at : at + width]

        # The stubs know lists only; an array is a sequence as well.
        suffixes: Sequence[np.uint32] = self._suffixes  # type: ignore[assignment]
        first = bisect.bisect_left(suffixes, pattern, key=prefix)
        end = bisect.bisect_right(suffixes, pattern, lo=first, key=prefix)
        return Match(len(wanted), first, end)

    def continuations(self, match: Match, depth: int, count_max: int) -> list[tuple[int, ...]]:
        """What followed occurrences of a match, up to `depth` ids each and to the document's end.

        Of more than `count_max` occurrences so many are taken at equal distances in the order of
        the suffix array, that is in the order of what follows: a stratified sample.
        """
        taken = min(match.count, count_max)
        places = match.first + (np.arange(taken) * match.count) // max(1, taken)
        starts = self._suffixes[places].astype(np.int64) + match.length
        last = self.header.tokens - 1
        rows = self._tokens[np.minimum(starts[:, None] + np.arange(depth), last)].tolist()
        return [self._document(row) for row in rows]

    def _document(self, row: list[int]) -> tuple[int, ...]:
        separator = self.header.vocabulary_size
        return tuple(row[: row.index(separator)] if separator in row else row)


def write_datastore(
    target: BinaryIO,
    tokens: Tokens,
    suffixes: NDArray[np.uint32],
    *,
    tokenizer_fingerprint: str,
    vocabulary_size: int,
    documents: int,
) -> Header:
    """Write a datastore; `tokens` ends with a separator, `suffixes` is its suffix array."""
    header = Header(VERSION, tokenizer_fingerprint, vocabulary_size, len(tokens), documents)
    packed = json.dumps(asdict(header), sort_keys=True).encode()
    # What follows is then aligned to ids.
    packed += b" " * (-len(packed) % _ID_BYTES)
    parts: list[bytes | memoryview] = [
        MAGIC,
        struct.pack("<I", len(packed)),
        packed,
        tokens.astype(">u4").data,
        suffixes.astype("<u4").data,
    ]
    digest = xxhash.xxh3_128()
    for part in parts:
        digest.update(part)
        target.write(part)
    target.write(digest.digest())
    return header


def open_datastore(path: Path, *, verified: bool = True) -> Datastore:
    """Map a datastore. Raises `ConfigError` for what is not one, or was changed or cut.

    `verified` reads the whole file once (about a second for 10 GB that are in memory already).
    """
    try:
        with path.open("rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise ConfigError(f"datastore {path} cannot be read: {error}") from error
    header, start = _header(path, data)
    expected = start + 2 * _ID_BYTES * header.tokens + _DIGEST_BYTES
    if len(data) != expected:
        raise ConfigError(
            f"datastore {path} has {len(data)} bytes, its header promises {expected}: "
            "it was cut or extended; build or copy it again"
        )
    end = len(data) - _DIGEST_BYTES
    if verified and xxhash.xxh3_128_digest(memoryview(data)[:end]) != data[end:]:
        raise ConfigError(
            f"datastore {path} is corrupt: its checksum does not fit; build or copy it again"
        )
    return Datastore(path, header, data, start)


def _header(path: Path, data: mmap.mmap) -> tuple[Header, int]:
    """Return the header and where it ends."""
    at = len(MAGIC) + _ID_BYTES
    if data[: len(MAGIC)] != MAGIC or len(data) < at:
        raise ConfigError(
            f"{path} is not a datastore; `outrider datastore build` makes one of a corpus"
        )
    (length,) = struct.unpack("<I", data[len(MAGIC) : at])
    try:
        if length > _HEADER_BYTES_MAX:
            raise ValueError
        fields = json.loads(data[at : at + length])
        version = fields["version"]
        if version == VERSION:
            return _checked(Header(**fields)), at + length
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"datastore {path} is corrupt: its header cannot be read") from error
    raise ConfigError(
        f"datastore {path} has version {version}, this release reads {VERSION}; build it again"
    )


def _checked(header: Header) -> Header:
    """Raise `ValueError` for what no writer wrote."""
    numbers = (header.vocabulary_size, header.tokens, header.documents)
    if not all(type(number) is int and 0 < number <= TOKENS_MAX for number in numbers):
        raise ValueError("a count is no count")
    if type(header.tokenizer_fingerprint) is not str:
        raise ValueError("the fingerprint is no text")
    return header
