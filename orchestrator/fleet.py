"""The workers that this orchestrator knows: static addresses and what the registry lists."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from orchestrator.budgets import expected_tokens
from orchestrator.placement import WorkerView, pairing_fault
from orchestrator.text import TextCodec
from orchestrator.workers import (
    DrafterBatch,
    DrafterLink,
    LinkState,
    VerifierBatch,
    VerifierLink,
)
from outrider.domain import TARGET_SOURCE, ModelInfo
from outrider.errors import Mismatch

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listener:
    """What the driver wants to hear."""

    verifier_changed: Callable[[VerifierLink], None]
    verifier_batch: Callable[[VerifierLink, VerifierBatch], None]
    drafter_changed: Callable[[DrafterLink], None]
    drafter_batch: Callable[[DrafterLink, DrafterBatch], None]


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, for people."""

    role: str
    address: str
    state: str
    reason: str
    info: ModelInfo | None
    sessions: int
    incarnation: str
    step_s: float
    """Duration of a verifier's last step in seconds; 0 until known."""
    kv_tokens_used: int
    """Tokens of KV in use on a verifier at its last step; 0 until known."""
    waiting: int
    """Admitted sessions that waited for KV there."""


class Fleet:
    """Links to workers, and the tokenizers of the models that they serve."""

    def __init__(
        self, name: str, *, verifiers: Iterable[str] = (), drafters: Iterable[str] = ()
    ) -> None:
        self._name = name
        self._static = {"verifier": frozenset(verifiers), "drafter": frozenset(drafters)}
        self.verifiers: dict[str, VerifierLink] = {}
        self.drafters: dict[str, DrafterLink] = {}
        self._sources = itertools.count(TARGET_SOURCE + 1)
        self._codecs: dict[str, TextCodec] = {}
        self._listener: Listener | None = None
        self._closing: set[asyncio.Task[None]] = set()

    def start(self, listener: Listener) -> None:
        """Connect to the static addresses."""
        self._listener = listener
        self.update(verifiers=(), drafters=())

    async def close(self) -> None:
        """End all streams."""
        links: list[VerifierLink | DrafterLink] = [
            *self.verifiers.values(),
            *self.drafters.values(),
        ]
        await asyncio.gather(*(link.close() for link in links), *self._closing)

    def update(self, *, verifiers: Iterable[str], drafters: Iterable[str]) -> None:
        """Take over what the registry lists; static addresses always stay.

        A worker that the registry no longer lists is kept while its stream works: Redis may be
        wrong or gone, the stream is the proof of life.
        """
        assert self._listener is not None, "start() comes first"
        wanted_verifiers = self._static["verifier"] | frozenset(verifiers)
        wanted_drafters = self._static["drafter"] | frozenset(drafters)
        for address in wanted_verifiers - self.verifiers.keys():
            verifier = VerifierLink(
                address,
                self._name,
                on_change=self._listener.verifier_changed,
                on_batch=self._listener.verifier_batch,
                on_tokenizer=self._load_codec,
                has_tokenizer=lambda info: info.tokenizer_fingerprint in self._codecs,
            )
            self.verifiers[address] = verifier
            verifier.start()
        for address in wanted_drafters - self.drafters.keys():
            drafter = DrafterLink(
                address,
                self._name,
                source=next(self._sources),
                on_change=self._listener.drafter_changed,
                on_batch=self._listener.drafter_batch,
            )
            self.drafters[address] = drafter
            drafter.start()
        self._forget_lost(self.verifiers, wanted_verifiers)
        self._forget_lost(self.drafters, wanted_drafters)

    def _forget_lost(
        self,
        links: dict[str, VerifierLink] | dict[str, DrafterLink],
        wanted: frozenset[str],
    ) -> None:
        for address in [a for a, link in links.items() if link.state is LinkState.LOST]:
            if address not in wanted:
                link: VerifierLink | DrafterLink = links.pop(address)
                task = asyncio.create_task(link.close())
                self._closing.add(task)
                task.add_done_callback(self._closing.discard)

    async def _load_codec(self, info: ModelInfo, files: dict[str, bytes]) -> None:
        # Building a tokenizer takes up to a second for large vocabularies: not on the loop.
        codec = await asyncio.to_thread(TextCodec.from_files, files)
        if codec.fingerprint != info.tokenizer_fingerprint:
            raise Mismatch(
                f"the verifier's tokenizer files do not fit its fingerprint "
                f"{(info.tokenizer_fingerprint or 'none')[:12]}"
            )
        self._codecs[codec.fingerprint] = codec

    def codec(self, info: ModelInfo) -> TextCodec:
        """Tokenizer of a model that a ready verifier serves."""
        assert info.tokenizer_fingerprint is not None, "links check it before they are ready"
        return self._codecs[info.tokenizer_fingerprint]

    def verifier_views(self) -> list[WorkerView]:
        """Verifiers that take sessions."""
        return _views(self.verifiers.values())

    def drafter_views(self, verifier: VerifierLink) -> list[WorkerView]:
        """Drafters that take sessions, and what each would win for one more on a verifier."""
        return [
            replace(
                view,
                tokens=expected_tokens(
                    self.drafters[view.address].pace_for(verifier), verifier.pace.step_s
                ),
            )
            for view in _views(self.drafters.values())
        ]

    def models(self) -> dict[str, ModelInfo]:
        """Models that can be asked for, by name."""
        return {view.info.model: view.info for view in self.verifier_views()}

    def refusal(self, drafter: ModelInfo) -> str | None:
        """Why a drafter fits none of the targets that are there, or None."""
        faults = [pairing_fault(target, drafter) for target in self.models().values()]
        if not faults or None in faults:
            return None
        return faults[0]

    def statuses(self) -> list[WorkerStatus]:
        """Every worker, for people."""
        links: list[VerifierLink | DrafterLink] = [
            *self.verifiers.values(),
            *self.drafters.values(),
        ]
        return [self._status(link) for link in links]

    def _status(self, link: VerifierLink | DrafterLink) -> WorkerStatus:
        state, reason = link.state.value, link.reason
        if isinstance(link, DrafterLink) and link.info and link.state is LinkState.READY:
            fault = self.refusal(link.info)
            if fault is not None:
                state, reason = "refused", fault
        step = link.step if isinstance(link, VerifierLink) else None
        return WorkerStatus(
            role=link.role,
            address=link.address,
            state=state,
            reason=reason,
            info=link.info,
            sessions=len(link.sessions),
            incarnation=link.incarnation,
            step_s=step.duration_s if step else 0.0,
            kv_tokens_used=step.kv_tokens_used if step else 0,
            waiting=step.waiting if step else 0,
        )


def _views(links: Iterable[VerifierLink | DrafterLink]) -> list[WorkerView]:
    return [
        WorkerView(link.address, link.info, len(link.sessions), link.sessions_max)
        for link in links
        if link.state is LinkState.READY and link.info is not None
    ]
