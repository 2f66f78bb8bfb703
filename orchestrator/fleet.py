"""The workers that this orchestrator knows: static addresses and what the registry lists."""

from __future__ import annotations

import asyncio
import itertools
import logging
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from orchestrator.budgets import expected_tokens
from orchestrator.placement import Draw, Kind, WorkerView, kind_of, pairing_fault, shortlist
from orchestrator.text import TextCodec
from orchestrator.workers import (
    DrafterBatch,
    DrafterLink,
    LinkState,
    VerifierBatch,
    VerifierLink,
)
from outrider.config import Tls
from outrider.domain import (
    CANDIDATES_MAX,
    OWN_TEXT_SOURCE,
    TARGET_SOURCE,
    KvPeer,
    ModelInfo,
)
from outrider.errors import InvalidRequest, Mismatch
from outrider.registry import WorkerRecord

SHORTLIST_MAX = 16
"""Workers of a role that are weighed for a session, beside those that hold its beginning."""

GUESSERS_MAX = 65_536
"""Source numbers whose meaning is remembered."""

_ADDRESSES_S = 1.0
LinkT = TypeVar("LinkT", VerifierLink, DrafterLink)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Listener:
    """What the driver wants to hear."""

    verifier_changed: Callable[[VerifierLink], None]
    verifier_batch: Callable[[VerifierLink, VerifierBatch], None]
    drafter_changed: Callable[[DrafterLink], None]
    drafter_batch: Callable[[DrafterLink, DrafterBatch], None]


@dataclass(frozen=True, slots=True)
class Guesser:
    """What is behind a source number."""

    proposer: str
    """Such as "lookup"; "prediction" is what clients predict, "own-text" what verifiers guess."""
    version: str
    """Fingerprint of the weights, or of whatever else it guesses with."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What a worker says in the registry, of which this orchestrator sees only a part."""

    incarnation: str
    sessions: int = 0
    """Of other orchestrators."""
    kv_share: float = 0.0
    """Of its KV in use; 0 if not known."""
    draining: bool = False


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """One worker, for people."""

    role: str
    address: str
    state: str
    reason: str
    info: ModelInfo | None
    sessions: int
    """Of this orchestrator."""
    sessions_max: int
    """That it takes, whosever they are; 0 until known."""
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
        self,
        name: str,
        *,
        verifiers: Iterable[str] = (),
        drafters: Iterable[str] = (),
        worker_timeout_s: float = 5.0,
        tls: Tls | None = None,
    ) -> None:
        """`worker_timeout_s`: silent workers count as lost; see `DriverConfig`."""
        self._name, self._tls = name, tls
        self._worker_timeout_s = worker_timeout_s
        self._static = {"verifier": frozenset(verifiers), "drafter": frozenset(drafters)}
        self.verifiers: dict[str, VerifierLink] = {}
        self.drafters: dict[str, DrafterLink] = {}
        self._sources = itertools.count(TARGET_SOURCE + 1)
        self._prediction_source: int | None = None
        self._guessers: dict[int, Guesser] = {OWN_TEXT_SOURCE: Guesser("own-text", "")}
        """By source number, those of drafters that are gone too."""
        self._codecs: dict[str, TextCodec] = {}
        self._listener: Listener | None = None
        self._elsewhere: dict[str, Elsewhere] = {}
        """By address."""
        self._addresses: dict[str, str] = {}
        """By incarnation, as of a while ago."""
        self._addresses_due_s = 0.0
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
                timeout_s=self._worker_timeout_s,
                on_change=self._listener.verifier_changed,
                on_batch=self._listener.verifier_batch,
                on_tokenizer=self._load_codec,
                has_tokenizer=lambda info: info.tokenizer_fingerprint in self._codecs,
                tls=self._tls,
            )
            self.verifiers[address] = verifier
            verifier.start()
        for address in wanted_drafters - self.drafters.keys():
            drafter = DrafterLink(
                address,
                self._name,
                source=next(self._sources),
                timeout_s=self._worker_timeout_s,
                on_change=self._drafter_changed,
                on_batch=self._listener.drafter_batch,
                tls=self._tls,
            )
            self.drafters[address] = drafter
            drafter.start()
        self._forget_lost(self.verifiers, wanted_verifiers)
        self._forget_lost(self.drafters, wanted_drafters)

    def _drafter_changed(self, link: DrafterLink) -> None:
        """Take note of what guesses under a drafter's number before anybody is told."""
        assert self._listener is not None, "start() comes first"
        if link.state is LinkState.READY and link.info is not None:
            guesser = Guesser(link.info.proposer, link.info.model_fingerprint)
            if self._guessers.setdefault(link.source, guesser) != guesser:
                # Another guesser is another source: nothing that was learnt of the old one holds.
                link.source, link.gain = next(self._sources), None
                self._guessers[link.source] = guesser
            if len(self._guessers) > GUESSERS_MAX:
                kept = (OWN_TEXT_SOURCE, self._prediction_source)
                del self._guessers[next(one for one in self._guessers if one not in kept)]
        self._listener.drafter_changed(link)

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

    def note(self, records: Iterable[WorkerRecord]) -> None:
        """Take over what the registry says of the workers' load."""
        self._elsewhere = {
            record.address: self._seen_elsewhere(record, links.get(record.address))
            for record in records
            for links in (self.verifiers if record.role == "verifier" else self.drafters,)
        }

    def kv_shares(self) -> dict[str, float]:
        """What share of its KV each ready verifier uses, as far as the registry says."""
        return {
            link.address: elsewhere.kv_share
            for link in self.verifiers.values()
            if link.state is LinkState.READY
            and (elsewhere := self._elsewhere.get(link.address)) is not None
            and elsewhere.incarnation == link.incarnation
        }

    @property
    def prediction_source(self) -> int:
        """Source number of what clients predict; one for all, as if it were one drafter."""
        if self._prediction_source is None:
            self._prediction_source = next(self._sources)
            self._guessers[self._prediction_source] = Guesser("prediction", "")
        return self._prediction_source

    @property
    def known_prediction_source(self) -> int | None:
        """The same, or None if no client has predicted anything yet."""
        return self._prediction_source

    @property
    def guessers(self) -> Mapping[int, Guesser]:
        """What guesses, or has guessed, under each source number."""
        return self._guessers

    def proposers(self, sources: Iterable[int]) -> dict[int, str]:
        """Name what guesses under source numbers, for people; unknown ones are left out."""
        known = self._guessers
        return {source: known[source].proposer for source in sources if source in known}

    def _seen_elsewhere(
        self, record: WorkerRecord, link: VerifierLink | DrafterLink | None
    ) -> Elsewhere:
        own = len(link.sessions) if link is not None else 0
        return Elsewhere(
            record.incarnation,
            # Ours are counted here, where they are known at once.
            sessions=max(0, record.load - own),
            kv_share=record.kv_tokens_used / max(1, record.kv_tokens_max),
            draining=record.state == "draining",
        )

    def verifier_views(
        self, held_tokens: Mapping[str, int] | None = None, draw: Draw | None = None
    ) -> list[WorkerView]:
        """Verifiers that take sessions; of a large fleet, with `draw`, some that are drawn.

        `held_tokens` says by incarnation how much of a text's beginning is held: those who hold
        some are among them. It counts only for the incarnation that this orchestrator talks to.
        """
        held_tokens = held_tokens or {}
        views = (
            self._view(link, held_tokens)
            for link in self._weighed(self.verifiers, held_tokens, draw)
        )
        return [view for view in views if view is not None]

    def drafter_views(
        self,
        verifier: VerifierLink,
        held_tokens: Mapping[str, int] | None = None,
        draw: Draw | None = None,
    ) -> list[WorkerView]:
        """Drafters that take sessions, and what each would win for one more on a verifier.

        Arguments are as for `verifier_views`.
        """
        held_tokens = held_tokens or {}
        links = self._weighed(self.drafters, held_tokens, draw)
        gains: dict[Kind, list[float]] = {}
        for link in links:
            if link.info is not None and link.gain is not None:
                gains.setdefault(kind_of(link.info), []).append(link.gain)
        views = []
        for link in links:
            view = self._view(link, held_tokens)
            if view is None:
                continue
            # Who has not shown yet what it wins is taken to be like the others of its kind.
            alike = gains.get(view.kind)
            pace = link.pace_for(verifier, statistics.fmean(alike) if alike else None)
            views.append(replace(view, tokens=expected_tokens(pace, verifier.pace.step_s)))
        return views

    def usual_drafters(self, draw: Draw) -> dict[Kind, str]:
        """Of each kind a drafter whose steps and way take about as long as the others'.

        Of two the quicker one; of a large fleet among some that are drawn.
        """
        kinds: dict[Kind, list[tuple[float, str]]] = {}
        for link in self._weighed(self.drafters, (), draw):
            if link.state is LinkState.READY and link.info is not None and link.grow is not None:
                time_s = link.grow.duration_s + link.rtt_s
                kinds.setdefault(kind_of(link.info), []).append((time_s, link.address))
        return {kind: statistics.median_low(times)[1] for kind, times in kinds.items()}

    def _weighed(
        self, links: Mapping[str, LinkT], incarnations: Iterable[str], draw: Draw | None
    ) -> list[LinkT]:
        """Some links, drawn, and those to these incarnations; without a look at all of them."""
        everyone = list(links.values())
        if draw is None or len(everyone) <= SHORTLIST_MAX:
            return everyone
        chosen = {
            everyone[index].address: everyone[index]
            for index in shortlist(len(everyone), SHORTLIST_MAX, draw)
        }
        for incarnation in incarnations:
            link = links.get(self._address_of(incarnation))
            if link is not None and link.incarnation == incarnation:
                chosen[link.address] = link
        return list(chosen.values())

    def _address_of(self, incarnation: str) -> str:
        """Where an incarnation was seen last; empty if nowhere."""
        now_s = time.monotonic()
        if incarnation not in self._addresses and now_s >= self._addresses_due_s:
            self._addresses_due_s = now_s + _ADDRESSES_S
            links: list[VerifierLink | DrafterLink] = [
                *self.verifiers.values(),
                *self.drafters.values(),
            ]
            self._addresses = {link.incarnation: link.address for link in links}
        return self._addresses.get(incarnation, "")

    def kv_peer(self, address: str, blocks: int) -> KvPeer | None:
        """The verifier at an address as one that holds so many blocks of a text, if it is there.

        One that drains will do: it serves its peers to the end.
        """
        link = self.verifiers.get(address)
        if link is None or link.state not in (LinkState.READY, LinkState.DRAINING) or blocks < 1:
            return None
        try:
            return KvPeer(link.address, link.incarnation, blocks)
        except InvalidRequest:
            # An address that only gRPC of this process understands.
            return None

    def best_holder(self, held_tokens: Mapping[str, int], fingerprint: str) -> VerifierLink | None:
        """The verifier of a model that holds most of a text; `held_tokens` is by incarnation.

        Among equals the one with fewer sessions.
        """
        links = (self.verifiers.get(self._address_of(incarnation)) for incarnation in held_tokens)
        there = [
            link
            for link in links
            if link is not None
            and link.incarnation in held_tokens
            and link.info is not None
            and link.info.model_fingerprint == fingerprint
            and link.state in (LinkState.READY, LinkState.DRAINING)
        ]
        return max(
            there,
            key=lambda link: (held_tokens[link.incarnation], -len(link.sessions), link.address),
            default=None,
        )

    def draft_fingerprints(self) -> list[str]:
        """Fingerprints of the draft models that guess; lookup drafters have no KV."""
        return sorted(
            {
                link.info.model_fingerprint
                for link in self.drafters.values()
                if link.info is not None and link.info.tokenizer_fingerprint is not None
            }
        )

    def candidates_wanted(self, target: ModelInfo) -> int:
        """How many of a target's candidates any drafter that fits it asks for; 0: none."""
        asked = (
            link.info.candidates
            for link in self.drafters.values()
            if link.info is not None
            and link.info.candidates
            and link.state is LinkState.READY
            and pairing_fault(target, link.info) is None
        )
        return min(CANDIDATES_MAX, max(asked, default=0))

    def _view(
        self, link: VerifierLink | DrafterLink, held_tokens: Mapping[str, int]
    ) -> WorkerView | None:
        if link.state is not LinkState.READY or link.info is None:
            return None
        if not link.breaker.allows(time.monotonic()):
            return None
        elsewhere = self._elsewhere.get(link.address)
        if elsewhere is None or elsewhere.incarnation != link.incarnation:
            elsewhere = Elsewhere(link.incarnation)
        if elsewhere.draining:
            return None
        # What an idle verifier reported last is of its busy time.
        step = link.step if isinstance(link, VerifierLink) and link.sessions else None
        return WorkerView(
            link.address,
            link.info,
            len(link.sessions) + elsewhere.sessions,
            link.sessions_max,
            rtt_s=link.rtt_s,
            kv_share=elsewhere.kv_share,
            waiting=step is not None and step.waiting > 0,
            held_tokens=held_tokens.get(link.incarnation, 0),
            spares=len(link.spares) if isinstance(link, DrafterLink) else 0,
        )

    def relied_on_by(self, drafter: DrafterLink, *, but: int) -> int:
        """How many sessions a drafter works for as no mere spare, as far as known; one apart."""
        elsewhere = self._elsewhere.get(drafter.address)
        others = 0
        if elsewhere is not None and elsewhere.incarnation == drafter.incarnation:
            others = elsewhere.sessions
        own = but in drafter.sessions and but not in drafter.spares
        return len(drafter.sessions) - len(drafter.spares) - own + others

    def models(self) -> dict[str, ModelInfo]:
        """Models that can be asked for, by name."""
        return {
            link.info.model: link.info
            for link in self.verifiers.values()
            if link.state is LinkState.READY and link.info is not None
        }

    def model_of(self, fingerprint: str) -> ModelInfo | None:
        """The model that continues output exactly, if a verifier that serves it is ready."""
        for link in self.verifiers.values():
            ready = link.state is LinkState.READY
            if ready and link.info is not None and link.info.model_fingerprint == fingerprint:
                return link.info
        return None

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
            sessions_max=link.sessions_max,
            incarnation=link.incarnation,
            step_s=step.duration_s if step else 0.0,
            kv_tokens_used=step.kv_tokens_used if step else 0,
            waiting=step.waiting if step else 0,
        )
