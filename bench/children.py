"""Child processes that take commands: a line of JSON in, a line of JSON out, in turn."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from outrider.errors import Unavailable
from outrider.processes import stop, tied


class Child:
    """`python -m MODULE ARGUMENTS`, asked through its standard input and output.

    It says a line when it is ready; `ready` is what that line holds. A context manager that ends
    it. Blocking, except that it is not waited for before the first question, so that several can
    start at once; for one thread at a time. What it logs is appended to `log_path`.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str] = (),
        *,
        log_path: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._name = module
        self._log_path = log_path
        with (log_path or Path(os.devnull)).open("ab") as log:
            self._process = subprocess.Popen(
                tied([sys.executable, "-m", module, *arguments]),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log if log_path is not None else None,
                env=dict(environment) if environment is not None else None,
                # A terminal's Ctrl-C is for the parent, which ends this one.
                start_new_session=sys.platform == "linux",
            )

    @functools.cached_property
    def ready(self) -> dict[str, Any]:
        """What it said when it was ready. Raises `Unavailable` if it ends instead."""
        return self._hear()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask(self, command: Mapping[str, Any]) -> dict[str, Any]:
        """Send a command and return the answer. Raises `Unavailable` if it has ended."""
        assert self._process.stdin is not None
        assert self.ready is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Unavailable(f"{self._name} has ended") from error
        return self._hear()

    def close(self) -> None:
        """End it; may be repeated."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()
        if self._process.poll() is None:
            stop(self._process)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            where = f"; see {self._log_path}" if self._log_path else ""
            raise Unavailable(f"{self._name} has ended{where}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise Unavailable(f"{self._name}: {answer['error']}")
        return answer
