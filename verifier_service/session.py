"""One session as the verifier holds it: committed tokens, draft tree, counters, KV.

Owned by the engine's thread, which lends it while the model computes (`Engine.submit`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

from outrider.committed import CommittedLog
from outrider.domain import (
    OWN_TEXT_SOURCE,
    TARGET_SOURCE,
    Draft,
    SessionSpec,
    SpeculationCounters,
)
from outrider.draft_tree import DraftTree, Node, ShadowScore, draft_fault
from outrider.model.kv_cache import SessionCache
from verifier_service.acceptance import Verdict
from verifier_service.calibration import WORTH_MIN, Calibrations, SessionCalibration
from verifier_service.own_text import OwnText, claim_logprob

_HOPELESS_NODES_MAX = 2
"""Nodes that are looked at of a draft none of whose nodes can pay: enough to score its source, and
few enough to cost next to nothing when every session gets such drafts after every step."""

_PASSED_OVER_MIN = 7
_PASSED_OVER_PER_ROW = 2
"""Drafts of a hopeless source that are not even read for each one that is: reading a full tree
takes the cores a third of a millisecond, which is all that such a source can still cost. The more
rows a step has, the more are passed over, so that a source's drafts for all of them together are
read in every other step. The first right guess in any session ends it for all, so that honesty is
noticed as soon whatever their number."""

_OWN_GUESSES_MAX = 16
"""Tokens guessed ahead from a session's own text."""


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
        calibrations: Calibrations | None = None,
        own_guesses: bool = False,
    ) -> None:
        """`calibrations` is what the verifier knows of all sources; by default nothing.

        With `own_guesses`, `guess` does something.
        """
        self.spec = spec
        self.connection = connection
        self.cache = cache
        self.log = CommittedLog((*spec.prompt, *spec.committed))
        self.tree = DraftTree(
            self.log.tip,
            len(self.log),
            nodes_max=tree_nodes_max,
            depth_max=tree_depth_max,
            calibrate=self._calibrate,
        )
        self.stop_ids = spec.stop_ids | (frozenset() if spec.ignore_eos else eos_ids)
        self._vocabulary_size = vocabulary_size
        self._own_text = OwnText(self.log.tokens) if own_guesses else None
        self._calibrations = calibrations or Calibrations()
        self._calibration_of: dict[int, SessionCalibration] = {}
        self._verify_steps = 0
        self._verified: Counter[int] = Counter()
        self._received = 0
        self._passing_over: dict[int, int] = {}
        self._unread: Counter[str] = Counter()
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
        first = None
        if draft is not None:
            self._received += len(draft.tokens)
            first = self._looked_at(draft, source)
        fault = self._fault(draft, first)
        if draft is None or fault is not None:
            self._dropped_drafts[fault or "malformed"] += 1
            return
        if first is not None and first < len(draft.tokens):
            self._dropped_nodes["hopeless"] += len(draft.tokens) - first
            draft = Draft(
                draft.epoch,
                draft.base_length,
                draft.base_digest,
                draft.tokens[:first],
                draft.parents[:first],
                draft.accept_logprobs[:first],
            )
        merge = self.tree.merge(draft, self.log.since(draft.base_length), source)
        for reason in ("decided", "off_path", "too_deep", "evicted"):
            count = getattr(merge, reason)
            if count:
                self._dropped_nodes[reason] += count
        self._learn(merge.shadow)
        if first is not None and self._calibration(source).hopeless:
            rows = self._calibrations.rows
            self._passing_over[source] = max(_PASSED_OVER_MIN, _PASSED_OVER_PER_ROW * rows - 1)

    def guess(self) -> None:
        """Guess from the session's own text what comes next; see `own_text`.

        As far as guesses can pay; one at least, which shows what they would be worth.
        """
        if self._own_text is None or self.tree.size + _OWN_GUESSES_MAX > self.tree.nodes_max:
            return
        calibration = self._calibration(OWN_TEXT_SOURCE)
        least = math.log(max(WORTH_MIN, min(1.0, self._calibrations.pay_min)))
        for match, tokens in self._own_text.continuations():
            node, path_logprob = self.tree.root, 0.0
            for depth, token in zip(range(_OWN_GUESSES_MAX), tokens, strict=False):
                claim = claim_logprob(match + depth)
                path_logprob += calibration.apply(claim)
                if depth and path_logprob < least:
                    break
                added = self.tree.add(node, token, claim, OWN_TEXT_SOURCE)
                if added is None:
                    break
                node = added

    def passes_over(self, source: int) -> bool:
        """Asked before a draft is read: True if it shall be dropped as it is.

        Called from the thread that receives drafts, at any time: it touches nothing else.
        """
        left = self._passing_over.get(source, 0)
        if not left or self._calibration_of[source].hopeful:
            return False
        self._passing_over[source] = left - 1
        self.drop_unread("hopeless")
        return True

    def drop_unread(self, reason: str) -> None:
        """Count a draft that will not be read; called from the thread that receives drafts."""
        self._unread[reason] += 1

    def _looked_at(self, draft: Draft, source: int) -> int | None:
        """How many nodes of a draft to look at: a few if none can pay, else all (None)."""
        needed = max(WORTH_MIN, 0.9 * self._calibrations.pay_min)
        calibration = self._calibration(source)
        if math.exp(calibration.apply(0.0)) < needed:
            return _HOPELESS_NODES_MAX
        # A path is no more probable than its last edge. Negated, since the claim may be NaN.
        surest = min(0.0, max(draft.accept_logprobs, default=0.0))
        return None if math.exp(calibration.apply(surest)) >= needed else _HOPELESS_NODES_MAX

    def _calibration(self, source: int) -> SessionCalibration:
        calibration = self._calibration_of.get(source)
        if calibration is None:
            calibration = self._calibrations.of_session(self.connection, source)
            self._calibration_of[source] = calibration
        return calibration

    def _calibrate(self, source: int, claim_logprob: float) -> float:
        # Asked of each node whenever nodes are ranked: nearly always of a source that is known.
        calibration = self._calibration_of.get(source) or self._calibration(source)
        return calibration.apply(claim_logprob)

    def _fault(self, draft: Draft | None, first: int | None) -> str | None:
        if draft is None:
            return "malformed"
        if draft.epoch != self.spec.epoch:
            return "epoch"
        fault = draft_fault(draft, self._vocabulary_size, self.tree.nodes_max, first=first)
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
        self._verified.update([node.owner for node in nodes])
        for node in accepted:
            self._accepted[node.owner] += 1
        sources = [node.owner for node in accepted[: len(verdict.tokens)]]
        sources += [TARGET_SOURCE] * (len(verdict.tokens) - len(sources))
        self.log.append(verdict.tokens)
        advance = self.tree.advance(verdict.tokens)
        if advance.dropped:
            self._dropped_nodes["missed"] += advance.dropped
        self._learn(advance.shadow)
        return tuple(sources)

    def _learn(self, scores: Iterable[ShadowScore]) -> None:
        for score in scores:
            self._calibration(score.source).observe(score.claimed_logprob, score.accepted)
            if score.accepted:
                self._passing_over.pop(score.source, None)

    def counters(self) -> SpeculationCounters:
        """A snapshot."""
        return SpeculationCounters(
            verify_steps=self._verify_steps,
            verified_draft_tokens=self._verified.total(),
            accepted_draft_tokens=sum(self._accepted.values()),
            received_draft_tokens=self._received,
            dropped_drafts=dict(self._dropped_drafts + self._unread),
            dropped_nodes=dict(self._dropped_nodes),
            accepted_by_source=dict(self._accepted),
            verified_by_source=dict(self._verified),
        )
