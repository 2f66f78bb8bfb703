"""Many short speculated continuations of one prompt, and the exact distribution they must follow.

The engine is driven directly: each batch of sessions and their drafts are queued before its
thread starts, so that the very first step verifies them, and every run is the same.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from outrider.committed import digest
from outrider.domain import Draft, SessionSpec, SpeculationCounters, session_seed
from outrider.draft_tree import Node
from outrider.model.language_model import LanguageModel
from outrider.model.noise import words_numpy
from tests.support.flat_times import FlatTimes
from tests.support.fleet import TARGET, load
from tests.support.reference import Case, exact_probabilities
from verifier_service.acceptance import AcceptRule, accept_path
from verifier_service.config import EngineConfig
from verifier_service.engine import Engine
from verifier_service.messages import Offer, Open, Outputs

BATCH = 256
DEPTH = 2
"""Tokens of each continuation. One more is asked for: the last one is never guessed at."""

CASE = Case(prompt=(ord("T"),), tokens_max=DEPTH + 1, temperature=1.3, top_k=10)

_CONFIG = EngineConfig(
    sessions_max=BATCH, kv_tokens_max=1 << 20, step_nodes_max=1 << 16, warm_up=False
)


@dataclass(slots=True)
class Exact:
    """The target's distribution over continuations of `DEPTH` tokens."""

    first: NDArray[np.float64]
    """Probability of each first token [V]."""
    second: dict[int, NDArray[np.float64]]
    """Probability of each second token [V], by the first."""

    @classmethod
    def of_case(cls) -> Exact:
        """Compute it, one pass for each possible first token."""
        first = exact_probabilities(TARGET, CASE, ())
        possible = np.flatnonzero(first).tolist()
        return cls(first, {t: exact_probabilities(TARGET, CASE, (t,)) for t in possible})

    def pairs(self) -> dict[tuple[int, int], float]:
        """Probability of each continuation that is possible."""
        return {
            (one, int(two)): float(self.first[one] * row[two])
            for one, row in self.second.items()
            for two in np.flatnonzero(row)
        }

    def sample(self, seed: int) -> tuple[int, int]:
        """What the rule gives for a session's seed."""
        length = len(CASE.prompt)
        one = _perturbed_best(self.first, seed, length)
        return one, _perturbed_best(self.second[one], seed, length + 1)


def _perturbed_best(probabilities: NDArray[np.float64], seed: int, position: int) -> int:
    possible = np.flatnonzero(probabilities)
    uniforms = ((words_numpy(seed, position, possible) >> 8).astype(np.float64) + 0.5) / 2.0**24
    return int(possible[np.argmax(np.log(probabilities[possible]) - np.log(-np.log(uniforms)))])


# --- drafters -----------------------------------------------------------------------------------

Guess: TypeAlias = tuple[tuple[int, ...], tuple[int, ...]]
"""Tokens and parents of a draft."""
Guesser: TypeAlias = Callable[[Exact, int], Guess | None]
"""What is guessed for a session, given its seed."""


def helpful(exact: Exact, seed: int) -> Guess:
    """The target's own sample."""
    return exact.sample(seed), (-1, 0)


def most_probable(exact: Exact, seed: int) -> Guess:
    """Always the same: what would win without noise."""
    one = int(exact.first.argmax())
    return (one, int(exact.second[one].argmax())), (-1, 0)


def never_the_sample(exact: Exact, seed: int) -> Guess:
    """Anything but what the target will say: it knows, and works against it."""
    truth = exact.sample(seed)
    wrong = next(token for token in exact.second if token != truth[0])
    row = exact.second[truth[0]]
    other = next(int(token) for token in np.flatnonzero(row) if token != truth[1])
    # Right first and wrong below, and wrong from the start, in turns.
    return ((truth[0], other), (-1, 0)) if seed % 2 else ((wrong, truth[1]), (-1, 0))


def siblings(exact: Exact, seed: int) -> Guess:
    """A tree: the four most probable, each with its most probable continuation."""
    tokens: list[int] = []
    parents: list[int] = []
    for one in sorted(exact.second, key=lambda token: -exact.first[token])[:4]:
        parents += [-1, len(tokens)]
        tokens += [one, int(exact.second[one].argmax())]
    return tuple(tokens), tuple(parents)


# --- drawing ------------------------------------------------------------------------------------


@dataclass(slots=True)
class Draws:
    """What many sessions said."""

    counts: Counter[tuple[int, int]] = field(default_factory=Counter)
    counters: SpeculationCounters = field(default_factory=SpeculationCounters)

    @property
    def tokens(self) -> int:
        """Tokens drawn."""
        return DEPTH * self.counts.total()

    def p_value(self, exact: Exact) -> float:
        """Chi-square of the continuations; those expected less than ten times count together."""
        pairs = exact.pairs()
        if not self.counts.keys() <= pairs.keys():
            return 0.0  # something that is filtered out was said
        sessions = self.counts.total()
        expected = np.array([probability * sessions for probability in pairs.values()])
        observed = np.array([float(self.counts[pair]) for pair in pairs])
        rare = expected < 10
        if rare.any():
            expected = np.append(expected[~rare], expected[rare].sum())
            observed = np.append(observed[~rare], observed[rare].sum())
        return float(stats.chisquare(observed, expected * (sessions / expected.sum())).pvalue)


def draw(exact: Exact, guesser: Guesser, *, sessions: int, rule: AcceptRule = accept_path) -> Draws:
    """Let so many sessions with different seeds decode, each offered what is guessed for it."""
    model = load(TARGET)
    draws = Draws()
    for start in range(0, sessions, BATCH):
        seeds = [session_seed(number, 0) for number in range(start, min(start + BATCH, sessions))]
        _draw_batch(model, exact, guesser, seeds, rule, draws)
    return draws


def _draw_batch(
    model: LanguageModel,
    exact: Exact,
    guesser: Guesser,
    seeds: list[int],
    rule: AcceptRule,
    draws: Draws,
) -> None:
    said: dict[int, list[int]] = {number: [] for number in range(len(seeds))}
    left = set(said)
    done = threading.Event()

    def emit(outputs: dict[int, Outputs]) -> None:
        output = outputs[1]
        assert not output.rejections
        for number, commit, report in output.commits:
            said[number] += commit.tokens
            if commit.last:
                draws.counters = draws.counters.plus(report.counters)
                left.discard(number)
        if not left:
            done.set()

    engine = Engine(model, _CONFIG, emit, rule=rule, times=FlatTimes())
    for number, seed in enumerate(seeds):
        engine.submit(Open(1, _session(number, seed)))
        guess = guesser(exact, seed)
        if guess is not None:
            engine.submit(Offer(1, number, 1, _draft(*guess)))
    engine.start()
    assert done.wait(60), "the engine did not finish"
    engine.stop()
    draws.counts.update((one, two) for one, two, _ in said.values())


def _session(number: int, seed: int) -> SessionSpec:
    return SessionSpec(
        session=number,
        epoch=1,
        prompt=CASE.prompt,
        committed=(),
        sampling=CASE.sampling,
        seed=seed,
        tokens_max=CASE.tokens_max,
        ignore_eos=True,
    )


def _draft(tokens: tuple[int, ...], parents: tuple[int, ...]) -> Draft:
    return Draft(
        epoch=1,
        base_length=len(CASE.prompt),
        base_digest=digest(CASE.prompt),
        tokens=tokens,
        parents=parents,
        accept_logprobs=(math.log(0.9),) * len(tokens),
    )


# --- a rule that is wrong -----------------------------------------------------------------------


def first_child_always(
    tip: Node, nodes: Sequence[Node], samples: Sequence[int]
) -> tuple[list[int], list[int]]:
    """The rule's classic mistake: the first guess is believed without asking the target."""
    index_of = {node: index for index, node in enumerate(nodes)}
    accepted: list[int] = []
    tokens: list[int] = []
    node = tip
    while True:
        child = next((c for c in node.children.values() if c in index_of), None)
        if child is None:
            break
        accepted.append(index_of[child])
        tokens.append(child.token)
        node = child
    return accepted, [*tokens, samples[1 + accepted[-1] if accepted else 0]]
