"""Child processes of a local fleet: none outlives its parent, and all end when told to."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from outrider.errors import ConfigError, InternalError

STOP_GRACE_S: Final = 5.0
"""How long a process may take to end after SIGTERM before it is killed."""

_LINUX: Final = sys.platform == "linux"
_LIBC: Final = ctypes.CDLL(None, use_errno=True) if _LINUX else None
_PR_SET_PDEATHSIG: Final = 1
_LAUNCHER: Final = f"""
import ctypes, os, sys
if ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, {int(signal.SIGKILL)}) != 0:
    sys.exit("the kernel does not tie processes to their parents")
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def die_with_parent(parent_pid: int | None = None) -> None:
    """Have the kernel kill this process when its parent ends, however that happens.

    Called in the child. `parent_pid` is the parent as the parent knows itself: if it ended before
    this call, there would be nothing left to wait for, so the process exits at once. Does nothing
    where the kernel is not Linux. Raises `OSError`.

    SIGKILL, since a parent that could end its children in order does so; this is for one that
    could not. The kernel's "parent" is the thread that forked, see `spawn`.
    """
    if _LIBC is None:
        return
    if _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    if parent_pid is not None and os.getppid() != parent_pid:
        os._exit(1)


def tied(argv: Sequence[str]) -> list[str]:
    """Return the command that runs `argv` in a process which ends with this one.

    A fresh interpreter asks the kernel for that and becomes the program. `subprocess` would do it
    between fork and exec (`preexec_fn`), where a process with threads of gRPC or torch must not run
    any Python: now and then it crashes there. Raises `ConfigError` if there is no such program.
    """
    if not _LINUX:
        return list(argv)
    if shutil.which(argv[0]) is None:
        raise ConfigError(f"cannot start {argv[0]}: there is no such program")
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), *argv]


def spawn(
    argv: Sequence[str], log_path: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start a program that ends with this one; what it prints is appended to `log_path`.

    `env` is the whole environment; by default ours. Raises `ConfigError` if the program or the
    log file cannot be opened, `InternalError` outside the main thread: the kernel would kill the
    child when the starting thread ends, which elsewhere may be long before the process.
    """
    if _LINUX and threading.current_thread() is not threading.main_thread():
        raise InternalError("processes must be started from the main thread")
    try:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log:
            return subprocess.Popen(
                tied(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                # A terminal's Ctrl-C goes to a whole group, but the parent decides who ends when.
                # Elsewhere than on Linux, sharing its fate is the best there is.
                start_new_session=_LINUX,
            )
    except (OSError, subprocess.SubprocessError) as error:
        raise ConfigError(f"cannot start {argv[0]}: {error}") from error


def stop(process: subprocess.Popen[bytes], grace_s: float = STOP_GRACE_S) -> int:
    """End a process, by SIGKILL if SIGTERM does not end it within `grace_s`.

    Returns its exit status, negative if it was a signal; one that has ended before is fine.
    Blocks for up to `grace_s`.
    """
    process.terminate()
    try:
        return process.wait(grace_s)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
