"""Whether to put drafters on machines of their own, how many, and what that costs.

Pure but for the seed of its simulations.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from orchestrator.planner.drafter_choice import SPEEDUP_WORTH, Prices, best_drafters
from orchestrator.planner.formulas import cost_per_million_tokens
from orchestrator.planner.knots import Knots
from orchestrator.planner.modes import COLOCATED, SESSION_STEPS, Mode, simulate_fleet, tokens_per_s
from orchestrator.planner.tree_simulation import TreeScenario
from outrider.errors import ConfigError

RTT_MAX_S = 0.2
"""Longest round trip for which a break-even is looked for."""
ROWS_MAX = 1_024
"""Most sessions on one verifier for which a break-even is looked for."""
VERIFIERS_MAX = 100_000

_SCAN_SHARE = 4
"""Simulations that only compare are shorter by this factor."""
_EVALUATIONS_MAX = 7
_LEAD_TOLERANCE = 0.01
"""Rates that differ by less are taken as equal: simulations are no surer."""

PLANNED = (
    Mode.TARGET_ONLY,
    Mode.COLOCATED_CHAIN,
    Mode.COLOCATED_TREE,
    Mode.LOCKSTEP,
    Mode.REMOTE_TREE,
)


@dataclass(frozen=True, slots=True)
class PlanRequest:
    """What is known and what is wanted. Raises `ConfigError`."""

    scenario: TreeScenario
    """Figures and load; its numbers of verifiers and drafters count only if fixed."""
    verifiers: int | None = None
    """Fixed; else the fewest that give each session what it needs."""
    drafters: int | None = None
    """Fixed; else what costs least for a token, or without prices the fewest that are fast."""
    tokens_per_s_min: float = 0.0
    """What each session needs."""
    colocated_draft: Knots | None = None
    """Draft step on a verifier's own device; by default the drafters'."""
    verifier_price: float | None = None
    """Per hour."""
    drafter_price: float | None = None
    session_steps: int = SESSION_STEPS
    """Verify steps times sessions of each simulation: precision for time."""

    def __post_init__(self) -> None:
        if (self.verifier_price is None) != (self.drafter_price is None):
            raise ConfigError(
                "verifier_price, drafter_price: give both prices or none, else no cost follows"
            )
        for name in ("verifier_price", "drafter_price", "tokens_per_s_min"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= 0.0):
                raise ConfigError(f"{name}: must not be negative, got {value}")


@dataclass(frozen=True, slots=True)
class ModePlan:
    """What the fleet does in one mode."""

    mode: Mode
    tokens_per_s: float
    tokens_per_s_session: float
    speedup: float
    drafters: int
    """On machines of their own."""
    cost_per_million: float | None


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer."""

    verifiers: int
    drafters: int
    """Of the remote tree."""
    sessions: int
    modes: tuple[ModePlan, ...]
    fastest: Mode
    """By tokens per second; the plainer of two whose difference is below 1%."""
    cheapest: Mode | None
    """By cost per token; None without prices."""
    break_even_rtt_s: float | None
    """Round trip beyond which co-located drafting is faster than the remote tree at this load; 0
    if it always is, None if not up to `RTT_MAX_S`."""
    rows_max: int | None
    """Sessions on a verifier beyond which the remote tree gains less than `SPEEDUP_WORTH`; 0 if
    already with one, None if not up to `ROWS_MAX`."""

    @property
    def drafters_per_verifier(self) -> float:
        """Of the remote tree."""
        return self.drafters / self.verifiers


def make_plan(request: PlanRequest, report: Callable[[str], None] = lambda _: None) -> Plan:
    """Answer a request; `report` hears what is being worked on. Raises `ConfigError`."""
    report("choosing verifiers")
    verifiers = request.verifiers or _fewest_verifiers(request)
    scenario = replace(request.scenario, verifiers=verifiers)
    report("choosing drafters")
    drafters = request.drafters
    if drafters is None:
        drafters = _drafters(request, scenario)
    scenario = replace(scenario, drafters=drafters)
    report("comparing modes")
    modes = tuple(_mode_plan(mode, scenario, request) for mode in PLANNED)
    report("looking for the round trip at which co-located drafting wins")
    break_even_s = break_even_rtt_s(
        scenario, request.colocated_draft, session_steps=request.session_steps
    )
    report("looking for the load at which plain decoding wins")
    rows_max = load_limit(scenario, session_steps=request.session_steps // _SCAN_SHARE)
    return Plan(
        verifiers=verifiers,
        drafters=drafters,
        sessions=scenario.sessions,
        modes=modes,
        fastest=_fastest(modes),
        cheapest=_cheapest(modes),
        break_even_rtt_s=break_even_s,
        rows_max=rows_max,
    )


def break_even_rtt_s(
    scenario: TreeScenario,
    colocated_draft: Knots | None = None,
    *,
    session_steps: int = SESSION_STEPS,
) -> float | None:
    """Round trip at which the best co-located mode is as fast as the remote tree.

    0 if the remote tree never is faster, None if it is up to `RTT_MAX_S`.
    """
    colocated = max(
        tokens_per_s(mode, scenario, colocated_draft=colocated_draft) for mode in COLOCATED
    )

    def lead(rtt_s: float) -> float:
        farther = replace(scenario, rtt_s=rtt_s)
        return tokens_per_s(Mode.REMOTE_TREE, farther, session_steps=session_steps) - colocated

    near_s, far_s = 0.0, RTT_MAX_S
    near_lead, far_lead = lead(near_s), lead(far_s)
    if near_lead <= 0.0:
        return 0.0
    if far_lead > 0.0:
        return None
    # False position, as Illinois: simulations are too slow for plain bisection.
    for _ in range(_EVALUATIONS_MAX):
        middle_s = near_s + (far_s - near_s) * near_lead / (near_lead - far_lead)
        middle_lead = lead(middle_s)
        if abs(middle_lead) < _LEAD_TOLERANCE * colocated:
            return middle_s
        if middle_lead > 0.0:
            near_s, near_lead, far_lead = middle_s, middle_lead, far_lead / 2
        else:
            far_s, far_lead, near_lead = middle_s, middle_lead, near_lead / 2
    return (near_s + far_s) / 2


def load_limit(
    scenario: TreeScenario, *, session_steps: int = SESSION_STEPS // _SCAN_SHARE
) -> int | None:
    """Sessions on a verifier up to which the remote tree gains `SPEEDUP_WORTH`, in steps of 10%.

    The drafters to a verifier stay what they are. 0 if one session is too many, None if
    `ROWS_MAX` are not.
    """
    verifiers = scenario.verifiers

    def pays(rows: int) -> bool:
        loaded = replace(scenario, sessions=rows * verifiers)
        return simulate_fleet(loaded, session_steps=session_steps).speedup >= SPEEDUP_WORTH

    low, high = 0, 1
    while pays(high):
        low, high = high, 2 * high
        if high > ROWS_MAX:
            return None
    while high - low > max(1, high // 10):
        middle = (low + high) // 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low


def _fewest_verifiers(request: PlanRequest) -> int:
    """The fewest that give each session what it needs in the mode that suits best."""

    def enough(verifiers: int) -> bool:
        scenario = replace(request.scenario, verifiers=verifiers)
        drafters = request.drafters
        if drafters is None:
            drafters = min(2 * verifiers, scenario.sessions)
        scenario = replace(scenario, drafters=drafters)
        need = request.tokens_per_s_min * scenario.sessions
        computed = (Mode.TARGET_ONLY, *COLOCATED)
        best = max(
            tokens_per_s(mode, scenario, colocated_draft=request.colocated_draft)
            for mode in computed
        )
        return best >= need or _scan(request, scenario) >= need

    sessions = request.scenario.sessions
    if not request.tokens_per_s_min:
        return 1
    most = min(sessions, VERIFIERS_MAX)
    if not enough(most):
        raise ConfigError(
            f"tokens_per_s_min: no mode gives each session {request.tokens_per_s_min:g} tokens/s,"
            " not even with a verifier for each"
        )
    low, high = 0, 1
    while high < most and not enough(high):
        low, high = high, min(most, 2 * high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def _drafters(request: PlanRequest, scenario: TreeScenario) -> int:
    prices = None
    if request.verifier_price is not None:
        assert request.drafter_price is not None
        prices = Prices(request.verifier_price, request.drafter_price)
    steps = request.session_steps // _SCAN_SHARE
    return best_drafters(scenario, prices, session_steps=steps).drafters


def _scan(request: PlanRequest, scenario: TreeScenario) -> float:
    steps = request.session_steps // _SCAN_SHARE
    return tokens_per_s(Mode.REMOTE_TREE, scenario, session_steps=steps)


def _price(request: PlanRequest, verifiers: int, drafters: int) -> float:
    assert request.verifier_price is not None
    assert request.drafter_price is not None
    return verifiers * request.verifier_price + drafters * request.drafter_price


def _mode_plan(mode: Mode, scenario: TreeScenario, request: PlanRequest) -> ModePlan:
    rate = tokens_per_s(
        mode,
        scenario,
        colocated_draft=request.colocated_draft,
        session_steps=request.session_steps,
    )
    drafters = {Mode.REMOTE_TREE: scenario.drafters, Mode.LOCKSTEP: scenario.verifiers}.get(mode, 0)
    cost = None
    if request.verifier_price is not None:
        cost = cost_per_million_tokens(_price(request, scenario.verifiers, drafters), rate)
    return ModePlan(
        mode=mode,
        tokens_per_s=rate,
        tokens_per_s_session=rate / scenario.sessions,
        speedup=rate / scenario.target_only_tokens_per_s,
        drafters=drafters,
        cost_per_million=cost,
    )


def _fastest(modes: tuple[ModePlan, ...]) -> Mode:
    best = max(plan.tokens_per_s for plan in modes)
    # Listed from plain to involved.
    return next(plan.mode for plan in modes if plan.tokens_per_s >= 0.99 * best)


def _cheapest(modes: tuple[ModePlan, ...]) -> Mode | None:
    costs = [(plan.cost_per_million, plan.mode) for plan in modes]
    known = [(cost, mode) for cost, mode in costs if cost is not None]
    return min(known, key=lambda pair: pair[0])[1] if known else None
