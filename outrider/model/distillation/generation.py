"""A target writes conversations: many at once, each step one token of each.

The pass is the verifier's own (`language_model`), and so is the rule by which tokens are chosen.
Which conversations there are is a function of the seed; an interrupted run goes on with the file
at which it was, and several processes share the work by taking files in turn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from outrider.domain import SamplingParams
from outrider.model.distillation.chat_frame import ChatFrame
from outrider.model.distillation.corpus import Conversation, Corpus
from outrider.model.distillation.openings import Openings
from outrider.model.kv_cache import SessionCache
from outrider.model.language_model import Row, TransformersModel
from outrider.model.sampling import sample_nodes

_GREEDY = SamplingParams(temperature=0.0)


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """How conversations are written."""

    seed: int = 0
    tokens_max: int = 1_000_000
    """Answer tokens in the corpus from which on it is complete."""
    answer_tokens_max: int = 160
    turn_tokens_max: int = 48
    """Of a user's turn that the target completes."""
    rows: int = 64
    """Conversations at a time."""
    file_conversations: int = 32
    turn_params: SamplingParams = field(
        default_factory=lambda: SamplingParams(temperature=0.9, top_p=0.95)
    )
    answer_params: SamplingParams = field(
        default_factory=lambda: SamplingParams(temperature=0.8, top_p=0.95)
    )
    """Of sampled answers; the others are greedy."""
    sampled_share: float = 0.15
    """Share of answers that are sampled."""
    process: int = 0
    """This process takes every `processes`-th file, from this one on."""
    processes: int = 1


@dataclass(slots=True)
class _Live:
    """A conversation that is being written."""

    number: int
    """Of its file."""
    place: int
    """Within it."""
    seed: int
    cache: SessionCache
    tokens: list[int]
    params: SamplingParams
    turn_end: int | None
    """Length at which the user's turn ends at the latest; None once the answer has begun."""
    answer_start: int = 0
    hidden: list[torch.Tensor] = field(default_factory=list)


class HeadInputs:
    """Context manager that keeps what a model's output head saw in the latest pass."""

    def __init__(self, model: TransformersModel) -> None:
        self._head: Any = model.module.get_output_embeddings()
        self._handle: Any = None
        self.latest = torch.empty(0)
        """[wanted, hidden]"""

    def __enter__(self) -> HeadInputs:
        self._handle = self._head.register_forward_pre_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, _: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.latest = inputs[0].reshape(-1, inputs[0].shape[-1])


class Writer:
    """Writes a corpus."""

    def __init__(
        self,
        model: TransformersModel,
        openings: Openings,
        corpus: Corpus,
        config: GenerationConfig,
    ) -> None:
        self._model = model
        self._openings = openings
        self._corpus = corpus
        self._config = config
        self._frame = ChatFrame(model.tokenizer_files)
        longest = 2 * (config.turn_tokens_max + config.answer_tokens_max) + 256
        self._pool = model.new_pool(config.rows * min(longest, model.length_max))
        self._live: list[_Live] = []
        self._done: dict[int, dict[int, Conversation]] = {}
        self._next = self._places()

    def run(self, progress: Callable[[int], None] | None = None) -> int:
        """Write until the corpus is complete; returns the tokens of its answers.

        `progress` hears of them whenever a file has been written.
        """
        total = self._corpus.answer_tokens()
        with HeadInputs(self._model) as head:
            while total < self._config.tokens_max:
                if self._step(head):
                    # Others may be writing too.
                    total = self._corpus.answer_tokens()
                    if progress is not None:
                        progress(total)
        for live in self._live:
            live.cache.release()
        self._live.clear()
        return total

    def _places(self) -> Iterator[tuple[int, int]]:
        """Numbers of files that are not there yet, with the places in them."""
        number = self._config.process
        while True:
            if not self._corpus.path(number).exists():
                for place in range(self._config.file_conversations):
                    yield number, place
            number += self._config.processes

    def _begin(self) -> _Live:
        number, place = next(self._next)
        config = self._config
        index = number * config.file_conversations + place
        opening = self._openings.opening(config.seed, index)
        digest = hashlib.sha256(f"{config.seed} {index}".encode()).digest()
        seed = int.from_bytes(digest[:8], "little")
        cache = self._pool.new_cache()
        room = self._model.length_max - config.answer_tokens_max - len(self._frame.after) - 1
        if not opening.complete:
            tokens = [*self._frame.before, *self._frame.encode(opening.text.rstrip())]
            end = min(len(tokens) + config.turn_tokens_max, room)
            if len(tokens) < end:
                return _Live(number, place, seed, cache, tokens, config.turn_params, end)
        tokens = self._frame.question(opening.text)[-room:]
        live = _Live(number, place, seed, cache, tokens, config.turn_params, None)
        self._begin_answer(live)
        return live

    def _begin_answer(self, live: _Live) -> None:
        live.turn_end = None
        live.answer_start = len(live.tokens)
        # Other bits of the seed than those that open the noise's first words would do as well.
        sampled = (live.seed >> 32) / 2.0**32 < self._config.sampled_share
        live.params = self._config.answer_params if sampled else _GREEDY

    def _step(self, head: HeadInputs) -> bool:
        """Add a token to each conversation; returns True if a file has been written."""
        while len(self._live) < self._config.rows:
            self._live.append(self._begin())
        rows = []
        for live in self._live:
            pending = live.tokens[live.cache.prefix_length :]
            rows.append(Row(live.cache, pending, None, [len(pending) - 1]))
        logits = self._model.forward(rows)
        chosen = sample_nodes(
            logits,
            [live.params for live in self._live],
            [live.seed for live in self._live],
            [len(live.tokens) for live in self._live],
        )
        hidden = head.latest.to(torch.float16).cpu()
        written = False
        for row, (live, token) in enumerate(zip(list(self._live), chosen, strict=True)):
            if live.turn_end is not None:
                self._extend_turn(live, token)
                continue
            live.hidden.append(hidden[row])
            live.tokens.append(token)
            length = len(live.tokens) - live.answer_start
            if token in self._model.eos_ids or length >= self._config.answer_tokens_max:
                written |= self._finish(live)
        return written

    def _extend_turn(self, live: _Live, token: int) -> None:
        """Go on with a user's turn; at its end comes the answer."""
        ended = token in self._model.eos_ids
        if not ended:
            live.tokens.append(token)
        if ended or len(live.tokens) >= (live.turn_end or 0):
            live.tokens += self._frame.after
            self._begin_answer(live)

    def _finish(self, live: _Live) -> bool:
        self._live.remove(live)
        live.cache.release()
        done = self._done.setdefault(live.number, {})
        done[live.place] = Conversation(
            torch.tensor(live.tokens, dtype=torch.int32),
            live.answer_start,
            torch.stack(live.hidden),
        )
        if len(done) < self._config.file_conversations:
            return False
        self._corpus.write(live.number, [done[place] for place in sorted(done)])
        del self._done[live.number]
        return True
