"""Asks contenders the same questions in turn, and keeps what was answered."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from bench.peers.process import PeerError
from bench.spec.answers import Answer, AnswerStore, Turn
from bench.spec.contenders import BASELINE, Contender, Conversation
from bench.spec.questions import Question

_WARM_UP_TOKENS = 16
Job = tuple[int, Question, float]
"""Repeat, question, temperature."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked, in order."""

    questions: Sequence[Question]
    temperatures: Sequence[float]
    repeats: int
    tokens_max: int

    @property
    def jobs(self) -> list[Job]:
        """A repeat begins when all questions were asked; temperatures take turns."""
        return [
            (repeat, question, temperature)
            for repeat in range(self.repeats)
            for question in self.questions
            for temperature in self.temperatures
        ]


@dataclass(slots=True)
class Field:
    """The contenders, as long as they last. The baseline must be among them."""

    contenders: dict[str, Contender]
    greedy_only: frozenset[str]
    failed: Callable[[str, str], None]
    """Hears who is out of it and why."""
    warm_up_s: dict[str, float] = field(default_factory=dict)
    """What the first turn of the first question took, by contender, after one to warm up."""

    def at(self, temperature: float) -> list[str]:
        """Who answers at a temperature."""
        return [n for n in self.contenders if not temperature or n not in self.greedy_only]

    def ask(
        self, name: str, chat: Conversation, tokens_max: int, temperature: float, seed: int
    ) -> Turn | None:
        """Let a contender answer; None if it fails, which ends its part. Ours may not fail."""
        # A salt of its own: nobody may profit from a prompt that was computed before.
        salt = secrets.token_hex(8)
        try:
            return self.contenders[name].answer(chat, tokens_max, temperature, seed, salt)
        except PeerError as error:
            self.failed(name, str(error))
            del self.contenders[name]
            return None

    def warm_up(self, question: Question, tokens_max: int, advance: Callable[[str], None]) -> None:
        """Let everybody compile and allocate, and note how long an answer takes then."""
        for name in list(self.contenders):
            # The first, short one compiles and allocates.
            for tokens in (min(tokens_max, _WARM_UP_TOKENS), tokens_max):
                if name not in self.contenders:
                    break
                advance(name)
                begun_s = time.perf_counter()
                self.ask(name, [("user", question.turns[0])], tokens, 0.0, 0)
                self.warm_up_s[name] = time.perf_counter() - begun_s


def open_jobs(plan: Plan, contenders: Field, answers: Iterable[Answer]) -> list[Job]:
    """Leave out what all contenders have answered within one round."""
    rounds: dict[str, set[str]] = {}
    jobs: dict[str, tuple[int, int, float]] = {}
    for answer in answers:
        rounds.setdefault(answer.round, set()).add(answer.contender)
        jobs[answer.round] = (answer.repeat, answer.question_id, answer.temperature)
    done = {jobs[name] for name, had in rounds.items() if had >= set(contenders.at(jobs[name][2]))}
    return [job for job in plan.jobs if (job[0], job[1].question_id, job[2]) not in done]


def seconds_of(jobs: Sequence[Job], contenders: Field) -> float:
    """Estimate how long jobs take, from what a turn took when all was warm."""
    return sum(
        len(question.turns) * contenders.warm_up_s.get(name, 0.0)
        for _, question, temperature in jobs
        for name in contenders.at(temperature)
    )


def measure(
    jobs: Sequence[Job],
    tokens_max: int,
    contenders: Field,
    store: AnswerStore,
    advance: Callable[[str], None],
) -> Iterator[Job]:
    """Do the jobs one by one; yields each when its answers are in the store.

    Within a job the contenders answer turn by turn, whose turn it is to begin goes round, and all
    hear the baseline's answers as the conversation's past: so all have the same prompts, and
    whatever the machine does meanwhile it does to all. Raises `OutriderError`.
    """
    for number, job in enumerate(jobs):
        repeat, question, temperature = job
        turns = _ask_in_turn(number, job, tokens_max, contenders, advance)
        name = secrets.token_hex(6)
        now_s = time.time()
        store.append(
            Answer(
                question.question_id,
                question.category,
                contender,
                temperature,
                repeat,
                name,
                tuple(said),
                now_s,
            )
            for contender, said in turns.items()
            # Who failed on the way has no answer to the whole.
            if len(said) == len(question.turns)
        )
        yield job


def _ask_in_turn(
    number: int, job: Job, tokens_max: int, contenders: Field, advance: Callable[[str], None]
) -> dict[str, list[Turn]]:
    repeat, question, temperature = job
    seed = (repeat << 32) + question.question_id
    turns: dict[str, list[Turn]] = {name: [] for name in contenders.at(temperature)}
    chat: list[tuple[str, str]] = []
    for at, text in enumerate(question.turns):
        chat.append(("user", text))
        names = contenders.at(temperature)
        first = (number + at) % len(names)
        for name in names[first:] + names[:first]:
            advance(f"{question.sub_task} {question.question_id}, {name}")
            turn = contenders.ask(name, list(chat), tokens_max, temperature, seed)
            if turn is not None:
                turns[name].append(turn)
        chat.append(("assistant", turns[BASELINE][-1].text))
    return turns
