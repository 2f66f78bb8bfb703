"""One session as the verifier holds it: committed tokens, draft tree, counters, KV.

Owned by the engine's thread; nobody else touches it.
"""

from __future__ import annotations

from collections import Counter

from outrider.committed import CommittedLog
from outrider.domain import TARGET_SOURCE, Draft, SessionSpec, SpeculationCounters
from outrider.draft_tree import Advance, DraftTree, Node, draft_fault
from outrider.model.kv_cache import SessionCache
from verifier_service.acceptance import Verdict
from verifier_service.scheduling import Calibration


class Session:
    """State between verify steps."""

    def __init__(
        self,
        spec: SessionSpec,
        connection: int,
        cache: SessionCache,
        *,
        eos_ids: frozenset[int],
        vocabulary_size: int,
        tree_nodes_max: int,
        tree_depth_max: int,
    ) -> None:
        self.spec = spec
        self.connection = connection
        self.cache = cache
        self.log = CommittedLog((*spec.prompt, *spec.committed))
        self.tree = DraftTree(
            self.log.tip, len(self.log), nodes_max=tree_nodes_max, depth_max=tree_depth_max
        )
        self.stop_ids = spec.stop_ids | (frozenset() if spec.ignore_eos else eos_ids)
        self._vocabulary_size = vocabulary_size
        self._calibrations: dict[int, Calibration] = {}
        self._verify_steps = 0
        self._verified = 0
        self._received = 0
        self._dropped_drafts: Counter[str] = Counter()
        self._dropped_nodes: Counter[str] = Counter()
        self._accepted: Counter[int] = Counter()

    @property
    def tokens_left(self) -> int:
        """Output tokens that may still be committed; at least 1 while the session lives."""
        return self.spec.tokens_max - (len(self.log) - len(self.spec.prompt))

    @property
    def pending(self) -> list[int]:
        """Committed tokens whose KV is not held yet; the tip is always among them."""
        return self.log.since(self.cache.prefix_length)

    def merge(self, draft: Draft | None, source: int) -> None:
        """Take a draft in; what cannot be used is counted and dropped."""
        fault = self._fault(draft)
        if draft is not None:
            self._received += len(draft.tokens)
        if draft is None or fault is not None:
            self._dropped_drafts[fault or "malformed"] += 1
            return
        calibration = self._calibrations.setdefault(source, Calibration())
        calibrated = Draft(
            draft.epoch,
            draft.base_length,
            draft.base_digest,
            draft.tokens,
            draft.parents,
            tuple(calibration.apply(logprob) for logprob in draft.accept_logprobs),
        )
        merge = self.tree.merge(calibrated, self.log.since(draft.base_length), source)
        for reason in ("decided", "off_path", "too_deep", "evicted"):
            count = getattr(merge, reason)
            if count:
                self._dropped_nodes[reason] += count

    def _fault(self, draft: Draft | None) -> str | None:
        if draft is None:
            return "malformed"
        if draft.epoch != self.spec.epoch:
            return "epoch"
        fault = draft_fault(draft, self._vocabulary_size, self.tree.nodes_max)
        if fault is not None:
            return fault
        if draft.base_length > len(self.log):
            return "ahead"
        known = self.log.digest_at(draft.base_length)
        if known is None:
            return "too_old"
        return None if known == draft.base_digest else "digest"

    def commit(self, verdict: Verdict, nodes: tuple[Node, ...]) -> tuple[int, ...]:
        """Make a verdict true; returns the source of each committed token."""
        accepted = [nodes[index] for index in verdict.accepted]
        self._verify_steps += 1
        self._verified += len(nodes)
        for node in accepted:
            self._accepted[node.owner] += 1
        sources = [node.owner for node in accepted[: len(verdict.tokens)]]
        sources += [TARGET_SOURCE] * (len(verdict.tokens) - len(sources))
        self.log.append(verdict.tokens)
        self._learn(self.tree.advance(verdict.tokens))
        return tuple(sources)

    def _learn(self, advance: Advance) -> None:
        if advance.dropped:
            self._dropped_nodes["missed"] += advance.dropped
        for score in advance.shadow:
            self._calibrations[score.source].observe(score.claimed_logprob, score.accepted)

    def counters(self) -> SpeculationCounters:
        """A snapshot."""
        return SpeculationCounters(
            verify_steps=self._verify_steps,
            verified_draft_tokens=self._verified,
            accepted_draft_tokens=sum(self._accepted.values()),
            received_draft_tokens=self._received,
            dropped_drafts=dict(self._dropped_drafts),
            dropped_nodes=dict(self._dropped_nodes),
            accepted_by_source=dict(self._accepted),
        )
