"""Encoding, chat templates, incremental decoding and stop strings."""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterator, Sequence
from datetime import datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from orchestrator.detokenizer import ByteDetokenizer, WindowDetokenizer
from orchestrator.stop_strings import STOP_CHARACTERS_MAX, STOPS_MAX
from orchestrator.text import TextCodec, TextPiece, TextStream
from outrider.errors import InternalError, InvalidRequest, ModelLoadError
from outrider.tokenizer import (
    BYTE_SPECIAL_TOKENS,
    BYTE_VOCABULARY_SIZE,
    TURN_START,
    byte_tokenizer,
    byte_tokenizer_files,
    tokenizer_fingerprint,
)

BYTES = TextCodec.from_files(byte_tokenizer_files())


def byte_level_with_words() -> Tokenizer:
    """Byte-level, with tokens of several bytes and added tokens of every sort."""
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    letters = {byte: character for character, byte in vocabulary.items()}
    for piece in ("the", " stop", "\n\n", "ab", "abc", "é", "日本", "🦊"):
        vocabulary["".join(letters[byte] for byte in piece.encode())] = len(vocabulary)
    for half in ("日本".encode()[1:], "🦊".encode()[:3], b"\x80\xffa"):
        vocabulary["".join(letters[byte] for byte in half)] = len(vocabulary)
    words = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    words.decoder = decoders.ByteLevel()
    # Plain text; text that reads as byte-level letters; both, which makes it plain text.
    words.add_tokens([AddedToken("<tool 日>"), AddedToken("Ġ¢¬"), AddedToken("Ġ x é")])
    words.add_special_tokens(["<eos>"])
    return words


def sentencepiece(*, byte_fallback: bool = True, decoder: str = "sequence") -> Tokenizer:
    """Build the Llama 2 and Gemma kind of tokenizer."""
    pieces = ["<unk>", "▁", "▁the", "▁stop", "a", "b", "é", "日", "\ufffd", "<0xZZ>"]
    pieces += [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    model = models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=byte_fallback)
    tokenizer = Tokenizer(model)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = (
        decoders.Sequence(steps) if decoder == "sequence" else decoders.Metaspace("▁", "never")
    )
    tokenizer.add_special_tokens(["<s>"])
    return tokenizer


WORDS = TextCodec(byte_level_with_words())
PIECES = TextCodec(sentencepiece())


def id_of(tokenizer: Tokenizer, token: str) -> int:
    found = tokenizer.token_to_id(token)
    assert found is not None
    return found


def decode_in_groups(
    codec: TextCodec, ids: Sequence[int], cuts: Sequence[int], stops: Sequence[str] = ()
) -> tuple[str, int, bool, list[TextPiece]]:
    """Push `ids`, cut at `cuts`; return text, tokens kept, whether it stopped, and the pieces."""
    stream = TextStream(codec, stops)
    edges = [0, *sorted(min(cut, len(ids)) for cut in cuts), len(ids)]
    pieces = [stream.push(ids[a:b]) for a, b in itertools.pairwise(edges)]
    pieces.append(stream.finish())
    kept = sum(piece.tokens_kept for piece in pieces)
    return "".join(piece.text for piece in pieces), kept, pieces[-1].stopped, pieces


def ids_of(codec: TextCodec) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, codec.vocabulary_size - 1), max_size=40)


cuts_strategy = st.lists(st.integers(0, 40), max_size=40)


# --- decoding ----------------------------------------------------------------------------------


@given(content=st.binary(max_size=60), cuts=cuts_strategy)
def test_any_bytes_decode_as_utf8_however_they_are_grouped(content: bytes, cuts: list[int]) -> None:
    text, kept, stopped, _ = decode_in_groups(BYTES, list(content), cuts)
    assert text == content.decode("utf-8", errors="replace")
    assert text == byte_tokenizer().decode(list(content))
    assert (kept, stopped) == (len(content), False)


@given(ids=ids_of(WORDS), cuts=cuts_strategy)
def test_byte_level_text_is_the_librarys(ids: list[int], cuts: list[int]) -> None:
    expected = byte_level_with_words_cached().decode(ids)
    assert decode_in_groups(WORDS, ids, cuts)[0] == expected
    assert WORDS.decode(ids) == expected


@given(text=st.text(max_size=30), cuts=cuts_strategy)
def test_text_comes_back_from_sentencepiece_ids(text: str, cuts: list[int]) -> None:
    ids = [token for character in text for token in sentencepiece_ids(character)]
    assert decode_in_groups(PIECES, ids, cuts)[0] == text


@given(ids=ids_of(PIECES), cuts=cuts_strategy)
def test_sentencepiece_grouping_does_not_matter(ids: list[int], cuts: list[int]) -> None:
    text = decode_in_groups(PIECES, ids, cuts)[0]
    assert text == PIECES.decode(ids)
    library = sentencepiece_cached().decode(ids)
    # The library gives a whole run of byte tokens up if one of them is amiss.
    if "\ufffd" not in library:
        assert text == library


@given(content=st.text(max_size=12).map(str.encode), cuts=cuts_strategy)
def test_no_character_is_said_before_it_is_complete(content: bytes, cuts: list[int]) -> None:
    pieces = decode_in_groups(BYTES, list(content), cuts)[3]
    said = b""
    for piece in pieces:
        said += piece.text.encode()
        assert content.startswith(said)


def test_half_a_character_waits_for_the_end() -> None:
    stream = TextStream(BYTES)
    assert stream.push([*b"a\xe6\x97"]) == TextPiece("a", 3, stopped=False)
    assert stream.finish() == TextPiece("\ufffd", 0, stopped=False)
    assert stream.finish() == TextPiece("", 0, stopped=False)


def test_bytes_that_cannot_become_a_character_do_not_wait() -> None:
    stream = TextStream(BYTES)
    assert stream.push([0xFF]).text == "\ufffd"
    assert stream.push([*b"\xe6\x97"]).text == ""
    assert stream.push([*b"x"]).text == "\ufffdx"


def test_special_and_unknown_ids_have_no_text() -> None:
    end = 256
    ids = [*b"a", end, *b"b", BYTE_VOCABULARY_SIZE, 10**12, -1, *b"c"]
    assert BYTES.decode(ids) == "abc"
    stream = TextStream(BYTES)
    assert stream.push(ids).tokens_kept == len(ids)


def test_a_special_id_does_not_break_a_character() -> None:
    assert BYTES.decode([0xC3, 256, 0xA9]) == "é"


def test_sentencepiece_keeps_good_characters_of_a_bad_run() -> None:
    tokenizer = sentencepiece_cached()
    ids = [id_of(tokenizer, f"<0x{byte:02X}>") for byte in "日本".encode() + b"\xff"]
    assert PIECES.decode(ids) == "日本\ufffd"


def test_first_space_of_sentencepiece_is_kept() -> None:
    tokenizer = sentencepiece()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    codec = TextCodec(tokenizer)
    assert isinstance(codec.detokenizer(), ByteDetokenizer)
    ids = [id_of(tokenizer, "▁the"), id_of(tokenizer, "▁stop")]
    assert codec.decode(ids) == " the stop"


def test_a_decoder_that_strips_the_end_goes_through_a_window() -> None:
    tokenizer = sentencepiece()
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 0, 1)])
    assert isinstance(TextCodec(tokenizer).detokenizer(), WindowDetokenizer)


def test_metaspace_decoder() -> None:
    tokenizer = sentencepiece(byte_fallback=False, decoder="metaspace")
    codec = TextCodec(tokenizer)
    assert isinstance(codec.detokenizer(), ByteDetokenizer)
    ids = [id_of(tokenizer, piece) for piece in ("▁the", "▁", "é", "<0xZZ>")]
    assert codec.decode(ids) == " the é<0xZZ>"


def neighbourly_tokenizers() -> Iterator[object]:
    """Yield tokenizers whose decoders look at neighbouring tokens."""
    vocabulary = {"a": 0, "b</w>": 1, "##c": 2, "d": 3, ",": 4, "</w>": 5}
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Replace("ab", "x")]
    for name, decoder in (
        ("none", None),
        ("bpe", decoders.BPEDecoder("</w>")),
        ("wordpiece", decoders.WordPiece("##", cleanup=False)),
        ("late replace", decoders.Sequence(steps)),
    ):
        tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
        if decoder is not None:
            tokenizer.decoder = decoder
        tokenizer.add_special_tokens(["<s>"])
        yield pytest.param(tokenizer, id=name)


@pytest.mark.parametrize("tokenizer", [*neighbourly_tokenizers()][:3])
@given(ids=st.lists(st.integers(0, 6), max_size=40), cuts=cuts_strategy)
def test_other_decoders_go_through_a_window(
    tokenizer: Tokenizer, ids: list[int], cuts: list[int]
) -> None:
    codec = TextCodec(tokenizer)
    assert isinstance(codec.detokenizer(), WindowDetokenizer)
    assert decode_in_groups(codec, ids, cuts)[0] == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [*neighbourly_tokenizers()][3:])
def test_a_decoder_of_unknown_steps_goes_through_a_window(tokenizer: Tokenizer) -> None:
    codec = TextCodec(tokenizer)
    assert isinstance(codec.detokenizer(), WindowDetokenizer)
    assert codec.decode([3, 0, 3]) == "dad"


@given(content=st.text(max_size=30).map(str.encode), cuts=cuts_strategy)
def test_window_waits_for_whole_characters(content: bytes, cuts: list[int]) -> None:
    window = WindowDetokenizer(byte_tokenizer_cached())
    edges = [0, *sorted(min(cut, len(content)) for cut in cuts), len(content)]
    text = "".join(window.push(content[a:b]) for a, b in itertools.pairwise(edges))
    assert text + window.finish() == content.decode()


def test_window_does_not_wait_for_what_never_becomes_text() -> None:
    window = WindowDetokenizer(byte_tokenizer_cached())
    said = window.push(b"\xff" * 100)
    assert len(said) > 80
    assert said + window.finish() == "\ufffd" * 100


# --- stop strings ------------------------------------------------------------------------------


def expected_end(text: str, stops: Sequence[str]) -> tuple[int, int] | None:
    """Return (begin, end) of the stop string complete first, the longest of several."""
    for end in range(1, len(text) + 1):
        lengths = [len(stop) for stop in stops if text[:end].endswith(stop)]
        if lengths:
            return end - max(lengths), end
    return None


def expected_kept(codec: TextCodec, ids: Sequence[int], end: int) -> int:
    """Return how many ids it takes until `end` characters are complete."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    characters = 0
    for kept, token in enumerate(ids, start=1):
        characters += len(decoder.decode(BYTES_OF_WORDS[token]))
        if characters >= end:
            return kept
    return len(ids)  # Completed by what `finish` says.


stops_strategy = st.lists(
    st.text(st.sampled_from("abcé日\ufffd"), min_size=1, max_size=5), min_size=1, max_size=4
)
stop_ids_strategy = st.lists(
    st.sampled_from([*b"abc", *"é日".encode(), 0xFF, 259, 260, 261, 262]), max_size=40
)
"""Ids of the words tokenizer that meet those stop strings often."""


@given(ids=stop_ids_strategy, stops=stops_strategy, cuts=cuts_strategy)
def test_output_ends_before_the_stop_string_complete_first(
    ids: list[int], stops: list[str], cuts: list[int]
) -> None:
    full = WORDS.decode(ids)
    found = expected_end(full, stops)
    text, kept, stopped, pieces = decode_in_groups(WORDS, ids, cuts, stops)
    assert stopped == (found is not None)
    if found is None:
        assert (text, kept) == (full, len(ids))
    else:
        begin, end = found
        assert text == full[:begin]
        assert kept == expected_kept(WORDS, ids, end)
    # What one push says with `last` is what all pieces say.
    whole = TextStream(WORDS, stops).push(ids, last=True)
    assert whole == TextPiece(text, kept, stopped)
    assert [piece.stopped for piece in pieces] == sorted(piece.stopped for piece in pieces)


@given(ids=stop_ids_strategy, stops=stops_strategy)
def test_held_back_text_is_the_longest_beginning_of_a_stop_string(
    ids: list[int], stops: list[str]
) -> None:
    stream = TextStream(WORDS, stops)
    plain = TextStream(WORDS)
    said = decoded = ""
    for token in ids:
        piece = stream.push([token])
        said += piece.text
        decoded += plain.push([token]).text
        if piece.stopped:
            return
        beginnings = [stop[:length] for stop in stops for length in range(1, len(stop))]
        held = max((len(b) for b in beginnings if decoded.endswith(b)), default=0)
        assert said == decoded[: len(decoded) - held]


def test_stop_string_within_one_token() -> None:
    word = WORDS.decode([258])
    assert word == "\n\n"
    assert TextStream(WORDS, ["\n"]).push([*b"x", 258, *b"y"]) == TextPiece("x", 2, stopped=True)


def test_stop_string_across_tokens_and_pushes() -> None:
    stream = TextStream(BYTES, ["END"])
    assert stream.push([*b"an E"]) == TextPiece("an ", 4, stopped=False)
    assert stream.push([*b"N"]) == TextPiece("", 1, stopped=False)
    assert stream.push([*b"D of"]) == TextPiece("", 1, stopped=True)
    assert stream.push([*b"it"]) == TextPiece("", 0, stopped=True)
    assert stream.finish() == TextPiece("", 0, stopped=True)


def test_held_back_text_is_said_when_it_turns_out_harmless() -> None:
    stream = TextStream(BYTES, ["aab"])
    assert stream.push([*b"aaa"]).text == "a"
    assert stream.push([*b"c"]).text == "aac"
    assert stream.push([*b"a"]).text == ""
    assert stream.finish() == TextPiece("a", 0, stopped=False)


def test_of_overlapping_stop_strings_the_one_complete_first_counts() -> None:
    assert TextStream(BYTES, ["bcd", "c"]).push([*b"abcd"]) == TextPiece("ab", 3, stopped=True)
    assert TextStream(BYTES, ["c", "abc"]).push([*b"xabc"]) == TextPiece("x", 4, stopped=True)


def test_stop_string_completed_by_the_end() -> None:
    stream = TextStream(BYTES, ["a\ufffd"])
    assert stream.push([*b"xa\xe6"]) == TextPiece("x", 3, stopped=False)
    assert stream.finish() == TextPiece("", 0, stopped=True)


def test_stop_strings_are_checked() -> None:
    for stops in ([""], ["a"] * (STOPS_MAX + 1), ["a" * (STOP_CHARACTERS_MAX + 1)]):
        with pytest.raises(InvalidRequest, match=r"^stop: "):
            TextStream(BYTES, stops)


def test_pushing_after_the_end_is_a_defect() -> None:
    stream = TextStream(BYTES)
    stream.finish()
    with pytest.raises(InternalError):
        stream.push([1])


# --- encoding and chat -------------------------------------------------------------------------


@given(text=st.text(max_size=30))
def test_encoded_text_comes_back(text: str) -> None:
    special = any(token in text for token in BYTE_SPECIAL_TOKENS)
    assert special or BYTES.decode(BYTES.encode(text)) == text


def test_identity() -> None:
    assert BYTES.vocabulary_size == BYTE_VOCABULARY_SIZE
    assert BYTES.fingerprint == tokenizer_fingerprint(byte_tokenizer())


def test_prompts_get_the_special_tokens_and_chats_only_the_templates() -> None:
    tokenizer = byte_tokenizer()
    start = id_of(tokenizer, TURN_START)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{TURN_START} $0", special_tokens=[(TURN_START, start)]
    )
    # As it was in training: neither may reach a prompt.
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    files = byte_tokenizer_files() | {"tokenizer.json": tokenizer.to_str().encode()}
    codec = TextCodec.from_files(files)
    assert codec.encode("hey") == (start, *b"hey")
    assert codec.encode_chat([("user", "hey")])[:2] == (start, ord("u"))


def test_chat_is_laid_out_for_the_answer() -> None:
    ids = BYTES.encode_chat([("system", "Be brief."), ("user", "Hé <b>")])
    assert byte_tokenizer().decode(ids, skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHé <b><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def codec_with(template: str | None, **config: object) -> TextCodec:
    files = byte_tokenizer_files()
    del files["chat_template.jinja"]
    if template is not None:
        config["chat_template"] = template
    files["tokenizer_config.json"] = json.dumps(config).encode()
    return TextCodec.from_files(files, now=lambda: datetime(2026, 11, 5))


def chat_text(codec: TextCodec) -> str:
    return byte_tokenizer().decode(codec.encode_chat([("user", "<é>")]), skip_special_tokens=False)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ eos_token }}|", "<|endoftext|><|im_end|>|"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ strftime_now('%d %b %Y') }}", "05 Nov 2026"),
        ("{% for m in messages %}\n    {% break %}\n{% endfor %}x", "x"),
        ("{% generation %}answer{% endgeneration %}", "answer"),
        ("{% set n = namespace(a=1) %}{% set n.a = n.a + 1 %}{{ n.a }}", "2"),
        ("{{ dict(a=1).a }}", "1"),
        ("{{ tools is none }} {{ add_generation_prompt }}", "True True"),
        ("{% if unheard_of is defined %}no{% endif %}yes", "yes"),
    ],
)
def test_templates_find_what_they_expect(template: str, text: str) -> None:
    tokens = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}}
    assert chat_text(codec_with(template, **tokens, pad_token=None)) == text


def test_named_templates_and_precedence() -> None:
    named = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    assert chat_text(codec_with(None, chat_template=named)) == "d"
    files = byte_tokenizer_files()
    files["tokenizer_config.json"] = json.dumps({"chat_template": "old", "bos_token": "B"}).encode()
    files["special_tokens_map.json"] = json.dumps({"bos_token": "A", "sep_token": "S"}).encode()
    files["chat_template.jinja"] = b"{{ bos_token }}{{ sep_token }}"
    assert chat_text(TextCodec.from_files(files)) == "BS"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% if %}", "is broken"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation"),
        ("{{ messages[7].content.x }}", "refuses the conversation"),
        ("{{ ''.__class__.__mro__ }}", "refuses the conversation"),
        ("{{ messages.append(1) }}", "refuses the conversation"),
        ("{% set n = namespace(__class__=1) %}", "refuses the conversation"),
    ],
)
def test_template_faults_are_the_callers_to_see(template: str | None, message: str) -> None:
    codec = codec_with(template)
    with pytest.raises(InvalidRequest, match=message) as caught:
        codec.encode_chat([("user", "hello")])
    assert caught.value.field == "chat"
    assert codec.encode("hello") == tuple(b"hello")


def test_input_that_is_no_text() -> None:
    with pytest.raises(InvalidRequest, match=r"^prompt: is not valid Unicode"):
        BYTES.encode("\ud800")
    with pytest.raises(InvalidRequest, match=r"^chat: is not valid Unicode"):
        BYTES.encode_chat([("user", "\ud800")])
    with pytest.raises(InvalidRequest, match=r"^chat: has no messages"):
        BYTES.encode_chat([])


@pytest.mark.parametrize(
    "broken",
    [
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"\xff"},
        {"tokenizer_config.json": b"["},
        {"tokenizer_config.json": b"[]"},
        {"special_tokens_map.json": b"1"},
        {"chat_template.jinja": b"\xff"},
    ],
)
def test_broken_files_name_themselves(broken: dict[str, bytes]) -> None:
    (name,) = broken
    with pytest.raises(ModelLoadError, match=name):
        TextCodec.from_files(byte_tokenizer_files() | broken)


def test_a_tokenizer_is_needed() -> None:
    with pytest.raises(ModelLoadError, match=r"no tokenizer\.json"):
        TextCodec.from_files({})


def test_pre_tokenizer_is_the_files() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    codec = TextCodec.from_files({"tokenizer.json": tokenizer.to_str().encode()})
    assert codec.encode("a") == tuple(b" a")


# Building a tokenizer takes a millisecond, too long for every example.
_byte_tokenizer = byte_tokenizer()
_words = byte_level_with_words()
_pieces = sentencepiece()


def byte_tokenizer_cached() -> Tokenizer:
    return _byte_tokenizer


def byte_level_with_words_cached() -> Tokenizer:
    return _words


def sentencepiece_cached() -> Tokenizer:
    return _pieces


def sentencepiece_ids(character: str) -> list[int]:
    """Return the ids of a character, through byte tokens if there is none of its own."""
    own = _pieces.token_to_id("▁" if character == " " else character)
    if own is not None and character != "▁":
        return [own]
    return [id_of(_pieces, f"<0x{byte:02X}>") for byte in character.encode()]


BYTES_OF_WORDS = {
    token: bytes(id_of(_byte_tokenizer, letter) for letter in _words.id_to_token(token) or "")
    for token in range(_words.get_vocab_size(with_added_tokens=False))
}
"""What each id of the words tokenizer stands for, added tokens left out."""
