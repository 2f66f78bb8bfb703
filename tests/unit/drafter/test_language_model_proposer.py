"""The language-model proposer with tiny random models: its guesses, and that its KV is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter_service.mirror import Mirror
from drafter_service.proposers.language_model import LanguageModelProposer
from outrider.domain import BindSpec, Commit, DraftBudget, ModelInfo, SamplingParams
from outrider.draft_tree import Node, draft_fault
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.model.kv_cache import KvPool, SessionCache
from outrider.model.language_model import LanguageModel, Row
from outrider.model.loading import load_language_model
from outrider.model.sampling import sample_nodes

TOLERANCE = 1e-4
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.0)
FILTERED = SamplingParams(temperature=0.9, top_k=20, top_p=0.9)
PROMPT = tuple(b"The quick brown fox")


def load(spec: str) -> LanguageModel:
    return load_language_model(spec, dtype="float32", device="cpu", cache_dir=Path("/nonexistent"))


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads of tiny operators wait for each other, and for other tests' threads even longer."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return load("random:tiny?seed=1")


class Watched:
    """A model that remembers the caches it made and the tokens it computed."""

    def __init__(self, model: LanguageModel) -> None:
        self._model = model
        self.caches: list[SessionCache] = []
        self.passes: list[list[int]] = []
        """Tokens of each row, pass by pass."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def new_pool(self, tokens_max: int | None = None) -> KvPool:
        pool = self._model.new_pool(tokens_max)
        make = pool.new_cache

        def remember(salt: str | None = None) -> SessionCache:
            self.caches.append(make(salt))
            return self.caches[-1]

        pool.new_cache = remember  # type: ignore[method-assign]
        return pool

    def forward(self, rows: Sequence[Row], meanwhile: Callable[[], None] | None = None) -> Any:
        self.passes.append([len(row.tokens) for row in rows])
        return self._model.forward(rows, meanwhile)


def proposer_of(model: Any, **options: Any) -> LanguageModelProposer:
    info = ModelInfo("draft", "f", "t", model.vocabulary_size, model.length_max, "float32")
    # Claims as the model makes them, so that they can be compared.
    return LanguageModelProposer(model, info, **{"learning": False, **options})


def test_a_text_that_begins_alike_is_computed_from_where_it_differs(model: LanguageModel) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched)
    prompt = tuple(range(40, 40 + 3 * BLOCK_TOKENS + 5))
    first = opened(proposer, spec_of(GREEDY, prompt=prompt))
    grow_out(proposer, first)
    expected = estimates(first)
    proposer.close(first)
    for salt, computed in (("", 5), ("tenant", len(prompt))):
        watched.passes.clear()
        spec = replace(spec_of(GREEDY, prompt=prompt, session=2), cache_salt=salt)
        again = opened(proposer, spec)
        grow_out(proposer, again)
        assert watched.passes[0] == [computed]
        found = estimates(again)
        assert found.keys() == expected.keys()
        assert all(abs(found[path] - expected[path]) < TOLERANCE for path in found)
        proposer.close(again)
    assert proposer.blocks.used == 0


def spec_of(
    sampling: SamplingParams,
    *,
    seed: int = 11,
    prompt: tuple[int, ...] = PROMPT,
    committed: tuple[int, ...] = (),
    session: int = 1,
    nodes_max: int = 60,
    depth_max: int = 12,
    vocabulary_size: int = 260,
    probability_min: float = 0.0,
) -> BindSpec:
    budget = DraftBudget(nodes_max, depth_max, 0.0, probability_min=probability_min)
    return BindSpec(session, 1, 1, prompt, committed, sampling, seed, "t", vocabulary_size, budget)


def opened(proposer: LanguageModelProposer, spec: BindSpec) -> Mirror:
    mirror = Mirror(1, spec)
    proposer.open(mirror)
    return mirror


def grow_out(proposer: LanguageModelProposer, *mirrors: Mirror) -> int:
    """Grow until the budget is used up; returns the number of steps."""
    for step in range(500):
        if not proposer.grow(mirrors):
            return step
    raise AssertionError("growth does not end")


def test_other_work_is_done_once_a_step_before_its_guesses_are_attached(
    model: LanguageModel,
) -> None:
    proposer = proposer_of(model)
    mirror = opened(proposer, spec_of(GREEDY))
    sizes: list[int] = []
    assert proposer.overlap(lambda: sizes.append(mirror.tree.size))
    grown: list[int] = []
    while proposer.grow([mirror]):
        grown.append(mirror.tree.size)
    assert len(grown) > 2
    assert sizes == [0, *grown[:-1]]


def follow(proposer: LanguageModelProposer, mirror: Mirror, *tokens: int) -> int:
    """Commit; returns how many guesses were right."""
    news = mirror.apply(Commit(1, len(mirror.log), tokens))
    assert news is not None
    proposer.advanced(mirror, *news)
    return len(news[1].matched)


def continuation(model: LanguageModel, spec: BindSpec, count: int) -> list[int]:
    """The target's own text, computed without any cache to get wrong."""
    tokens = [*spec.prompt, *spec.committed]
    for _ in range(count):
        cache = model.new_cache()
        logits = model.forward([Row(cache, tokens, None, [len(tokens) - 1])])
        tokens += sample_nodes(logits, [spec.sampling], [spec.seed], [len(tokens)])
        cache.release()
    return tokens[-count:]


def estimates(mirror: Mirror) -> dict[tuple[int, ...], float]:
    found: dict[tuple[int, ...], float] = {}
    stack: list[tuple[tuple[int, ...], Node]] = [((), mirror.tree.root)]
    while stack:
        path, node = stack.pop()
        for token, child in node.children.items():
            found[*path, token] = child.accept_logprob
            stack.append(((*path, token), child))
    return found


def depth_along(mirror: Mirror, text: Sequence[int]) -> int:
    """How many tokens of the text the tree has, from the tip on."""
    node = mirror.tree.root
    for depth, token in enumerate(text):
        if token not in node.children:
            return depth
        node = node.children[token]
    return len(text)


SAMPLINGS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED, FILTERED], ids=str)

# --- the guesses ------------------------------------------------------------------------------


@SAMPLINGS
def test_a_chain_of_the_targets_own_model_is_the_targets_text(
    model: LanguageModel, sampling: SamplingParams
) -> None:
    proposer = proposer_of(model, width=1, leaves_max=1)
    spec = spec_of(sampling)
    mirror = opened(proposer, spec)
    assert grow_out(proposer, mirror) == 12
    text = continuation(model, spec, 12)
    assert [node.token for node in mirror.tree.best(12)] == text


@SAMPLINGS
def test_the_tree_of_the_targets_own_model_has_the_targets_path(
    model: LanguageModel, sampling: SamplingParams
) -> None:
    spec = spec_of(sampling)
    proposer = proposer_of(model)
    mirror = opened(proposer, spec)
    grow_out(proposer, mirror)
    text = continuation(model, spec, 24)
    depth = depth_along(mirror, text)
    assert depth >= 4
    # It rides ahead of commits: whatever they accept, the path below is there or grows again.
    while len(mirror.log) + depth < len(PROMPT) + 20:
        done = len(mirror.log) - len(PROMPT)
        assert follow(proposer, mirror, *text[done : done + 2]) == 2
        grow_out(proposer, mirror)
        depth = depth_along(mirror, text[done + 2 :])
        assert depth >= 4


def test_another_seed_is_another_text(model: LanguageModel) -> None:
    proposer = proposer_of(model)
    mirror = opened(proposer, spec_of(SAMPLED, seed=11))
    grow_out(proposer, mirror)
    others = [continuation(model, spec_of(SAMPLED, seed=seed), 4) for seed in range(20, 26)]
    assert any(depth_along(mirror, text) < 4 for text in others)


def test_estimates_are_probabilities_best_first(model: LanguageModel) -> None:
    for sampling in (GREEDY, SAMPLED):
        proposer = proposer_of(model)
        mirror = opened(proposer, spec_of(sampling))
        grow_out(proposer, mirror)
        for node in (mirror.tree.root, *mirror.tree):
            edges = [child.accept_logprob for child in node.children.values()]
            assert edges == sorted(edges, reverse=True)
            assert sum(map(math.exp, edges)) <= 1 + TOLERANCE


def test_drafts_pass_the_verifiers_checks(model: LanguageModel) -> None:
    proposer = proposer_of(model)
    mirror = opened(proposer, spec_of(SAMPLED, nodes_max=40))
    while proposer.grow([mirror]):
        draft = mirror.take_draft()
        assert draft is not None
        assert draft_fault(draft, 260, 40) is None


# --- its KV -----------------------------------------------------------------------------------


@SAMPLINGS
def test_estimates_stay_right_through_hits_and_misses(
    model: LanguageModel, sampling: SamplingParams
) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched)
    spec = spec_of(sampling)
    mirror = opened(proposer, spec)
    text = continuation(model, spec, 5)
    first = [[text[0]], text[1:4], [*text[4:5], 7, 9], [200], [201, 202, 203]]
    hits = []
    for turn, tokens in enumerate(first * 2):
        # Now before anything is known, now in the middle of growth, now after it.
        for _ in range((0, 2, 5, 99)[turn % 4]):
            if not proposer.grow([mirror]):
                break
        hits.append(follow(proposer, mirror, *tokens))
        proposer.grow([mirror])
        assert assert_like_new(model, mirror) > 0
    grow_out(proposer, mirror)
    assert assert_like_new(model, mirror) >= 20
    assert 0 in hits
    assert max(hits) >= 2
    (cache,) = watched.caches
    assert cache.prefix_length == len(mirror.log)


def assert_like_new(model: LanguageModel, mirror: Mirror) -> int:
    """Compare with a fresh mirror of the same text; returns how many nodes both have."""
    proposer = proposer_of(model)
    new = replace(mirror.spec, committed=tuple(mirror.log.tokens[len(mirror.spec.prompt) :]))
    fresh = opened(proposer, replace(new, budget=DraftBudget(24, 12, 0.0)))
    grow_out(proposer, fresh)
    ours, theirs = estimates(mirror), estimates(fresh)
    shared = ours.keys() & theirs.keys()
    for path in shared:
        assert ours[path] == pytest.approx(theirs[path], abs=TOLERANCE), path
    proposer.close(fresh)
    return len(shared)


def test_what_survives_a_commit_is_not_computed_again(model: LanguageModel) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched)
    spec = spec_of(GREEDY, nodes_max=60)
    mirror = opened(proposer, spec)
    grow_out(proposer, mirror)
    text = continuation(model, spec, 2)
    (cache,) = watched.caches
    slots = cache.tree_size
    before = len(watched.passes)
    assert follow(proposer, mirror, *text) == 2
    survivors = [node for node in mirror.tree if node.children]
    assert cache.prefix_length == len(mirror.log)
    assert len(survivors) <= cache.tree_size < slots
    grow_out(proposer, mirror)
    computed = sum(sum(rows) for rows in watched.passes[before:])
    # Each node is computed once at most, and what was there is not computed at all.
    assert computed + len(survivors) <= mirror.tree.size
    # A miss costs the committed tokens alone.
    before = len(watched.passes)
    assert follow(proposer, mirror, 255, 254, 253) == 0
    proposer.grow([mirror])
    assert watched.passes[before:] == [[3]]


def test_sessions_in_one_batch_do_not_disturb_each_other(model: LanguageModel) -> None:
    specs = [
        spec_of(GREEDY, session=1, nodes_max=40),
        spec_of(SAMPLED, session=2, nodes_max=20, prompt=(*PROMPT, 1, 2, 3)),
        spec_of(FILTERED, session=3, nodes_max=30, prompt=(5,), committed=(6, 7)),
    ]
    together = proposer_of(model, prefill_tokens_max=8)
    mirrors = [opened(together, spec) for spec in specs]
    grow_out(together, *mirrors)
    for spec, mirror in zip(specs, mirrors, strict=True):
        alone = proposer_of(model)
        single = opened(alone, spec)
        grow_out(alone, single)
        ours, theirs = estimates(mirror), estimates(single)
        shared = ours.keys() & theirs.keys()
        assert len(shared) >= spec.budget.nodes_max * 0.8
        for path in shared:
            assert ours[path] == pytest.approx(theirs[path], abs=TOLERANCE), path


def test_a_long_prompt_is_computed_in_pieces(model: LanguageModel) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched, prefill_tokens_max=8)
    mirrors = [opened(proposer, spec_of(GREEDY, session=n, nodes_max=3)) for n in (1, 2)]
    for _ in range(4):
        assert proposer.grow(mirrors)
        assert mirrors[1].tree.size == 0
    grow_out(proposer, *mirrors)
    # 19 tokens each, 8 a step, first come first served.
    assert watched.passes == [[8], [8], [3, 5], [8], [6]]
    assert [mirror.tree.size for mirror in mirrors] == [3, 3]
    assert estimates(mirrors[0]) == pytest.approx(estimates(mirrors[1]), abs=TOLERANCE)


def test_a_closed_session_gives_its_memory_back(model: LanguageModel) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched)
    mirror = opened(proposer, spec_of(GREEDY))
    proposer.grow([mirror])
    (cache,) = watched.caches
    used = cache.pool.tokens_used
    assert len(cache.blocks) > 0
    blocks = len(cache.blocks)
    proposer.close(mirror)
    assert cache.pool.tokens_used == used - blocks * BLOCK_TOKENS
    with pytest.raises(RuntimeError, match="released"):
        cache.reserve(1)
    proposer.close(mirror)
    assert proposer.grow([]) is False


# --- bounds -----------------------------------------------------------------------------------


@pytest.mark.parametrize("nodes_max", [1, 2, 3, 4, 10, 25])
def test_the_budget_holds_and_no_branch_is_left_barren(
    model: LanguageModel, nodes_max: int
) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched)
    mirror = opened(proposer, spec_of(GREEDY, nodes_max=nodes_max))
    grow_out(proposer, mirror)
    assert mirror.tree.size == nodes_max
    # What was computed has children: a barren node would be a dead end after the next commits.
    parents = sum(1 for node in mirror.tree if node.children)
    assert watched.caches[0].tree_size == parents


def test_the_depth_is_bounded(model: LanguageModel) -> None:
    proposer = proposer_of(model)
    mirror = opened(proposer, spec_of(GREEDY, depth_max=2))
    grow_out(proposer, mirror)
    assert max(len(path) for path in estimates(mirror)) == 2
    # Up to three children each, and all of those expanded.
    assert mirror.tree.size == 3 + 9


def test_improbable_branches_are_not_followed(model: LanguageModel) -> None:
    proposer = proposer_of(model)
    mirror = opened(proposer, spec_of(GREEDY, probability_min=0.1))
    grow_out(proposer, mirror)
    for path_logprob, node in mirror.tree.ranked():
        assert bool(node.children) == (path_logprob >= math.log(0.1))


def test_only_as_many_leaves_as_a_step_may_have(model: LanguageModel) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched, leaves_max=5)
    mirrors = [opened(proposer, spec_of(GREEDY, session=n)) for n in (1, 2)]
    grow_out(proposer, *mirrors)
    assert max(sum(rows) for rows in watched.passes[1:]) == 5


def test_the_most_probable_leaf_of_all_sessions_goes_first(model: LanguageModel) -> None:
    proposer = proposer_of(model, leaves_max=1)
    unsure = opened(proposer, spec_of(GREEDY, session=1))
    sure = opened(proposer, spec_of(SamplingParams(top_k=1), session=2))
    for _ in range(6):
        assert proposer.grow([unsure, sure])
    assert (unsure.tree.size, sure.tree.size) == (3, 6)


def test_where_filters_leave_one_token_there_is_one_guess(model: LanguageModel) -> None:
    proposer = proposer_of(model)
    spec = spec_of(SamplingParams(temperature=1.0, top_k=1), depth_max=6)
    mirror = opened(proposer, spec)
    grow_out(proposer, mirror)
    assert [node.token for node in mirror.tree.best(9)] == continuation(model, spec, 6)
    assert mirror.tree.size == 6


def test_ids_that_the_target_does_not_know_are_not_guessed(model: LanguageModel) -> None:
    proposer = proposer_of(model)
    mirror = opened(proposer, spec_of(GREEDY, vocabulary_size=128))
    grow_out(proposer, mirror)
    assert mirror.tree.size > 0
    assert all(node.token < 128 for node in mirror.tree)


@pytest.fixture(scope="module")
def short() -> LanguageModel:
    return load("random:tiny?seed=1&length_max=24")


def test_guesses_end_where_the_models_text_ends(short: LanguageModel) -> None:
    proposer = proposer_of(short, width=1)
    mirror = opened(proposer, spec_of(GREEDY))
    grow_out(proposer, mirror)
    assert len(PROMPT) == 19
    assert [node.position for node in mirror.tree.best(99)] == [19, 20, 21, 22, 23]
    longer = opened(proposer, spec_of(GREEDY, session=2, prompt=tuple(range(40))))
    full = opened(proposer, spec_of(GREEDY, session=3, prompt=tuple(range(24))))
    assert proposer.grow([longer, full]) is False


def test_near_the_end_of_the_models_text_a_miss_begins_a_new_tree(short: LanguageModel) -> None:
    proposer = proposer_of(short, leaves_max=2)
    mirror = opened(proposer, spec_of(GREEDY))
    for _ in range(3):
        assert proposer.grow([mirror])
    # Where guesses end stays the same, but none of those waiting for their turn lives on.
    assert follow(proposer, mirror, 200) == 0
    grow_out(proposer, mirror)
    assert assert_like_new(short, mirror) >= 20


def test_kv_lost_to_another_session_is_computed_again(model: LanguageModel) -> None:
    watched = Watched(model)
    proposer = proposer_of(watched, kv_tokens_max=64)
    first, second = (opened(proposer, spec_of(GREEDY, session=n)) for n in (1, 2))
    grow_out(proposer, first)
    grow_out(proposer, second)
    assert (watched.caches[0].prefix_length, watched.caches[0].tree_size) == (0, 0)
    first.set_budget(DraftBudget(90, 12, 0.0, probability_min=0.0))
    grow_out(proposer, first)
    assert first.tree.size == 90
    assert watched.caches[0].tree_size == sum(1 for node in first.tree if node.children)
    assert assert_like_new(model, first) >= 20
