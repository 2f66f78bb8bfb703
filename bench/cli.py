"""`outrider bench`: what a running fleet does, measured by its clients."""

from __future__ import annotations

import importlib

import click

_COMMANDS = {"spec-bench": "bench.spec_bench", "load": "bench.load", "page": "bench.page"}


class _Lazy(click.Group):
    """Imports a command's module when it is asked for: each takes a second."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = importlib.import_module(_COMMANDS[cmd_name]).command
        return command


@click.group("bench", cls=_Lazy)
def bench() -> None:
    """Measure a fleet: speculated against target-only decoding, and against other engines.

    \b
    A fleet of its own, small questions:   outrider bench spec-bench --local
    A fleet that runs already:             outrider bench spec-bench --endpoint localhost:50050
    """


if __name__ == "__main__":
    bench()
