"""The same comparison with real models, over sockets, each service on cores of its own."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console

from bench.pipeline_prompts import Case, measure_prompts
from outrider.client import Client
from outrider.local import LocalConfig, LocalFleet

_VERIFIER = "verifier-"


def measure_real(
    console: Console,
    model: str,
    draft_model: str | None,
    cache_dir: Path,
    prompts: Sequence[dict[str, str]],
    repeats: int,
    tokens_max: int,
) -> Iterator[Case]:
    """Answer the prompts with and without speculation, one by one. Raises `OutriderError`.

    The verifier has all cores but the last, which the others share; where processes cannot be
    bound to cores, or there is only one, all share all.
    """
    config = LocalConfig(
        model=model,
        dtype="float32",
        device="cpu",
        verifiers=1,
        drafters=2,
        draft_model=draft_model,
        redis_url=None,
        log_dir=None,
        cache_dir=cache_dir,
        port=None,
    )
    with (
        _cores_of_verifiers() as cores,
        LocalFleet(config, console) as fleet,
        Client(fleet.endpoint) as client,
    ):
        _move_others(fleet.pids, cores)
        for prompt in prompts:
            yield from measure_prompts(client, [prompt], repeats, tokens_max, 0.0, lambda: None)


@contextlib.contextmanager
def _cores_of_verifiers() -> Iterator[set[int]]:
    """Bind this process, and what it starts meanwhile, to the cores that verifiers may have.

    Yields the others; nothing, where this cannot be done.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield set()
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(cores)[:-1]) or cores)
    try:
        yield {max(cores)}
    finally:
        for thread in _threads(os.getpid()):
            os.sched_setaffinity(thread, cores)


def _move_others(pids: dict[str, int], cores: set[int]) -> None:
    """Bind all but the verifiers, this process included, to the remaining cores."""
    if not cores:
        return
    others = [pid for name, pid in pids.items() if not name.startswith(_VERIFIER)]
    for pid in (os.getpid(), *others):
        for thread in _threads(pid):
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(thread, cores)


def _threads(pid: int) -> list[int]:
    return [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
