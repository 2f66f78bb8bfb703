"""How many drafters a fleet deserves: the curve of goodput over their number. Pure but for a seed.

Shared by `outrider plan`, which is asked once, and by the fleet controller, which asks again as
its measurements change.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.planner.modes import SESSION_STEPS, simulate_fleet
from orchestrator.planner.tree_simulation import TreeScenario

SPEEDUP_WORTH = 1.05
"""Below this, guessing is not worth its machines; the orchestrator unbinds drafters there too."""

_RATIOS = (0.25, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0)
"""Drafters to a verifier that are tried."""
_NEARLY_BEST = 0.97


@dataclass(frozen=True, slots=True)
class Prices:
    """Per hour, any currency."""

    verifier: float
    drafter: float


@dataclass(frozen=True, slots=True)
class DrafterChoice:
    """A number of drafters, and what others would win."""

    drafters: int
    """What makes tokens cheapest; without prices the fewest that are within 3% of the fastest."""
    speedup: float
    """Of that many, over decoding without guesses."""
    rates: Mapping[int, float]
    """Tokens per second of the whole fleet by number of drafters, ascending."""

    def rate(self, drafters: float) -> float:
        """Tokens per second with any number of drafters: straight between those that were tried."""
        counts = sorted(self.rates)
        at = bisect.bisect_left(counts, drafters)
        if at == len(counts):
            return self.rates[counts[-1]]
        high = counts[at]
        low, low_rate = (counts[at - 1], self.rates[counts[at - 1]]) if at else (0, self._plain)
        return low_rate + (self.rates[high] - low_rate) * (drafters - low) / (high - low)

    @property
    def _plain(self) -> float:
        """Without any."""
        return self.rates[self.drafters] / max(1e-9, self.speedup)

    @property
    def marginal_tokens_per_s(self) -> float:
        """What the last of the chosen drafters wins: the slope from the next smaller number."""
        smaller = [count for count in self.rates if count < self.drafters]
        if not smaller:
            return (self.rates[self.drafters] - self._plain) / max(1, self.drafters)
        before = max(smaller)
        return (self.rates[self.drafters] - self.rates[before]) / (self.drafters - before)


def best_drafters(
    scenario: TreeScenario, prices: Prices | None = None, *, session_steps: int = SESSION_STEPS // 4
) -> DrafterChoice:
    """Choose the number of drafters of a scenario; its own number does not count.

    `session_steps`, verify steps times sessions of each simulation, trades precision for time.
    """
    useful_max = scenario.sessions * scenario.drafters_per_session
    counts = sorted({min(useful_max, math.ceil(r * scenario.verifiers)) for r in _RATIOS})
    rates = {
        count: simulate_fleet(
            replace(scenario, drafters=count), session_steps=session_steps
        ).tokens_per_s
        for count in counts
    }
    if prices is not None:
        costs = {
            count: (scenario.verifiers * prices.verifier + count * prices.drafter) / rate
            for count, rate in rates.items()
        }
        chosen = min(counts, key=costs.__getitem__)
    else:
        best = max(rates.values())
        chosen = min(count for count, rate in rates.items() if rate >= _NEARLY_BEST * best)
    return DrafterChoice(chosen, rates[chosen] / scenario.target_only_tokens_per_s, rates)
