"""Drafting for sessions whose texts are known, beside a verifier that is only imagined.

What a target says is a function of prompt, parameters and seed: once it is known, no target is
needed to tell which guesses it would accept. So a real proposer grows real trees, and between two
verify steps it has a stated number of steps of its own, as it would with a clock: what it grows
while a step runs can be verified in the next one. Nothing here depends on how fast the machine is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from drafter_service.mirror import Mirror
from drafter_service.proposers.base import Proposer
from outrider.domain import BindSpec, Commit
from outrider.draft_tree import Node
from outrider.model.language_model import LanguageModel, Row
from outrider.model.sampling import sample_nodes

Claim = tuple[float, bool]
"""(log-probability that a drafter stated, whether the target's sample was that guess)"""


@dataclass(frozen=True, slots=True)
class Known:
    """A session, and how its text goes on."""

    spec: BindSpec
    text: tuple[int, ...]
    """After prompt and committed tokens."""


@dataclass(slots=True)
class Followed:
    """What became of a session."""

    mirror: Mirror
    text: tuple[int, ...]
    done: int = 0
    """Tokens of the text that are committed."""
    accepted: list[int] = field(default_factory=list)
    """Guesses accepted in each verify step."""
    ready: list[bool] = field(default_factory=list)
    """For each verify step but the first, whether there were guesses below the tip at its start."""
    on_path: list[bool] = field(default_factory=list)
    """For each verify step, whether all that it decided had been guessed when it ended."""

    @property
    def tau(self) -> float:
        """Tokens committed a verify step."""
        return 1.0 + sum(self.accepted) / max(1, len(self.accepted))

    @property
    def ready_on_path(self) -> list[bool]:
        """The same, for steps after one that decided nothing but what had been guessed."""
        return [ready for ready, path in zip(self.ready, self.on_path, strict=False) if path]


class Lockstep:
    """Verify steps of all sessions together, and a proposer's steps between them."""

    def __init__(
        self, proposer: Proposer, known: Iterable[Known], *, grows: float, verified_max: int
    ) -> None:
        """In a verify step the proposer has `grows` steps (a fraction adds up), and the target
        takes the `verified_max` most probable nodes of all sessions."""
        self.claims: list[Claim] = []
        """All that were stated of tokens decided since."""
        self.followed = [Followed(Mirror(1, one.spec), one.text) for one in known]
        self._proposer = proposer
        self._grows = grows
        self._verified_max = verified_max
        self._due = 0.0
        for one in self.followed:
            proposer.open(one.mirror)

    @property
    def running(self) -> list[Followed]:
        """Sessions whose texts have not ended."""
        return [one for one in self.followed if one.done < len(one.text)]

    @property
    def accepted(self) -> int:
        """Guesses accepted so far."""
        return sum(sum(one.accepted) for one in self.followed)

    def warm_up(self) -> None:
        """Let the proposer compute the prompts and first guesses."""
        mirrors = [one.mirror for one in self.running]
        while any(not mirror.tree.size for mirror in mirrors) and self._proposer.grow(mirrors):
            pass

    def run(self, steps: int) -> None:
        """Do so many verify steps, or as many as the texts have."""
        for _ in range(steps):
            if not self.running:
                return
            self.step()

    def step(self) -> None:
        """Do one verify step, during which the trees go on growing."""
        running = self.running
        for one in running:
            if one.accepted:
                one.ready.append(bool(one.mirror.tree.root.children))
        chosen = self._chosen(running)
        self._grow(running)
        for one in running:
            self._commit(one, chosen)
        if not self._proposer.leaves_max:
            # Who does not compute answers a commit at once.
            self._proposer.grow([one.mirror for one in running])

    def _grow(self, running: Sequence[Followed]) -> None:
        mirrors = [one.mirror for one in running]
        self._due += self._grows
        while self._due >= 1.0:
            self._due -= 1.0
            self._proposer.grow(mirrors)

    def _chosen(self, running: Sequence[Followed]) -> set[Node]:
        ranked = [
            (-logprob, at, order, node)
            for at, one in enumerate(running)
            for order, (logprob, node) in zip(
                range(self._verified_max), one.mirror.tree.ranked(), strict=False
            )
        ]
        ranked.sort(key=lambda entry: entry[:3])
        return {node for *_, node in ranked[: self._verified_max]}

    def _commit(self, one: Followed, chosen: set[Node]) -> None:
        """Walk down the verified nodes as the text says, and decide one token more."""
        node, accepted = one.mirror.tree.root, 0
        for token in one.text[one.done :]:
            child = node.children.get(token)
            if child is None or child not in chosen:
                break
            node, accepted = child, accepted + 1
        tokens = one.text[one.done : one.done + accepted + 1]
        one.accepted.append(len(tokens) - 1)
        one.done += len(tokens)
        mirror = one.mirror
        news = mirror.apply(Commit(mirror.spec.epoch, len(mirror.log), tokens))
        assert news is not None, "there is at least one token"
        one.on_path.append(len(news[1].matched) == len(tokens))
        self.claims += [(shadow.claimed_logprob, shadow.accepted) for shadow in news[1].shadow]
        self._proposer.advanced(mirror, *news)
        mirror.take_draft()  # nobody reads it, but it would wait for ever


def decided(model: LanguageModel, specs: Sequence[BindSpec], count: int) -> list[Known]:
    """Let a target say how each session goes on, for `count` tokens."""
    texts = [[*spec.prompt, *spec.committed] for spec in specs]
    pool = model.new_pool(sum(len(text) + count + 32 for text in texts))
    caches = [pool.new_cache() for _ in texts]
    lengths = [len(text) for text in texts]
    for _ in range(count):
        rows = [
            Row(cache, new, None, [len(new) - 1])
            for cache, text in zip(caches, texts, strict=True)
            if (new := text[cache.prefix_length :])
        ]
        samples = sample_nodes(
            model.forward(rows),
            [spec.sampling for spec in specs],
            [spec.seed for spec in specs],
            [len(text) for text in texts],
        )
        for text, token in zip(texts, samples, strict=True):
            text.append(token)
    for cache in caches:
        cache.release()
    return [
        Known(spec, tuple(text[length:]))
        for spec, text, length in zip(specs, texts, lengths, strict=True)
    ]
