"""Text to ids and back: encoding, chat templates, incremental decoding, stop strings.

Plain CPU code without IO or a model. A `TextCodec` is shared by all sessions of a model and may be
used from several threads; a `TextStream` belongs to one session.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final, NamedTuple

from tokenizers import Tokenizer

from orchestrator.chat_template import ChatTemplate
from orchestrator.detokenizer import Detokenizer, Detokenizers
from orchestrator.stop_strings import StopMatcher
from outrider.errors import InternalError, InvalidRequest, ModelLoadError
from outrider.tokenizer import tokenizer_fingerprint


class TextCodec:
    """A model's tokenizer and chat template."""

    def __init__(self, tokenizer: Tokenizer, chat_template: ChatTemplate | None = None) -> None:
        # A tokenizer file may carry its training set-up; a prompt must never be cut silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        ids = tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocabulary_size: Final = max(ids, default=-1) + 1
        """One above the highest id that the tokenizer knows; a model may have more rows."""
        self.fingerprint: Final = tokenizer_fingerprint(tokenizer)
        """Identity of the vocabulary; see `outrider.tokenizer.tokenizer_fingerprint`."""
        self._detokenizers = Detokenizers(tokenizer, self.vocabulary_size)
        added = tokenizer.get_added_tokens_decoder()
        self._special = {token: entry.content for token, entry in added.items() if entry.special}

    @classmethod
    def from_files(
        cls, files: Mapping[str, bytes], *, now: Callable[[], datetime] = datetime.now
    ) -> TextCodec:
        """Build a codec from the files that a verifier serves, by name.

        Needs tokenizer.json; uses tokenizer_config.json, special_tokens_map.json and
        chat_template.jinja, which goes before a template in the configuration. `now` is the
        clock of templates that write today's date. Raises `ModelLoadError`.
        """
        if "tokenizer.json" not in files:
            raise ModelLoadError("the model has no tokenizer.json, so text cannot become ids")
        try:
            tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        except Exception as error:  # The library raises nothing more exact.
            raise ModelLoadError(f"tokenizer.json cannot be read: {error}") from error
        config = _read_object(files, "tokenizer_config.json")
        source = _template_source(files, config)
        if source is None:
            return cls(tokenizer)
        names = _special_tokens(_read_object(files, "special_tokens_map.json"), config)
        return cls(tokenizer, ChatTemplate(source, names, now))

    def encode(self, text: str) -> tuple[int, ...]:
        """Return the ids of `text`, with the special tokens that the tokenizer adds.

        Raises `InvalidRequest`.
        """
        return self._encode("prompt", text, add_special_tokens=True)

    def encode_chat(self, messages: Sequence[tuple[str, str]]) -> tuple[int, ...]:
        """Return the ids of a conversation of (role, content), up to where the answer begins.

        Raises `InvalidRequest` if there is no template, or if it refuses the conversation.
        """
        if self._chat_template is None:
            raise InvalidRequest("chat", "the model has no chat template; send a prompt instead")
        if not messages:
            raise InvalidRequest("chat", "has no messages")
        text = self._chat_template.render(messages)
        # The template has written the special tokens already.
        return self._encode("chat", text, add_special_tokens=False)

    def encode_prediction(self, text: str) -> tuple[int, ...]:
        """Return the ids of text that an output may hold, without special tokens.

        Raises `InvalidRequest`.
        """
        return self._encode("prediction", text, add_special_tokens=False)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes that an id stands for by itself; special ones read as their names."""
        name = self._special.get(token)
        return self._detokenizers.token_bytes(token) if name is None else name.encode()

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids` as it reads behind a prompt, without special tokens.

        Unknown ids have no text. The space with which SentencePiece tokenizers begin a word stays
        at the beginning too, as the text goes on from a prompt.
        """
        return TextStream(self).push(ids, last=True).text

    def detokenizer(self) -> Detokenizer:
        """Return a new incremental detokenizer; `TextStream` is the one for sessions."""
        return self._detokenizers.new()

    def _encode(self, field: str, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        try:
            text.encode()  # JSON can carry half a surrogate pair, which no tokenizer takes.
        except UnicodeEncodeError as error:
            raise InvalidRequest(field, f"is not valid Unicode: {error.reason}") from error
        return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


class TextPiece(NamedTuple):
    """What a `TextStream` has to say about some ids; one is made for every commit."""

    text: str
    """To append to the output."""
    tokens_kept: int
    """How many of the ids pushed belong to the output, counted from the first."""
    stopped: bool
    """True if a stop string has ended the output, now or before."""


class TextStream:
    """Turns the ids of one session into text, piece by piece, and looks for stop strings.

    The pieces together are `codec.decode` of all ids, or the part of it before the stop string
    that is complete first (of those complete at the same character, the longest). They do not
    depend on how the ids were grouped. A character whose bytes are not all there yet, and text
    that may be the beginning of a stop string, are held back until the matter is settled.
    """

    def __init__(self, codec: TextCodec, stops: Sequence[str] = ()) -> None:
        """Raises `InvalidRequest` for empty, overlong or too many stop strings."""
        self._detokenizer = codec.detokenizer()
        self._stops = StopMatcher(stops)
        self._held = ""
        """Decoded but not yet said: the beginning of one or more stop strings."""
        self._stopped = False
        self._finished = False

    def push(self, ids: Sequence[int], *, last: bool = False) -> TextPiece:
        """Add ids; with `last` also say what `finish` would, as one piece.

        After a stop string has been seen, ids are ignored. Raises `InternalError` after `finish`.
        """
        if self._stopped:
            return TextPiece("", 0, stopped=True)
        if self._finished:
            raise InternalError("ids were pushed to a text stream that had been finished")
        if self._stops.empty and not last:
            return TextPiece(self._detokenizer.push(ids), len(ids), stopped=False)
        self._finished = last
        said: list[str] = []
        if self._stops.empty:
            said.append(self._detokenizer.push(ids))
        else:
            # One by one, to know which id completes a stop string.
            for kept, token in enumerate(ids, start=1):
                said.append(self._release(self._detokenizer.push((token,))))
                if self._stopped:
                    return TextPiece("".join(said), kept, stopped=True)
        if last:
            said.append(self._release(self._detokenizer.finish()))
            said.append(self._held)
            self._held = ""
        return TextPiece("".join(said), len(ids), stopped=self._stopped)

    def finish(self) -> TextPiece:
        """End the output: say what was held back. Half a character becomes U+FFFD."""
        if self._finished:
            return TextPiece("", 0, stopped=self._stopped)
        return self.push((), last=True)

    def _release(self, text: str) -> str:
        """Take text in; return what of the held and the new text can be said."""
        if not text:
            return ""
        text_end = len(self._held)
        match = self._stops.scan(text)
        pending = self._held + text
        if match is None:
            text_end = len(pending) - self._stops.open_characters
            self._held = pending[text_end:]
        else:
            text_end += match.end - match.length
            self._held = ""
            self._stopped = True
        return pending[:text_end]


def _read_object(files: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """Return a JSON file's object, empty if there is none. Raises `ModelLoadError`."""
    try:
        value = json.loads(files.get(name, b"{}"))
    except ValueError as error:
        raise ModelLoadError(f"{name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ModelLoadError(f"{name} must hold a JSON object, not a {type(value).__name__}")
    return value


def _template_source(files: Mapping[str, bytes], config: Mapping[str, Any]) -> str | None:
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise ModelLoadError(f"chat_template.jinja is not UTF-8: {error}") from error
    source = config.get("chat_template")
    if isinstance(source, list):  # Several, by name.
        named = [entry for entry in source if isinstance(entry, dict)]
        source = next((e.get("template") for e in named if e.get("name") == "default"), None)
    return source if isinstance(source, str) else None


def _special_tokens(*sources: Mapping[str, Any]) -> dict[str, str]:
    """Return the tokens that templates know by name, `bos_token` and so on; the last wins."""
    found: dict[str, str] = {}
    for source in sources:
        for name, token in source.items():
            content = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(content, str):
                found[name] = content
    return found
