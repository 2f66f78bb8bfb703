"""Every command says what it does, and every option what it is for."""

from __future__ import annotations

from collections.abc import Iterator

import click
import pytest

from outrider.cli import main


def commands(group: click.Group, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, (path, name)
        here = (*path, name)
        if isinstance(command, click.Group):
            yield " ".join(here), command
            yield from commands(command, here)
        else:
            yield " ".join(here), command


COMMANDS = dict(commands(main, ("outrider",)))
FOR_MACHINES = (
    *("chat", "generate", "top", "workers", "plan", "local", "trace show"),
    *("bench spec-bench", "bench load", "datastore build", "datastore info"),
    *("distill generate", "distill train", "distill evaluate"),
)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_teaches(name: str) -> None:
    command = COMMANDS[name]
    assert command.help, "says nothing"
    for option in command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{option.opts[0]} says nothing"


@pytest.mark.parametrize("name", FOR_MACHINES)
def test_what_programs_may_want_to_read_is_there_as_json(name: str) -> None:
    options = {text for option in COMMANDS[f"outrider {name}"].params for text in option.opts}
    assert "--json" in options
