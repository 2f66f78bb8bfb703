"""Chooses workers for sessions: gathers what placement weighs, and remembers what it chose.

Redis is asked once, at admission (`find`); from then on all is known here.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from orchestrator.budgets import expected_tokens
from orchestrator.fleet import Fleet
from orchestrator.jobs import Job
from orchestrator.placement import (
    NEAR_SHARE,
    Draw,
    Kind,
    Weighed,
    WorkerView,
    choose_drafters,
    kind_of,
    pick,
    weigh_verifiers,
)
from orchestrator.prefix_lookup import PrefixLookup
from orchestrator.prefix_memory import Prefix, PrefixMemory
from orchestrator.workers import DrafterLink, VerifierLink
from outrider.domain import KvPeer, ModelInfo, SessionSpec
from outrider.kv_blocks import BLOCK_TOKENS, chain_hashes, chain_root

HASHED_BLOCKS_MAX = 1_024
"""Blocks of a text that are hashed; what comes after is not looked for."""
DRAFT_MODELS_MAX = 2
"""Draft models for whose KV a text is hashed, too."""
MEMORY_TRUST_S = 10.0
"""While Redis answers, what it does not know of is believed for so long: it is on its way there."""
PEER_TOKENS_MIN = 2 * BLOCK_TOKENS
"""That a peer must hold more of a prompt to be worth a hint."""
_EXPLAINED_MAX = 3

_log = logging.getLogger(__name__)


class Placer:
    """Places the sessions of one orchestrator. For the event loop."""

    def __init__(
        self, fleet: Fleet, lookup: PrefixLookup | None = None, draw: Draw = random.randrange
    ) -> None:
        """Without `lookup` only what this orchestrator did itself is known."""
        self.lookup = lookup
        self._fleet = fleet
        self._draw = draw
        self._memory = PrefixMemory()
        self._paces: Mapping[Kind, str] | None = None
        """A drafter of each kind that is neither quick nor slow for it, as of the last sweep."""

    async def find(self, job: Job) -> Prefix:
        """Look up who holds the beginning of a prompt. Waits a few milliseconds at most."""
        prefix = self.prefix(job)
        if self.lookup is None or not prefix.hashes:
            return prefix
        texts = [prefix.hashes, *prefix.drafted.values()]
        answers = await asyncio.gather(*map(self.lookup.holders, texts))
        holders = {name: count for answer in answers for name, count in (answer or {}).items()}
        return replace(prefix, holders=holders, looked_up=answers[0] is not None)

    def prefix(self, job: Job) -> Prefix:
        """What can be said of a prompt without asking anybody."""
        spec = job.choices[0]
        if spec.prompt_logprobs is not None:
            return Prefix()  # All of it is computed in any case.
        root = chain_root(job.info.model_fingerprint, spec.cache_salt)
        drafts = self._fleet.draft_fingerprints() if job.speculation else []
        return Prefix(
            root,
            tuple(chain_hashes(root, spec.prompt, HASHED_BLOCKS_MAX)),
            drafted={
                draft: tuple(
                    chain_hashes(chain_root(draft, spec.cache_salt), spec.prompt, HASHED_BLOCKS_MAX)
                )
                for draft in drafts[:DRAFT_MODELS_MAX]
            },
        )

    def weigh(
        self, prefix: Prefix, model: str, prompt_tokens: int, exclude: frozenset[str] = frozenset()
    ) -> list[Weighed]:
        """Weigh verifiers for a prompt; the cheapest comes first."""
        held_tokens = self._held_tokens(prefix, prefix.hashes)
        for draw in (self._draw, None):
            views = self._fleet.verifier_views(held_tokens, draw)
            weighed = weigh_verifiers(views, model, exclude, prompt_tokens)
            if weighed:
                break
            # None of those drawn serves the model, or is up: all are looked at.
        return weighed

    def verifier(
        self, prefix: Prefix, model: str, spec: SessionSpec, exclude: frozenset[str]
    ) -> Weighed | None:
        """Choose a verifier for a session, and take note that it computes the prompt."""
        weighed = self.weigh(prefix, model, len(spec.prompt), exclude)
        chosen = pick(weighed, self._draw)
        if chosen is not None:
            self._remember(prefix.hashes, self._fleet.verifiers.get(chosen.view.address))
            if _log.isEnabledFor(logging.DEBUG):
                others = [one for one in weighed[:_EXPLAINED_MAX] if one is not chosen]
                reasons = "; ".join(["chosen: " + str(chosen), *map(str, others)])
                _log.debug("session %016x, %d verifiers: %s", spec.session, len(weighed), reasons)
        return chosen

    def peer(self, prefix: Prefix, chosen: Weighed) -> KvPeer | None:
        """Whom a verifier that was chosen might ask for KV of a prompt; None: nobody holds more."""
        view = chosen.view
        held_tokens = {
            incarnation: tokens
            for incarnation, tokens in self.held(prefix).items()
            if tokens >= view.held_tokens + PEER_TOKENS_MIN
        }
        link = self._fleet.verifiers.get(view.address)
        if link is not None:
            # It will compute the prompt, which was noted already.
            held_tokens.pop(link.incarnation, None)
        best = self._fleet.best_holder(held_tokens, view.info.model_fingerprint)
        if best is None:
            return None
        return self._fleet.kv_peer(best.address, held_tokens[best.incarnation] // BLOCK_TOKENS)

    def drafters(
        self,
        prefix: Prefix,
        verifier: VerifierLink,
        target: ModelInfo,
        count: int,
        exclude: frozenset[str],
        bound: Collection[Kind] = (),
    ) -> list[WorkerView]:
        """Choose drafters for a session on a verifier that has some of the kinds `bound`."""
        held_tokens: dict[str, int] = {}
        for hashes in prefix.drafted.values():
            held_tokens |= self._held_tokens(prefix, hashes)
        for draw in (self._draw, None):
            views = self._fleet.drafter_views(verifier, held_tokens, draw)
            # Among equals not every orchestrator is to take the same.
            begin = self._draw(len(views)) if views else 0
            views = views[begin:] + views[:begin]
            chosen = choose_drafters(views, target, count, exclude, bound)
            if chosen:
                break
        for view in chosen:
            hashes = prefix.drafted.get(view.info.model_fingerprint, ())
            self._remember(hashes, self._fleet.drafters.get(view.address))
        return chosen

    def measure_anew(self) -> None:
        """Have `outpaced` follow what has been measured since."""
        self._paces = None

    def outpaced(self, verifier: VerifierLink, drafter: DrafterLink) -> bool:
        """Whether a drafter wins much less than its peers, being slower or farther away.

        What its sessions' texts are like has no part in it, nor who guessed right of late.
        """
        if drafter.info is None or drafter.grow is None:
            return False
        if self._paces is None:
            self._paces = self._fleet.usual_drafters(self._draw)
        usual = self._paces.get(kind_of(drafter.info))
        if usual is None or usual == drafter.address:
            return False
        own, step_s = drafter.pace_for(verifier), verifier.pace.step_s
        peer = self._fleet.drafters[usual].pace_for(verifier)
        mine, theirs = (
            expected_tokens(replace(pace, sessions=0, agreement=None), step_s)
            for pace in (own, peer)
        )
        return mine < NEAR_SHARE * theirs

    def ended(self, prefix: Prefix, spec: SessionSpec, output: list[int], address: str) -> None:
        """Take note of all that a verifier has computed for a session."""
        if prefix.root is None:
            return
        known = prefix.hashes
        tokens = [*spec.prompt[len(known) * BLOCK_TOKENS :], *output]
        parent = known[-1] if known else prefix.root
        more = chain_hashes(parent, tokens, HASHED_BLOCKS_MAX - len(known))
        self._remember([*known, *more], self._fleet.verifiers.get(address))

    def _remember(self, hashes: Sequence[bytes], link: VerifierLink | DrafterLink | None) -> None:
        if link is not None and hashes:
            self._memory.remember(hashes, link.incarnation, time.monotonic())

    def held(self, prefix: Prefix) -> dict[str, int]:
        """Return by verifiers' incarnation how many tokens of a prompt's beginning are held."""
        return self._held_tokens(prefix, prefix.hashes)

    def _held_tokens(self, prefix: Prefix, hashes: Sequence[bytes]) -> dict[str, int]:
        """Return by incarnation how much of a text's beginning is held."""
        since_s = time.monotonic() - MEMORY_TRUST_S if prefix.looked_up else -math.inf
        remembered = self._memory.holders(hashes, since_s)
        return {
            incarnation: BLOCK_TOKENS
            * max(remembered.get(incarnation, 0), prefix.holders.get(incarnation, 0))
            for incarnation in {**remembered, **prefix.holders}
        }
