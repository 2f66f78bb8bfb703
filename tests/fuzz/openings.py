"""Requests for a fuzz run: known cases with any options, and what no verifier should take."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from outrider import wire
from outrider.domain import Grammar, GrammarKind, SessionSpec
from outrider.v1 import types_pb2, verifier_pb2
from tests.support.reference import Case, Expected

SALTS = ("", "", "", "tenant", "\N{SNOWMAN}" * 85)
_UINTS = (0, 1, 2, 255, 259, 260, 261, 2**31 - 1, 2**31, 2**32 - 1)
_DOUBLES = (
    *(math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1.0, 1.0 + 1e-15, 2.0, 2.0000001, 100.0),
    *(5e-324, 1e-300, 1e-40, 1e-9, 1e300, 1.7e308, -1e-300, 10.0, 10.1, 1e4),
)
EXTREMES: dict[int, tuple[Any, ...]] = {
    FieldDescriptor.TYPE_UINT32: _UINTS,
    FieldDescriptor.TYPE_INT32: (0, 1, 2, 259, 260, 261, -1, 2**31 - 1, -(2**31)),
    FieldDescriptor.TYPE_SINT32: (0, 1, 2, 255, 256, -1, -2, 2**31 - 1, -(2**31)),
    FieldDescriptor.TYPE_FIXED64: (0, 1, 2**63 - 1, 2**63, 2**64 - 1),
    FieldDescriptor.TYPE_DOUBLE: _DOUBLES,
    FieldDescriptor.TYPE_FLOAT: (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-4, 0.1, 3e38, -3e38),
    FieldDescriptor.TYPE_BOOL: (False, True),
}

_SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "integer", "maximum": 99}, "b": {"enum": ["x", "yy"]}},
    "required": ["a", "b"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
GRAMMARS = (
    Grammar(GrammarKind.REGEX, r"(ab|cd|[0-9]{2}){3,8}"),
    Grammar(GrammarKind.REGEX, r"[a-z ]*"),
    Grammar(GrammarKind.REGEX, r"yes|no"),
    Grammar(GrammarKind.JSON_SCHEMA, json.dumps(_SCHEMA)),
    Grammar(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "boolean"}}'),
)
_BAD_REGEXES = (
    "(",
    "[",
    "a{2,1}",
    "\\",
    "*",
    "a**",
    "(?<n>a)\\k<n>",
    "(?=a)b",
    "",
    "\x00",
    "[^\x00-",
)
_BAD_SCHEMAS = (
    *("", "{", "[]", "null", "0", '"x"', "true", "false", '{"type": 3}', '{"type": "nothing"}'),
    *('{"$ref": "#/nowhere"}', '{"enum": []}', '{"minimum": 3, "maximum": 2, "type": "integer"}'),
    *('{"pattern": "(", "type": "string"}', '{"allOf": [{"type": "null"}, {"type": "object"}]}'),
    '{"items":' * 200 + "{}" + "}" * 200,
)


def random_case(draw: random.Random, shared: bytes) -> Case:
    """A request that a verifier takes, with any of the options."""
    prompt = shared[: draw.randrange(len(shared))] if draw.random() < 0.5 else b""
    prompt += draw.randbytes(draw.randint(0 if prompt else 1, 24))
    tokens_max = draw.choice((1, 2, draw.randint(3, 12), draw.randint(12, 48), 48))
    hot = draw.random() < 0.6
    options: dict[str, Any] = {}
    if hot:
        options["temperature"] = draw.choice((0.3, 0.7, 1.0, 1.6))
        options["top_k"] = draw.choice((0, 0, 1, 5, 60, 260, 2**31 - 1))
        # Not 0.5: two end ids of the tiny model have equal logits, which alone reach just that.
        options["top_p"] = draw.choice((1.0, 1.0, 0.95, 0.6))
        options["min_p"] = draw.choice((0.0, 0.0, 0.02, 0.3, 1.0))
        options["seed"] = draw.getrandbits(63)
    if draw.random() < 0.3:
        options["repetition_penalty"] = draw.choice((1.3, 0.8, 1.01))
        options["presence_penalty"] = draw.choice((0.0, 1.0, -1.0, 2.0))
        options["frequency_penalty"] = draw.choice((0.0, 0.5, -0.5, -2.0))
    if draw.random() < 0.2:
        biased = draw.sample(range(260), draw.randint(1, 5))
        options["logit_bias"] = tuple((token, draw.uniform(-8, 8)) for token in sorted(biased))
    if draw.random() < 0.2:
        options["grammar"] = draw.choice(GRAMMARS)
    else:
        options["ignore_eos"] = draw.random() < 0.7
        options["tokens_min"] = draw.choice((0, 0, draw.randint(0, tokens_max)))
    if draw.random() < 0.2:
        options["stop_ids"] = tuple(draw.sample(range(256), draw.randint(1, 8)))
    return Case(tuple(prompt), tokens_max, **options)


def opening(
    draw: random.Random, case: Case, expected: Expected, session: int, epoch: int
) -> verifier_pb2.OpenSession:
    """Ask for a case; what of its output is there already, and what else is wanted, is drawn."""
    committed = expected.ids[: draw.randrange(len(expected.ids))] if draw.random() < 0.2 else ()
    if len(committed) >= case.tokens_max:
        committed = ()
    spec = SessionSpec(
        session=session,
        epoch=epoch,
        prompt=case.prompt,
        committed=committed,
        sampling=case.sampling,
        seed=case.session_seed,
        tokens_max=case.tokens_max,
        stop_ids=frozenset(case.stop_ids),
        ignore_eos=case.ignore_eos,
        logprobs=draw.choice((None, None, 0, 1, 5, 20)),
        prompt_logprobs=draw.choice((None, None, None, 0, 2)),
        cache_salt=draw.choice(SALTS),
        own_guesses=draw.random() < 0.5,
    )
    return wire.session_to_pb(spec)


def spoil_opening(draw: random.Random, message: verifier_pb2.OpenSession) -> None:
    """Change one thing or several, into something at or beyond the limits."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        match draw.randrange(10):
            case 0:
                grammar = types_pb2.Grammar()
                if draw.random() < 0.5:
                    grammar.regex = draw.choice((*_BAD_REGEXES, some_regex(draw)))
                elif draw.random() < 0.9:
                    grammar.json_schema = draw.choice(_BAD_SCHEMAS)
                message.sampling.grammar.CopyFrom(grammar)
            case 1:
                message.committed[:] = ids(draw, draw.randint(0, 12))
            case 2:
                message.prompt[:] = ids(draw, draw.choice((0, 1, 60, 330, 2_100)))
            case 3:
                message.stop_ids[:] = ids(draw, draw.choice((1, 30, 260)))
            case 4:
                token = draw.choice((0, 5, 256, 259, 260, 2**32 - 1))
                message.sampling.logit_bias[token] = draw.choice(_DOUBLES)
            case 5:
                message.cache_salt = draw.choice(("x" * 256, "x" * 257, "\0"))
                message.origin.request_id = draw.choice(("", "fine", "two\nlines", "x" * 129))
                message.origin.traceparent = draw.choice(("", "nonsense", "x" * 10_000))
            case 6 | 7:
                exaggerate(draw, message.sampling)
            case _:
                exaggerate(draw, message)


def exaggerate(draw: random.Random, message: Message) -> None:
    """Set one numeric field to a number at or beyond its limits."""
    fields = [field for field in message.DESCRIPTOR.fields if field.type in EXTREMES]
    field = draw.choice(fields)
    values = EXTREMES[field.type]
    if field.is_repeated:
        held = getattr(message, field.name)
        if held:
            held[draw.randrange(len(held))] = draw.choice(values)
        else:
            held.append(draw.choice(values))
    else:
        setattr(message, field.name, draw.choice(values))


def ids(draw: random.Random, count: int) -> Sequence[int]:
    """Ids that mostly are some."""
    wild = draw.random() < 0.2
    return [draw.choice(_UINTS) if wild else draw.randrange(260) for _ in range(count)]


def some_regex(draw: random.Random) -> str:
    """A few characters that mean something in a regex, or nothing."""
    return "".join(draw.choice("ab01.|()[]{}*+?^$\\-,\xe4") for _ in range(draw.randint(1, 12)))
