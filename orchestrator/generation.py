"""What is under way: a generation, and the sessions that are its choices. Plain state, no IO.

The driver owns all of it. A generation has one mailbox, so that its client reads one stream
whatever the number of its choices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from orchestrator.engagement import Engagement
from orchestrator.journaling import Record
from orchestrator.messages import Deliver, DeliverPrompt, Finish
from orchestrator.prediction import Follower
from orchestrator.prefix_memory import Prefix
from orchestrator.session import Session, State
from orchestrator.tracing import SessionTrace
from outrider.domain import Commit, DraftBudget, KvPeer, ModelInfo
from outrider.errors import OutriderError
from outrider.serving.queues import Mailbox
from outrider.serving.telemetry import Span


class Delivery(NamedTuple):
    """More output of one choice; a named tuple as there is one for every commit."""

    choice: int
    deliver: Deliver


@dataclass(frozen=True, slots=True)
class PredictionUse:
    """What became of the client's predicted output, in tokens."""

    accepted: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Ending:
    """The end of one choice, with its times in seconds."""

    choice: int
    finish: Finish
    first_token_s: float
    total_s: float
    trace: bytes = b""
    """Timeline, if the request asked for one."""
    steps_by_accepted: tuple[int, ...] = ()
    """How many verify steps accepted 0, 1, 2, ... guesses."""
    predicted: PredictionUse = field(default_factory=lambda: PredictionUse(0, 0))
    proposers: Mapping[int, str] = field(default_factory=dict)
    """What guesses under each source number whose guesses were verified."""


Output: TypeAlias = DeliverPrompt | Delivery | Ending | OutriderError


@dataclass(slots=True, eq=False)
class Running:
    """One session under way: one choice of a generation."""

    generation: Generation
    choice: int
    session: Session
    heard_s: float
    """When the verifier was last heard of."""
    progress_s: float
    """When it last made progress."""
    first_token_s: float | None = None
    """From the generation's start."""
    bindings_made: int = 0
    budgets: dict[int, DraftBudget] = field(default_factory=dict)
    """What the drafters were told, by binding."""
    engagement: Engagement = field(default_factory=Engagement)
    prefix: Prefix = field(default_factory=Prefix)
    """What is known of who holds its prompt."""
    trace: SessionTrace | None = None
    """Timeline, if the request asked for one."""
    missing_tokens: int = 0
    """Of it, its verifier did not hold so many when it was chosen."""
    prefill_began_s: float | None = None
    """When its verifier took it; None: it has committed since."""
    kv_peer: KvPeer | None = None
    """Whom its verifier is told of when it is opened."""
    moved_s: float = -math.inf
    """When it was moved to where it would be served better."""
    homeless_s: float | None = None
    """Since when it has waited for a verifier that takes it over."""
    commit_bytes: bytes = b""
    """The commit under way, as it came."""
    candidates: bytes = b""
    """The target's, of the same step, if any drafter asked for them; as they came."""
    follower: Follower | None = None
    """Guesses from the client's predicted output, if there is one."""
    span: Span | None = None
    """Of its trace, if requests are traced."""
    asked_s: float = 0.0
    """When a verifier was last asked to take it."""
    end: str = "left"
    """How it ended: a finish reason, an error's kind, or that nobody wanted it any more."""
    steps_by_tokens: dict[int, int] = field(default_factory=dict)
    """Verify steps by the number of tokens that they committed."""

    def heard(self, now_s: float, commit_bytes: bytes, commit: Commit) -> None:
        """Take note of a commit that arrived."""
        self.heard_s, self.commit_bytes = now_s, commit_bytes
        if commit.tokens:
            self.progress_s = now_s
            self.homeless_s = None
            count = len(commit.tokens)
            self.steps_by_tokens[count] = self.steps_by_tokens.get(count, 0) + 1
            if self.first_token_s is None:
                self.first_token_s = now_s - self.generation.started_s

    @property
    def steps_by_accepted(self) -> tuple[int, ...]:
        """How many verify steps accepted 0, 1, 2, ... guesses."""
        most = max(self.steps_by_tokens, default=1)
        return tuple(self.steps_by_tokens.get(count, 0) for count in range(1, most + 1))

    @property
    def number(self) -> int:
        """The session's number."""
        return self.session.spec.session


def joined(batch: list[Output]) -> list[Output]:
    """Join the deliveries of each choice, so that a slow client gets fewer and larger messages.

    What a batch says of one choice stays in order; choices are independent of each other.
    """
    if len(batch) < 2:
        return batch
    result: list[Output] = []
    pieces: dict[int, list[Deliver]] = {}
    places: dict[int, int] = {}
    for output in batch:
        if isinstance(output, Delivery):
            if output.choice not in places:
                places[output.choice] = len(result)
                result.append(output)
            pieces.setdefault(output.choice, []).append(output.deliver)
        else:
            result.append(output)
    for choice, delivers in pieces.items():
        if len(delivers) > 1:
            result[places[choice]] = Delivery(choice, _concatenated(delivers))
    return result


def _concatenated(delivers: list[Deliver]) -> Deliver:
    chain = itertools.chain.from_iterable
    return Deliver(
        "".join([deliver.text for deliver in delivers]),
        tuple(chain(deliver.token_ids for deliver in delivers)),
        tuple(chain(deliver.sources for deliver in delivers)),
        tuple(chain(deliver.logprobs for deliver in delivers)),
    )


@dataclass(slots=True, eq=False)
class Generation:
    """One request under way. Iterate `outputs()`; call `Driver.abandon` when nobody listens."""

    info: ModelInfo
    started_s: float
    prompt_wanted: bool = False
    """The prompt's log-probabilities have yet to come; they come before any output."""
    id: str = ""
    """Names it in logs, and when it is resumed."""
    tenant: str = ""
    """Whose it is; empty: nobody's."""
    choices: list[Running] = field(default_factory=list)
    mailbox: Mailbox[Output] = field(default_factory=lambda: Mailbox(joined))
    finished: int = 0
    """Choices that have said all."""
    record: Record[Output] | None = None
    """Its journal, which output waits for; None: it has none."""
    left: bool = False
    """Nobody reads it any more."""
    held: list[Output] = field(default_factory=list)
    """Output of quicker choices that waits for the prompt's log-probabilities."""

    def say(self, output: DeliverPrompt | Delivery | Ending) -> None:
        """Pass output on to the client, by way of the journal if there is one."""
        if self.record is not None:
            self._note(self.record, output)
        elif isinstance(output, Delivery) and not self.prompt_wanted:
            # The hot path: nothing can have ended.
            self.mailbox.put(output)
            return
        if isinstance(output, DeliverPrompt):
            self.prompt_wanted = False
            self._say(output)
            for earlier in self.held:
                self._say(earlier)
            self.held.clear()
        else:
            self.replay(output)

    def replay(self, output: Delivery | Ending) -> None:
        """Pass on what is in the journal already."""
        if self.prompt_wanted:
            self.held.append(output)
        else:
            self._say(output)

    def _note(self, record: Record[Output], output: DeliverPrompt | Delivery | Ending) -> None:
        match output:
            case Delivery(choice, deliver) if deliver.token_ids:
                epoch = self.choices[choice].session.epoch
                record.note(choice, epoch, deliver.token_ids, deliver.logprobs)
            case Ending(choice, finish):
                record.note(choice, self.choices[choice].session.epoch, finish=finish.reason)

    def _say(self, output: Output) -> None:
        if self.record is None:
            self.put(output)
        else:
            self.record.say(output)

    def put(self, output: Output) -> None:
        """Hand output to the client at once; the last choice's ending closes the stream."""
        self.mailbox.put(output)
        self.finished += isinstance(output, Ending)
        if self.finished == len(self.choices):
            self.mailbox.close()
            self.forget()

    def close(self) -> None:
        """Close the stream of a generation whose client had heard all before it was resumed."""
        self.mailbox.close()
        self.forget()

    def forget(self) -> None:
        """Journal nothing more of it; what is journaled stays for a while."""
        if self.record is not None:
            self.record.end()

    def fail(self, error: OutriderError) -> None:
        """Close the stream with an error, which ends all choices; the first one counts."""
        self.forget()
        self.mailbox.put(error)
        self.mailbox.close()

    def unfinished(self) -> Iterator[Running]:
        """Choices whose sessions have not ended."""
        return (running for running in self.choices if running.session.state is not State.ENDED)

    async def take(self) -> list[Output]:
        """Wait for output and return what there is; empty after an error or the last Ending."""
        return joined(await self.mailbox.take())

    async def outputs(self) -> AsyncIterator[Output]:
        """Yield outputs as they come; ends after the last choice's Ending or an error."""
        while batch := await self.take():
            for output in batch:
                yield output
