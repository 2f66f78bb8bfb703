"""What the benchmark's results look like: tables in Markdown, and lines for scripts. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.spec.contenders import BASELINE
from bench.spec.fleet import OURS
from bench.spec.questions import in_order
from bench.spec.results import Results
from bench.spec.statistics import DEPTHS, OVERALL, Interval, Summary

_TITLES = {
    "mt_bench": "multi-turn",
    "translation": "translation",
    "summarization": "summarization",
    "qa": "QA",
    "math_reasoning": "math",
    "rag": "RAG",
    OVERALL: "overall",
}


def markdown(results: Results, *, intervals: bool = True) -> str:
    """All tables."""
    parts = []
    for temperature in _temperatures(results):
        kind = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        rows = [s for s in results.summaries if s.temperature == temperature]
        parts.append(
            f"Speed-up over target-only, {kind}, {_questions(rows)}; in brackets where 95 % of the"
            " bootstrap's resamples of the questions fall.\n"
        )
        parts.append(speed_table(rows, intervals=intervals))
        parts.append(f"Tau, {kind}: tokens of each step of the target, its own included.\n")
        parts.append(_tau_table(rows))
        parts.append(f"Share of steps, {kind}, that accepted at least so many guesses.\n")
        parts.append(_depth_table(rows))
        parts += _limits(rows, kind)
    if results.identity is not None:
        parts.append(_identity(results))
    parts += [f"- {name}: not measured ({why})\n" for name, why in results.unavailable.items()]
    return "\n".join(parts)


def speed_table(rows: Sequence[Summary], *, intervals: bool) -> str:
    """Speed-ups by sub-task, and absolute speed; with the questions where not all had the same."""
    tasks = _tasks(rows)
    header = ["", *(_TITLES.get(task, task) for task in tasks), "tokens/s", "first token, ms"]
    differ = len({row.questions for row in rows}) > 1
    return table(
        header,
        (
            [
                f"{row.contender}, {_counted(row.questions)}" if differ else row.contender,
                *(_cell(row.speedups.get(task), intervals=intervals) for task in tasks),
                f"{row.tokens_per_s.value:.1f}",
                f"{1e3 * row.first_token_s:.0f}",
            ]
            for row in rows
        ),
    )


def result_line(results: Results) -> str:
    """The line that scripts read."""
    ours = results.summary(OURS, 0.0)
    tasks = [] if ours is None else [ours.speedups[t].value for t in ours.speedups if t != OVERALL]
    fields = {
        "overall": None if ours is None else ours.speedups[OVERALL].value,
        "vs_vllm": results.ours_over.get("vllm"),
        "vs_vllm_ngram": results.ours_over.get("vllm-ngram"),
        "vs_hf": results.ours_over.get("hf"),
        "vs_hf_lookup": results.ours_over.get("hf-lookup"),
        "vs_hf_assisted": results.ours_over.get("hf-assisted"),
        "vs_llama_cpp": results.ours_over.get("llama-cpp"),
        "vs_openvino": results.ours_over.get("openvino"),
        "min_category": min(tasks, default=None),
        "tau": None if ours is None else ours.taus[OVERALL].value,
    }
    cells = " ".join(f"{k}={'na' if v is None else f'{v:.2f}'}" for k, v in fields.items())
    return f"result: spec-bench {cells} identical={results.identity or 'na'}"


def _tau_table(rows: Sequence[Summary]) -> str:
    tasks = _tasks(rows)
    header = ["", *(_TITLES.get(task, task) for task in tasks), "accepted/verified"]
    return table(
        header,
        (
            [
                row.contender,
                *(_cell(row.taus.get(task), intervals=False) for task in tasks),
                "-" if row.acceptance is None else f"{row.acceptance:.2f}",
            ]
            for row in rows
            if row.contender != BASELINE
        ),
    )


def _depth_table(rows: Sequence[Summary]) -> str:
    header = ["", *(str(depth) for depth in range(1, DEPTHS + 1))]
    return table(
        header,
        (
            [row.contender, *(f"{share:.2f}" for share in row.by_depth)]
            for row in rows
            if row.by_depth[0] > 0
        ),
    )


def _limits(rows: Sequence[Summary], kind: str) -> list[str]:
    """What keeps a speed-up below tau: prompts, and steps that take longer than plain ones."""
    found = {row.contender: row for row in rows}
    ours, base = found.get(OURS), found.get(BASELINE)
    if ours is None or base is None:
        return []
    header = ["sub-task", "speed-up", "tau", "before the first token", "target-only", "step, ms"]
    header += ["target-only", "after the first token"]
    lines = []
    for task in _tasks(rows):
        if task not in ours.step_s or task not in base.step_s:
            continue
        own_s, base_s = ours.step_s[task], base.step_s[task]
        after = ours.taus[task].value * base_s / own_s if own_s else 0.0
        lines.append(
            [
                _TITLES.get(task, task),
                f"{ours.speedups[task].value:.2f}",
                f"{ours.taus[task].value:.2f}",
                f"{ours.first_shares[task]:.0%}",
                f"{base.first_shares[task]:.0%}",
                f"{1e3 * own_s:.1f}",
                f"{1e3 * base_s:.1f}",
                f"{after:.2f}",
            ]
        )
    return [
        f"What limits `{OURS}`, {kind}: the share of its time that prompts take, which no guess"
        " shortens, and how much longer its steps take than target-only ones, drafters on the same"
        " cores included. After the first token the speed-up is about tau times the ratio of the"
        " steps.\n",
        table(header, lines),
    ]


def _identity(results: Results) -> str:
    found = results.identity
    assert found is not None
    lines = [
        f"Greedy answers in {found.dtype}, {found.tokens_max} tokens at most: {found.identical} of"
        f" {found.questions} questions were answered with the very ids of target-only decoding.\n"
    ]
    for one in found.differences:
        margin = "not among its best" if one.margin is None else f"{one.margin:.1e} behind"
        kind = "a tie" if one.tie else "a difference"
        lines.append(
            f"- question {one.question_id}, turn {one.turn + 1}: {kind} at output token"
            f" {one.position} (the other token was {margin})\n"
        )
    return "\n".join(lines)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _temperatures(results: Results) -> list[float]:
    return sorted({summary.temperature for summary in results.summaries})


def _tasks(rows: Sequence[Summary]) -> list[str]:
    names = {task for row in rows for task in row.speedups if task != OVERALL}
    return [*in_order(names), OVERALL]


def _questions(rows: Sequence[Summary]) -> str:
    return _counted(max((row.questions for row in rows), default=0))


def _counted(questions: int) -> str:
    return f"{questions} question{'s' if questions != 1 else ''}"


def _cell(value: Interval | None, *, intervals: bool) -> str:
    if value is None:
        return "-"
    if value.low is None or value.high is None or not intervals:
        return f"{value.value:.2f}"
    return f"{value.value:.2f} ({value.low:.2f}-{value.high:.2f})"
