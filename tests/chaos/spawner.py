"""The process that starts a cluster's processes: one with gRPC's threads had better not fork.

`python -m tests.chaos.spawner` takes commands as `bench.children.Child` sends them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from outrider.processes import spawn


def main() -> None:
    """Obey until the parent closes the pipe; what was started ends with this process."""
    processes: dict[int, subprocess.Popen[bytes]] = {}

    def obey(command: dict[str, Any]) -> dict[str, Any]:
        match command:
            case {"start": argv, "log": log, "environment": environment}:
                process = spawn(argv, Path(log), environment)
                processes[process.pid] = process
                return {"pid": process.pid}
            case {"poll": pid}:
                return {"code": processes[pid].poll()}
            case _:
                return {"error": f"unknown command {command}"}

    say({})
    for line in sys.stdin:
        say(obey(json.loads(line)))


def say(answer: dict[str, Any]) -> None:
    """Answer."""
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
