"""Which sessions a verifier takes. Pure; every refusal says what was wrong and what to do."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.domain import Rejection, RejectionCode, SessionSpec
from outrider.kv_blocks import BLOCK_TOKENS
from verifier_service.config import EngineConfig


def kv_need(spec: SessionSpec) -> int:
    """Tokens of KV that a session may need, in whole blocks."""
    return -(-(len(spec.prompt) + spec.tokens_max) // BLOCK_TOKENS) * BLOCK_TOKENS


def reject(
    spec: SessionSpec, code: RejectionCode, message: str, field: str = "", current_epoch: int = 0
) -> Rejection:
    """Refuse or end a session."""
    return Rejection(
        spec.session, spec.epoch, code, message, field=field, current_epoch=current_epoch
    )


class Admission:
    """The rules of admission under fixed budgets."""

    def __init__(
        self, config: EngineConfig, vocabulary_size: int, length_max: int, kv_tokens_max: int
    ) -> None:
        self._config = config
        self._kv_tokens_max = kv_tokens_max
        self._vocabulary_size = vocabulary_size
        self._length_max = length_max

    def refusal(
        self,
        spec: SessionSpec,
        *,
        others: Sequence[SessionSpec],
        known_epoch: int,
        draining: bool,
    ) -> Rejection | None:
        """Say why `spec` cannot be opened beside `others`, or None.

        `known_epoch` is the highest epoch this verifier has seen for the session, 0 for none.
        """
        if spec.epoch <= known_epoch:
            text = f"epoch {spec.epoch} is not newer than {known_epoch}"
            return reject(spec, RejectionCode.STALE_EPOCH, text, current_epoch=known_epoch)
        if draining:
            return reject(spec, RejectionCode.DRAINING, "the verifier is draining")
        fault = self._fault(spec)
        if fault is not None:
            return reject(spec, RejectionCode.INVALID, fault[1], field=fault[0])
        sessions_max = self._config.sessions_max
        if len(others) >= sessions_max:
            text = f"the verifier has its {sessions_max} sessions; try again later"
            return reject(spec, RejectionCode.EXHAUSTED, text)
        promised = sum(kv_need(other) for other in others)
        promises_max = int(self._kv_tokens_max * max(1.0, self._config.kv_overcommit))
        if promised + kv_need(spec) > promises_max:
            text = (
                f"needs KV for up to {kv_need(spec)} tokens; {promised} of {promises_max} are"
                " promised to others; try again later"
            )
            return reject(spec, RejectionCode.EXHAUSTED, text)
        return None

    def _fault(self, spec: SessionSpec) -> tuple[str, str] | None:
        """Name the field that is wrong and stays wrong, and say how."""
        vocabulary_size = self._vocabulary_size
        for name, ids in (
            ("prompt", spec.prompt),
            ("committed", spec.committed),
            ("stop_ids", tuple(spec.stop_ids)),
        ):
            wrong = next((i for i in ids if not 0 <= i < vocabulary_size), None)
            if wrong is not None:
                return name, f"id {wrong} is outside the vocabulary of {vocabulary_size}"
        if spec.tokens_max <= len(spec.committed):
            return "tokens_max", "leaves nothing to generate"
        length = len(spec.prompt) + spec.tokens_max
        if length > self._length_max:
            return (
                "tokens_max",
                f"prompt and output need {length} tokens; the context holds {self._length_max}",
            )
        if kv_need(spec) > self._kv_tokens_max:
            return (
                "tokens_max",
                f"needs KV for {kv_need(spec)} tokens; {self._kv_tokens_max} exist in all",
            )
        wrong = next((i for i, _ in spec.sampling.logit_bias if i >= vocabulary_size), None)
        if wrong is not None:
            return (
                "sampling.logit_bias",
                f"id {wrong} is outside the vocabulary of {vocabulary_size}",
            )
        return None
