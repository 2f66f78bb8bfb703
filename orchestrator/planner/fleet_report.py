"""How the result of a fleet simulation is shown."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from orchestrator.planner.fleet_scenario import FleetResult, FleetScenario


def print_fleet(scenario: FleetScenario, result: FleetResult, console: Console) -> None:
    """Print a result as a table."""
    cost = result.placement
    shown = f"the {scenario.shortlist} least loaded" if scenario.shortlist else "all pods"
    rows = (
        ("fleet", f"{scenario.verifiers:,} verifiers, {scenario.drafters:,} drafters (simulated)"),
        ("arrivals", f"{result.arrivals_per_s:,.1f} sessions/s"),
        ("tokens", f"{result.tokens_per_s:,.0f} tokens/s"),
        ("speed-up", f"{result.speedup:.2f} over plain decoding of the same sessions"),
        ("sessions", f"{result.sessions_mean:,.0f} at once"),
        (
            "verifiers",
            f"{result.verifier_utilisation:.1%} of the time computing,"
            f" {result.verifier_sessions_share:.1%} of their sessions in use",
        ),
        ("drafters", f"{result.drafter_utilisation:.1%} of the time computing"),
        (
            "time per token",
            f"p50 {result.time_per_token_p50_s * 1e3:.1f} ms,"
            f" p95 {result.time_per_token_p95_s * 1e3:.1f} ms",
        ),
        (
            "sessions",
            f"{result.started:,} started, {result.finished:,} finished, {result.refused:,} refused",
        ),
        (
            "deaths",
            f"{result.verifier_deaths:,} verifiers, {result.drafter_deaths:,} drafters:"
            f" {result.moved:,} sessions moved, {result.rebound:,} bound anew,"
            f" {result.lost:,} lost",
        ),
        (
            "placement",
            f"verifier {cost.verifier_us:,.0f} µs, drafters {cost.drafters_us:,.0f} µs"
            f" over {shown}",
        ),
        (
            "",
            f"verifier {cost.verifier_all_us:,.0f} µs, drafters {cost.drafters_all_us:,.0f} µs"
            " over all pods",
        ),
    )
    table = Table(box=None, show_header=False)
    for name, value in rows:
        table.add_row(name, value)
    console.print(table, highlight=False)
