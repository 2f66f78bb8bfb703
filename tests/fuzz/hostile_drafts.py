"""Drafts for a fuzz run: right, wrong, late, broken, and no drafts at all."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

from google.protobuf.descriptor import FieldDescriptor

from outrider.committed import digest
from outrider.v1 import types_pb2
from tests.fuzz.openings import EXTREMES, exaggerate

NODES_MAX = 256
"""More than this many nodes is too many for one draft."""
_SCORES = (math.nan, math.inf, -math.inf, 1e-5, 0.5, 3e38, -3e38, -0.0, -1e-45, -60.0, -61.0)


def right(
    draw: random.Random, epoch: int, truth: Sequence[int], upcoming: Sequence[int]
) -> types_pb2.Draft:
    """What will come, with a wrong sibling beside each token; late by a few tokens at times."""
    late = draw.choice((0, 0, 0, draw.randrange(4)))
    base = max(1, len(truth) - late)
    path = [*truth[base:], *upcoming[: draw.randint(1, 6)]]
    found = _rooted(epoch, truth[:base])
    parent = -1
    for token in path:
        for one in ((token + 1) % 256, token):
            found.tokens.append(one)
            found.parents.append(parent)
            found.accept_logprobs.append(-draw.random() / 4)
        parent = len(found.tokens) - 1
    return found


def wrong(draw: random.Random, epoch: int, truth: Sequence[int]) -> types_pb2.Draft:
    """Well formed, of any shape."""
    shape = draw.choice(("any", "any", "any", "deep", "wide"))
    count = {"any": draw.randint(1, 24), "deep": draw.randint(60, NODES_MAX)}.get(shape, NODES_MAX)
    back = draw.choice((0, 0, draw.randint(0, 8)))
    found = _rooted(epoch, truth[: max(1, len(truth) - back)])
    for node in range(count):
        parent = {"deep": node - 1, "wide": -1}.get(shape, draw.randrange(-1, node))
        found.parents.append(parent)
        found.tokens.append(node if shape == "wide" else draw.randrange(260))
        found.accept_logprobs.append(-draw.expovariate(1.0))
    return found


def _rooted(epoch: int, truth: Sequence[int]) -> types_pb2.Draft:
    try:
        found = digest(truth)
    except (ValueError, OverflowError):
        found = 0
    return types_pb2.Draft(epoch=epoch, base_length=len(truth), base_digest=found)


def _broken_scores(draw: random.Random, draft: types_pb2.Draft) -> None:
    for _ in range(draw.randint(1, 3)):
        draft.accept_logprobs[draw.randrange(len(draft.tokens))] = draw.choice(_SCORES)


def _all_scores(draw: random.Random, draft: types_pb2.Draft) -> None:
    draft.accept_logprobs[:] = [draw.choice(_SCORES)] * len(draft.tokens)


def _parents(draw: random.Random, draft: types_pb2.Draft) -> None:
    at = draw.randrange(len(draft.tokens))
    draft.parents[at] = draw.choice((at, at + 1, len(draft.tokens) - 1, -2, -(2**31), 2**31 - 1))


def _tokens(draw: random.Random, draft: types_pb2.Draft) -> None:
    draft.tokens[draw.randrange(len(draft.tokens))] = draw.choice((260, 2**31, 2**32 - 1))


def _digest(draw: random.Random, draft: types_pb2.Draft) -> None:
    draft.base_digest = draw.getrandbits(64)


def _base(draw: random.Random, draft: types_pb2.Draft) -> None:
    draft.base_length = draw.choice((0, 1, draft.base_length + 1, 2**31, 2**32 - 1))


def _epoch(draw: random.Random, draft: types_pb2.Draft) -> None:
    draft.epoch = draw.choice((0, max(0, draft.epoch - 1), 2**32 - 1))


def _lengths(draw: random.Random, draft: types_pb2.Draft) -> None:
    del draw.choice((draft.tokens, draft.parents, draft.accept_logprobs))[-1]


def _empty(draw: random.Random, draft: types_pb2.Draft) -> None:
    for part in (draft.tokens, draft.parents, draft.accept_logprobs)[: draw.randint(1, 3)]:
        del part[:]


def _oversize(draw: random.Random, draft: types_pb2.Draft) -> None:
    count = draw.choice((NODES_MAX + 1, 400, 3_000))
    draft.tokens[:] = [7] * count
    draft.parents[:] = range(-1, count - 1)
    draft.accept_logprobs[:] = [-0.1] * count


def _number(draw: random.Random, draft: types_pb2.Draft) -> None:
    exaggerate(draw, draft)


_SPOILERS: tuple[Callable[[random.Random, types_pb2.Draft], None], ...] = (
    *(_broken_scores, _all_scores, _parents, _tokens, _digest, _base, _epoch),
    *(_lengths, _empty, _oversize, _number),
)


def spoilt(draw: random.Random, draft: types_pb2.Draft) -> types_pb2.Draft:
    """The same with one thing wrong."""
    draw.choice(_SPOILERS)(draw, draft)
    return draft


def garbled(draw: random.Random, data: bytes) -> bytes:
    """Cut, flipped, or something else altogether."""
    match draw.randrange(4):
        case 0:
            return data[: draw.randrange(len(data) + 1)]
        case 1:
            return draw.randbytes(draw.randrange(64))
        case 2:
            return data + draw.randbytes(draw.randint(1, 8))
        case _:
            flipped = bytearray(data)
            for _ in range(draw.randint(1, 3)):
                if flipped:
                    flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            return bytes(flipped)


def source(draw: random.Random) -> int:
    """Number of the drafter: mostly one of a few."""
    number: int = draw.choice(
        (1, 1, 1, 2, 3, 0, draw.choice(EXTREMES[FieldDescriptor.TYPE_UINT32]), draw.getrandbits(32))
    )
    return number
