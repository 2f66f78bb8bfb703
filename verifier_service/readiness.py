"""When a verify step starts: at once, or after drafts that are worth waiting for. Pure.

Every decoding session joins every step, with its tip alone if nothing better is there. A start is
delayed only where what is on its way promises more tokens than the verifier commits in the time
that it takes to arrive, over all rows.

Sessions without any guess are those that may be waited for: after a miss. What arrives when is
learnt from all of them, waited for or not, since drafts for a tip keep coming while a step
computes and after it: from a *value* (the tokens that a session may expect of a step, by its
tree) the next draft comes after a *delay* and adds a *gain*. Chained, these hops foretell what
waiting brings, also from a drafter that is farther than a step. Its cost is what all rows commit
in the meantime, and what the step after is worse for it: while a step without guesses computes,
the drafter gets ahead, and that is learnt too.

One miss (a draft that was waited for and did not come) ends the waiting for a session, until
a draft comes for it again within the time that one was expected.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Iterator
from dataclasses import dataclass

_MEMORY = 64
"""Arrivals over which delays and gains are averaged."""
_COUNT_MIN = 4
"""Arrivals before a hop is trusted."""
_LATE_SIGMAS = 3.0
"""A draft is missed when it is so many standard deviations late."""
_VALUE_STEP = 0.5
"""Width of the classes of values that hops are learnt for."""
_HOPS_MAX = 12
_AFTER_SHARE = 1.0 / 32.0
_RATE_MIN = 1e-9
_RATE_DECAY = 1.0 - 1.0 / 64.0
_SOURCES_MAX = 1_024

Sources = Hashable
"""Who drafts for a session: whatever tells one combination of drafters from another."""


@dataclass(slots=True)
class _Hop:
    """What the next draft was like, from values of one class; moving averages."""

    delay_s: float
    delay_variance: float
    gain: float
    count: int = 1

    def learn(self, delay_s: float, gain: float) -> None:
        self.count += 1
        share = max(1.0 / self.count, 1.0 / _MEMORY)
        # One hiccup says no more than that the draft was late.
        off_s = min(delay_s, self.late_s + self.delay_s) - self.delay_s
        self.delay_s += share * off_s
        self.delay_variance += share * (off_s * off_s * (1.0 - share) - self.delay_variance)
        self.gain += share * (gain - self.gain)

    @property
    def late_s(self) -> float:
        """Delay beyond which the draft counts as missed."""
        return self.delay_s + _LATE_SIGMAS * math.sqrt(self.delay_variance) + 0.1 * self.delay_s


class Arrivals:
    """How drafts of one combination of sources arrive, whatever the session."""

    def __init__(self) -> None:
        self._hops: dict[int, _Hop] = {}

    def learn(self, value: float, delay_s: float, gain: float) -> None:
        """A draft came `delay_s` after the tree had that value, and added `gain` tokens."""
        gain = max(0.0, gain)
        hop = self._hops.get(_class(value))
        if hop is None:
            # As uncertain as it is late, until more is known.
            self._hops[_class(value)] = _Hop(delay_s, delay_s * delay_s, gain)
        else:
            hop.learn(delay_s, gain)

    def next(self, value: float) -> _Hop | None:
        """What to expect of the next draft, or None if too little is known."""
        hop = self._hops.get(_class(value))
        return hop if hop is not None and hop.count >= _COUNT_MIN else None

    def ahead(self, value: float, elapsed_s: float) -> Iterator[tuple[float, float]]:
        """Yield (seconds from now, tokens gained) of the drafts to come, one after the other.

        `elapsed_s` is how long ago the tree got its value.
        """
        for number in range(_HOPS_MAX):
            hop = self.next(value)
            if hop is None:
                return
            yield (hop.delay_s if number else max(0.0, hop.delay_s - elapsed_s)), hop.gain
            value += hop.gain


def _class(value: float) -> int:
    return 0 if value < 1.001 else 1 + int((value - 1.0) / _VALUE_STEP)


@dataclass(slots=True)
class _Watch:
    """One session between two steps."""

    sources: Sources
    value: float
    since_s: float
    """When the tree got this value."""


@dataclass(frozen=True, slots=True)
class Hold:
    """A start is delayed."""

    until_s: float
    """When to decide anew if nothing arrives, on the caller's clock."""
    gain: float
    """Tokens that waiting is expected to win, less its cost."""
    sessions: tuple[int, ...]
    """Whose drafts are waited for."""


@dataclass(slots=True)
class _Rate:
    """Committed tokens a second, over the last steps."""

    tokens: float = 0.0
    duration_s: float = 0.0
    rows: float = 0.0

    def add(self, tokens: int, rows: int, duration_s: float) -> None:
        self.tokens = self.tokens * _RATE_DECAY + tokens
        self.rows = self.rows * _RATE_DECAY + rows
        self.duration_s = self.duration_s * _RATE_DECAY + duration_s

    @property
    def per_row(self) -> float:
        return self.tokens / self.rows if self.rows > 0.0 else 1.0

    @property
    def per_s(self) -> float:
        return self.tokens / self.duration_s if self.duration_s > 0.0 else math.inf


class Readiness:
    """Decides when a verifier's next step starts. One owner; times come in as arguments."""

    def __init__(self) -> None:
        self._arrivals: OrderedDict[Sources, Arrivals] = OrderedDict()
        self._watches: dict[int, _Watch] = {}
        self._scale = 1.0
        self._rate = _Rate()
        self._missed: set[int] = set()
        self._held: Hold | None = None
        self._after_held: float | None = None
        self._after_bare: float | None = None

    def ready(self) -> None:
        """A step could begin."""
        self._watches.clear()
        self._scale = 1.0
        self._held = None

    def stand_for(self, scale: float) -> None:
        """Each of the sessions that were looked at stands for so many."""
        self._scale = scale

    def watch(self, session: int, sources: Sources, now_s: float) -> None:
        """A session has no guesses for the step."""
        self._watches[session] = _Watch(sources, 1.0, now_s)

    def watched(self, session: int) -> bool:
        """True if drafts for the session are to be reported by `arrived`."""
        return session in self._watches

    def arrived(self, session: int, value: float, at_s: float) -> None:
        """A draft came in time for the step; `value` is what the tree promises with it.

        One that adds nothing was made for an older tip: what is waited for is still to come.
        """
        watch = self._watches[session]
        if value > watch.value:
            watch.value, watch.since_s = value, max(at_s, watch.since_s)

    def learn(
        self, session: int, sources: Sources, value: float, delay_s: float, gain: float
    ) -> None:
        """A draft came `delay_s` after a tree had promised `value`, and added `gain` tokens.

        Whether the step was still to begin or not.
        """
        arrivals = self._arrivals.setdefault(sources, Arrivals())
        self._arrivals.move_to_end(sources)
        if len(self._arrivals) > _SOURCES_MAX:
            self._arrivals.popitem(last=False)
        hop = arrivals.next(value)
        if session in self._missed and hop is not None and delay_s <= hop.late_s:
            self._missed.discard(session)
        arrivals.learn(value, delay_s, gain)

    def hold(self, now_s: float) -> Hold | None:
        """Return how long to delay the start, or None to begin now. Ask again after arrivals."""
        held, self._held = self._held, None
        coming: list[tuple[float, float, int]] = []
        overdue_s: dict[int, float] = {}
        for session, watch in self._watches.items():
            arrivals = self._arrivals.get(watch.sources)
            hop = arrivals.next(watch.value) if arrivals is not None else None
            if arrivals is None or hop is None:
                continue
            elapsed_s = now_s - watch.since_s
            # No longer than until its being late has cost all that the draft is to win.
            worth_s = hop.delay_s + self._scale * hop.gain / max(_RATE_MIN, self._rate.per_s)
            late_s = watch.since_s + min(hop.late_s, worth_s)
            if held is not None and session in held.sessions and now_s >= late_s:
                self._missed.add(session)
            if session in self._missed:
                continue
            overdue_s[session] = late_s
            after_s = 0.0
            for delay_s, gain in arrivals.ahead(watch.value, elapsed_s):
                after_s += delay_s
                coming.append((after_s, gain, session))
        best, wanted = self._best(sorted(coming))
        if best <= 0.0:
            return None
        until_s = max(now_s, min(overdue_s[session] for session in wanted))
        self._held = Hold(until_s, best, tuple(wanted))
        return self._held

    def _best(self, coming: list[tuple[float, float, int]]) -> tuple[float, list[int]]:
        """The most that waiting for some of what is coming wins, and for whom."""
        best, count, gained = 0.0, 0, 0.0
        waited_for: set[int] = set()
        for index, (after_s, gain, session) in enumerate(coming, start=1):
            waited_for.add(session)
            gained += self._scale * gain
            cost = self._rate.per_s * after_s + self._scale * self._lost_after * len(waited_for)
            if gained - cost > best:
                best, count = gained - cost, index
        return best, list(dict.fromkeys(session for _, _, session in coming[:count]))

    @property
    def _lost_after(self) -> float:
        """Tokens that a session commits less in the step after one that was waited for.

        Less than after one without guesses: during that, its drafter had the whole step to get
        ahead, and what waiting wins is partly won twice.
        """
        held = self._rate.per_row if self._after_held is None else self._after_held
        bare = held if self._after_bare is None else self._after_bare
        return bare - held

    def followed(self, tokens: int, *, held: bool) -> None:
        """A session committed so many tokens in the step after one without guesses.

        `held`: or after one that would have had none if it had not waited.
        """
        before = self._after_held if held else self._after_bare
        after = float(tokens) if before is None else before + _AFTER_SHARE * (tokens - before)
        if held:
            self._after_held = after
        else:
            self._after_bare = after

    def committed(self, tokens: int, rows: int, duration_s: float) -> None:
        """A step of so many sessions committed so many tokens, so long after the one before."""
        self._rate.add(tokens, rows, duration_s)

    def forget(self, session: int) -> None:
        """A session ended."""
        self._watches.pop(session, None)
        self._missed.discard(session)
