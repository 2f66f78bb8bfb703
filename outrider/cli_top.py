"""`outrider top`: what a fleet is doing, as it does it."""

from __future__ import annotations

import contextlib
import json
import ssl
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from outrider.config import DEFAULT_HTTP_URL
from outrider.errors import ConfigError, Unavailable

_TIMEOUT_S = 5.0
_UNKNOWN = "-"
_WIDTH = 160


@dataclass(frozen=True, slots=True)
class Look:
    """What the orchestrator said, and when."""

    at_s: float
    state: dict[str, Any]
    """As `/fleet` has it; its counters are since the orchestrator's start."""


@dataclass(frozen=True, slots=True)
class Figures:
    """How fast a fleet is; None where nothing was decoded, or nothing is known yet."""

    tau: float | None
    acceptance: float | None
    tokens_per_s: float | None


def table_console() -> Console:
    """Where tables go; what no terminal shows is not cut at the width of one."""
    return Console(width=None if sys.stdout.isatty() else _WIDTH)


def figures(now: Look, before: Look | None) -> Figures:
    """Return the figures between two looks; those since the start if there is only one."""
    since = before
    if since is not None and now.state["rounds"] < since.state["rounds"]:
        since = None  # The orchestrator was started anew.

    def grown(name: str) -> int:
        return int(now.state[name]) - (int(since.state[name]) if since else 0)

    rounds, drafted, accepted = map(grown, ("rounds", "draft_tokens", "accepted_tokens"))
    return Figures(
        tau=1 + accepted / rounds if rounds > 0 else None,
        acceptance=accepted / drafted if drafted > 0 else None,
        # Each step commits one token more than it accepts.
        tokens_per_s=(rounds + accepted) / (now.at_s - since.at_s) if since else None,
    )


@click.command()
@click.option(
    "--url",
    default=DEFAULT_HTTP_URL,
    envvar="OUTRIDER_HTTP_URL",
    show_default=True,
    help="The orchestrator's HTTP address.",
)
@click.option("--api-key", envvar="OUTRIDER_API_KEY", help="If the orchestrator wants one.")
@click.option(
    "--tls-ca",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Authority that its certificate is from; PEM.  [default: those of this machine]",
)
@click.option(
    "--interval",
    "interval_s",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option(
    "--looks",
    type=click.IntRange(min=1),
    help="Stop after so many.  [default: at Ctrl-C; 1 where no terminal watches]",
)
@click.option("--json", "as_json", is_flag=True, help="Print each look as a line of JSON.")
def top(
    url: str,
    api_key: str | None,
    tls_ca: Path | None,
    interval_s: float,
    looks: int | None,
    as_json: bool,
) -> None:
    """Watch the fleet: who is there, how loaded, and how well speculation does.

    \b
    tau        tokens for each verify step, between two looks; 1 without speculation
    accepted   guesses that were right, of those that were checked; a drafter's since the start
    sessions   those of this orchestrator, and how many the worker takes in all
    step, kv   duration of a verifier's last step, and tokens of KV in use in it
    waiting    admitted sessions that waited for room for their KV

    \b
    One look, for a program:    outrider top --json | jq .tau
    Speed every ten seconds:    outrider top --json --looks 6 --interval 10 | jq .tokens_per_s
    """
    console = table_console()
    door = _Door(url, api_key, tls_ca)
    looks = looks or (None if console.is_terminal and not as_json else 1)
    before: Look | None = None
    with contextlib.ExitStack() as stack:
        live = None
        if console.is_terminal and not as_json:
            live = stack.enter_context(Live(console=console, auto_refresh=False))
        while True:
            now = door.look()
            if as_json:
                click.echo(json.dumps(_as_json(now, figures(now, before))))
            elif live is None:
                console.print(_frame(now, figures(now, before)))
            else:
                live.update(_frame(now, figures(now, before)), refresh=True)
            looks = looks and looks - 1
            if looks == 0:
                return
            before = now
            try:
                time.sleep(interval_s)
            except KeyboardInterrupt:
                return


class _Door:
    """The HTTP door of an orchestrator."""

    def __init__(self, url: str, api_key: str | None, authority: Path | None) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"--url {url} must begin with http:// or https://")
        self._url = url.rstrip("/")
        self._headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._tls = ssl.create_default_context(cafile=authority)
        except ssl.SSLError as error:
            raise ConfigError(f"--tls-ca {authority} holds no certificates: {error}") from error

    def look(self) -> Look:
        """Ask for the fleet's state. Raises `Unavailable`."""
        request = urllib.request.Request(f"{self._url}/fleet", headers=self._headers)
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S, context=self._tls) as answer:
                state = json.load(answer)
        except urllib.error.HTTPError as error:
            hint = "; give --api-key" if error.code == 401 else ""
            raise Unavailable(f"{self._url} answered {error.code} {error.reason}{hint}") from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(f"{self._url} does not answer as an orchestrator: {reason}") from None
        return Look(time.monotonic(), state)


def _frame(now: Look, said: Figures) -> Group:
    state = now.state
    tau = _UNKNOWN if said.tau is None else f"{said.tau:.2f}"
    rate = _UNKNOWN if said.tokens_per_s is None else f"{said.tokens_per_s:.1f}"
    accepted = _UNKNOWN if said.acceptance is None else f"{said.acceptance:.0%}"
    head = Text.assemble(
        *(
            "tau ",
            (tau, "bold"),
            "   tokens/s ",
            (rate, "bold"),
            "   accepted ",
            (accepted, "bold"),
        ),
        *("   sessions ", (str(state["sessions"]), "bold")),
        *("   tokens so far ", (str(state["completion_tokens"]), "bold")),
    )
    table = Table(
        *("role", "address", "state", "model", "sessions", "accepted"),
        *("step", "kv", "waiting", "reason"),
        box=None,
    )
    for worker in state["workers"]:
        step_s, drafted = worker["step_s"], worker["draft_tokens"]
        table.add_row(
            worker["role"],
            worker["address"],
            Text(worker["state"], style="green" if worker["state"] == "ready" else "red"),
            worker["model"] or "?",
            f"{worker['sessions']}/{worker['sessions_max'] or _UNKNOWN}",
            f"{worker['accepted_tokens'] / drafted:.0%}" if drafted else _UNKNOWN,
            f"{step_s * 1e3:.0f} ms" if step_s else _UNKNOWN,
            str(worker["kv_tokens_used"]) if step_s else _UNKNOWN,
            str(worker["waiting"]) if step_s else _UNKNOWN,
            worker["reason"],
        )
    return Group(head, Text(), table)


def _as_json(now: Look, said: Figures) -> dict[str, Any]:
    return {
        "tau": said.tau,
        "acceptance": said.acceptance,
        "tokens_per_s": said.tokens_per_s,
        **now.state,
    }
