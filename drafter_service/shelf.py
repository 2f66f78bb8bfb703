"""Mirrors within a bound of memory: those that were idle longest are put aside as bare tokens.

A mirror with its guesses and whatever its proposer knows of it takes up to a megabyte, and most
sessions of a drafter with thousands of them are idle at any time: their verifier has other work, or
their client is slow to read. Tokens are the truth, four bytes each and less than a kilobyte a
session; all else is rebuilt from them when the session goes on. Tokens of those put aside have a
bound of their own, beyond which the oldest are given up.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from dataclasses import dataclass, replace

from drafter_service.mirror import Mirror
from outrider.domain import BindSpec

TOKEN_BYTES = 1_200
"""Estimate for a committed token: as an object, and in a lookup's automaton, the largest index."""
NODE_BYTES = 900
"""Estimate for a guess."""

Key = tuple[int, int]
"""(connection, session)"""


@dataclass(frozen=True, slots=True)
class Aside:
    """What is left of an idle session's mirror."""

    connection: int
    spec: BindSpec
    """Without tokens."""
    tokens: array[int]
    prompt_length: int

    def rebuilt(self) -> Mirror:
        """Make a mirror of it again, as it was when it was opened, but with all tokens."""
        prompt = tuple(self.tokens[: self.prompt_length])
        committed = tuple(self.tokens[self.prompt_length :])
        return Mirror(self.connection, replace(self.spec, prompt=prompt, committed=committed))


class Shelf:
    """All mirrors of a drafter. One owner; who closes what falls off is up to the caller."""

    def __init__(self, bytes_max: int, aside_tokens_max: int) -> None:
        self._bytes_max = bytes_max
        self._aside_tokens_max = aside_tokens_max
        self._live: dict[Key, Mirror] = {}
        self._recency: OrderedDict[Key, int] = OrderedDict()
        """Bytes that each live mirror counts for, least recently used first."""
        self._bytes = 0
        self._aside: OrderedDict[Key, Aside] = OrderedDict()
        self._aside_tokens = 0

    def __len__(self) -> int:
        """Sessions, live or put aside."""
        return len(self._live) + len(self._aside)

    @property
    def live(self) -> list[Mirror]:
        """Mirrors that can grow."""
        return list(self._live.values())

    @property
    def bytes_used(self) -> int:
        """Estimate for all live mirrors."""
        return self._bytes

    def of_connection(self, connection: int) -> list[Key]:
        """All sessions of a connection."""
        return [key for key in (*self._live, *self._aside) if key[0] == connection]

    def get(self, key: Key) -> Mirror | None:
        """Return a session's mirror if it is live."""
        return self._live.get(key)

    def aside(self, key: Key) -> Aside | None:
        """Return what is left of a session that was put aside."""
        return self._aside.get(key)

    def use(self, mirror: Mirror) -> None:
        """Enter a mirror, or take note that it has changed and is in use."""
        self._live[mirror.key] = mirror
        count = len(mirror.log) * TOKEN_BYTES + mirror.budget.nodes_max * NODE_BYTES
        self._bytes += count - self._recency.pop(mirror.key, 0)
        self._recency[mirror.key] = count

    def discard(self, key: Key) -> None:
        """Forget a session."""
        if self._live.pop(key, None) is not None:
            self._bytes -= self._recency.pop(key)
        aside = self._aside.pop(key, None)
        if aside is not None:
            self._aside_tokens -= len(aside.tokens)

    def put_aside(self) -> list[Mirror]:
        """Reduce live mirrors to their bound; returns those whose guesses can be freed now.

        The one used last stays, whatever its size.
        """
        idle: list[Mirror] = []
        while self._bytes > self._bytes_max and len(self._live) > 1:
            key, count = self._recency.popitem(last=False)
            mirror = self._live.pop(key)
            self._bytes -= count
            self._keep_tokens(mirror)
            idle.append(mirror)
        return idle

    def give_up(self) -> list[Aside]:
        """Reduce what was put aside to its bound; returns the sessions that are forgotten now."""
        lost: list[Aside] = []
        while self._aside_tokens > self._aside_tokens_max:
            _, aside = self._aside.popitem(last=False)
            self._aside_tokens -= len(aside.tokens)
            lost.append(aside)
        return lost

    def revive(self, key: Key) -> Mirror:
        """Make a session that was put aside live again. Raises KeyError."""
        aside = self._aside.pop(key)
        self._aside_tokens -= len(aside.tokens)
        mirror = aside.rebuilt()
        self.use(mirror)
        return mirror

    def change_aside(self, key: Key, spec: BindSpec) -> None:
        """Replace the description of a session that was put aside."""
        self._aside[key] = replace(self._aside[key], spec=spec)

    def _keep_tokens(self, mirror: Mirror) -> None:
        bare = replace(mirror.spec, prompt=(), committed=(), budget=mirror.budget)
        tokens = array("I", mirror.log.tokens)
        self._aside[mirror.key] = Aside(mirror.connection, bare, tokens, len(mirror.spec.prompt))
        self._aside_tokens += len(tokens)
