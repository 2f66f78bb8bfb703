"""How a plan and its comparison with measurements are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from orchestrator.planner.drafter_choice import SPEEDUP_WORTH
from orchestrator.planner.measured import Prediction
from orchestrator.planner.modes import Mode
from orchestrator.planner.plan import ROWS_MAX, RTT_MAX_S, Plan

_LABELS = {
    Mode.TARGET_ONLY: "target only",
    Mode.COLOCATED_CHAIN: "co-located chain",
    Mode.COLOCATED_TREE: "co-located tree",
    Mode.LOCKSTEP: "remote chain, lockstep",
    Mode.REMOTE_TREE: "remote tree",
}


def print_plan(plan: Plan, console: Console) -> None:
    """Print a plan as a table and sentences."""
    table = Table(
        "mode",
        "tokens/s",
        "per session",
        "speed-up",
        "drafters",
        "per million",
        box=None,
        title=f"sessions: {plan.sessions:,}, verifiers: {plan.verifiers:,}",
        title_justify="left",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for mode in plan.modes:
        table.add_row(
            _LABELS[mode.mode],
            f"{mode.tokens_per_s:,.0f}",
            f"{mode.tokens_per_s_session:.1f}",
            f"{mode.speedup:.2f}",
            str(mode.drafters),
            "-" if mode.cost_per_million is None else f"{mode.cost_per_million:.3f}",
            style="bold" if mode.mode is plan.fastest else None,
        )
    console.print(table)
    for sentence in advice(plan):
        console.print(sentence, soft_wrap=True, highlight=False)


def advice(plan: Plan) -> list[str]:
    """What follows from a plan, in sentences."""
    sentences = [f"Fastest at this load: {_LABELS[plan.fastest]}."]
    if plan.cheapest is not None:
        sentences.append(f"Cheapest for a token: {_LABELS[plan.cheapest]}.")
    sentences.append(f"Drafters: {plan.drafters} ({plan.drafters_per_verifier:.2g} to a verifier).")
    if plan.break_even_rtt_s is None:
        sentences.append(
            f"The remote tree is faster than co-located drafting up to {RTT_MAX_S * 1e3:.0f} ms of"
            " round trip at least."
        )
    elif plan.break_even_rtt_s == 0.0:
        sentences.append(
            "Do not disaggregate for speed: at this load co-located drafting is faster at any"
            " distance."
        )
    else:
        sentences.append(
            "Do not disaggregate for speed beyond a round trip of"
            f" {plan.break_even_rtt_s * 1e3:.1f} ms: co-located drafting is faster there."
        )
    percent = (SPEEDUP_WORTH - 1) * 100
    if plan.rows_max is None:
        sentences.append(f"Guessing pays up to {ROWS_MAX} sessions on a verifier at least.")
    elif plan.rows_max == 0:
        sentences.append(
            f"Remote drafters do not pay: they gain less than {percent:.0f}% over plain decoding"
            " even with one session on a verifier."
        )
    else:
        sentences.append(
            f"Beyond about {plan.rows_max} sessions on a verifier remote drafters gain less than"
            f" {percent:.0f}%: decode plainly there."
        )
    return sentences


def plan_json(plan: Plan) -> dict[str, Any]:
    """A plan for scripts."""
    return {
        "sessions": plan.sessions,
        "verifiers": plan.verifiers,
        "drafters": plan.drafters,
        "drafters_per_verifier": plan.drafters_per_verifier,
        "fastest": plan.fastest.value,
        "cheapest": plan.cheapest.value if plan.cheapest else None,
        "break_even_rtt_ms": _ms(plan.break_even_rtt_s),
        "rtt_ms_max": RTT_MAX_S * 1e3,
        "sessions_per_verifier_max": plan.rows_max,
        "modes": [
            {
                "mode": mode.mode.value,
                "tokens_per_s": mode.tokens_per_s,
                "tokens_per_s_session": mode.tokens_per_s_session,
                "speedup": mode.speedup,
                "drafters": mode.drafters,
                "cost_per_million": mode.cost_per_million,
            }
            for mode in plan.modes
        ],
        "advice": advice(plan),
    }


def print_predictions(predictions: Sequence[Prediction], console: Console) -> None:
    """Print predicted beside measured."""
    table = Table("row", "mode", "measured", "predicted", "error", box=None)
    for column in table.columns[2:]:
        column.justify = "right"
    for prediction in predictions:
        table.add_row(
            prediction.row.name,
            prediction.row.mode.value,
            f"{prediction.row.tokens_per_s:,.1f}",
            f"{prediction.tokens_per_s:,.1f}",
            f"{prediction.error:+.1%}",
        )
    console.print(table)
    console.print(f"Largest error: {worst_error(predictions):.1%}", highlight=False)


def worst_error(predictions: Sequence[Prediction]) -> float:
    """The largest error, as a share of what was measured."""
    return max(abs(prediction.error) for prediction in predictions)


def predictions_json(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Predictions for scripts."""
    return {
        "worst_error": worst_error(predictions),
        "rows": [
            {
                "name": prediction.row.name,
                "mode": prediction.row.mode.value,
                "measured_tokens_per_s": prediction.row.tokens_per_s,
                "predicted_tokens_per_s": prediction.tokens_per_s,
                "error": prediction.error,
            }
            for prediction in predictions
        ],
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else seconds * 1e3
