"""How many drafters: what the planner would have, none where guessing does not pay. Pure.

A fleet that has been sent home comes back through a canary: one drafter, from time to time and
when the load has fallen, on whose guesses it is measured whether they pay again. Missed deadlines
play no part: where nobody waits for drafts, there are none.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, replace

from orchestrator.planner.drafter_choice import SPEEDUP_WORTH, DrafterChoice, Prices
from orchestrator.scaling.signals import DrafterSignals, SpeculationFigures, VerifierSignals
from orchestrator.scaling.worth import Planner, Service, agreement_of, scenario_of
from outrider.errors import ConfigError

_TURNS_SHORT = 2.0
"""Where a session waits so many draft steps for its turn, guesses are few for want of drafters."""
_AGREEMENT_SHARE = 0.2
"""Of each look in the agreement that is remembered."""
_GROW_GAIN, _SHRINK_LOSS = 1.06, 1.01
"""More drafters must win so much for a fleet to grow; fewer may lose so much for it to shrink."""
_DEARER_MAX = 1.05
"""With prices: how much dearer tokens may be than they could be before the number changes."""
_ROWS_FALLEN = 0.5
"""A load that has fallen to this share is tried at once."""


@dataclass(frozen=True, slots=True)
class DrafterGoals:
    """What drafters are for. Raises `ConfigError`."""

    prices: Prices | None = None
    """With prices, tokens are made as cheap as possible; without, as fast as few drafters can."""
    step_nodes_max: int = 32
    """As the verifiers have it: `--step-nodes-max`."""
    occupancy: float = 0.9
    """Attachments over what drafters take."""
    off_after_s: float = 300.0
    """Guessing has not paid for so long before drafters are sent home."""
    back_speedup: float = 1.08
    """What guesses must win for drafters to come back; more than what keeps them."""
    canary_first_s: float = 600.0
    """From being sent home to the first canary; doubled with each in vain."""
    canary_most_s: float = 7_200.0
    """Up to this."""
    canary_s: float = 900.0
    """A canary has so long to load its model and to show something."""
    canary_seen_s: float = 60.0
    """It is judged after it has been ready for so long."""

    def __post_init__(self) -> None:
        if self.back_speedup < SPEEDUP_WORTH:
            raise ConfigError(f"back_speedup: must be at least {SPEEDUP_WORTH:g}")
        if not 0.0 < self.occupancy <= 1.0:
            raise ConfigError(f"occupancy: must lie above 0 and at most at 1: {self.occupancy}")


class Mode(enum.Enum):
    """How things stand with guessing."""

    ON = "on"
    OFF = "off"
    CANARY = "canary"


@dataclass(frozen=True, slots=True)
class DrafterMemory:
    """What was found out so far."""

    mode: Mode = Mode.ON
    since_s: float | None = None
    """Of the mode; None: nothing is known yet."""
    doubtful_since_s: float | None = None
    """Since when guessing does not seem to pay."""
    ready_since_s: float | None = None
    """Since when the canary is."""
    rest_s: float = 0.0
    """Until the next canary."""
    agreement: float | None = None
    """How often a drafter's first choice is right, as last inferred."""
    rows: float = 0.0
    """Sessions on a verifier when drafters were sent home."""
    ratio: float | None = None
    """Drafters to a verifier that were chosen last."""


@dataclass(frozen=True, slots=True)
class DrafterWish:
    """What drafters would do."""

    wanted: int
    reasons: tuple[str, ...]
    memory: DrafterMemory


def wanted_drafters(
    goals: DrafterGoals,
    memory: DrafterMemory,
    drafters: DrafterSignals,
    verifiers: VerifierSignals,
    current: int,
    now_s: float,
    planner: Planner,
) -> DrafterWish:
    """Say how many would do, and why."""
    if memory.since_s is None:
        memory = replace(memory, since_s=now_s)
    if not verifiers.ready:
        return DrafterWish(current, ("no verifier is ready",), memory)
    sessions = max(0, verifiers.sessions - verifiers.waiting)
    if not sessions or drafters.figures is None:
        return DrafterWish(0, ("no session decodes",), memory)
    memory = replace(memory, agreement=_learnt(goals, memory, drafters, verifiers, sessions))
    if memory.agreement is None:
        return _try(goals, memory, drafters, sessions / verifiers.ready, None, now_s)
    choice, scale = _ask(goals, memory.agreement, drafters.figures, verifiers, sessions, planner)
    if memory.mode is not Mode.ON:
        rows = sessions / verifiers.ready
        wish = _try(goals, memory, drafters, rows, choice, now_s)
        if wish.memory.mode is not Mode.ON:
            return wish
        memory = wish.memory
    return _stay(goals, memory, drafters, verifiers, sessions, choice, scale, now_s)


def _learnt(
    goals: DrafterGoals,
    memory: DrafterMemory,
    drafters: DrafterSignals,
    verifiers: VerifierSignals,
    sessions: int,
) -> float | None:
    """The agreement as of now; as before if nothing says otherwise."""
    figures = drafters.figures
    assert figures is not None, "the caller has looked"
    service = Service(
        verifiers=verifiers.ready,
        sessions=sessions,
        drafters=drafters.ready,
        attachments=drafters.sessions,
        nodes_max=goals.step_nodes_max,
    )
    inferred = agreement_of(figures, service)
    if inferred is None:
        return memory.agreement
    served = drafters.sessions / max(1, drafters.ready)
    short = figures.leaves_max > 0 and served > _TURNS_SHORT * figures.leaves_max
    if memory.agreement is None or memory.mode is not Mode.ON:
        return inferred
    if short and inferred < memory.agreement:
        # Drafters that are short show less than they could. With more of them it will be seen.
        return memory.agreement
    return memory.agreement + _AGREEMENT_SHARE * (inferred - memory.agreement)


def _ask(
    goals: DrafterGoals,
    agreement: float,
    figures: SpeculationFigures,
    verifiers: VerifierSignals,
    sessions: int,
    planner: Planner,
) -> tuple[DrafterChoice, float]:
    """Ask the planner; returns its choice for a part of the fleet, and the part's share."""
    scenario, share = scenario_of(
        figures,
        agreement,
        verifiers=verifiers.ready,
        sessions=sessions,
        # More than one is a reserve: drafters of one kind guess the same.
        drafters_per_session=1,
        nodes_max=goals.step_nodes_max,
    )
    return planner(scenario, goals.prices), 1.0 / share


def _stay(
    goals: DrafterGoals,
    memory: DrafterMemory,
    drafters: DrafterSignals,
    verifiers: VerifierSignals,
    sessions: int,
    choice: DrafterChoice,
    scale: float,
    now_s: float,
) -> DrafterWish:
    """Drafters are there: as many as the planner would have, or none from now on."""
    if choice.speedup < SPEEDUP_WORTH:
        since_s = now_s if memory.doubtful_since_s is None else memory.doubtful_since_s
        said = f"{choice.drafters * scale:.0f} would win {_percent(choice.speedup)}"
        if now_s - since_s >= goals.off_after_s:
            return _send_home(
                memory, sessions / verifiers.ready, now_s, goals.canary_first_s,
                f"{said}, for {goals.off_after_s:g} s now: guessing does not pay",
            )  # fmt: skip
        memory = replace(memory, doubtful_since_s=since_s)
    else:
        memory = replace(memory, doubtful_since_s=None)
    chosen = _unless_nearly_as_good(goals, memory, choice, scale, verifiers.ready)
    memory = replace(memory, ratio=chosen * scale / verifiers.ready)
    wanted = max(1, math.ceil(chosen * scale - 1e-9))
    reasons: tuple[str, ...] = (
        f"the planner would have {wanted}: {_percent(choice.speedup)} faster with guesses right"
        f" {memory.agreement:.2f} of the time, the last drafter winning"
        f" {choice.marginal_tokens_per_s:.0f} tokens/s",
    )
    if drafters.ready and drafters.sessions_max:
        each = goals.occupancy * drafters.sessions_max / drafters.ready
        for_room = math.ceil(min(sessions, drafters.sessions) / each)
        if for_room > wanted:
            wanted = for_room
            reasons += (f"{drafters.sessions} attachments need {for_room}",)
    if memory.doubtful_since_s is not None:
        doubtful_s = now_s - memory.doubtful_since_s
        reasons += (f"does not pay for {doubtful_s:.0f} s",)
    return DrafterWish(wanted, reasons, memory)


def _unless_nearly_as_good(
    goals: DrafterGoals, memory: DrafterMemory, choice: DrafterChoice, scale: float, verifiers: int
) -> float:
    """The planner's number, or the last one chosen, where that is nearly as good.

    Curves are flat around their best and follow what is measured: without this, a fleet would
    follow their noise.
    """
    if memory.ratio is None:
        return choice.drafters
    last = memory.ratio * verifiers / scale
    rate, wanted = choice.rate(last), choice.rates[choice.drafters]
    if goals.prices is not None:
        shown = verifiers / scale

        def price(drafters: float) -> float:
            assert goals.prices is not None, "looked above"
            return shown * goals.prices.verifier + drafters * goals.prices.drafter

        dearer = price(last) / rate > _DEARER_MAX * price(choice.drafters) / wanted
        return choice.drafters if dearer else last
    if last < choice.drafters:
        return choice.drafters if wanted > _GROW_GAIN * rate else last
    return choice.drafters if wanted * _SHRINK_LOSS >= max(choice.rates.values()) else last


def _try(
    goals: DrafterGoals,
    memory: DrafterMemory,
    drafters: DrafterSignals,
    rows: float,
    choice: DrafterChoice | None,
    now_s: float,
) -> DrafterWish:
    """Nothing is known, or guessing did not pay when it was tried last: now and then, try."""
    assert memory.since_s is not None, "the caller has set it"
    if memory.mode is Mode.OFF:
        fallen = rows <= _ROWS_FALLEN * memory.rows
        rested_s = now_s - memory.since_s
        if rested_s < memory.rest_s and not fallen:
            left_s = memory.rest_s - rested_s
            return DrafterWish(0, (f"guessing did not pay; next canary in {left_s:.0f} s",), memory)
        memory = replace(memory, mode=Mode.CANARY, since_s=now_s, ready_since_s=None)
    elif memory.mode is Mode.ON:
        memory = replace(memory, mode=Mode.CANARY, since_s=now_s, ready_since_s=None)
    since_s = now_s if memory.since_s is None else memory.since_s
    ready_s = memory.ready_since_s
    if drafters.ready and ready_s is None:
        ready_s = now_s
        memory = replace(memory, ready_since_s=now_s)
    shown = drafters.figures is not None and drafters.figures.gain is not None
    if shown and choice is not None and ready_s is not None:
        if choice.speedup >= goals.back_speedup:
            on = replace(
                memory, mode=Mode.ON, since_s=now_s, rest_s=0.0, doubtful_since_s=None, ratio=None
            )
            return DrafterWish(choice.drafters, ("the canary pays",), on)
        if now_s - ready_s >= goals.canary_seen_s:
            return _send_home(
                memory, rows, now_s, _longer(goals, memory),
                f"the canary's guesses would win {_percent(choice.speedup)}",
            )  # fmt: skip
    if now_s - since_s >= goals.canary_s:
        return _send_home(
            memory, rows, now_s, _longer(goals, memory), "the canary has shown nothing"
        )
    # Those that are there already show it as well.
    wanted = 1 if choice is not None else max(1, drafters.ready)
    return DrafterWish(wanted, ("it is to be seen whether guessing pays",), memory)


def _send_home(
    memory: DrafterMemory, rows: float, now_s: float, rest_s: float, reason: str
) -> DrafterWish:
    home = replace(
        memory,
        mode=Mode.OFF,
        since_s=now_s,
        doubtful_since_s=None,
        ready_since_s=None,
        rest_s=rest_s,
        rows=rows,
    )
    return DrafterWish(0, (reason,), home)


def _longer(goals: DrafterGoals, memory: DrafterMemory) -> float:
    return min(goals.canary_most_s, max(goals.canary_first_s, 2.0 * memory.rest_s))


def _percent(speedup: float) -> str:
    return f"{100.0 * (speedup - 1.0):.0f}%"
