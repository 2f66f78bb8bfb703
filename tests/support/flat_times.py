"""Step times that make every guess worth verifying, for tests of what is verified."""

from __future__ import annotations

from verifier_service.step_times import StepTimes


class FlatTimes(StepTimes):
    """T(N) = 1 for every N: tokens cost nothing, so all nodes that can be chosen are."""

    def predict(
        self, tokens: int, *, kv_tokens: int | None = None, prefill_tokens: int = 0
    ) -> float:
        return 1.0

    def predict_all(
        self, tokens: int, more: int, *, kv_tokens: int | None = None, prefill_tokens: int = 0
    ) -> list[float]:
        return [1.0] * (more + 1)
