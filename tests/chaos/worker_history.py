"""What verifiers committed, by their logs, and whether it could have happened. Pure.

Whoever holds a session commits to it under its epoch, one stretch after the other; whoever takes
it over has a higher epoch and begins where somebody stood. All of them commit the same text.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_STARTED = "listening on "
_COMMITTED = re.compile(
    r"committed session=(\w+) epoch=(\d+) base=(\d+) length=(\d+) digest=(\w+)$"
)


@dataclass(frozen=True, slots=True)
class Decided:
    """A commit of a verifier."""

    incarnation: str
    session: str
    epoch: int
    base: int
    """Length of the session before."""
    length: int
    digest: str
    """Of all committed tokens."""


def decided_in(name: str, lines: Iterable[str]) -> list[Decided]:
    """Read a verifier's log, in which incarnations follow each other."""
    found, starts = [], 0
    for line in lines:
        if _STARTED in line:
            starts += 1
        elif (match := _COMMITTED.search(line)) is not None:
            session, epoch, base, length, digest = match.groups()
            incarnation = f"{name}/{starts}"
            found.append(Decided(incarnation, session, int(epoch), int(base), int(length), digest))
    return found


def faults_of_workers(history: Iterable[Decided]) -> list[str]:
    """Say what cannot have been; commits of one incarnation must be in order."""
    sessions: dict[str, list[Decided]] = defaultdict(list)
    for decided in history:
        sessions[decided.session].append(decided)
    return [fault for session, all_ in sessions.items() for fault in _faults(session, all_)]


def held_twice(history: Iterable[Decided]) -> int:
    """Count epochs of sessions that two verifiers held.

    That is no fault: whoever holds a stream may move its session without asking Redis, at the same
    moment as somebody else takes it over. The journal's fence decides then who is heard.
    """
    holders: dict[tuple[str, int], set[str]] = defaultdict(set)
    for decided in history:
        holders[decided.session, decided.epoch].add(decided.incarnation)
    return sum(len(names) > 1 for names in holders.values())


def _faults(session: str, history: Sequence[Decided]) -> Iterable[str]:
    digests: dict[int, str] = {}
    spells: dict[tuple[int, str], list[Decided]] = defaultdict(list)
    for decided in history:
        spells[decided.epoch, decided.incarnation].append(decided)
        if digests.setdefault(decided.length, decided.digest) != decided.digest:
            yield f"session {session}: two texts of {decided.length} tokens"
    reached: dict[int, int] = {}
    """How far each epoch came."""
    for (epoch, _), spell in sorted(spells.items()):
        before = max((length for other, length in reached.items() if other < epoch), default=None)
        if before is not None and spell[0].base > before:
            yield f"session {session}: epoch {epoch} began at {spell[0].base}, behind {before}"
        for one, after in itertools.pairwise(spell):
            if after.base != one.length:
                yield f"session {session}, epoch {epoch}: {after.base} follows {one.length}"
        if any(decided.length <= decided.base for decided in spell):
            yield f"session {session}, epoch {epoch}: a commit of nothing"
        reached[epoch] = max(reached.get(epoch, 0), spell[-1].length)
