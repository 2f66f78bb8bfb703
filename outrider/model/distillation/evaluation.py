"""How often a drafter would be right: on the target's own greedy answers to given questions.

Counts what acceptance counts. *Agreement*: the drafter's first choice is the target's, at every
position of the answers. *tau*: tokens committed per verify step when the drafter grows the tree
that it would grow between two steps: a number of passes over its best leaves, each leaf given its
best children, all of it ready before the verifier looks (no network, no other sessions).
"""

from __future__ import annotations

import heapq
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from outrider.domain import SamplingParams
from outrider.model.distillation.chat_frame import ChatFrame
from outrider.model.distillation.drafting import DistilledModel
from outrider.model.distillation.openings import Prompt
from outrider.model.kv_cache import KvPool, SessionCache
from outrider.model.language_model import LanguageModel, Row, TransformersModel
from outrider.model.ranking import ranked_guesses

_GREEDY = SamplingParams(temperature=0.0)
_CHUNK = 256


@dataclass(frozen=True, slots=True)
class TreeShape:
    """The tree that a drafter has ready for a verify step."""

    passes: int = 5
    leaves: int = 8
    """Expanded in one pass."""
    width: int = 3
    """Children of a leaf."""
    nodes: int = 16
    """Verified in a step: the most probable ones."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A question with the target's greedy answer."""

    category: str
    question: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Score:
    """What was counted over some answers."""

    tokens: int = 0
    agreed: int = 0
    steps: int = 0
    committed: int = 0

    def plus(self, other: Score) -> Score:
        """Return the sum."""
        return Score(
            self.tokens + other.tokens,
            self.agreed + other.agreed,
            self.steps + other.steps,
            self.committed + other.committed,
        )

    @property
    def agreement(self) -> float:
        """Share of the answers' tokens that are the drafter's first choice."""
        return self.agreed / max(1, self.tokens)

    @property
    def tau(self) -> float:
        """Tokens committed per verify step."""
        return self.committed / max(1, self.steps)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Medians of steps that took turns."""

    draft_s: float
    """Of a draft step of one leaf."""
    verify_s: float
    """Of a verify step of one row without guesses."""

    @property
    def share(self) -> float:
        """What a draft step takes of a verify step."""
        return self.draft_s / self.verify_s


def step_times(
    target: LanguageModel, drafter: LanguageModel, answer: Answer, *, repeats: int = 32
) -> StepTimes:
    """Measure one row's steps of both at the end of an answer."""
    text = [*answer.question, *answer.answer]
    caches = []
    for model in (target, drafter):
        cache = model.new_pool(len(text) + repeats + 64).new_cache()
        model.forward([Row(cache, text[:-1], None, [len(text) - 2])])
        caches.append((model, cache))
    taken: list[list[float]] = [[], []]
    for _ in range(repeats):
        for (model, cache), times in zip(caches, taken, strict=True):
            begin_s = time.perf_counter()
            # A result on the host: on a GPU nothing has been computed before.
            model.forward([Row(cache, text[-1:], None, [0])]).argmax(-1).tolist()
            times.append(time.perf_counter() - begin_s)
    verify, draft = (statistics.median(times) for times in taken)
    return StepTimes(draft, verify)


def greedy_answers(
    target: TransformersModel,
    prompts: Sequence[Prompt],
    tokens_max: int,
    *,
    rows_max: int = 16,
    question_tokens_max: int = 1_024,
    progress: Callable[[int], None] | None = None,
) -> list[Answer]:
    """Let the target answer; `progress` hears how many answers are done."""
    frame = ChatFrame(target.tokenizer_files)
    answers: list[Answer] = []
    for begin in range(0, len(prompts), rows_max):
        some = prompts[begin : begin + rows_max]
        questions = [frame.question(prompt.text)[-question_tokens_max:] for prompt in some]
        longest = max(map(len, questions)) + tokens_max + 32
        pool = target.new_pool(len(some) * longest)
        caches = [pool.new_cache() for _ in some]
        texts = [list(question) for question in questions]
        live = list(range(len(some)))
        while live:
            rows = []
            for index in live:
                pending = texts[index][caches[index].prefix_length :]
                rows.append(Row(caches[index], pending, None, [len(pending) - 1]))
            for index, token in zip(
                list(live), target.forward(rows).argmax(-1).tolist(), strict=True
            ):
                texts[index].append(token)
                length = len(texts[index]) - len(questions[index])
                if token in target.eos_ids or length >= tokens_max:
                    live.remove(index)
        for prompt, question, text in zip(some, questions, texts, strict=True):
            answers.append(Answer(prompt.category, tuple(question), tuple(text[len(question) :])))
        if progress is not None:
            progress(len(answers))
    return answers


def score_answer(drafter: LanguageModel, answer: Answer, shape: TreeShape | None) -> Score:
    """Count one answer; without a `shape` only the first choices."""
    pool = drafter.new_pool(
        len(answer.question) + len(answer.answer) + 64 + (0 if shape is None else 512)
    )
    agreed = _agreed(drafter, pool, answer)
    if shape is None:
        return Score(len(answer.answer), agreed)
    steps = _verify_steps(drafter, pool, answer, shape)
    # The first token comes of the prompt's pass, which verifies nothing.
    return Score(len(answer.answer), agreed, steps, len(answer.answer) - 1)


def _agreed(drafter: LanguageModel, pool: KvPool, answer: Answer) -> int:
    tokens = [*answer.question, *answer.answer][:-1]
    first = len(answer.question) - 1
    cache = pool.new_cache()
    chosen: list[int] = []
    for begin in range(0, len(tokens), _CHUNK):
        chunk = tokens[begin : begin + _CHUNK]
        wanted = [place for place in range(len(chunk)) if begin + place >= first]
        logits = drafter.forward([Row(cache, chunk, None, wanted)])
        chosen += logits.argmax(-1).tolist()
    cache.release()
    return sum(ours == theirs for ours, theirs in zip(chosen, answer.answer, strict=True))


def _verify_steps(drafter: LanguageModel, pool: KvPool, answer: Answer, shape: TreeShape) -> int:
    """Return in how many verify steps the answer is committed, its first token being known."""
    text = [*answer.question, *answer.answer]
    length = len(answer.question) + 1
    cache = pool.new_cache()
    steps = 0
    while length < len(text):
        tree = _grown(drafter, cache, text[:length], shape)
        length += 1 + _accepted(tree, text[length:])
        steps += 1
    cache.release()
    return steps


@dataclass(slots=True)
class _Node:
    token: int
    logprob: float
    """Of the path."""
    parent: int
    """Index in the list of nodes; -1 for children of the tip."""
    slot: int = -1
    """In the cache, once it has been expanded."""


def _grown(
    drafter: LanguageModel, cache: SessionCache, text: Sequence[int], shape: TreeShape
) -> list[_Node]:
    """Return the most probable nodes of the tree below the end of a text."""
    cache.truncate(min(cache.prefix_length, len(text) - 1))
    nodes: list[_Node] = []
    leaves: list[tuple[float, int]] = []
    pending = list(text[cache.prefix_length :])
    row = Row(cache, pending, None, [len(pending) - 1])
    kept = drafter.kept if isinstance(drafter, DistilledModel) else None
    expanded = [-1]
    for number in range(shape.passes):
        logits = drafter.forward([row])
        count = len(expanded)
        zeros = [0] * count
        guesses = ranked_guesses(logits, [_GREEDY] * count, zeros, zeros, shape.width, kept)
        for parent, children in zip(expanded, guesses, strict=True):
            above = nodes[parent].logprob if parent >= 0 else 0.0
            for token, logprob in children:
                heapq.heappush(leaves, (-above - logprob, len(nodes)))
                nodes.append(_Node(token, above + logprob, parent))
        if number + 1 == shape.passes:
            break
        expanded = [heapq.heappop(leaves)[1] for _ in range(min(shape.leaves, len(leaves)))]
        parents = []
        for slot, index in enumerate(expanded, start=cache.tree_size):
            parent = nodes[index].parent
            parents.append(nodes[parent].slot if parent >= 0 else -1)
            nodes[index].slot = slot
        row = Row(cache, [nodes[index].token for index in expanded], parents, range(len(expanded)))
    return _best(nodes, shape.nodes)


def _best(nodes: Sequence[_Node], count: int) -> list[_Node]:
    """Return the most probable nodes, parents before children, with places in the new list."""
    # A child is never more probable than its parent, and comes after it.
    order = sorted(range(len(nodes)), key=lambda index: (-nodes[index].logprob, index))[:count]
    place = {index: number for number, index in enumerate(sorted(order))}
    return [
        _Node(nodes[index].token, nodes[index].logprob, place.get(nodes[index].parent, -1))
        for index in sorted(order)
    ]


def _accepted(tree: Sequence[_Node], following: Sequence[int]) -> int:
    """Return how many of the following tokens a path of the tree guesses."""
    at, accepted = -1, 0
    # The last token of an answer is committed by itself if need be.
    for token in following[:-1]:
        found = [i for i, node in enumerate(tree) if node.parent == at and node.token == token]
        if not found:
            break
        at, accepted = found[0], accepted + 1
    return accepted
