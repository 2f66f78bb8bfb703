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


def _faults(session: str, history: Sequence[Decided]) -> Iterable[str]:
    digests: dict[int, str] = {}
    spells: dict[int, list[Decided]] = defaultdict(list)
    for decided in history:
        spells[decided.epoch].append(decided)
        if digests.setdefault(decided.length, decided.digest) != decided.digest:
            yield f"session {session}: two texts of {decided.length} tokens"
    reached: int | None = None
    for epoch, spell in sorted(spells.items()):
        holders = sorted({decided.incarnation for decided in spell})
        if len(holders) > 1:
            yield f"session {session}: epoch {epoch} was held by {' and '.join(holders)}"
            continue
        if reached is not None and spell[0].base > reached:
            yield f"session {session}: epoch {epoch} began at {spell[0].base}, behind {reached}"
        for before, after in itertools.pairwise(spell):
            if after.base != before.length:
                yield (f"session {session}, epoch {epoch}: {after.base} follows {before.length}")
        if any(decided.length <= decided.base for decided in spell):
            yield f"session {session}, epoch {epoch}: a commit of nothing"
        reached = max(reached or 0, spell[-1].length)
