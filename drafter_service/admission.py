"""Whether a drafter takes a session: refusals, each with what is wrong for people. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from outrider.domain import BindSpec, ModelInfo, Rejection, RejectionCode


def bind_fault(
    spec: BindSpec, info: ModelInfo, *, draining: bool, room: int, sessions_max: int
) -> Rejection | None:
    """Return why a session is refused, or None; `room` is how many more there may be."""
    own = info.tokenizer_fingerprint
    if own is not None and own != spec.tokenizer_fingerprint:
        return rejection(
            spec,
            RejectionCode.MISMATCH,
            f"tokenizer mismatch: this drafter has {own[:12]}, the target "
            f"{spec.tokenizer_fingerprint[:12]}",
            "tokenizer_fingerprint",
        )
    if draining:
        return rejection(spec, RejectionCode.DRAINING, "the drafter is draining")
    wrong = wrong_id(spec, info, (*spec.prompt, *spec.committed))
    if wrong is not None:
        return rejection(spec, RejectionCode.INVALID, wrong, "prompt")
    if room <= 0:
        return rejection(
            spec, RejectionCode.EXHAUSTED, f"the drafter has its {sessions_max} sessions"
        )
    return None


def wrong_id(spec: BindSpec, info: ModelInfo, tokens: Sequence[int]) -> str | None:
    """Name an id that target or proposer does not know: it would break everybody's step."""
    size = known_ids(spec, info)
    wrong = next((token for token in tokens if not 0 <= token < size), None)
    return None if wrong is None else f"id {wrong} is outside the vocabulary of {size}"


def known_ids(spec: BindSpec, info: ModelInfo) -> int:
    """How many ids target and proposer both know; 0 is a proposer's that takes any."""
    own = info.vocabulary_size
    return min(spec.vocabulary_size, own) if own else spec.vocabulary_size


def rejection(spec: BindSpec, code: RejectionCode, message: str, field: str = "") -> Rejection:
    """Refuse a session, or end it."""
    return Rejection(spec.session, spec.epoch, code, message, field=field, binding=spec.binding)
