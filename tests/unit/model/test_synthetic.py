"""Synthetic models: what they say and claim, how long they take, and that nobody is fooled."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from outrider.domain import SamplingParams
from outrider.kv_blocks import BLOCK_TOKENS, OutOfBlocks
from outrider.model.info import model_info
from outrider.model.kv_cache import SessionCache
from outrider.model.language_model import Row
from outrider.model.loading import load_language_model
from outrider.model.sampling import rank_candidates, sample_nodes
from outrider.model.synthetic import Pacer, SyntheticModel, parse_synthetic_spec

TARGET = "synthetic:target?seed=5"
DRAFT = "synthetic:draft?seed=5&agree=0.8,0.1,0.05"
AGREE = (0.8, 0.1, 0.05)
PROMPT = tuple(b"The quick brown fox")
GREEDY = SamplingParams(temperature=0.0)

#        0
#      /   \
#     1     2        and 5, a second child of the prefix
#     |    / \
#     .   3   4
TREE, PARENTS = [40, 41, 42, 43, 44, 45], [-1, 0, 0, 2, 2, -1]


def made(spec: str, pacer: Pacer | None = None) -> SyntheticModel:
    return SyntheticModel(parse_synthetic_spec(spec), pacer)


def fresh(model: SyntheticModel, tokens: Sequence[int]) -> torch.Tensor:
    """[tokens, vocabulary] logits of a text as one chain in a cache of its own."""
    cache = model.new_cache()
    logits = model.forward([Row(cache, tokens, None, range(len(tokens)))])
    cache.release()
    return logits


def prefilled(model: SyntheticModel, tokens: Sequence[int] = PROMPT) -> SessionCache:
    cache = model.new_cache()
    model.forward([Row(cache, tokens)])
    return cache


def path_to(slot: int) -> list[int]:
    path: list[int] = []
    while slot >= 0:
        path.insert(0, TREE[slot])
        slot = PARENTS[slot]
    return path


def contexts(count: int) -> list[list[int]]:
    """Texts of three tokens, all different."""
    return [[10 + n % 200, n // 200 % 200, 7] for n in range(count)]


# --- contexts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [TARGET, DRAFT])
def test_a_tree_says_what_its_paths_say(spec: str) -> None:
    model = made(spec)
    cache = prefilled(model)
    logits = model.forward([Row(cache, TREE[:3], PARENTS[:3], [2, 0, 1])])
    more = model.forward([Row(cache, TREE[3:], PARENTS[3:], range(3))])
    for slot, found in [(2, logits[0]), (0, logits[1]), (1, logits[2]), *enumerate(more, start=3)]:
        assert torch.equal(found, fresh(model, [*PROMPT, *path_to(slot)])[-1])


@pytest.mark.parametrize("spec", [TARGET, DRAFT])
def test_what_follows_does_not_depend_on_how_the_context_came_about(spec: str) -> None:
    model = made(spec)
    cache = prefilled(model)
    model.forward([Row(cache, TREE, PARENTS)])
    moved = cache.advance([0, 2], keep=[4])
    found = model.forward([Row(cache, [46], [moved[4]], [0])])
    assert torch.equal(found[0], fresh(model, [*PROMPT, 40, 42, 44, 46])[-1])
    cache.truncate(len(PROMPT) - 3)
    found = model.forward([Row(cache, [1, 2], None, [0, 1])])
    assert torch.equal(found, fresh(model, [*PROMPT[:-3], 1, 2])[-2:])


def test_every_token_of_the_context_matters() -> None:
    model = made(TARGET)
    after = {tuple(fresh(model, text)[-1].tolist()) for text in contexts(300)}
    assert len(after) > 255  # of 16 * 94 that there are: 272 in the mean
    longer = [fresh(model, [*text, *PROMPT])[-1].argmax().item() for text in contexts(300)]
    assert len(set(longer)) > 80


def test_rows_do_not_disturb_each_other() -> None:
    model = made(DRAFT)
    chain, tree, empty = model.new_cache(), prefilled(model), model.new_cache()
    rows = [
        Row(chain, PROMPT[:4], None, [3]),
        Row(tree, TREE, PARENTS, [5, 1]),
        Row(empty, TREE, PARENTS, [1]),
    ]
    expected = [PROMPT[:4], [*PROMPT, *path_to(5)], [*PROMPT, *path_to(1)], path_to(1)]
    for found, text in zip(model.forward(rows), expected, strict=True):
        assert torch.equal(found, fresh(model, text)[-1])


def test_a_shared_prefix_is_read_where_others_left_it() -> None:
    model = made(TARGET)
    pool = model.new_pool(10 * BLOCK_TOKENS)
    text = list(range(40, 40 + 2 * BLOCK_TOKENS + 5))
    first, second = pool.new_cache("salt"), pool.new_cache("salt")
    model.forward([Row(first, text)])
    first.publish(text)
    assert second.adopt(text) == 2 * BLOCK_TOKENS
    assert second.blocks == first.blocks[:2]
    found = model.forward([Row(second, text[2 * BLOCK_TOKENS :], None, [4])])
    assert torch.equal(found[0], fresh(model, text)[-1])
    # It is read, not made up again.
    third = pool.new_cache("salt")
    third.adopt(text)
    pool.buffer[:, 0, first.slots[2 * BLOCK_TOKENS - 1]] += 1
    found = model.forward([Row(third, text[2 * BLOCK_TOKENS :], None, [4])])
    assert not torch.equal(found[0], fresh(model, text)[-1])


def test_seeds_are_worlds_and_specs_are_all_there_is() -> None:
    text = contexts(1)[0]
    assert torch.equal(fresh(made(TARGET), text), fresh(made(TARGET), text))
    assert torch.equal(fresh(made(DRAFT), text), fresh(made(DRAFT), text))
    texts = contexts(500)
    ours, theirs = made(TARGET), made("synthetic:target?seed=6")
    same = sum(a == b for a, b in zip(nexts(ours, texts), nexts(theirs, texts), strict=True))
    assert same < 30  # 5 in the mean
    # Drafts err at places of their own.
    other = made(DRAFT + "&draft_seed=1")
    right = nexts(ours, texts)
    first, second = nexts(made(DRAFT), texts), nexts(other, texts)
    both = [a == t == b for a, b, t in zip(first, second, right, strict=True)]
    assert np.mean(both) == pytest.approx(0.64, abs=0.08)


def nexts(model: SyntheticModel, texts: Sequence[Sequence[int]]) -> list[int]:
    """The most probable next token of each text."""
    caches = [model.new_cache() for _ in texts]
    rows = [
        Row(cache, text, None, [len(text) - 1]) for cache, text in zip(caches, texts, strict=True)
    ]
    found: list[int] = model.forward(rows).argmax(dim=-1).tolist()
    for cache in caches:
        cache.release()
    return found


# --- what is said -----------------------------------------------------------------------------


def test_texts_are_printable_and_never_end() -> None:
    model = made(TARGET)
    found = set(nexts(model, contexts(2000)))
    assert found == set(range(ord("!"), ord("~") + 1))
    assert not found & set(model.eos_ids)


def test_sampled_requests_hardly_differ_from_greedy_ones() -> None:
    model = made(TARGET)
    logits = torch.cat([fresh(model, text)[-1:] for text in contexts(1000)])
    sampled = sample_nodes(logits, [SamplingParams()] * 1000, [1] * 1000, range(1000))
    assert sum(a == b for a, b in zip(sampled, logits.argmax(dim=-1).tolist(), strict=True)) >= 999


def ranked(draft: SyntheticModel, row: Row, width: int = 3) -> tuple[list[int], list[float]]:
    """The drafter's guesses after the row's last token, and what it claims."""
    logits = draft.forward([row])
    tokens, _, claims = rank_candidates(logits, [GREEDY], [1], [1], width)
    return tokens[0].tolist(), claims[0].exp().tolist()


@pytest.mark.parametrize("width", [1, 3, 5])
def test_claims_are_those_stated(width: int) -> None:
    draft = made(DRAFT)
    for text in contexts(20):
        tokens, claims = ranked(draft, Row(draft.new_cache(), text, None, [2]), width)
        assert len(set(tokens)) == width
        assert claims[:3] == pytest.approx(AGREE[:width], abs=1e-6)
        assert all(claim < 0.001 for claim in claims[3:])
    assert float(fresh(draft, PROMPT).softmax(dim=-1).sum(dim=-1).max()) == pytest.approx(1.0)


def shares_right(target: SyntheticModel, draft: SyntheticModel, count: int) -> list[float]:
    """How often the draft's first, second and third choice is the target's token."""
    texts = contexts(count)
    caches = [draft.new_cache() for _ in texts]
    rows = [Row(cache, text, None, [2]) for cache, text in zip(caches, texts, strict=True)]
    tokens, _, _ = rank_candidates(
        draft.forward(rows), [GREEDY] * count, [1] * count, range(count), 3
    )
    truth = torch.tensor(nexts(target, texts))[:, None]
    shares: list[float] = (tokens == truth).double().mean(dim=0).tolist()
    return shares


def assert_shares(found: Sequence[float], stated: Sequence[float], count: int) -> None:
    for share, probability in zip(found, stated, strict=True):
        sigma = math.sqrt(probability * (1 - probability) / count)
        assert abs(share - probability) <= 3 * sigma


def test_choices_are_right_as_often_as_stated() -> None:
    assert_shares(shares_right(made(TARGET), made(DRAFT), 4000), AGREE, 4000)


def test_agreement_may_fall_while_claims_stay() -> None:
    draft = made(DRAFT)
    draft.agreement = (0.05, 0.02, 0.0)
    assert_shares(shares_right(made(TARGET), draft, 4000), (0.05, 0.02, 0.0), 4000)
    _, claims = ranked(draft, Row(draft.new_cache(), PROMPT, None, [3]))
    assert claims == pytest.approx(AGREE, abs=1e-6)
    for wrong in [(0.5,), (0.5, 0.5, 0.5), (math.nan, 0.0, 0.0), (1.1, 0.0, 0.0)]:
        with pytest.raises(ValueError, match="agreement"):
            draft.agreement = wrong
    assert draft.agreement == (0.05, 0.02, 0.0)
    draft.agreement = AGREE
    assert_shares(shares_right(made(TARGET), draft, 4000), AGREE, 4000)


def test_agreement_decays_with_depth_and_claims_with_it() -> None:
    target, draft = made(TARGET), made(DRAFT + "&agree_decay=0.5")
    hits = np.zeros((2000, 3))
    for number, text in enumerate(contexts(2000)):
        cache = prefilled(draft, text)
        guesses, claims = ranked(draft, Row(cache, [50, 51, 52], [-1, 0, 0], [2]))
        assert claims == pytest.approx([share / 4 for share in AGREE], abs=1e-6)
        truth = fresh(target, [*text, 50, 52])[-1].argmax().item()
        hits[number] = [guess == truth for guess in guesses]
        cache.release()
    assert_shares(hits.mean(axis=0).tolist(), [share / 4 for share in AGREE], 2000)


def test_a_wide_vocabulary_changes_nothing_but_the_width() -> None:
    wide, narrow = made(TARGET + "&vocabulary=50000"), made(TARGET)
    texts = contexts(50)
    assert nexts(wide, texts) == nexts(narrow, texts)
    assert fresh(wide, PROMPT).shape == (len(PROMPT), 50000)


# --- as a model -------------------------------------------------------------------------------


def test_wrong_rows_raise_and_change_no_cache() -> None:
    model = made(TARGET + "&length_max=64")
    good, bad = prefilled(model), prefilled(model)
    model.forward([Row(bad, [1], [-1])])
    wrong: list[tuple[Row, str]] = [
        (Row(bad, [], []), "at least one"),
        (Row(bad, [260], [0]), "token id"),
        (Row(bad, [1], [1]), "parent"),
        (Row(bad, [1], None), "tree slots"),
        (Row(bad, [1], [0], [1]), "wanted"),
        (Row(good, [1], None), "only once"),
        (Row(made(TARGET).new_cache(), [1], None), "share one pool"),
        (Row(prefilled(model, [1] * 64), [1], [-1]), "maximum length"),
    ]
    for row, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.forward([Row(good, [1], None, [0]), row])
        assert (good.prefix_length, good.tree_size) == (len(PROMPT), 0)
        assert (bad.prefix_length, bad.tree_size) == (len(PROMPT), 1)


@pytest.mark.parametrize("spec", [TARGET, DRAFT])
def test_other_work_comes_before_the_caches_change(spec: str) -> None:
    model = made(spec)
    cache = model.new_cache()
    lengths: list[int] = []
    model.forward([Row(cache, [1, 2, 3], None, [2])], lambda: lengths.append(cache.prefix_length))
    assert lengths == [0]
    assert cache.prefix_length == 3


def test_too_little_room_changes_no_cache() -> None:
    model = made(TARGET)
    pool = model.new_pool(2 * BLOCK_TOKENS)
    first, second = pool.new_cache(), pool.new_cache()
    with pytest.raises(OutOfBlocks):
        model.forward([Row(first, [1]), Row(second, [2] * (BLOCK_TOKENS + 1))])
    assert (first.prefix_length, second.prefix_length) == (0, 0)


def test_a_pass_without_rows_or_wishes_gives_nothing() -> None:
    model = made(DRAFT)
    assert model.forward([]).shape == (0, 260)
    assert model.forward([Row(model.new_cache(), PROMPT)]).shape == (0, 260)


def test_nobody_takes_it_for_a_real_model(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        model = load_language_model(DRAFT, dtype="bfloat16", cache_dir=Path("/nonexistent"))
    assert "synthetic:draft is a synthetic model" in caplog.text
    assert isinstance(model, SyntheticModel)
    info = model_info(model)
    assert (info.model, info.dtype) == ("synthetic:draft", "synthetic")
    assert info.model_fingerprint.startswith("synthetic-")
    assert info.eos_ids == (256, 258)
    tiny = load_language_model("random:tiny", cache_dir=Path("/nonexistent"))
    assert info.tokenizer_fingerprint == tiny.tokenizer_fingerprint
    assert model.kv_bytes_per_token * 64 == model.new_pool(64).buffer.nbytes


def test_fingerprints_tell_apart_what_says_something_else() -> None:
    changes = ["&agree_decay=0.9", "&draft_seed=1", "&vocabulary=300", "&length_max=9"]
    specs = [DRAFT, TARGET, TARGET.replace("5", "6"), *(DRAFT + change for change in changes)]
    assert len({made(spec).model_fingerprint for spec in specs}) == len(specs)
    # Machines of other speed, or other names, run the same model.
    alike = [TARGET + "&step=1:22&jitter=0.1&kv_ms=2", "synthetic:other?seed=5"]
    assert {made(spec).model_fingerprint for spec in alike} == {made(TARGET).model_fingerprint}


# --- time -------------------------------------------------------------------------------------


class Clock:
    """Time that passes in sleep alone, which ends late, and in each look at the clock."""

    def __init__(self, late_s: Callable[[], float] = lambda: 80e-6) -> None:
        self.now_s = 100.0
        self.slept: list[float] = []
        self._late_s = late_s

    def look(self) -> float:
        self.now_s += 1e-7
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)
        self.now_s += duration_s + (self._late_s() if duration_s else 1e-6)


def durations_ms(spec: str, rows: Callable[[SyntheticModel], list[Row]], count: int) -> list[float]:
    clock = Clock()
    model = made(spec, Pacer(clock.look, clock.sleep))
    found = []
    for _ in range(count):
        batch = rows(model)
        before_s = clock.now_s
        model.forward(batch)
        found.append((clock.now_s - before_s) * 1000)
        for row in batch:
            row.cache.release()
    return found


@pytest.mark.parametrize(("tokens", "time_ms"), [(1, 22.0), (32, 22.0), (80, 25.0), (512, 100.0)])
def test_a_pass_takes_the_time_stated(tokens: int, time_ms: float) -> None:
    spec = "synthetic:target?step=1:22,32:22,128:28,512:100"
    found = durations_ms(spec, lambda model: [Row(model.new_cache(), [5] * tokens)], 60)
    assert min(found) >= time_ms
    assert max(found) < time_ms + 0.1
    assert found[-1] < time_ms + 0.01  # it has learned how late sleep ends


def test_all_rows_of_a_pass_share_its_time() -> None:
    def rows(model: SyntheticModel) -> list[Row]:
        return [Row(model.new_cache(), [5] * 8) for _ in range(4)]

    assert durations_ms("synthetic:x?step=1:0,32:32", rows, 1)[0] == pytest.approx(32, abs=0.1)


def test_tokens_held_take_time_if_asked_to() -> None:
    clock = Clock()
    model = made("synthetic:x?step=1:1&kv_ms=10", Pacer(clock.look, clock.sleep))
    cache = prefilled(model, [5] * 500)
    before_s = clock.now_s
    model.forward([Row(cache, [5, 5], [-1, 0])])
    assert (clock.now_s - before_s) * 1000 == pytest.approx(1 + 5, abs=0.1)


def test_jitter_has_the_stated_spread_and_comes_again() -> None:
    def rows(model: SyntheticModel) -> list[Row]:
        return [Row(model.new_cache(), [5])]

    spec = "synthetic:x?seed=1&step=1:20&jitter=0.05"
    found = np.array(durations_ms(spec, rows, 1000))
    assert found.mean() == pytest.approx(20, abs=0.15)
    assert found.std() == pytest.approx(1, abs=0.1)
    assert np.allclose(found, durations_ms(spec, rows, 1000), atol=0.1)
    assert not np.allclose(found, durations_ms(spec.replace("seed=1", "seed=2"), rows, 1000), 0.1)


def test_the_clock_on_the_wall_agrees() -> None:
    model = made("synthetic:x?step=1:3")
    cache = prefilled(model)
    for _ in range(5):
        started_s = time.perf_counter()
        model.forward([Row(cache, [5])])
        assert time.perf_counter() - started_s >= 0.003


def test_a_pass_without_time_does_not_sleep() -> None:
    clock = Clock()
    prefilled(made(TARGET, Pacer(clock.look, clock.sleep)))
    assert clock.slept == []
