"""The process that starts a cluster's processes: one with gRPC's threads had better not fork.

`python -m tests.chaos.spawner` takes commands as `bench.children.Child` sends them. Services are
forked from it when it has loaded what all of them load: a process that is killed is back within a
second, where importing torch anew would take most of a chaos run's time.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from outrider.processes import die_with_parent, spawn

SERVICES = ("verifier_service", "drafter_service", "orchestrator")
_LOADED = ("app", "__main__")


class Forked:
    """A service that was forked from this process."""

    def __init__(self, module: str, arguments: Sequence[str], log: Path, env: dict[str, str]):
        log.parent.mkdir(parents=True, exist_ok=True)
        self._code: int | None = None
        parent = os.getpid()
        self.pid = os.fork()
        if not self.pid:
            _become(module, arguments, log, env, parent)

    def poll(self) -> int | None:
        """Exit code, negative for a signal; None while it runs."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code


def _become(
    module: str, arguments: Sequence[str], log: Path, env: Mapping[str, str], parent: int
) -> None:
    """Be a service from now on, in the child; ends the process."""
    code: Any = 1
    try:
        os.setsid()
        die_with_parent(parent)
        said = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        nothing = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((nothing, 0), (said, 1), (said, 2)):
            os.dup2(source, target)
        os.environ.clear()
        os.environ.update(env)
        sys.argv = [module, *arguments]
        importlib.import_module(f"{module}.__main__").command(list(arguments))
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def load() -> None:
    """Import what services import, and what loading a model imports late."""
    for module in SERVICES:
        for part in _LOADED:
            importlib.import_module(f"{module}.{part}")
    importlib.import_module("drafter_service.proposers.language_model")
    from outrider.model.loading import load_language_model
    from tests.support.fleet import TARGET

    load_language_model(TARGET, dtype="float32", device="cpu", cache_dir=Path("/nonexistent"))
    gc.collect()
    # Pages of what nobody writes to stay shared.
    gc.freeze()


def main() -> None:
    """Obey until the parent closes the pipe; what was started ends with this process."""
    load()
    processes: dict[int, subprocess.Popen[bytes] | Forked] = {}

    def obey(command: dict[str, Any]) -> dict[str, Any]:
        match command:
            case {"start": [_, "-m", module, *arguments], "log": log, "environment": env}:
                process: subprocess.Popen[bytes] | Forked
                process = Forked(module, arguments, Path(log), env)
            case {"start": argv, "log": log, "environment": env}:
                process = spawn(argv, Path(log), env)
            case {"poll": pid}:
                return {"code": processes[pid].poll()}
            case _:
                return {"error": f"unknown command {command}"}
        processes[process.pid] = process
        return {"pid": process.pid}

    say({})
    for line in sys.stdin:
        say(obey(json.loads(line)))


def say(answer: dict[str, Any]) -> None:
    """Answer."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
