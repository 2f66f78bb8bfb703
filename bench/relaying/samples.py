"""From what was sent and what was read to latencies, costs and lines of a table. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.int64]

_LENGTH_BITS = 32


@dataclass(frozen=True, slots=True)
class Row:
    """One window of one number of sessions."""

    sessions: int
    drafts: bool
    """Two drafters a session, each of which answers every commit with a draft."""
    flood: bool
    """As fast as flow control allows instead of at a stated load."""
    seconds: float
    tokens: int
    """Output tokens that clients have read."""
    messages: int
    """Messages in which they were."""
    commits: int
    """Commits that the verifiers sent."""
    drafts_relayed: int
    cpu_s: float
    """Processor time of the orchestrator's process, all threads."""
    cpu_main_s: float
    """Of its main thread, which runs Python; the others are gRPC's."""
    cpu_kernel_s: float
    """Of all threads, within the kernel."""
    generator_cpu_s: float
    """Processor time of workers and clients, whose work for a token is always the same."""
    memory_mib: float
    added_p50_ms: float
    added_p99_ms: float
    added_p999_ms: float
    own_p50_ms: float
    """Of a stream from the workers' process to the clients' without an orchestrator."""
    own_p99_ms: float

    @property
    def tokens_per_core(self) -> float:
        """Output tokens for a second of the orchestrator's processor time."""
        return self.tokens / self.cpu_s

    @property
    def token_us(self) -> float:
        """Processor time of the orchestrator for an output token, in microseconds."""
        return 1e6 * self.cpu_s / self.tokens

    @property
    def relative(self) -> float:
        """Processor time over that of workers and clients: survives a change of machine speed."""
        return self.cpu_s / self.generator_cpu_s

    @property
    def busy(self) -> float:
        """Share of a core that the orchestrator used."""
        return self.cpu_s / self.seconds

    @property
    def joined(self) -> float:
        """Output tokens in a message to a client."""
        return self.tokens / self.messages


def added_ns(sent: Samples, read: Samples) -> npt.NDArray[np.int64]:
    """Return for each commit how long its tokens took to the client, in nanoseconds.

    `sent` has rows of (client, output tokens with this commit, time), `read` of (client, output
    tokens with this message, tokens in it, time). A commit has arrived with the first message
    that reaches its length. Raises ValueError if one never arrived.
    """
    order = np.argsort(_keys(read), kind="stable")
    keys = _keys(read)[order]
    found = np.searchsorted(keys, _keys(sent))
    clients = read[order, 0]
    inside = found < len(keys)
    inside[inside] = clients[found[inside]] == sent[inside, 0]
    if not inside.all():
        raise ValueError(f"{(~inside).sum()} of {len(sent)} commits never arrived")
    latencies: npt.NDArray[np.int64] = read[order, 3][found] - sent[:, 2]
    return latencies


def _keys(samples: Samples) -> Samples:
    return (samples[:, 0] << _LENGTH_BITS) | samples[:, 1]


def quantiles_ms(latencies_ns: npt.NDArray[np.int64]) -> tuple[float, float, float]:
    """Median, 99th and 99.9th percentile in milliseconds."""
    p50, p99, p999 = np.quantile(latencies_ns, (0.5, 0.99, 0.999)) / 1e6
    return float(p50), float(p99), float(p999)


def flatness(rows: Sequence[Row]) -> float:
    """Highest over lowest cost of a token between numbers of sessions; 1 is flat.

    Of repeated windows the median counts. Raises ValueError without rows.
    """
    costs = _medians(rows, lambda row: row.token_us)
    return max(costs) / min(costs)


def _medians(rows: Sequence[Row], figure: Callable[[Row], float]) -> list[float]:
    """Median over the repeats of each number of sessions."""
    counts = sorted({row.sessions for row in rows})
    return [
        statistics.median(figure(row) for row in rows if row.sessions == count) for count in counts
    ]


def result_line(rows: Sequence[Row]) -> str:
    """Return the line for scripts: the worst over the numbers of sessions, without drafts.

    `generator_p99_ms` is how much of `added_p99_ms` workers and clients have among themselves.
    """
    paced = [row for row in rows if not row.flood and not row.drafts]
    drafted = [row for row in rows if not row.flood and row.drafts]
    flooded = [row for row in rows if row.flood and not row.drafts]
    figures = dict.fromkeys(("tokens_per_core", "added_p99_ms", "flatness"), "na")
    if paced:
        figures = {
            "tokens_per_core": f"{min(_medians(paced, _per_core)):.0f}",
            "added_p99_ms": f"{max(_medians(paced, _p99)):.2f}",
            "flatness": f"{flatness(paced):.2f}",
            "generator_p99_ms": f"{max(_medians(paced, lambda row: row.own_p99_ms)):.2f}",
        }
    if drafted:
        figures["drafts_tokens_per_core"] = f"{min(_medians(drafted, _per_core)):.0f}"
        figures["drafts_added_p99_ms"] = f"{max(_medians(drafted, _p99)):.2f}"
    if flooded:
        figures["flood_tokens_per_core"] = f"{min(_medians(flooded, _per_core)):.0f}"
    return "result: orchestrator " + " ".join(f"{key}={text}" for key, text in figures.items())


def _per_core(row: Row) -> float:
    return row.tokens_per_core


def _p99(row: Row) -> float:
    return row.added_p99_ms


COLUMNS = (
    "sessions",
    "drafts",
    "load",
    "tokens/s",
    "core busy",
    "tokens/s per core",
    "µs a token",
    "of generator's",
    "main thread",
    "kernel",
    "tokens a message",
    "p50 ms",
    "p99 ms",
    "p99.9 ms",
    "generator p50",
    "p99 ms",
    "MiB",
)


def cells(row: Row) -> tuple[str, ...]:
    """One line of the table."""
    return (
        f"{row.sessions:,}",
        "yes" if row.drafts else "no",
        "flood" if row.flood else "paced",
        f"{row.tokens / row.seconds:,.0f}",
        f"{row.busy:.0%}",
        f"{row.tokens_per_core:,.0f}",
        f"{row.token_us:.1f}",
        f"{row.relative:.2f}",
        f"{row.cpu_main_s / row.cpu_s:.0%}",
        f"{row.cpu_kernel_s / row.cpu_s:.0%}",
        f"{row.joined:.2f}",
        f"{row.added_p50_ms:.2f}",
        f"{row.added_p99_ms:.2f}",
        f"{row.added_p999_ms:.2f}",
        f"{row.own_p50_ms:.2f}",
        f"{row.own_p99_ms:.2f}",
        f"{row.memory_mib:.0f}",
    )


def markdown(rows: Sequence[Row], notes: Sequence[str]) -> str:
    """Return the table and what must be known to read it."""
    lines = ["# Relay cost of the orchestrator (synthetic workers)", ""]
    lines += [f"- {note}" for note in notes]
    lines += ["", "| " + " | ".join(COLUMNS) + " |", "|" + " ---: |" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join([*lines, "", f"`{result_line(rows)}`", ""])
