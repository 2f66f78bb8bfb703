"""Whether greedy answers are the same with speculation: in float32 a promise, counted here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.spec.questions import Question
from outrider.client import Client, Completion, Request

TIE = 1e-3
"""Two best logits within this of each other are a tie, which the numerics of batch shape decide."""
_ALTERNATIVES = 5


@dataclass(frozen=True, slots=True)
class Difference:
    """A turn whose speculated answer is another one."""

    question_id: int
    turn: int
    position: int
    """Of the first output token that differs."""
    margin: float | None
    """By how much the target preferred its own token there; None if it was not the best two."""

    @property
    def tie(self) -> bool:
        """The target had no preference that float32 could tell."""
        return self.margin is not None and self.margin <= TIE


@dataclass(frozen=True, slots=True)
class Identity:
    """How many questions were answered alike, in all their turns."""

    dtype: str
    tokens_max: int
    questions: int
    identical: int
    differences: tuple[Difference, ...]

    def __str__(self) -> str:
        return f"{self.identical}/{self.questions}"


class IdentityStore:
    """A file with a line a question, so that a run can be gone on with."""

    def __init__(self, path: Path, *, fresh: bool = False) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh:
            path.unlink(missing_ok=True)

    def read(self, dtype: str, tokens_max: int) -> dict[int, tuple[Difference, ...]]:
        """Differences by question, of those measured under this setting."""
        if not self._path.exists():
            return {}
        text = self._path.read_text()
        whole = text[: text.rfind("\n") + 1]
        if whole != text:
            self._path.write_text(whole)
        lines = [json.loads(line) for line in whole.splitlines()]
        return {
            line["question_id"]: tuple(Difference(**entry) for entry in line["differences"])
            for line in lines
            if (line["dtype"], line["tokens_max"]) == (dtype, tokens_max)
        }

    def append(
        self, question_id: int, differences: Sequence[Difference], dtype: str, tokens_max: int
    ) -> None:
        """Add a question."""
        line = {
            "question_id": question_id,
            "dtype": dtype,
            "tokens_max": tokens_max,
            "differences": [asdict(difference) for difference in differences],
        }
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def summed(
    found: dict[int, tuple[Difference, ...]],
    questions: Sequence[Question],
    dtype: str,
    tokens_max: int,
) -> Identity:
    """Count over those of the questions that were asked."""
    asked = [question.question_id for question in questions if question.question_id in found]
    differences = [difference for name in asked for difference in found[name]]
    return Identity(
        dtype,
        tokens_max,
        len(asked),
        sum(not found[name] for name in asked),
        tuple(differences),
    )


def compare_answers(
    client: Client, questions: Sequence[Question], tokens_max: int, at_once: int
) -> Iterator[tuple[Question, tuple[Difference, ...]]]:
    """Answer questions with and without speculation, several at once, and tell where they differ.

    Speed is not measured here, so prompts are shared. Raises `OutriderError`.
    """
    todo = iter(questions)
    running: dict[Future[tuple[Difference, ...]], Question] = {}
    with ThreadPoolExecutor(at_once) as pool:
        while True:
            while len(running) < at_once and (question := next(todo, None)) is not None:
                running[pool.submit(_compare, client, question, tokens_max)] = question
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


def _compare(client: Client, question: Question, tokens_max: int) -> tuple[Difference, ...]:
    differences = []
    chat: list[tuple[str, str]] = []
    for turn, text in enumerate(question.turns):
        chat.append(("user", text))
        request = Request(
            chat=tuple(chat), temperature=0.0, tokens_max=tokens_max, speculation=False
        )
        plain = client.complete(request)
        speculated = client.complete(replace(request, speculation=True))
        if plain.token_ids != speculated.token_ids:
            scored = client.complete(replace(request, logprobs=_ALTERNATIVES))
            differences.append(_difference(question.question_id, turn, plain, speculated, scored))
        chat.append(("assistant", plain.text))
    return tuple(differences)


def _difference(
    question_id: int, turn: int, plain: Completion, speculated: Completion, scored: Completion
) -> Difference:
    pairs = zip(plain.token_ids, speculated.token_ids, strict=False)
    position = next((at for at, (a, b) in enumerate(pairs) if a != b), -1)
    margin = None
    if 0 <= position < len(scored.logprobs):
        best = dict(scored.logprobs[position].top)
        own = best.get(plain.token_ids[position])
        other = best.get(speculated.token_ids[position])
        margin = None if own is None or other is None else abs(own - other)
    return Difference(question_id, turn, position, margin)


def run_with(
    store: IdentityStore,
    client: Client,
    questions: Sequence[Question],
    dtype: str,
    tokens_max: int,
    at_once: int,
    advance: Callable[[], None],
) -> None:
    """Ask about the questions that the store does not have yet."""
    found = store.read(dtype, tokens_max)
    todo = [question for question in questions if question.question_id not in found]
    for question, differences in compare_answers(client, todo, tokens_max, at_once):
        store.append(question.question_id, differences, dtype, tokens_max)
        advance()
