"""Verify steps against the raw matrix products of the same size, and the rule's share of a step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bench.floor import Floor
from outrider.domain import SamplingParams
from outrider.model.kv_cache import SessionCache
from outrider.model.language_model import LanguageModel, Row
from outrider.model.sampling import sample_nodes

CONTEXT = 300
"""Committed tokens of each row."""

TREE_PARENTS = (-1, 0, 0, 1, 1, 3, 3, 5)
"""The tip and seven nodes, four deep, as a drafter with a choice of two would send them."""

_SAMPLED = SamplingParams(temperature=0.8, top_p=0.95)


@dataclass(frozen=True, slots=True)
class StepCase:
    """A shape of step; `tree` gives each row the eight tokens of `TREE_PARENTS`."""

    name: str
    rows: int
    tree: bool
    goal: float

    @property
    def tokens(self) -> int:
        """Tokens that a step computes."""
        return self.rows * (len(TREE_PARENTS) if self.tree else 1)


CASES = (
    StepCase("rows1", 1, False, 1.3),
    StepCase("rows1x8", 1, True, 1.2),
    StepCase("rows16", 16, False, 1.45),
    StepCase("tree16x8", 16, True, 1.45),
)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Seconds of one case: the least of the interleaved rounds, and their medians."""

    name: str
    tokens: int
    goal: float
    floor_s: float
    step_s: float
    rule_s: float
    """`sample_nodes` alone, temperature 0.8 and top-p 0.95 at every token of the step."""
    greedy_rule_s: float
    floor_median_s: float
    step_median_s: float

    @property
    def ratio(self) -> float:
        """The step over the floor."""
        return self.step_s / self.floor_s

    @property
    def rule_share(self) -> float:
        """What the rule takes of a step that samples."""
        return self.rule_s / (self.step_s + self.rule_s)


class _Bench:
    """One case over filled caches."""

    def __init__(
        self,
        case: StepCase,
        model: LanguageModel,
        floor: Floor,
        texts: Sequence[Sequence[int]],
        caches: Sequence[SessionCache],
    ) -> None:
        self.case = case
        self._model = model
        self._floor = floor
        self._inputs = floor.inputs(case.tokens)
        # The nodes carry the text's own tokens, so that their logits are as peaked as in use.
        count = len(TREE_PARENTS) if case.tree else 1
        parents = TREE_PARENTS if case.tree else None
        self._rows = [
            Row(cache, text[CONTEXT : CONTEXT + count], parents, range(count))
            for cache, text in zip(caches[: case.rows], texts, strict=False)
        ]
        self._positions = [
            CONTEXT + 1 + depth
            for _ in range(case.rows)
            for depth in (_depths() if case.tree else [0])
        ]
        self.floor_s: list[float] = []
        self.step_s: list[float] = []
        self.rule_s: list[float] = []
        self.greedy_rule_s: list[float] = []

    def round(self, step_first: bool) -> None:
        """Time the floor, the step and the rule once each."""
        if not step_first:
            self._time_floor()
        started = time.perf_counter()
        logits = self._model.forward(self._rows)
        self.step_s.append(time.perf_counter() - started)
        for row in self._rows:
            row.cache.truncate(CONTEXT)
        count = self.case.tokens
        for params, seconds in (
            (_SAMPLED, self.rule_s),
            (SamplingParams(temperature=0.0), self.greedy_rule_s),
        ):
            started = time.perf_counter()
            sample_nodes(logits, [params] * count, [7] * count, self._positions)
            seconds.append(time.perf_counter() - started)
        if step_first:
            self._time_floor()

    def _time_floor(self) -> None:
        started = time.perf_counter()
        self._floor.run(self._inputs)
        self.floor_s.append(time.perf_counter() - started)

    def result(self) -> StepResult:
        """Sum the rounds up."""
        return StepResult(
            name=self.case.name,
            tokens=self.case.tokens,
            goal=self.case.goal,
            floor_s=min(self.floor_s),
            step_s=min(self.step_s),
            rule_s=min(self.rule_s),
            greedy_rule_s=min(self.greedy_rule_s),
            floor_median_s=statistics.median(self.floor_s),
            step_median_s=statistics.median(self.step_s),
        )


def _depths() -> list[int]:
    depths: list[int] = []
    for parent in TREE_PARENTS:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def measure_steps(
    model: LanguageModel,
    floor: Floor,
    texts: Sequence[Sequence[int]],
    rounds: int,
    advance: Callable[[], None],
) -> list[StepResult]:
    """Measure all cases, `rounds` times in turn. Call it on the model's thread.

    `texts` are 16 texts of at least `CONTEXT` + 8 tokens. Large cases run every fourth round.
    `advance` is called after each text and each round.
    """
    # Each case leaves the caches as it found them, so that all can share them.
    caches = [model.new_cache() for _ in texts]
    for cache, text in zip(caches, texts, strict=True):
        model.forward([Row(cache, text[:CONTEXT], None, [CONTEXT - 1])])
        advance()
    benches = [_Bench(case, model, floor, texts, caches) for case in CASES]
    for bench in benches:
        bench.round(False)
        bench.round(True)
        for seconds in (bench.floor_s, bench.step_s, bench.rule_s, bench.greedy_rule_s):
            seconds.clear()  # warm-up: not counted
    for number in range(rounds):
        for bench in benches:
            if bench.case.tokens <= len(TREE_PARENTS) or number % 4 == 0:
                bench.round(step_first=number // 4 % 2 == 1)
        advance()
    for cache in caches:
        cache.release()
    return [bench.result() for bench in benches]
