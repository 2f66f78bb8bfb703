"""Many sessions on one drafter: what best-first growth wins, and what tenants get of it.

Two orders of work at equal compute, leaves and steps alike, over the same sessions, whose texts
are known: the product's queue, and one that gives each session its best leaf in turn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from bench.lockstep import Known, Lockstep
from drafter_service.proposers.language_model import LanguageModelProposer
from drafter_service.proposers.leaf_queue import Leaf, LeafQueue, Offer


class RoundRobin(LeafQueue):
    """Each session's best leaf in turn, whatever it is worth."""

    def __init__(self) -> None:
        super().__init__()
        self._turn = 0

    def take(self, offers: Iterable[Offer], count: int) -> list[Leaf]:
        """See `LeafQueue.take`."""
        waiting = sorted(
            ((offer.mirror.spec.session, offer, offer.leaves_max) for offer in offers),
            key=lambda entry: (entry[0] <= self._turn, entry[0]),
        )
        taken: list[Leaf] = []
        while waiting and len(taken) < count:
            left = []
            for session, offer, leaves_max in waiting:
                if len(taken) == count:
                    break
                (entry,) = offer.frontier.take(1)
                taken.append((offer.mirror, entry))
                self._turn = session
                if leaves_max > 1 and offer.frontier.best is not None:
                    left.append((session, offer, leaves_max - 1))
            waiting = left
        return taken


class Counted(LeafQueue):
    """The product's queue, which counts what tenants and sessions get."""

    def __init__(self) -> None:
        super().__init__()
        self.by_tenant: Counter[str] = Counter()

    def take(self, offers: Iterable[Offer], count: int) -> list[Leaf]:
        """See `LeafQueue.take`."""
        leaves = super().take(offers, count)
        self.by_tenant.update(mirror.spec.tenant for mirror, _ in leaves)
        return leaves


@dataclass(frozen=True, slots=True)
class Sharing:
    """Sessions of one drafter, served best first and in turn."""

    sessions: int
    leaves: int
    """That a growing step expands."""
    steps: int
    """Verify steps."""
    accepted: int
    """Guesses accepted, of all sessions."""
    accepted_in_turn: int
    least: float
    """Guesses accepted a step in the session that got least."""
    least_in_turn: float
    shares: dict[str, tuple[float, float]]
    """By tenant: of the weights, and of the leaves that were expanded."""

    @property
    def gain(self) -> float:
        """Guesses accepted, over those when sessions are served in turn."""
        return self.accepted / max(1, self.accepted_in_turn)


def measure_sharing(
    make: Callable[[LeafQueue], LanguageModelProposer],
    known: Sequence[Known],
    weights: dict[str, float],
    *,
    grows: float,
    verified_max: int,
    steps: int,
) -> Sharing:
    """Serve the sessions for so many verify steps in both orders, and with tenants.

    For the last run sessions belong to the tenants one after the other; `make` builds a proposer
    with a queue, anew for each run.
    """

    def run(queue: LeafQueue, sessions: Sequence[Known]) -> tuple[int, float]:
        rounds = Lockstep(make(queue), sessions, grows=grows, verified_max=verified_max)
        rounds.warm_up()
        rounds.run(steps)
        return rounds.accepted, min(one.tau - 1.0 for one in rounds.followed)

    accepted, least = run(LeafQueue(), known)
    accepted_in_turn, least_in_turn = run(RoundRobin(), known)
    names, counted = list(weights), Counted()
    theirs = [
        replace(one, spec=replace(one.spec, tenant=name, tenant_weight=weights[name]))
        for at, one in enumerate(known)
        for name in (names[at % len(names)],)
    ]
    run(counted, theirs)
    leaves, total = counted.by_tenant.total(), sum(weights.values())
    return Sharing(
        sessions=len(known),
        leaves=make(LeafQueue()).leaves_max,
        steps=steps,
        accepted=accepted,
        accepted_in_turn=accepted_in_turn,
        least=least,
        least_in_turn=least_in_turn,
        shares={name: (weights[name] / total, counted.by_tenant[name] / leaves) for name in names},
    )
