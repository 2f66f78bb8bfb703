"""What `bench.verifier` writes of its results. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.memory import MemoryResult
from bench.steps import StepResult
from bench.throughput import SESSIONS, PrefixResult, Throughput
from bench.useless import Estimate, RecoveryResult, UselessResult

OURS = "outrider"
PEERS = ("hf", "vllm")
STEPS = ("rows1", "rows1x8", "rows16", "tree16x8")


@dataclass(slots=True)
class Results:
    """What was measured; a part that was not asked for stays empty."""

    steps: list[StepResult] = field(default_factory=list)
    throughput: list[Throughput] = field(default_factory=list)
    prefix: PrefixResult | None = None
    memory: MemoryResult | None = None
    useless: list[UselessResult] = field(default_factory=list)
    recovery: RecoveryResult | None = None
    peers: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Versions and settings, as the peers themselves state them."""
    unavailable: dict[str, str] = field(default_factory=dict)
    """Why a contender has no numbers."""
    times: dict[str, str] = field(default_factory=dict)
    """When each part was measured."""


def versus(results: Sequence[Throughput], peer: str, sessions: int) -> float | None:
    """Our median decode throughput over a peer's; None if either is missing."""
    for result in results:
        if result.sessions == sessions:
            ours, theirs = result.decode(OURS), result.decode(peer)
            return ours / theirs if ours and theirs else None
    return None


def result_lines(results: Results) -> list[str]:
    """Lines for scripts; the last one has the ratios that have goals."""
    lines = []
    if results.steps:
        shares = {step.name: step.rule_share for step in results.steps}
        lines.append(
            f"result: verifier_rule share={_cell(max(shares.values()), 3)} "
            + " ".join(f"{name}={_cell(share, 3)}" for name, share in shares.items())
        )
    if results.memory is not None:
        memory = results.memory
        lines.append(
            f"result: verifier_memory budget_mib={memory.kv_budget:.1f}"
            f" needed_mib={memory.kv_needed:.1f} used_mib={_cell(memory.kv_used, 1)}"
            f" loaded_mib={memory.loaded:.0f} peak_mib={memory.peak:.0f}"
            f" growth={memory.growth_ratio:.2f}"
        )
    if results.useless:
        recovery = results.recovery or RecoveryResult(None, None)
        lines.append(
            f"result: verifier_recovery accepted_s={_cell(recovery.accepted_s)}"
            f" tau_s={_cell(recovery.tau_s)}"
        )
    ratios: dict[str, float | None] = dict.fromkeys(STEPS)
    ratios |= {step.name: step.ratio for step in results.steps}
    for peer in PEERS:
        for sessions in SESSIONS:
            ratios[f"vs_{peer}_{sessions}"] = versus(results.throughput, peer, sessions)
    ratios["prefix_ttft"] = results.prefix.ratio if results.prefix else None
    ratios["useless_floor"] = min((r.floor for r in results.useless), default=None)
    lines.append(
        "result: verifier " + " ".join(f"{key}={_cell(value)}" for key, value in ratios.items())
    )
    return lines


def markdown(results: Results) -> str:
    """Tables for people."""
    parts = []
    if results.steps:
        parts.append(_steps(results.steps))
    if results.throughput:
        parts.append(_throughput(results.throughput))
    if results.prefix is not None:
        cold, hit = min(results.prefix.cold_s), min(results.prefix.hit_s)
        parts.append(
            f"First token of a prompt with a 1,000-token prefix: {results.prefix.ratio:.1f} times"
            f" sooner with a hit (best {1e3 * cold:.0f} ms without, {1e3 * hit:.0f} ms with).\n"
        )
    if results.memory is not None:
        memory = results.memory
        parts.append(
            f"KV budget {memory.kv_budget:.0f} MiB; resident {memory.loaded:.0f} MiB with the"
            f" model, {memory.warm:.0f} MiB after warm-up, {memory.peak:.0f} MiB with the budget"
            f" full.\n"
        )
    if results.useless:
        parts.append(_useless(results.useless))
    parts += [f"{name}: na ({why})\n" for name, why in results.unavailable.items()]
    return "\n".join(parts)


def _steps(steps: Iterable[StepResult]) -> str:
    header = ("step", "tokens", "products ms", "step ms", "ratio", "goal", "rule ms", "rule share")
    rows = [
        (
            step.name,
            str(step.tokens),
            f"{1e3 * step.floor_s:.2f}",
            f"{1e3 * step.step_s:.2f}",
            f"{step.ratio:.2f}",
            f"{step.goal:.2f}",
            f"{1e3 * step.rule_s:.2f}",
            f"{100 * step.rule_share:.1f} %",
        )
        for step in steps
    ]
    return "Least of the interleaved rounds, 300 tokens of context a row.\n\n" + _table(
        header, rows
    )


def _throughput(results: Sequence[Throughput]) -> str:
    header = ("sessions", "contender", "decode tokens/s", "with prefill", "ours / theirs")
    rows = []
    for result in results:
        for name in result.rates:
            ratio = None if name == OURS else versus(results, name, result.sessions)
            rows.append(
                (
                    str(result.sessions),
                    name,
                    _cell(result.decode(name), 1),
                    _cell(result.total(name), 1),
                    "" if name == OURS else _cell(ratio),
                )
            )
    return "Target-only, greedy; medians of the repeats.\n\n" + _table(header, rows)


def _useless(results: Iterable[UselessResult]) -> str:
    header = ("sessions", "silent drafter", "wrong trees", "target-only again", "turns")
    rows = [
        (
            str(r.sessions),
            *(_estimate(one) for one in (r.ratio("silent"), r.ratio("wrong"), r.noise)),
            str(len(r.alone)),
        )
        for r in results
    ]
    return (
        "Throughput with useless drafters over target-only, median of the turns and its 95% "
        "interval; target-only over target-only is noise.\n\n" + _table(header, rows)
    )


def _estimate(one: Estimate) -> str:
    return f"{one.median:.3f} [{one.low:.3f}, {one.high:.3f}]"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _cell(value: float | None, digits: int = 2) -> str:
    return "na" if value is None else f"{value:.{digits}f}"
