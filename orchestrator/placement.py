"""Which workers serve a session. Pure: a function of what is known about the fleets."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from outrider.domain import ModelInfo


@dataclass(frozen=True, slots=True)
class WorkerView:
    """A ready worker as placement sees it."""

    address: str
    info: ModelInfo
    sessions: int
    """Sessions that this orchestrator has on it."""
    sessions_max: int
    tokens: float = 1.0
    """Of a drafter: what a verify step of one more session is expected to commit with it."""


def pairing_fault(target: ModelInfo, drafter: ModelInfo) -> str | None:
    """Say why a drafter cannot guess for a target, or None.

    Ids must mean the same on both sides; a drafter that only handles ids fits every target.
    """
    if drafter.tokenizer_fingerprint is None:
        return None
    if drafter.tokenizer_fingerprint != target.tokenizer_fingerprint:
        return (
            f"tokenizer mismatch: drafter {drafter.model} has tokenizer "
            f"{drafter.tokenizer_fingerprint[:12]}, target {target.model} has "
            f"{(target.tokenizer_fingerprint or 'none')[:12]}; use a draft model of the target's "
            "family"
        )
    return None


def choose_verifier(
    views: Sequence[WorkerView], model: str, exclude: Collection[str]
) -> WorkerView | None:
    """The least loaded verifier of a model, by share of its sessions in use."""
    fitting = [v for v in views if v.info.model == model and v.address not in exclude]
    return min(fitting, key=_load, default=None)


def choose_drafters(
    views: Sequence[WorkerView], target: ModelInfo, count: int, exclude: Collection[str]
) -> list[WorkerView]:
    """Up to `count` drafters for a target, by what they are expected to win, then by load.

    The best of each kind of proposer first, since two of a kind guess the same.
    """
    fitting = sorted(
        (v for v in views if v.address not in exclude and pairing_fault(target, v.info) is None),
        key=lambda view: (-round(view.tokens, 1), *_load(view)),
    )
    chosen: list[WorkerView] = []
    kinds: set[tuple[str, str]] = set()
    for view in fitting:
        kind = (view.info.proposer, view.info.model_fingerprint)
        if kind not in kinds:
            kinds.add(kind)
            chosen.append(view)
    chosen += [view for view in fitting if view not in chosen]
    return chosen[:count]


def _load(view: WorkerView) -> tuple[float, str]:
    return view.sessions / max(1, view.sessions_max), view.address
