"""Ids to text, piece by piece. Pure.

Decoding is defined on bytes: every id stands for some bytes, the text is their UTF-8 reading, and
what is not UTF-8 becomes U+FFFD. This gives the `tokenizers` library's text exactly for byte-level
tokenizers, invalid bytes included, at a cost per token that does not depend on the past. The
library's `DecodeStream` decodes everything since the last good character anew with each token
(300 us a token after 3,000 bytes that are no text), and cannot be told that the text has ended.
"""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from tokenizers import Tokenizer

from outrider.tokenizer import byte_tokenizer

REPLACEMENT: Final = "\ufffd"
"""What stands for bytes that are no text."""


class Detokenizer(Protocol):
    """Ids in, complete characters out. Serves one session."""

    def push(self, ids: Iterable[int]) -> str:
        """Add ids; return the characters that they complete."""
        ...

    def finish(self) -> str:
        """Return what is left at the end; half a character becomes U+FFFD."""
        ...


class Detokenizers:
    """Makes the detokenizers of one model, which share what is known of its vocabulary."""

    def __init__(self, tokenizer: Tokenizer, vocabulary_size: int) -> None:
        """`vocabulary_size` is one above the highest id that the tokenizer knows."""
        self._tokenizer = tokenizer
        to_bytes = _token_reader(tokenizer)
        self._token_bytes = (
            None if to_bytes is None else TokenBytes(tokenizer, to_bytes, vocabulary_size)
        )

    def new(self) -> Detokenizer:
        """Return a detokenizer for one session."""
        if self._token_bytes is None:
            return WindowDetokenizer(self._tokenizer)
        return ByteDetokenizer(self._token_bytes)

    def token_bytes(self, token: int) -> bytes:
        """Return what an id stands for by itself; empty if it is unknown or special."""
        if self._token_bytes is None:
            return self._tokenizer.decode([token]).encode()
        return self._token_bytes[token]


class ByteDetokenizer:
    """For tokenizers whose ids stand for bytes."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self._bytes_of = token_bytes.__getitem__
        self._rest = b""
        """The beginning of a character."""

    def push(self, ids: Iterable[int]) -> str:
        data = b"".join(map(self._bytes_of, ids))
        if self._rest:
            data = self._rest + data
        # What the standard library's incremental decoder does, in one call instead of three.
        text, used = codecs.utf_8_decode(data, "replace", False)
        self._rest = data[used:]
        return text

    def finish(self) -> str:
        rest, self._rest = self._rest, b""
        return rest.decode(errors="replace")


class WindowDetokenizer:
    """For all other tokenizers, which have to see neighbours to know an id's text.

    Decodes the ids not yet said behind the ids said last, and says the difference. This is what
    TGI does; here ids without text and ids that make no character cannot grow the window.
    """

    _UNSAID_MAX: Final = 16
    """Byte pieces of one character are at most 4; more ids than this wait for nothing."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._special_ids = _special_ids(tokenizer)
        self._said: list[int] = []
        self._said_text = ""
        self._unsaid: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        return "".join([self._push_one(token) for token in ids if token not in self._special_ids])

    def finish(self) -> str:
        text = self._tokenizer.decode(self._said + self._unsaid)
        self._unsaid = []
        return text[len(self._said_text) :]

    def _push_one(self, token: int) -> str:
        self._unsaid.append(token)
        text = self._tokenizer.decode(self._said + self._unsaid)
        said_length = len(self._said_text)
        undecided = len(text) <= said_length or text.endswith(REPLACEMENT)
        if undecided and len(self._unsaid) < self._UNSAID_MAX:
            return ""
        self._said, self._unsaid = self._unsaid, []
        self._said_text = self._tokenizer.decode(self._said)
        return text[said_length:]


class TokenBytes(dict[int, bytes]):
    """Id to bytes, filled as ids come up: a whole vocabulary would take a second to read."""

    def __init__(
        self, tokenizer: Tokenizer, to_bytes: Callable[[str], bytes], vocabulary_size: int
    ) -> None:
        super().__init__(dict.fromkeys(_special_ids(tokenizer), b""))
        self._tokenizer = tokenizer
        self._to_bytes = to_bytes
        self._vocabulary_size = vocabulary_size

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < self._vocabulary_size:
            return b""  # Not remembered: only the vocabulary bounds this table.
        token = self._tokenizer.id_to_token(token_id)
        found = b"" if token is None else self._to_bytes(token)
        self[token_id] = found
        return found


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    added = tokenizer.get_added_tokens_decoder()
    return frozenset(token_id for token_id, token in added.items() if token.special)


def _token_reader(tokenizer: Tokenizer) -> Callable[[str], bytes] | None:
    """Return how a token reads as bytes; None if that depends on its neighbours.

    Knows the two families of today's models: byte-level, and SentencePiece with or without byte
    fallback. In the second the library turns a whole run of byte tokens into U+FFFD if any of
    them is amiss; here the good characters stay, as nobody can wait for the end of a run.
    """
    if tokenizer.decoder is None:
        return None  # The library then puts a space between tokens.
    decoder = json.loads(tokenizer.decoder.__getstate__())
    steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _read_byte_level
    replaced: list[tuple[str, str]] = []
    rest = [dict(step) for step in steps]
    while rest and rest[0]["type"] in ("Replace", "Metaspace"):
        step = rest.pop(0)
        pattern = step.get("pattern", {}).get("String", step.get("replacement"))
        if not pattern:
            return None  # A regular expression.
        replaced.append((pattern, step.get("content", " ")))
    # A Strip of the start only concerns the very first space; see `TextCodec.decode`.
    starts_only = all(step["stop"] == 0 for step in rest if step["type"] == "Strip")
    tail = " ".join(step["type"] for step in rest)
    if not replaced or not starts_only or tail not in _SENTENCEPIECE_TAILS:
        return None
    byte_fallback = tail.startswith("ByteFallback")
    return functools.partial(_read_sentencepiece, tuple(replaced), byte_fallback)


_SENTENCEPIECE_TAILS: Final = (
    "",
    "Fuse",
    "Fuse Strip",
    "ByteFallback",
    "ByteFallback Fuse",
    "ByteFallback Fuse Strip",
)

_BYTE_TOKEN: Final = re.compile("<0x([0-9A-Fa-f]{2})>")


def _read_sentencepiece(
    replaced: Sequence[tuple[str, str]], byte_fallback: bool, token: str
) -> bytes:
    for pattern, content in replaced:
        token = token.replace(pattern, content)
    match = _BYTE_TOKEN.fullmatch(token) if byte_fallback else None
    return token.encode() if match is None else bytes.fromhex(match[1])


def _read_byte_level(token: str) -> bytes:
    try:
        return bytes(map(_byte_of_character().__getitem__, token))
    except KeyError:
        return token.encode()  # An added token in plain text, as the library takes it.


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Return the byte behind each character of the byte-level alphabet."""
    vocabulary = byte_tokenizer().get_vocab(with_added_tokens=False)
    return {character: byte for character, byte in vocabulary.items() if byte < 256}
