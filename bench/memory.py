"""What a verifier's memory grows to while its KV budget is full. Runs in a process of its own.

    python -m bench.memory MODEL DTYPE THREADS CACHE_DIR

Fills the budget exactly with sessions that use all they asked for, and prints one JSON object.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.engine_driver import EngineDriver, ModelThread
from bench.texts import Texts
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model
from outrider.model.threads import set_threads
from verifier_service.config import EngineConfig

_SESSIONS = 16
_PROMPT_TOKENS = 448
_OUTPUT_TOKENS = 64
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """Mebibytes, except where the name says otherwise."""

    loaded: float
    """Resident before the engine exists: interpreter, libraries and weights."""
    warm: float
    """After warm-up, without a session."""
    peak: float
    """Highest while the budget was full."""
    kv_budget: float
    kv_needed: float
    """What the sessions may need together: the whole budget."""
    kv_used: float | None
    """Most that a step reported as used; None if steps do not report it."""
    bytes_per_token: int

    @property
    def growth_ratio(self) -> float:
        """Growth through sessions over the budget."""
        return (self.peak - self.warm) / self.kv_budget


def resident_bytes(field: str = "VmRSS") -> int:
    """Resident set now, or its peak (`VmHWM`). Linux only."""
    match = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    if match is None:
        raise OSError(f"/proc/self/status has no {field}")
    return int(match[1]) * 1024


def measure_memory(
    model: LanguageModel, thread: ModelThread, texts: Texts, loaded: int
) -> MemoryResult:
    """Fill a budget and look at the process meanwhile."""
    budget = _SESSIONS * (_PROMPT_TOKENS + _OUTPUT_TOKENS)
    driver = EngineDriver(model, EngineConfig(sessions_max=_SESSIONS, kv_tokens_max=budget), thread)
    warm = resident_bytes()
    peak = warm
    needed = 0

    def look(*_: Any) -> None:
        nonlocal peak, needed
        peak = max(peak, resident_bytes())
        needed = max(needed, driver.engine.kv_tokens_used)

    driver.on_commits = look
    prompts = [texts.take(index, _PROMPT_TOKENS) for index in range(_SESSIONS)]
    driver.generate(prompts, _OUTPUT_TOKENS, "memory")
    used = driver.kv_tokens_used_max
    driver.stop()
    per_token = model.kv_bytes_per_token
    return MemoryResult(
        loaded=loaded / _MIB,
        warm=warm / _MIB,
        peak=peak / _MIB,
        kv_budget=budget * per_token / _MIB,
        kv_needed=needed * per_token / _MIB,
        kv_used=used * per_token / _MIB if used else None,
        bytes_per_token=per_token,
    )


def main() -> None:
    """Measure and print."""
    spec, dtype, threads, cache_dir = sys.argv[1:5]
    thread = ModelThread()
    thread.run(set_threads, int(threads))

    def load() -> LanguageModel:
        any_dtype: Any = dtype
        return load_language_model(spec, dtype=any_dtype, cache_dir=Path(cache_dir))

    model = thread.run(load)
    loaded = resident_bytes()
    result = measure_memory(model, thread, Texts(model.tokenizer_files), loaded)
    thread.close()
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
