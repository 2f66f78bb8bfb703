"""Which workers serve a session. Pure: a function of what is known about the fleets.

Everything is weighed in one currency, tokens of prefill: what is missing of the prompt, what the
verifier's load will cost, what its distance costs. Prefix hits against load, as in Preble (arXiv
2407.00023) and Mooncake (arXiv 2407.00079). Among equals the better of two drawn at random is taken
(power of two choices; Mitzenmacher 2001), so that orchestrators that know the same do not all
choose the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from outrider.domain import ModelInfo

LOAD_TOKENS = 512.0
"""What a half-full verifier costs; an almost full one costs twenty times as much."""
LOAD_SLACK_MIN = 0.05
RTT_TOKENS_PER_S = 5_000.0
"""A millisecond away is as bad as so many thousandths of these tokens to prefill."""
TIE_TOKENS = 32.0
"""Verifiers whose costs differ by less are equals: a block more or less decides nothing."""
SESSION_TOKENS = 256.0
"""A session that a drafter works for is as bad as so many tokens that it has to prefill: with the
one its work is shared for good, the others are a delay at the beginning."""
NEAR_SHARE = 0.8
"""Drafters of a kind that are expected to win so much of what the best one wins are equals:
estimates are no better."""

Draw: TypeAlias = Callable[[int], int]
"""Draws a number below the given one."""

Kind: TypeAlias = tuple[str, str]
"""Proposer and fingerprint of what it guesses with."""


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A ready worker as placement sees it."""

    address: str
    info: ModelInfo
    sessions: int
    """Sessions on it, those of other orchestrators included as far as known."""
    sessions_max: int
    tokens: float = 1.0
    """Of a drafter: what a verify step of one more session is expected to commit with it."""
    rtt_s: float = 0.0
    """To the worker and back."""
    kv_share: float = 0.0
    """Of its KV in use; 0 if not known."""
    waiting: bool = False
    """Sessions wait for KV there."""
    held_tokens: int = 0
    """Of the beginning of this text that it holds."""
    spares: int = 0
    """Of a drafter: sessions that it is a spare for, and ready to leave to the other drafter."""

    @property
    def kind(self) -> Kind:
        """What it guesses with: two of a kind guess the same."""
        return kind_of(self.info)


class Weighed(NamedTuple):
    """A verifier and what choosing it would cost, in tokens of prefill."""

    cost_tokens: float
    """All of what follows."""
    view: WorkerView
    missing_tokens: int
    load_tokens: float
    rtt_tokens: float

    def __str__(self) -> str:
        """For people."""
        return f"{self.view.address} {self.reason}"

    @property
    def reason(self) -> str:
        """What makes up the cost, for people."""
        return (
            f"costs {self.cost_tokens:.0f} (holds {self.view.held_tokens} "
            f"tokens, misses {self.missing_tokens}; load {_share(self.view):.2f} counts as "
            f"{self.load_tokens:.0f}, {self.view.rtt_s * 1e3:.1f} ms as {self.rtt_tokens:.0f})"
        )


def kind_of(info: ModelInfo) -> Kind:
    """Say what a drafter guesses with: two of a kind guess the same."""
    return info.proposer, info.model_fingerprint


def pairing_fault(target: ModelInfo, drafter: ModelInfo) -> str | None:
    """Say why a drafter cannot guess for a target, or None.

    Ids must mean the same on both sides; a drafter that only handles ids fits every target.
    """
    if drafter.tokenizer_fingerprint is None:
        return None
    if drafter.tokenizer_fingerprint != target.tokenizer_fingerprint:
        return (
            f"tokenizer mismatch: drafter {drafter.model} has tokenizer "
            f"{drafter.tokenizer_fingerprint[:12]}, target {target.model} has "
            f"{(target.tokenizer_fingerprint or 'none')[:12]}; use a draft model of the target's "
            "family"
        )
    return None


def weigh_verifiers(
    views: Sequence[WorkerView], model: str, exclude: Collection[str], prompt_tokens: int
) -> list[Weighed]:
    """Weigh the verifiers of a model for a prompt; the cheapest comes first."""
    weighed = [
        _weigh(view, prompt_tokens)
        for view in views
        if view.info.model == model and view.address not in exclude
    ]
    return sorted(weighed, key=lambda one: (one.cost_tokens, one.view.address))


def _weigh(view: WorkerView, prompt_tokens: int) -> Weighed:
    missing_tokens = max(0, prompt_tokens - view.held_tokens)
    load_tokens = _load_tokens(view)
    rtt_tokens = view.rtt_s * RTT_TOKENS_PER_S
    cost_tokens = missing_tokens + load_tokens + rtt_tokens
    return Weighed(cost_tokens, view, missing_tokens, load_tokens, rtt_tokens)


def pick(weighed: Sequence[Weighed], draw: Draw) -> Weighed | None:
    """Choose among weighed verifiers, the cheapest first."""
    if not weighed:
        return None
    dearest = weighed[0].cost_tokens + TIE_TOKENS
    equals = sum(one.cost_tokens <= dearest for one in weighed)
    if equals == 1:
        return weighed[0]
    # The first of two different ones: a second number that is not below the first stands for the
    # one after it, which is not the first of the two.
    return weighed[min(draw(equals), draw(equals - 1))]


def choose_verifier(
    views: Sequence[WorkerView], model: str, exclude: Collection[str]
) -> WorkerView | None:
    """The cheapest verifier of a model for a short prompt: the least loaded, if all are near."""
    fitting = (v for v in views if v.info.model == model and v.address not in exclude)
    return min(
        fitting,
        key=lambda view: (_load_tokens(view) + view.rtt_s * RTT_TOKENS_PER_S, view.address),
        default=None,
    )


def choose_drafters(
    views: Sequence[WorkerView],
    target: ModelInfo,
    count: int,
    exclude: Collection[str],
    bound: Collection[Kind] = (),
) -> list[WorkerView]:
    """Up to `count` drafters for a target: of each kind the best, then spares.

    Kinds come by what they are expected to win, which takes distance and speed into account. Of
    a kind the least loaded one is taken, unless another holds much of the text: two of a kind
    guess the same, so that another one wins nothing but safety. Hence it has to be idle, and is
    left (`surplus`) when somebody else needs it. Among equals the first in `views` is taken.
    `bound`: kinds that the session has already.
    """
    kinds: dict[Kind, list[WorkerView]] = {}
    for view in views:
        if view.address not in exclude and pairing_fault(target, view.info) is None:
            kinds.setdefault(view.kind, []).append(view)
    best: list[tuple[float, WorkerView]] = []
    spares: list[tuple[float, WorkerView]] = []
    for kind, members in kinds.items():
        most = max(view.tokens for view in members)
        members.sort(key=lambda view: _drafter_cost(view, most))
        if kind not in bound:
            best.append((most, members.pop(0)))
        spares += [(most, view) for view in members if not view.sessions]
    ranked = [*_by_worth(best), *_by_worth(spares)]
    return ranked[:count]


def _by_worth(found: list[tuple[float, WorkerView]]) -> list[WorkerView]:
    return [view for _, view in sorted(found, key=lambda e: (-e[0], *_drafter_cost(e[1], e[0])))]


def _drafter_cost(view: WorkerView, most: float) -> tuple[bool, float, int]:
    """Order drafters of a kind of which the best one wins `most`."""
    cost = SESSION_TOKENS * max(0, view.sessions - view.spares) - view.held_tokens
    # Rather one that is nobody's spare.
    return view.tokens < NEAR_SHARE * most, cost, view.sessions


@dataclass(frozen=True, slots=True)
class Attachment:
    """One of the drafters that a session has, for `surplus`."""

    binding: int
    kind: Kind
    others: int
    """Sessions that the drafter works for beside this one."""
    gain: float = 0.0
    """Tokens a step that it has won of late, if that is known."""


def primaries(attachments: Sequence[Attachment]) -> dict[Kind, Attachment]:
    """Say on which drafter of each kind a session relies: who won most, else who came first."""
    found: dict[Kind, Attachment] = {}
    for one in sorted(attachments, key=lambda one: (-one.gain, one.binding)):
        found.setdefault(one.kind, one)
    return found


def credited(
    attachments: Sequence[Attachment], chosen: Mapping[Kind, Attachment]
) -> dict[int, float]:
    """Say by binding what each would have won alone, at least.

    Two of a kind guess the same, and which one was heard first says little of either: the one
    relied on is credited with what its kind has won.
    """
    together: dict[Kind, float] = {}
    for one in attachments:
        together[one.kind] = together.get(one.kind, 0.0) + one.gain
    return {
        one.binding: together[one.kind] if chosen[one.kind].binding == one.binding else one.gain
        for one in attachments
    }


def surplus(attachments: Sequence[Attachment], chosen: Mapping[Kind, Attachment]) -> list[int]:
    """Spares (all but those `chosen`) on drafters that others need: their bindings should end."""
    return [
        one.binding for one in attachments if one.others and chosen[one.kind].binding != one.binding
    ]


def shortlist(count: int, most: int, draw: Draw) -> list[int]:
    """Draw up to `most` different indices below `count`: all of them if there are no more.

    The least loaded of a few drawn at random is nearly the least loaded of all, and costs the same
    in a fleet of thousands.
    """
    if count <= most:
        return list(range(count))
    drawn: dict[int, None] = {}
    while len(drawn) < most:
        drawn[draw(count)] = None
    return list(drawn)


def _share(view: WorkerView) -> float:
    """Of a worker in use: of its sessions or of its KV, whichever is scarcer."""
    share = max(view.sessions / max(1, view.sessions_max), view.kv_share)
    return max(1.0, share) if view.waiting else share


def _load_tokens(view: WorkerView) -> float:
    share = _share(view)
    return LOAD_TOKENS * share / max(LOAD_SLACK_MIN, 1.0 - share)
