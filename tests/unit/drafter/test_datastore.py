"""The datastore's format and search against brute force, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import xxhash
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from drafter_service.datastore import MAGIC, MATCH_MAX, Datastore, open_datastore
from drafter_service.datastore_building import (
    build_datastore,
    collect_tokens,
    documents_of,
    sorted_suffixes,
)
from drafter_service.datastore_cli import datastore as command
from outrider.errors import ConfigError
from outrider.tokenizer import BYTE_VOCABULARY_SIZE, byte_tokenizer, tokenizer_fingerprint

thorough = settings(max_examples=200, deadline=None, derandomize=True)


def built(folder: Path, *documents: str | Sequence[int], name: str = "c.store") -> Path:
    build_datastore(folder / name, documents, byte_tokenizer())
    return folder / name


def opened(folder: Path, *documents: str | Sequence[int]) -> Datastore:
    return open_datastore(built(folder, *documents))


@thorough
@given(st.lists(st.integers(0, 2), max_size=60))
def test_suffixes_are_sorted_by_their_beginnings_and_equal_ones_by_place(text: list[int]) -> None:
    tokens = np.array([*text, 9], np.uint32)
    listed = tokens.tolist()
    expected = sorted(range(len(listed)), key=lambda at: (listed[at : at + MATCH_MAX], at))
    assert sorted_suffixes(tokens).tolist() == expected


@pytest.mark.parametrize("period", [[1], [1, 2], [2, 1, 1, 3, 2]])
def test_equal_beginnings_stay_in_the_order_of_the_text(period: list[int]) -> None:
    tokens = [*period * 1_000, 9]
    expected = sorted(range(len(tokens)), key=lambda at: (tokens[at : at + MATCH_MAX], at))
    assert sorted_suffixes(np.array(tokens, np.uint32)).tolist() == expected


def test_a_text_that_ends_comes_before_one_that_goes_on_with_the_lowest_id() -> None:
    assert sorted_suffixes(np.array([5, 0, 0, 0], np.uint32)).tolist() == [3, 2, 1, 0]


def brute_force(documents: Sequence[Sequence[int]], context: Sequence[int]) -> tuple[int, int]:
    """Length of the longest end of the context that occurs in a document, and how often."""
    for length in range(min(len(context), MATCH_MAX), 0, -1):
        wanted = list(context[len(context) - length :])
        count = sum(
            list(document[at : at + length]) == wanted
            for document in documents
            for at in range(len(document) - length + 1)
        )
        if count:
            return length, count
    return 0, 0


@thorough
@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=40), min_size=1, max_size=4),
    st.lists(st.integers(0, 3), max_size=30),
)
def test_the_longest_end_that_occurs_is_found(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], context: list[int]
) -> None:
    store = opened(tmp_path_factory.getbasetemp(), *documents)
    match = store.longest_match(context)
    assert (match.length, match.count) == brute_force(documents, context)
    rows = store.continuations(match, 5, 1_000)
    wanted = context[len(context) - match.length :]
    expected = sorted(
        tuple(document[at + match.length : at + match.length + 5])
        for document in documents
        for at in range(len(document) - match.length + 1)
        if match.length and document[at : at + match.length] == wanted
    )
    assert sorted(rows) == expected


def test_a_worked_example(tmp_path: Path) -> None:
    store = opened(tmp_path, "the cat sat", "the cat ran", "a cat")
    match = store.longest_match(list(b"see the cat "))
    assert (match.length, match.count) == (8, 2)
    assert sorted(store.continuations(match, 8, 10)) == [tuple(b"ran"), tuple(b"sat")]
    # No document ends with "cat" and goes on in the next one.
    assert store.longest_match(list(b"a cat")).count == 1
    assert store.continuations(store.longest_match(list(b"a cat")), 8, 10) == [()]
    assert store.longest_match(list(b"xyz")).count == 0
    assert store.longest_match([]).count == 0


def test_ids_that_are_none_of_the_corpus_never_match(tmp_path: Path) -> None:
    store = opened(tmp_path, [1, 2], [1, 2])
    for stranger in (BYTE_VOCABULARY_SIZE, BYTE_VOCABULARY_SIZE + 1, 2**32, -1):
        assert store.longest_match([1, 2, stranger]).count == 0
        # What comes behind it still does.
        assert store.longest_match([2, stranger, 1]).length == 1


def test_a_sample_is_drawn_evenly(tmp_path: Path) -> None:
    store = opened(tmp_path, *[[1, 2, 3]] * 90, *[[1, 2, 4]] * 10)
    match = store.longest_match([1, 2])
    assert match.count == 100
    rows = store.continuations(match, 1, 10)
    assert sorted(rows) == [(3,)] * 9 + [(4,)]


def test_the_header_names_the_tokenizer(tmp_path: Path) -> None:
    header = opened(tmp_path, "ab", "", "c").header
    assert header.tokenizer_fingerprint == tokenizer_fingerprint(byte_tokenizer())
    assert (header.vocabulary_size, header.tokens, header.documents) == (260, 5, 2)


def test_the_same_corpus_gives_the_same_file(tmp_path: Path) -> None:
    one, two = built(tmp_path, "abab", "ab"), built(tmp_path, "abab", "ab", name="d.store")
    assert one.read_bytes() == two.read_bytes()


def test_a_new_one_replaces_the_old_one_that_is_open(tmp_path: Path) -> None:
    old = opened(tmp_path, "abc")
    new = opened(tmp_path, "xyz")
    assert old.longest_match(list(b"ab")).count == 1
    assert new.longest_match(list(b"ab")).count == 0
    assert [path.name for path in tmp_path.iterdir()] == ["c.store"]


# --- what is refused --------------------------------------------------------------------------


@thorough
@given(st.data())
def test_any_changed_byte_is_noticed(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = built(tmp_path_factory.getbasetemp(), "some text", "more text", name="flipped.store")
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"flipped\.store"):
        open_datastore(path)


@thorough
@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_a_datastore(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "bytes.store"
    for data in (content, MAGIC + content, MAGIC + struct.pack("<I", len(content)) + content):
        path.write_bytes(data)
        with pytest.raises(ConfigError, match=r"bytes\.store"):
            open_datastore(path)


def with_header(path: Path, **changes: object) -> None:
    """Change the header of a datastore, checksum and all, as another writer might."""
    content = path.read_bytes()
    at = len(MAGIC) + 4
    (length,) = struct.unpack("<I", content[len(MAGIC) : at])
    header = json.loads(content[at : at + length]) | changes
    packed = json.dumps(header).encode()
    whole = MAGIC + struct.pack("<I", len(packed)) + packed + content[at + length : -16]
    path.write_bytes(whole + xxhash.xxh3_128_digest(whole))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text("Once upon a time, " * 99), "is not a datastore"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "cut or extended"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "cut or extended"),
        (lambda path: with_header(path, version=2), "has version 2, this release reads 1"),
        (lambda path: with_header(path, tokens=6), "cut or extended"),
        (lambda path: with_header(path, tokens=-5), "header cannot be read"),
        (lambda path: with_header(path, tokens=True), "header cannot be read"),
        (lambda path: with_header(path, tokenizer_fingerprint=7), "header cannot be read"),
        (lambda path: with_header(path, more=1), "header cannot be read"),
    ],
    ids=(
        [
            "empty",
            "gone",
            "text",
            "cut",
            "longer",
            "newer",
            "more-tokens",
            "negative",
            "boolean",
            "number",
            "unknown",
        ]
    ),
)
def test_what_is_wrong_is_said(tmp_path: Path, change: Callable[[Path], object], said: str) -> None:
    path = built(tmp_path, "four")
    open_datastore(path)
    change(path)
    with pytest.raises(ConfigError, match=said):
        open_datastore(path)


# --- corpora ----------------------------------------------------------------------------------


def test_documents_of_files(tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("one\ntwo\n", encoding="utf-8")
    assert list(documents_of(text, "text")) == ["one\ntwo\n"]
    lines = tmp_path / "b.jsonl"
    lines.write_text('"one"\n\n[1, 2]\n{"text": "two", "n": 1}\n', encoding="utf-8")
    assert list(documents_of(lines, "text")) == ["one", [1, 2], "two"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", r"c\.jsonl:2: not JSON"),
        ('{"body": "x", "id": 1}', r"c\.jsonl:2: has no field 'text', but body, id; see --field"),
        ("[1, true]", r"c\.jsonl:2: neither a text nor a list of ids"),
        ("7", r"c\.jsonl:2: neither"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "c.jsonl"
    path.write_text(f'"fine"\n{line}\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        list(documents_of(path, "text"))


def test_ids_are_checked_and_tokens_bounded() -> None:
    with pytest.raises(ConfigError, match=r"document 2 .* vocabulary of 260"):
        collect_tokens([[1], [260]], byte_tokenizer())
    with pytest.raises(ConfigError, match="nothing to build"):
        collect_tokens(["", []], byte_tokenizer())
    tokens, count = collect_tokens(["abc", "de", "f"], byte_tokenizer(), tokens_max=7)
    assert (tokens.tolist(), count) == ([*b"abc", 260, *b"de", 260], 2)


# --- the command ------------------------------------------------------------------------------


def test_the_command_builds_and_shows(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(byte_tokenizer().to_str(), encoding="utf-8")
    (tmp_path / "a.txt").write_text("tell me", encoding="utf-8")
    store = str(tmp_path / "a.store")
    arguments = ["build", store, str(tmp_path / "a.txt"), "--tokenizer", str(tmp_path), "--json"]
    made = CliRunner().invoke(command, arguments)
    assert made.exit_code == 0, made.output
    facts = json.loads(made.stdout)
    assert (facts["tokens"], facts["documents"], facts["version"]) == (8, 1, 1)
    shown = CliRunner().invoke(command, ["info", store, "--json"])
    assert json.loads(shown.stdout) == {k: v for k, v in facts.items() if k != "built_s"}
    table = CliRunner().invoke(command, ["info", store])
    assert facts["tokenizer_fingerprint"] in table.stdout
    Path(store).write_bytes(b"nonsense")
    failed = CliRunner().invoke(command, ["info", store])
    assert failed.exit_code == 1
    assert failed.stderr.startswith("error: ")
    assert "is not a datastore" in failed.stderr
