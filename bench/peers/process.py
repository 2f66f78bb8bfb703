"""Our side of a peer's process: start it, ask it, end it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from bench.rates import Run

ROOT = Path(__file__).resolve().parents[2]
_READY_TIMEOUT_S = 900.0
_RUN_TIMEOUT_S = 900.0


class PeerError(Exception):
    """A peer could not start or answer; the message is for people."""


class Peer:
    """One engine in a process of its own."""

    def __init__(self, name: str, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.settings: dict[str, Any] = {}
        # Not a pipe that nobody reads: what a peer says is looked at only if it fails. Closed by
        # `close`.
        self._log = tempfile.NamedTemporaryFile("w+", suffix=f".{name}.log")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        )
        self._answers: SimpleQueue[str] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def wait_ready(self) -> None:
        """Wait until the model is loaded. Raises PeerError."""
        self.settings = self._answer(_READY_TIMEOUT_S)["ready"]

    def generate(
        self, prompts: Sequence[Sequence[int]], tokens: int, eos_ids: Sequence[int] = ()
    ) -> Run:
        """Decode greedily `tokens` tokens for each prompt at once. Raises PeerError.

        An output ends earlier with the first of `eos_ids`.
        """
        request = {
            "prompts": [list(prompt) for prompt in prompts],
            "tokens": tokens,
            "eos_ids": list(eos_ids),
        }
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:
            raise PeerError(self._last_words("has ended")) from None
        answer = self._answer(_RUN_TIMEOUT_S)
        return Run(
            tuple(tuple(row) for row in answer["times_s"]),
            tuple(tuple(row) for row in answer["ids"]),
        )

    def close(self) -> None:
        """End the process. May be called again."""
        self._process.terminate()
        try:
            self._process.wait(10.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        # The reader ends with the process, and lets go of its pipe.
        self._reader.join()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        self._log.close()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout_s: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout_s)
        except Empty:
            raise PeerError(self._last_words(f"gave no answer within {timeout_s:g} s")) from None
        if not line:
            raise PeerError(self._last_words("has ended"))
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}")
        return answer

    def _last_words(self, what: str) -> str:
        lines = [line for line in Path(self._log.name).read_text().splitlines() if line.strip()]
        return f"{self.name} {what}: {lines[-1] if lines else 'it said nothing'}"
