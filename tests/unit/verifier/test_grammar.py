"""Masks over draft trees: what a fresh matcher fed with the path would say, and no traces."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from outrider.domain import Grammar, GrammarKind
from outrider.errors import InvalidRequest
from outrider.tokenizer import BYTE_VOCABULARY_SIZE, byte_tokenizer, byte_tokenizer_files
from verifier_service import grammar as module
from verifier_service.grammar import GrammarCompiler, GrammarState, Mask

EOS = (256, 258)
WIDTH = BYTE_VOCABULARY_SIZE + 40  # models round the size of their vocabulary up
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["red", "redder"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, json.dumps(PERSON))
REGEXES = [r"[ab]{1,3}(cd)*", r"(foo|bar baz)+[0-9]{2,4}x?", "é|€uro|one exact text"]
GRAMMARS = [SCHEMA, *(Grammar(GrammarKind.REGEX, regex) for regex in REGEXES)]

thorough = settings(max_examples=60, deadline=None, derandomize=True)


def byte_compiler() -> GrammarCompiler:
    return GrammarCompiler(byte_tokenizer_files(), WIDTH, EOS)


def merging_compiler() -> GrammarCompiler:
    """A tokenizer with longer tokens, so that one text has several spellings."""
    known = byte_tokenizer().get_vocab(with_added_tokens=False)
    pairs = [("f", "o"), ("fo", "o"), ("b", "a"), ("c", "d"), ("o", "n"), ("on", "e"), ('"', ":")]
    vocabulary = known | {a + b: 256 + i for i, (a, b) in enumerate(pairs)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<end>", "<stop>"])
    ends = [tokenizer.token_to_id(token) for token in ("<end>", "<stop>")]
    return GrammarCompiler({"tokenizer.json": tokenizer.to_str().encode()}, WIDTH, ends)


COMPILERS = {"bytes": byte_compiler(), "merges": merging_compiler()}


def ids_of(mask: Mask | None) -> list[int]:
    assert mask is not None
    return np.unpackbits(mask.view(np.uint8), bitorder="little").nonzero()[0].tolist()


def mask_after(compiler: GrammarCompiler, grammar: Grammar, path: Sequence[int]) -> list[int]:
    """What a fresh state says after a path of allowed tokens."""
    state = compiler.compile(grammar)
    state.advance(path)
    return ids_of(state.walk([])[1][0])


def tip_ids(state: GrammarState) -> list[int]:
    return ids_of(state.walk([])[1][0])


def text_ids(text: str) -> list[int]:
    return list(text.encode())


def written(state: GrammarState, draw: random.Random, ends: Sequence[int], most: int) -> list[int]:
    """Sample allowed ids until an end id; prefers to end, once `most` ids are there."""
    output: list[int] = []
    while True:
        allowed = tip_ids(state)
        ending = [token for token in allowed if token in ends]
        if ending and (len(output) >= most or len(ending) == len(allowed) or draw.random() < 0.1):
            return output
        output.append(draw.choice([token for token in allowed if token not in ends]))
        state.advance(output[-1:])


@pytest.mark.parametrize("tokens", COMPILERS)
@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: grammar.source[:12])
@thorough
@given(seed=st.integers(0, 2**32))
def test_masks_at_nodes_equal_those_of_a_fresh_matcher(tokens, grammar, seed) -> None:
    compiler, draw = COMPILERS[tokens], random.Random(seed)
    ends = sorted(compiler._eos_ids)
    state = compiler.compile(grammar)
    prefix = written(state, draw, ends, 0)[: draw.randrange(12)]
    state = compiler.compile(grammar)
    state.advance(prefix)
    before = tip_ids(state)
    # A random tree, in random order among siblings and cousins: allowed, refused and end ids.
    nodes: list[tuple[int, int]] = []
    paths: list[tuple[int, ...]] = []
    for _ in range(draw.randrange(14)):
        parent = draw.randrange(-1, len(nodes))
        path = () if parent < 0 else paths[parent]
        try:
            known = mask_after(compiler, grammar, [*prefix, *path])
        except InvalidRequest:
            known = []
        token = draw.choice([*known, *known, *ends, draw.randrange(WIDTH)])
        nodes.append((parent, token))
        paths.append((*path, token))
    allowed, masks = state.walk(nodes)
    assert ids_of(masks[0]) == before
    for index, (parent, token) in enumerate(nodes):
        parents_mask = masks[1 + parent]
        expected = parents_mask is not None and token in ids_of(parents_mask)
        assert allowed[index] is expected
        if not expected:
            assert masks[1 + index] is None
        elif token in ends:
            assert ids_of(masks[1 + index]) == ends
        else:
            path = [*prefix, *paths[index]]
            assert ids_of(masks[1 + index]) == mask_after(compiler, grammar, path)
    # No trace: the same again, and the state goes on as one that was never asked.
    again, same = state.walk(nodes)
    assert again == allowed
    assert [m is None or ids_of(m) for m in same] == [m is None or ids_of(m) for m in masks]
    assert tip_ids(state) == before


@pytest.mark.parametrize("tokens", COMPILERS)
@pytest.mark.parametrize("seed", range(12))
def test_what_is_sampled_from_masks_belongs_to_the_language(tokens, seed) -> None:
    compiler, draw = COMPILERS[tokens], random.Random(seed)
    tokenizer = Tokenizer.from_buffer(compiler._files["tokenizer.json"])
    for grammar in GRAMMARS:
        output = written(compiler.compile(grammar), draw, sorted(compiler._eos_ids), 25)
        text = tokenizer.decode(output)
        if grammar.kind is GrammarKind.REGEX:
            assert re.fullmatch(grammar.source, text)
        else:
            value = json.loads(text)
            assert set(value) - {"tags"} == {"name", "age"}
            assert 0 <= value["age"] <= 130


def test_nodes_that_the_grammar_refuses_take_their_subtrees_along() -> None:
    state = COMPILERS["bytes"].compile(Grammar(GrammarKind.REGEX, "ab|ac"))
    # a -> (b, x -> b), x -> b; and a's sibling in second place is refused without harm to a.
    nodes = [(-1, 120), (-1, 97), (0, 98), (1, 120), (1, 98), (3, 98), (1, 99)]
    allowed, masks = state.walk(nodes)
    assert allowed == [False, True, False, False, True, False, True]
    assert [mask is not None for mask in masks[1:]] == allowed
    assert ids_of(masks[2]) == [98, 99]


def test_every_end_id_is_allowed_where_the_text_may_end_and_nothing_else_where_it_must() -> None:
    state = COMPILERS["bytes"].compile(Grammar(GrammarKind.REGEX, "ab?"))
    assert tip_ids(state) == [97]
    nodes = [(-1, 97), (0, 256), (0, 98), (2, 258), (2, 98), (1, 98), (1, 258)]
    allowed, masks = state.walk(nodes)
    assert allowed == [True, True, True, True, False, False, True]
    assert ids_of(masks[1]) == [98, *EOS]
    for index in (1, 2, 3, 6):
        assert ids_of(masks[1 + index]) == [*EOS]
    state.advance([97, 98, 258])
    assert tip_ids(state) == [*EOS]


def test_ids_without_text_are_never_allowed() -> None:
    state = COMPILERS["bytes"].compile(Grammar(GrammarKind.REGEX, "(?s:.)*"))
    allowed = tip_ids(state)
    assert {*range(128), *EOS} <= set(allowed)
    assert max(allowed) == max(EOS)
    assert 257 not in allowed  # special, but no end
    outside = [WIDTH - 1, WIDTH, 10**6]
    assert state.walk([(-1, token) for token in outside])[0] == [False] * 3


@pytest.mark.parametrize("token", [120, 256, 257, WIDTH - 1, WIDTH + 1000])
def test_committed_tokens_that_do_not_fit_are_refused(token) -> None:
    state = COMPILERS["bytes"].compile(Grammar(GrammarKind.REGEX, "abc"))
    state.advance([97])
    with pytest.raises(InvalidRequest) as caught:
        state.advance([token])
    assert caught.value.field == "sampling.grammar.regex"


@pytest.mark.parametrize(
    ("kind", "source", "reason"),
    [
        ("regex", "(a", "unclosed group"),
        ("regex", r"(a)\1", "backreferences are not supported"),
        ("regex", "(?=a)b", "look-around, including look-ahead and look-behind, is not supported"),
        ("regex", r"a[^\x00-\x{10FFFF}]", "nothing matches it"),
        ("regex", "(" * 30_000 + ")" * 30_000, "nest"),
        ("json_schema", "{", "line 1"),
        ("json_schema", "[1]", "schema must be an object or boolean"),
        ("json_schema", '{"type": "strin"}', "Invalid type: strin"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", '{"$ref": "http://example.com/x.json"}', "does not fetch"),
        ("json_schema", '{"$ref": "#"}', "nothing matches it"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "recursion limit"),
        (
            "json_schema",
            '{"type": "string", "minLength": 5, "maxLength": 2}',
            "minLength (5) is greater than maxLength (2)",
        ),
    ],
)
def test_a_bad_grammar_is_refused_for_a_reason(kind, source, reason) -> None:
    with pytest.raises(InvalidRequest) as caught:
        COMPILERS["bytes"].compile(Grammar(GrammarKind(kind), source))
    assert caught.value.field == f"sampling.grammar.{kind}"
    assert reason in caught.value.message
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("files", "eos_ids"),
    [
        ({}, EOS),
        ({"tokenizer.json": b"{}"}, EOS),
        ({"tokenizer.json": b"/etc/passwd"}, EOS),
        (byte_tokenizer_files(), ()),
        (byte_tokenizer_files(), (WIDTH - 1,)),
    ],
)
def test_a_model_that_cannot_follow_grammars_says_so(files, eos_ids) -> None:
    with pytest.raises(InvalidRequest, match="this model cannot follow a grammar"):
        GrammarCompiler(files, WIDTH, eos_ids).compile(SCHEMA)


def test_limits_end_a_greedy_grammar_and_spare_the_others(monkeypatch) -> None:
    limits = module.LLParserLimits(max_lexer_states=300, verbose_errors=False)
    monkeypatch.setattr(module, "_LIMITS", limits)
    compiler = COMPILERS["bytes"]
    greedy = compiler.compile(Grammar(GrammarKind.REGEX, "(.{1,500}b){1,500}"))
    other = compiler.compile(Grammar(GrammarKind.REGEX, "a+"))
    chain = [(index - 1, 97 + index % 2) for index in range(400)]
    allowed, masks = greedy.walk(chain)
    reached = allowed.index(False)
    assert reached > 0
    assert not any(allowed[reached:])
    assert masks[reached] is not None
    # The lexer's states belong to the session: what it asked of its tree counts.
    with pytest.raises(InvalidRequest, match="too many states") as caught:
        greedy.advance([token for _, token in chain])
    assert caught.value.field == "sampling.grammar.regex"
    assert other.walk([(-1, 97)])[0] == [True]


def test_a_node_that_breaks_a_limit_spares_its_siblings(monkeypatch) -> None:
    whole = module._mask
    calls = []

    def failing(matcher: module.LLMatcher) -> Mask | None:
        calls.append(matcher)
        if len(calls) == 3:  # the tip, a, and then ab
            matcher.consume_token(257)  # a failed matcher is of no more use
        return whole(matcher)

    state = COMPILERS["bytes"].compile(Grammar(GrammarKind.REGEX, "a(bx|cy)"))
    monkeypatch.setattr(module, "_mask", failing)
    allowed, masks = state.walk([(-1, 97), (0, 98), (0, 99), (1, 120), (2, 121)])
    assert allowed == [True, False, True, False, True]
    assert ids_of(masks[3]) == [121]
    assert ids_of(masks[5]) == [*EOS]
