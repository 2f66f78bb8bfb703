"""The demonstration: one real prompt through a whole fleet, target-only against speculated.

Both runs go through the same services; the only difference is the request's `speculation` flag.
Runs alternate, so that a noisy machine treats both alike, and medians are compared.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from outrider.client import Client, Completion, Delta, Request
from outrider.errors import InternalError
from outrider.local import LocalConfig, LocalFleet

TOKENS_MAX = 192

PROMPT = """\
Summarize the following text in three sentences.

The platform team met on Tuesday to review the rollout of the new inference service. Maria \
reported that the first cluster has been serving traffic for a week without an incident. Jonas \
showed that the latency of the first token went down after the cache was enlarged, and that the \
cost per request went down as well. The team agreed to move the second cluster to the new release, \
to keep the old release ready for one more week, and to write down every step of the rollout so \
that other teams can repeat it.
"""


@dataclass(frozen=True, slots=True)
class Run:
    """One generation and what it took, in seconds as the orchestrator saw them."""

    completion: Completion

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return len(self.completion.token_ids)

    @property
    def total_s(self) -> float:
        """From admission to the end, prefill included."""
        return self.completion.finished.total_s

    @property
    def decode_s(self) -> float:
        """From the first token to the end."""
        return self.total_s - self.completion.finished.first_token_s


@dataclass(frozen=True, slots=True)
class Series:
    """All runs of one kind; they produce the same tokens, so times alone differ."""

    runs: Sequence[Run]

    @property
    def last(self) -> Run:
        """The latest run."""
        return self.runs[-1]

    @property
    def total_s(self) -> float:
        """Median, prefill included."""
        return statistics.median(run.total_s for run in self.runs)

    @property
    def decode_s(self) -> float:
        """Median, decoding alone."""
        return statistics.median(run.decode_s for run in self.runs)

    @property
    def verify_steps(self) -> float:
        """Median number of verify steps."""
        return statistics.median(
            run.completion.finished.speculation.verify_steps for run in self.runs
        )

    @property
    def tau(self) -> float:
        """Tokens committed per verify step."""
        return self.last.tokens / max(1.0, self.verify_steps)

    @property
    def acceptance(self) -> float:
        """Accepted over verified draft tokens, over all runs; NaN without any."""
        counters = [run.completion.finished.speculation for run in self.runs]
        verified = sum(c.verified_draft_tokens for c in counters)
        accepted = sum(c.accepted_draft_tokens for c in counters)
        return accepted / verified if verified else float("nan")


def run_demo(config: LocalConfig, *, repeats: int) -> int:
    """Run the demonstration; returns the exit status: 0 if the outputs are identical."""
    console = Console()
    with LocalFleet(config, console) as fleet, Client(fleet.endpoint) as client:
        guessing = "lookup"
        if config.draft_model is not None:
            guessing = f"{Path(config.draft_model).name}, then lookup, in turn"
        console.print(
            f"fleet: {config.verifiers} verifier(s), {config.drafters} drafter(s) ({guessing}), "
            f"1 orchestrator; {config.model} in {config.dtype}; logs in {fleet.log_dir}\n",
            soft_wrap=True,
        )
        console.rule("prompt", align="left")
        console.print(PROMPT, style="dim", markup=False, highlight=False)
        console.rule("answer, speculated; guessed tokens in green", align="left")
        _stream(client, console)
        # The first generation pays for cold caches; it is shown, not measured.
        plain, speculated = _measure(client, console, repeats)
    return report(console, plain, speculated)


def report(console: Console, plain: Series, speculated: Series) -> int:
    """Print the table and the result line; returns the exit status."""
    identical = all(
        run.completion.token_ids == plain.last.completion.token_ids
        for run in (*plain.runs, *speculated.runs)
    )
    table = Table("", "target only", "Outrider", box=None, title="medians", title_justify="left")
    lines: tuple[tuple[str, Callable[[Series], str]], ...] = (
        ("tokens", lambda s: f"{s.last.tokens}"),
        ("seconds", lambda s: f"{s.total_s:.2f}"),
        ("tokens/s", lambda s: f"{s.last.tokens / s.total_s:.1f}"),
        ("seconds, decoding only", lambda s: f"{s.decode_s:.2f}"),
        ("tokens/s, decoding only", lambda s: f"{(s.last.tokens - 1) / s.decode_s:.1f}"),
        ("verify steps", lambda s: f"{s.verify_steps:g}"),
        ("tau (tokens per verify step)", lambda s: f"{s.tau:.2f}"),
    )
    for label, value in lines:
        table.add_row(label, value(plain), value(speculated))
    table.add_row("acceptance rate", "-", f"{speculated.acceptance:.2f}")
    console.print(table)
    word = "yes" if identical else "no"
    speedup = plain.total_s / speculated.total_s
    decode_speedup = plain.decode_s / speculated.decode_s
    console.print(f"speed-up: {speedup:.2f}x end to end, {decode_speedup:.2f}x decoding only")
    console.print(f"identical: {word}")
    _print_result(speedup, decode_speedup, speculated, word)
    return 0 if identical else 1


def _print_result(
    speedup: float, decode_speedup: float, speculated: Series, identical: str
) -> None:
    """Print the line that scripts read, unwrapped."""
    Console(width=1_000, highlight=False).print(
        f"result: demo speedup={speedup:.2f} decode_speedup={decode_speedup:.2f} "
        f"tau={speculated.tau:.2f} acceptance={speculated.acceptance:.2f} identical={identical}"
    )


def _request(*, speculation: bool) -> Request:
    return Request(
        chat=[("user", PROMPT)], temperature=0.0, tokens_max=TOKENS_MAX, speculation=speculation
    )


def _stream(client: Client, console: Console) -> None:
    """Show an answer as it arrives; text that came with an accepted guess is green."""
    for event in client.generate(_request(speculation=True)):
        if isinstance(event, Delta):
            guessed = any(event.sources)
            console.print(
                event.text,
                end="",
                style="green" if guessed else "default",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
    console.print("\n")


def _measure(client: Client, console: Console, repeats: int) -> tuple[Series, Series]:
    runs: dict[bool, list[Run]] = {False: [], True: []}
    total = 2 * repeats
    with console.status("measuring") as status:
        for number in range(total):
            speculation = bool(number % 2)
            kind = "speculated" if speculation else "target only"
            status.update(f"measuring: run {number + 1} of {total}, {kind}")
            completion = client.complete(_request(speculation=speculation))
            if not completion.token_ids:
                raise InternalError("the model answered nothing")
            runs[speculation].append(Run(completion))
    return Series(runs[False]), Series(runs[True])
