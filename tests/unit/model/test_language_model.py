"""The ragged pass against plain transformers: same weights, eager attention, no cache.

Each node of a tree must get the logits that a plain pass over its path gives.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from outrider.kv_blocks import OutOfBlocks
from outrider.model import native
from outrider.model.kv_cache import SessionCache
from outrider.model.language_model import Row, TransformersModel
from outrider.model.loading import load_language_model
from outrider.model.random_model import build_random_model, parse_random_spec

SPEC = "random:tiny?seed=3&layers=3"
PROMPT = [72, 101, 108, 108, 111, 44, 32, 119]
TREE = [10, 20, 30, 40, 50, 60]
PARENTS = [-1, 0, 0, -1, 2, 2]

# In float32 both round, in another order.
TOLERANCE = 1e-4


def load(spec: str, dtype: Any = "float32") -> TransformersModel:
    model = load_language_model(spec, dtype=dtype, device="cpu", cache_dir=Path("/nonexistent"))
    assert isinstance(model, TransformersModel)
    return model


@pytest.fixture(scope="module")
def model() -> TransformersModel:
    return load(SPEC)


@pytest.fixture(scope="module")
def plain() -> Any:
    return build_random_model(parse_random_spec(SPEC), "eager").eval()


def reference(plain: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Logits [n, vocabulary] of a plain pass."""
    with torch.inference_mode():
        logits: torch.Tensor = plain(torch.tensor([list(tokens)]), use_cache=False).logits[0]
    return logits


def path_to(tokens: Sequence[int], parents: Sequence[int], slot: int) -> list[int]:
    path: list[int] = []
    while slot >= 0:
        path.insert(0, tokens[slot])
        slot = parents[slot]
    return path


def check_tree(
    logits: torch.Tensor,
    plain: Any,
    prefix: Sequence[int],
    tokens: Sequence[int],
    parents: Sequence[int],
    slots: Sequence[int],
) -> None:
    """Compare logits [len(slots), vocabulary] with the plain passes over the slots' paths."""
    assert len(logits) == len(slots)
    for row, slot in zip(logits, slots, strict=True):
        path = [*prefix, *path_to(tokens, parents, slot)]
        torch.testing.assert_close(row, reference(plain, path)[-1], atol=TOLERANCE, rtol=0)


def prefilled(model: TransformersModel, tokens: Sequence[int] = PROMPT) -> SessionCache:
    cache = model.new_cache()
    model.forward([Row(cache, tokens)])
    return cache


@pytest.mark.parametrize("chunks", [[8], [1] * 8, [3, 5], [5, 1, 2]])
def test_prefill_in_chunks_equals_one_plain_pass(
    model: TransformersModel, plain: Any, chunks: list[int]
) -> None:
    cache, logits, at = model.new_cache(), [], 0
    for size in chunks:
        logits.append(model.forward([Row(cache, PROMPT[at : at + size], None, range(size))]))
        at += size
    torch.testing.assert_close(torch.cat(logits), reference(plain, PROMPT), atol=TOLERANCE, rtol=0)
    assert cache.prefix_length == len(PROMPT)


def test_a_long_text_outgrows_a_block(model: TransformersModel, plain: Any) -> None:
    tokens = [index * 7 % 256 for index in range(150)]
    cache = model.new_cache()
    parts = [
        model.forward([Row(cache, tokens[at : at + 50], None, range(50))]) for at in (0, 50, 100)
    ]
    torch.testing.assert_close(torch.cat(parts), reference(plain, tokens), atol=TOLERANCE, rtol=0)


def test_every_node_of_a_tree_sees_its_path_only(model: TransformersModel, plain: Any) -> None:
    cache = prefilled(model)
    logits = model.forward([Row(cache, TREE, PARENTS, range(6))])
    check_tree(logits, plain, PROMPT, TREE, PARENTS, range(6))
    assert (cache.prefix_length, cache.tree_size) == (8, 6)


def test_a_tree_may_stand_on_an_empty_prefix(model: TransformersModel, plain: Any) -> None:
    logits = model.forward([Row(model.new_cache(), TREE, PARENTS, range(6))])
    check_tree(logits, plain, [], TREE, PARENTS, range(6))


def test_a_tree_grows_over_several_passes(model: TransformersModel, plain: Any) -> None:
    tokens, parents = [*TREE, 70, 80, 90, 100], [*PARENTS, 4, -1, 6, 3]
    cache = prefilled(model)
    for begin, end in ((0, 1), (1, 6), (6, 9), (9, 10)):
        row = Row(cache, tokens[begin:end], parents[begin:end], range(end - begin))
        logits = model.forward([row])
        check_tree(logits, plain, PROMPT, tokens, parents, range(begin, end))


@pytest.mark.parametrize(
    ("path", "keep"),
    [([0, 1], []), ([0, 2], [4, 5]), ([0], [2, 5]), ([3], []), ([0, 2, 5], []), ([], [3, 0, 2])],
)
def test_growth_goes_on_after_an_advance(
    model: TransformersModel, plain: Any, path: list[int], keep: list[int]
) -> None:
    cache = prefilled(model)
    model.forward([Row(cache, TREE, PARENTS)])
    remap = cache.advance(path, keep)
    prefix = [*PROMPT, *(TREE[slot] for slot in path)]
    tokens = [TREE[slot] for slot in keep]
    parents = [remap.get(PARENTS[slot], -1) for slot in keep]

    added = list(range(-1, len(keep)))
    tokens += [110 + index for index in range(len(added))]
    parents += added
    logits = model.forward([Row(cache, tokens[len(keep) :], added, range(len(added)))])
    check_tree(logits, plain, prefix, tokens, parents, range(len(keep), len(tokens)))

    cache.advance([])
    logits = model.forward([Row(cache, [1, 2], None, [1])])
    check_tree(logits, plain, prefix, [1, 2], [-1, 0], [1])


def test_decoding_continues_after_truncate(model: TransformersModel, plain: Any) -> None:
    cache = prefilled(model)
    model.forward([Row(cache, TREE, PARENTS)])
    cache.truncate(5)
    logits = model.forward([Row(cache, [5, 6], None, [0, 1])])
    check_tree(logits, plain, PROMPT[:5], [5, 6], [-1, 0], [0, 1])


def test_wanted_logits_come_in_the_order_asked_for(model: TransformersModel, plain: Any) -> None:
    caches = [prefilled(model) for _ in range(3)]
    rows = [
        Row(caches[0], TREE, PARENTS, [5, 0, 5]),
        Row(caches[1], [9, 9], None, ()),
        Row(caches[2], [7], None, [0]),
    ]
    logits = model.forward(rows)
    check_tree(logits[:3], plain, PROMPT, TREE, PARENTS, [5, 0, 5])
    check_tree(logits[3:], plain, PROMPT, [7], [-1], [0])
    assert model.forward([Row(caches[1], [3])]).shape == (0, model.vocabulary_size)
    assert model.forward([]).shape == (0, model.vocabulary_size)


def test_rows_of_a_mixed_batch_do_not_feel_each_other(model: TransformersModel) -> None:
    generator = random.Random(5)

    def rows() -> list[Row]:
        draw = random.Random(7)
        built = []
        for index in range(7):
            cache = prefilled(model, [draw.randrange(256) for _ in range(1 + 11 * index)])
            count = 1 + 3 * (index % 4)
            tokens = [draw.randrange(256) for _ in range(count)]
            chain = index % 3 == 0
            parents = None if chain else [draw.randrange(-1, at) for at in range(count)]
            built.append(Row(cache, tokens, parents, range(count)))
        return built

    alone = torch.cat([model.forward([row]) for row in rows()])
    together = model.forward(rows())
    assert float((alone - together).abs().max()) <= 1e-5
    order = list(range(7))
    generator.shuffle(order)
    batch = rows()
    shuffled = model.forward([batch[index] for index in order])
    sizes = [len(row.tokens) for row in batch]
    parts = dict(zip(order, shuffled.split([sizes[index] for index in order]), strict=True))
    assert float((torch.cat([parts[index] for index in range(7)]) - alone).abs().max()) <= 1e-5


@pytest.mark.parametrize("arch", ["qwen3", "mistral", "gemma3"])
def test_other_architectures_and_head_groups(arch: str) -> None:
    spec = f"random:tiny?seed=4&arch={arch}&heads=4&kv_heads=1"
    model, plain = load(spec), build_random_model(parse_random_spec(spec), "eager").eval()
    cache = prefilled(model)
    logits = model.forward([Row(cache, TREE, PARENTS, range(6))])
    check_tree(logits, plain, PROMPT, TREE, PARENTS, range(6))


@pytest.mark.parametrize("attends", ["native", "gathered"])
@pytest.mark.parametrize(
    ("arch", "window", "layers"),
    [("mistral", 1, 2), ("mistral", 2, 2), ("mistral", 7, 3), ("mistral", 32, 2), ("gemma3", 9, 7)],
)
def test_sliding_windows_are_those_of_transformers(
    arch: str, window: int, layers: int, attends: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if attends == "gathered":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip("no C++ compiler is found: the CPU operators cannot be built")
    spec = f"random:tiny?seed=4&arch={arch}&layers={layers}&window={window}&length_max=256"
    model, plain = load(spec), build_random_model(parse_random_spec(spec), "eager").eval()
    # Of Gemma's layers, every sixth sees everything.
    full = [layer for layer in range(layers) if arch == "gemma3" and layer % 6 == 5]
    assert [layer for layer in range(layers) if model.windows[layer] is None] == full
    assert set(model.windows) - {None} == {window}
    text = [index * 7 % 256 for index in range(3 * window + 40)]
    cache, parts = model.new_cache(), []
    for begin, end in ((0, 33), (33, 34), (34, len(text))):
        chunk = text[begin:end]
        parts.append(model.forward([Row(cache, chunk, None, range(len(chunk)))]))
    expected = reference(plain, text)
    torch.testing.assert_close(torch.cat(parts), expected, atol=TOLERANCE, rtol=0)
    # It matters: without the window the end of the text would be told otherwise.
    wide = build_random_model(parse_random_spec(spec.replace(f"&window={window}", "")), "eager")
    assert float((reference(wide.eval(), text)[-1] - expected[-1]).abs().max()) > 0.01
    # A tree deeper than the window, grown in two passes, and on after its path.
    tokens = [10 + slot for slot in range(window + 8)]
    parents = [-1, 0, 0, 1, 3, 4, *range(5, window + 7)]
    logits = model.forward([Row(cache, tokens[:5], parents[:5], range(5))])
    check_tree(logits, plain, text, tokens, parents, range(5))
    logits = model.forward([Row(cache, tokens[5:], parents[5:], range(len(tokens) - 5))])
    check_tree(logits, plain, text, tokens, parents, range(5, len(tokens)))
    cache.advance([0, 1, 3], [4, 5])
    logits = model.forward([Row(cache, [99], [1], [0])])
    path = [*text, *(tokens[slot] for slot in (0, 1, 3, 4, 5)), 99]
    torch.testing.assert_close(logits[0], reference(plain, path)[-1], atol=TOLERANCE, rtol=0)


def test_a_prefix_of_others_gives_the_same_logits(model: TransformersModel, plain: Any) -> None:
    text = [index * 7 % 256 for index in range(80)]
    pool = model.new_pool(256)
    owner, cache = pool.new_cache(""), pool.new_cache("")
    model.forward([Row(owner, text)])
    owner.publish(text)
    assert cache.adopt(text) == 64
    logits = model.forward([Row(cache, text[64:], None, range(16)), Row(owner, [5], None, [0])])
    expected = torch.cat([reference(plain, text)[64:], reference(plain, [*text, 5])[-1:]])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    owner.release()
    cache.release()
    assert pool.tokens_used == 0


def test_a_pass_without_room_changes_no_cache(model: TransformersModel) -> None:
    pool = model.new_pool(96)
    caches = [pool.new_cache() for _ in range(3)]
    model.forward([Row(cache, PROMPT) for cache in caches[:2]])
    rows = [Row(caches[0], [1], None, [0]), Row(caches[1], TREE, PARENTS), Row(caches[2], [1] * 40)]
    with pytest.raises(OutOfBlocks, match="2 blocks"):
        model.forward(rows)
    assert [(cache.prefix_length, cache.tree_size) for cache in caches] == [(8, 0), (8, 0), (0, 0)]
    model.forward(rows[:2])
    for cache in caches:
        cache.release()
    assert pool.tokens_used == 0


def test_other_work_comes_before_the_caches_change(model: TransformersModel) -> None:
    cache = model.new_pool(96).new_cache()
    lengths: list[int] = []
    model.forward([Row(cache, PROMPT)], lambda: lengths.append(cache.prefix_length))
    assert lengths == [0]
    assert cache.prefix_length == len(PROMPT)
    cache.release()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_stays_near(dtype: str, plain: Any) -> None:
    model = load(SPEC, dtype)
    cache = prefilled(model)
    logits = model.forward([Row(cache, TREE, PARENTS, range(6))])
    assert logits.dtype == torch.float32
    assert cache.pool.buffer.dtype == getattr(torch, dtype)
    for slot in range(6):
        expected = reference(plain, [*PROMPT, *path_to(TREE, PARENTS, slot)])[-1]
        deviation = (logits[slot] - expected).square().mean().sqrt() / expected.std()
        assert float(deviation) < 0.1


def test_wrong_rows_raise_and_change_no_cache(model: TransformersModel) -> None:
    good, bad = prefilled(model), prefilled(model)
    model.forward([Row(bad, [1], [-1])])
    released = model.new_cache()
    released.release()
    stranger = load("random:tiny?layers=1").new_cache()
    full = prefilled(model, [1] * model.length_max)
    wrong: list[tuple[Row, type[Exception], str]] = [
        (Row(bad, [], []), ValueError, "at least one"),
        (Row(bad, [260], [0]), ValueError, "token id"),
        (Row(bad, [-1], [0]), ValueError, "token id"),
        (Row(bad, [1], [1]), ValueError, "parent"),
        (Row(bad, [1, 2], [0]), ValueError, "parents"),
        (Row(bad, [1], None), ValueError, "tree slots"),
        (Row(bad, [1], [0], [1]), ValueError, "wanted"),
        (Row(bad, [1], [0], [-1]), ValueError, "wanted"),
        (Row(good, [1], None), ValueError, "only once"),
        (Row(stranger, [1], None), ValueError, "share one pool"),
        (Row(full, [1], [-1]), ValueError, "maximum length"),
        (Row(released, [1], None), RuntimeError, "released"),
    ]
    for row, error, message in wrong:
        with pytest.raises(error, match=message):
            model.forward([Row(good, [1], None, [0]), row])
        assert (good.prefix_length, good.tree_size) == (len(PROMPT), 0)
        assert (bad.prefix_length, bad.tree_size) == (len(PROMPT), 1)


def test_a_cache_of_another_model_is_refused(model: TransformersModel) -> None:
    stranger = load("random:tiny?layers=1").new_cache()
    with pytest.raises(ValueError, match="another model"):
        model.forward([Row(stranger, [1], None)])


def test_the_last_position_can_be_used(model: TransformersModel) -> None:
    cache = prefilled(model, [1] * (model.length_max - 1))
    assert len(model.forward([Row(cache, [1, 2], [-1, -1], [0, 1])])) == 2


def test_what_a_model_says_about_itself(model: TransformersModel) -> None:
    assert (model.name, model.vocabulary_size, model.length_max) == ("tiny", 260, 2048)
    assert (model.dtype, model.device.type) == ("float32", "cpu")
    assert model.kv_bytes_per_token == 3 * 2 * 2 * 16 * 4
    pool = model.new_pool(100)
    assert (pool.tokens_max, pool.layout) == (128, model.layout)
    assert pool.buffer.nbytes == 128 * model.kv_bytes_per_token
