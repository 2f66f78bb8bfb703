"""Cascade: cheap proposers first, dear ones only where these are silent or unsure.

Staged speculation (Spector and Re, 2023, arXiv 2308.04623) and the vertical part of cascade
drafting (Chen et al., 2023, arXiv 2312.11462): what a cheap proposer guesses well enough need not
be guessed by a model. Here a session is handed on to the next stage as long as the guesses so far
promise less than `enough_tokens` accepted tokens, which they say themselves in claims that follow
what happened. All stages grow one tree: a model goes on below what a cheap stage guessed, and
computes several of its nodes in one pass.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from drafter_service.mirror import Mirror
from drafter_service.proposers.base import CandidateTaker, Overlapping, Proposer
from outrider.domain import Candidates, ModelInfo
from outrider.draft_tree import Advance
from outrider.errors import ConfigError

_RESERVED_SHARE = 0.5
"""Of a session's nodes, for the last stage: a cheap one could fill the tree with what is unsure."""


@dataclass(slots=True)
class _State:
    length: int = 0
    """Length of the committed tokens for which it was decided how far down a session goes."""
    stages: int = 0
    """So many have been asked for guesses."""
    done: bool = False
    """None of the others will be."""


class CascadeProposer:
    """Proposers in stages; what the first ones know, the later ones are not asked for."""

    def __init__(self, stages: Sequence[Proposer], *, enough_tokens: float) -> None:
        """`stages` from cheap to dear. Raises `ConfigError` if they do not fit each other."""
        self._stages = tuple(stages)
        self._enough_tokens = enough_tokens
        self._info = _joint_info([stage.info for stage in stages])
        self._states: dict[tuple[int, int], _State] = {}

    @property
    def info(self) -> ModelInfo:
        """The last stage's model, if it is one, under a name that tells all stages."""
        return self._info

    @property
    def leaves_max(self) -> int:
        """The dearest stage's."""
        return max(stage.leaves_max for stage in self._stages)

    def open(self, mirror: Mirror) -> None:
        """Open all stages: any of them may be asked."""
        self._states[mirror.key] = _State()
        for stage in self._stages:
            stage.open(mirror)

    def take(self, mirror: Mirror, candidates: Candidates) -> None:
        """Pass on what the target said."""
        for stage in self._stages:
            if isinstance(stage, CandidateTaker):
                stage.take(mirror, candidates)

    def overlap(self, work: Callable[[], None]) -> bool:
        """Have the stages that compute do `work`; see `Overlapping`."""
        return any(
            [isinstance(stage, Overlapping) and stage.overlap(work) for stage in self._stages]
        )

    def advanced(self, mirror: Mirror, tokens: Sequence[int], advance: Advance) -> None:
        """Tell all stages, the spared ones too."""
        for stage in self._stages:
            stage.advanced(mirror, tokens, advance)

    def close(self, mirror: Mirror) -> None:
        """Close all stages."""
        self._states.pop(mirror.key, None)
        for stage in self._stages:
            stage.close(mirror)

    def grow(self, mirrors: Sequence[Mirror]) -> bool:
        """Let each stage guess for the sessions that come down to it."""
        busy = False
        last = len(self._stages) - 1
        for index, stage in enumerate(self._stages):
            asked = [mirror for mirror in mirrors if self._reaches(mirror, index)]
            for mirror in asked:
                mirror.source = index + 1
                share = _RESERVED_SHARE if index < last else 0.0
                mirror.reserved = int(share * mirror.budget.nodes_max)
            busy |= bool(asked) and stage.grow(asked)
        return busy

    def _reaches(self, mirror: Mirror, index: int) -> bool:
        """Whether a session needs the guesses of a stage; decided once for each of its texts."""
        state = self._states[mirror.key]
        if state.length != len(mirror.log):
            state.length, state.stages, state.done = len(mirror.log), 0, False
        if index < state.stages:
            return True
        if state.done or (index and promised_tokens(mirror, index) >= self._enough_tokens):
            state.done = True
            return False
        state.stages = index + 1
        return True


def promised_tokens(mirror: Mirror, sources: int) -> float:
    """Tokens that guesses of the first `sources` stages will win, by their own account."""
    total = 0.0
    level = [(mirror.tree.root, 0.0)]
    for node, above in level:
        for child in node.children.values():
            claims = [claim for source, claim in child.claims.items() if source <= sources]
            if claims:
                path_logprob = above + max(claims)
                total += math.exp(path_logprob)
                level.append((child, path_logprob))
    return total


def _joint_info(infos: Sequence[ModelInfo]) -> ModelInfo:
    """Identity of stages that grow the same trees."""
    tokenizers = {info.tokenizer_fingerprint for info in infos} - {None}
    if len(tokenizers) > 1:
        named = "; ".join(
            f"{info.proposer} {info.model} has {info.tokenizer_fingerprint[:12]}"
            for info in infos
            if info.tokenizer_fingerprint is not None
        )
        raise ConfigError(f"the stages of a cascade have different tokenizers: {named}")
    name = "cascade:" + ",".join(info.proposer for info in infos)
    candidates = max(info.candidates for info in infos)
    tokenizer = next(iter(tokenizers), None)
    model = infos[-1]
    if model.length_max:
        # Whoever looks for warm KV looks for the model's.
        return replace(model, proposer=name, candidates=candidates)
    prints = ",".join(info.model_fingerprint for info in infos)
    return replace(
        model,
        model="+".join(info.model for info in infos),
        model_fingerprint=hashlib.sha256(prints.encode()).hexdigest(),
        tokenizer_fingerprint=tokenizer,
        vocabulary_size=0,
        proposer=name,
        candidates=candidates,
    )
