"""Runs an orchestrator that profiles itself between SIGUSR1 and SIGUSR2.

    python -m bench.relaying.profiled OUT.prof -- --verifier localhost:1234 ...

Profiles the main thread, which runs all of Python. What gRPC does inside counts for the built-in
function that called it, mostly `Context.run`, with which the event loop resumes a task.
"""

from __future__ import annotations

import cProfile
import signal
import sys
from types import FrameType

from orchestrator.__main__ import command


def main() -> None:
    """Install the signals, then be an orchestrator."""
    path, arguments = sys.argv[1], sys.argv[3:]
    profile = cProfile.Profile()

    def begin(number: int, frame: FrameType | None) -> None:
        profile.enable()

    def end(number: int, frame: FrameType | None) -> None:
        profile.disable()
        profile.dump_stats(path)

    signal.signal(signal.SIGUSR1, begin)
    signal.signal(signal.SIGUSR2, end)
    command(arguments)


if __name__ == "__main__":
    main()
