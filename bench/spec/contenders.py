"""Who answers: Outrider through its client library, and other engines in processes of their own."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from bench.peers.process import Peer
from bench.spec.answers import Turn, lengths_of_sources, lengths_of_times
from outrider.client import Client, Collector, Delta, Request

Conversation = Sequence[tuple[str, str]]
"""(role, content), oldest first."""

BASELINE = "target-only"
_TIMEOUT_S = 900.0


class Contender(Protocol):
    """Somebody who can go on with a conversation."""

    @property
    def name(self) -> str:
        """What tables and files call it."""

    def answer(
        self, conversation: Conversation, tokens_max: int, temperature: float, seed: int, salt: str
    ) -> Turn:
        """Answer the last message. Raises `OutriderError` or `PeerError`.

        Prompts are shared only within a salt, by contenders that share them at all.
        """


class Ours:
    """A fleet behind an orchestrator."""

    def __init__(self, name: str, client: Client, *, speculation: bool, model: str = "") -> None:
        self.name = name
        self._client = client
        self._speculation = speculation
        self._model = model

    def answer(
        self, conversation: Conversation, tokens_max: int, temperature: float, seed: int, salt: str
    ) -> Turn:
        """As `Contender` says; times are the client's, transport included."""
        request = Request(
            chat=conversation,
            model=self._model,
            temperature=temperature,
            seed=seed,
            tokens_max=tokens_max,
            speculation=self._speculation,
            cache_salt=salt,
        )
        collector = Collector()
        first_s: float | None = None
        begun_s = time.perf_counter()
        for event in self._client.generate(request, timeout_s=_TIMEOUT_S):
            collector.add(event)
            if first_s is None and isinstance(event, Delta) and event.token_ids:
                first_s = time.perf_counter() - begun_s
        wall_s = time.perf_counter() - begun_s
        completion = collector.completion(0)
        return Turn(
            completion.text,
            completion.token_ids,
            completion.started.prompt_tokens,
            wall_s,
            wall_s if first_s is None else first_s,
            lengths_of_sources(completion.sources),
            completion.finished.speculation.verified_draft_tokens,
        )


class Layout(Protocol):
    """How the model sees a conversation; `orchestrator.text.TextCodec` is one."""

    def encode_chat(self, messages: Conversation) -> tuple[int, ...]:
        """Ids of a conversation, up to where the answer begins."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""


class Theirs:
    """A peer, which is handed the very ids that the orchestrator makes of a conversation."""

    def __init__(
        self, peer: Peer, layout: Layout, eos_ids: Sequence[int], settle: Callable[[], None]
    ) -> None:
        """`settle` waits until the threads of whoever computed before are at rest."""
        self._peer = peer
        self._layout = layout
        self._eos_ids = tuple(eos_ids)
        self._settle = settle

    @property
    def name(self) -> str:
        """The peer's."""
        return self._peer.name

    def answer(
        self, conversation: Conversation, tokens_max: int, temperature: float, seed: int, salt: str
    ) -> Turn:
        """As `Contender` says; greedy only, and nothing is shared between prompts."""
        if temperature:
            raise ValueError("peers decode greedily")
        prompt = self._layout.encode_chat(conversation)
        try:
            run = self._peer.generate([prompt], tokens_max, self._eos_ids)
        finally:
            self._settle()
        times_s, ids = run.times_s[0], run.ids[0]
        return Turn(
            self._layout.decode([token for token in ids if token not in self._eos_ids]),
            ids,
            len(prompt),
            times_s[-1],
            times_s[0],
            lengths_of_times(times_s),
        )
