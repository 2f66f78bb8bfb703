"""Both attentions against one written down by definition: which keys a query sees, softmax, sum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outrider.model import native
from outrider.model.attention import GatheredAttention, NativeAttention
from outrider.model.kv_cache import Extension, KvLayout, KvPool, SessionCache
from outrider.model.step_inputs import StepInputs, step_inputs

CPU = torch.device("cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}

needs_native = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler is found: the CPU operators cannot be built"
)
WAYS = [pytest.param("native", marks=needs_native), "gathered"]

thorough = settings(max_examples=120, deadline=None, derandomize=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of an attention, and the sliding window of each layer."""

    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    windows: tuple[int | None, ...] = (None,)
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True, slots=True)
class Part:
    """One row of a batch: what its session holds, and what is new."""

    prefix: int
    old_parents: tuple[int, ...]
    parents: tuple[int, ...] | None
    """Of the new tokens; None: they are a chain."""
    count: int


@dataclass
class Text:
    """A session with its keys and values, kept a second time by token index."""

    cache: SessionCache
    keys: torch.Tensor  # [layers, tokens, kv_heads, dim]
    values: torch.Tensor
    seen: list[list[int]] = field(default_factory=list)
    """For each token those that it sees, itself included."""
    positions: list[int] = field(default_factory=list)

    def add(self, count: int, parents: Sequence[int] | None) -> Extension:
        """Plan tokens, and note by definition what they see."""
        prefix = self.cache.prefix_length
        extension = self.cache.plan(count, parents)
        for index in range(count):
            at = len(self.seen)
            if parents is None:
                self.seen.append([*range(at + 1)])
            elif parents[index] < 0:
                self.seen.append([*range(prefix), at])
            else:
                self.seen.append([*self.seen[prefix + parents[index]], at])
            # All that it sees but itself stands before it.
            self.positions.append(len(self.seen[-1]) - 1)
        return extension


class Batch:
    """Rows in one pool, whose blocks lie in no order, and their new queries, keys and values."""

    def __init__(self, shape: Shape, parts: Sequence[Part], seed: int = 0) -> None:
        self.shape = shape
        generator = torch.Generator().manual_seed(seed)
        layers = len(shape.windows)
        layout = KvLayout(layers, shape.kv_heads, shape.dim, shape.dtype, CPU)
        sizes = [part.prefix + len(part.old_parents) + part.count for part in parts]
        self.pool = KvPool(layout, 32 * (4 + sum(-(-size // 32) for size in sizes)))
        # What was never written must never matter.
        self.pool.buffer.fill_(torch.nan)

        def draw(*sizes: int) -> torch.Tensor:
            return torch.randn(*sizes, generator=generator).to(shape.dtype)

        self.texts = [
            Text(self.pool.new_cache(), *draw(2, layers, size, shape.kv_heads, shape.dim))
            for size in sizes
        ]
        others = self.pool.new_cache()
        for tokens in range(32, max(sizes) + 32, 32):
            others.reserve(min(tokens, 128))
            for text, size in zip(self.texts, sizes, strict=True):
                text.cache.reserve(min(tokens, size))
        others.release()
        self.extensions = []
        for text, part in zip(self.texts, parts, strict=True):
            if part.prefix:
                text.cache.apply(text.add(part.prefix, None))
            if part.old_parents:
                text.cache.apply(text.add(len(part.old_parents), part.old_parents))
            held = part.prefix + len(part.old_parents)
            slots = torch.from_numpy(text.cache.slots[:held])
            self.pool.buffer[:, 0, slots] = text.keys[:, :held]
            self.pool.buffer[:, 1, slots] = text.values[:, :held]
            self.extensions.append(text.add(part.count, part.parents))
        heads = shape.kv_heads * shape.group
        self.queries = [draw(layers, part.count, heads, shape.dim) for part in parts]

    def inputs(self, rows: Sequence[int]) -> StepInputs:
        return step_inputs(
            [[0] * self.extensions[row].size for row in rows],
            [self.texts[row].cache for row in rows],
            [self.extensions[row] for row in rows],
            [() for _ in rows],
        )

    def attend(self, way: str, rows: Sequence[int] | None = None) -> list[torch.Tensor]:
        """[layers, n, heads, dim] for each of the rows, computed in one pass."""
        rows = range(len(self.texts)) if rows is None else rows
        inputs = self.inputs(rows)
        starts = [self.extensions[row].start for row in rows]
        scaling = self.shape.dim**-0.5
        layers = []
        native_plan = gathered = None
        if way == "native":
            native_plan = NativeAttention(inputs, self.pool, self.shape.windows)
        else:
            gathered = GatheredAttention(inputs, self.pool, self.shape.windows)
        for layer in range(len(self.shape.windows)):
            query = torch.cat([self.queries[row][layer] for row in rows])
            key, value = (
                torch.cat([x[layer, at:] for x, at in zip(kept, starts, strict=True)])
                for kept in (
                    [self.texts[row].keys for row in rows],
                    [self.texts[row].values for row in rows],
                )
            )
            if native_plan is not None:
                out = torch.ops.outrider.attend(
                    query, key, value, native_plan.words, layer, scaling
                )
            else:
                assert gathered is not None
                out = gathered.attend(layer, query, key, value, scaling)
            layers.append(out)
        return list(torch.stack(layers).split([self.extensions[row].size for row in rows], 1))

    def expected(self, row: int) -> torch.Tensor:
        """[layers, n, heads, dim] in float64, one query and one head at a time."""
        text, shape = self.texts[row], self.shape
        out = torch.empty(self.queries[row].shape, dtype=torch.float64)
        for layer, window in enumerate(shape.windows):
            for index in range(self.extensions[row].size):
                at = self.extensions[row].start + index
                own = text.positions[at]
                seen = [
                    key
                    for key in text.seen[at]
                    if window is None or own - text.positions[key] < window
                ]
                for head in range(shape.kv_heads * shape.group):
                    keys = text.keys[layer, seen, head // shape.group].double()
                    values = text.values[layer, seen, head // shape.group].double()
                    scores = keys @ self.queries[row][layer, index, head].double()
                    out[layer, index, head] = (scores * shape.dim**-0.5).softmax(0) @ values
        return out

    def check(self, way: str) -> None:
        attended = self.attend(way)
        for row, found in enumerate(attended):
            tolerance = TOLERANCE[self.shape.dtype]
            assert found.dtype == self.shape.dtype
            torch.testing.assert_close(
                found.double(), self.expected(row), atol=tolerance, rtol=tolerance
            )
            text, extension = self.texts[row], self.extensions[row]
            slots = torch.from_numpy(text.cache.slots[: extension.start + extension.size])
            stored = self.pool.buffer[:, :, slots]
            assert torch.equal(stored, torch.stack([text.keys, text.values], 1))
        written = ~self.pool.buffer[0, 0, :, 0, 0].isnan()
        assert int(written.sum()) == sum(len(text.seen) for text in self.texts)


@st.composite
def parents_of(draw: st.DrawFn, first: int, count: int) -> tuple[int, ...]:
    """Parents of `count` slots after `first` older ones: bushy, or deep."""
    deep = draw(st.booleans())
    return tuple(
        first + index - 1
        if deep and index and draw(st.integers(0, 4))
        else draw(st.integers(-1, first + index - 1))
        for index in range(count)
    )


borders = st.one_of(st.sampled_from([0, 1, 30, 31, 32, 33, 63, 64, 65, 96]), st.integers(0, 140))


@st.composite
def parts(draw: st.DrawFn) -> Part:
    prefix = draw(borders)
    if draw(st.booleans()):
        size = draw(st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 32, 33, 40])))
        return Part(prefix, (), None, size)
    old = draw(st.sampled_from([0, 0, 1, 5, 40]))
    count = draw(st.one_of(st.integers(1, 9), st.sampled_from([16, 17, 33])))
    return Part(prefix, draw(parents_of(0, old)), draw(parents_of(old, count)), count)


@st.composite
def shapes(draw: st.DrawFn, dtype: torch.dtype) -> Shape:
    width = st.one_of(st.none(), st.integers(1, 12), st.sampled_from([31, 32, 33, 64, 100]))
    return Shape(
        kv_heads=draw(st.integers(1, 3)),
        group=draw(st.integers(1, 4)),
        dim=draw(st.sampled_from([16, 64, 80, 20])),
        windows=tuple(draw(st.lists(width, min_size=1, max_size=3))),
        dtype=dtype,
    )


CHAIN_OF_THREE = (-1, 0, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_any_batch_is_attended_as_defined(way: str, dtype: torch.dtype) -> None:
    @thorough
    @example(Shape(dtype=dtype), [Part(0, (), None, 1)], 0)
    @example(Shape(windows=(2, None), dtype=dtype), [Part(40, CHAIN_OF_THREE, (2, 3, 4), 3)], 1)
    @given(shapes(dtype), st.lists(parts(), min_size=1, max_size=5), st.integers(0, 99))
    def check(shape: Shape, batch: list[Part], seed: int) -> None:
        Batch(shape, batch, seed).check(way)

    check()


MIXED = [
    Part(70, (), None, 1),
    Part(0, (), None, 33),
    Part(65, (-1, 0, 0, -1), (2, 4, -1, 3, 1), 5),
    Part(31, (), None, 17),
    Part(128, (), (-1, 0, 0, 1, 2, 2), 6),
    Part(3, (), (-1,), 1),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("window", [1, 2, 3, 31, 32, 33, 64, 65])
def test_a_window_may_be_narrower_than_the_prefix_and_the_tree(way: str, window: int) -> None:
    deep = Part(64, CHAIN_OF_THREE, (2, 3, 4, 5, 1, 6), 6)
    Batch(Shape(windows=(window, None, window + 1)), [*MIXED, deep]).check(way)


@pytest.mark.parametrize("way", WAYS)
def test_large_scores_do_not_overflow(way: str) -> None:
    batch = Batch(Shape(dim=64), MIXED)
    for queries in batch.queries:
        queries *= 300.0
    attended = batch.attend(way)
    for row, found in enumerate(attended):
        torch.testing.assert_close(found.double(), batch.expected(row), atol=2e-3, rtol=0)


# --- company ----------------------------------------------------------------------------------


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [64, 20])
@pytest.mark.parametrize("group", [1, 3])
def test_a_row_is_the_same_to_the_bit_in_any_company(
    dtype: torch.dtype, dim: int, group: int
) -> None:
    batch = Batch(Shape(group=group, dim=dim, windows=(None, 40), dtype=dtype), MIXED)
    alone = [batch.attend("native", [row])[0] for row in range(len(MIXED))]
    for company in ([0, 1, 2, 3, 4, 5], [5, 3, 1, 0, 2, 4], [4, 2], [1, 0]):
        for row, found in zip(company, batch.attend("native", company), strict=True):
            assert torch.equal(found, alone[row]), f"row {row} in {company}"


@needs_native
def test_a_row_is_the_same_to_the_bit_with_any_number_of_threads(two_threads: None) -> None:
    shape = Shape(dim=64, windows=(None, 40))
    torch.set_num_threads(1)
    alone = Batch(shape, MIXED).attend("native")
    torch.set_num_threads(2)
    for _ in range(5):
        for one, two in zip(alone, Batch(shape, MIXED).attend("native"), strict=True):
            assert torch.equal(one, two)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("computed", [1, 31, 32, 64, 69])
def test_after_a_prefix_hit_the_rest_is_the_same_to_the_bit(
    dtype: torch.dtype, computed: int
) -> None:
    shape = Shape(group=3, dim=64, windows=(None, 40), dtype=dtype)
    whole, rest = (
        Batch(shape, [Part(0, (), None, 70)], 3),
        Batch(shape, [Part(9, (), None, 2), Part(computed, (), None, 70 - computed)], 3),
    )
    # The same text, in other blocks and in other company.
    text, same = whole.texts[0], rest.texts[1]
    same.keys.copy_(text.keys)
    same.values.copy_(text.values)
    slots = torch.from_numpy(same.cache.slots[:computed])
    rest.pool.buffer[:, 0, slots] = text.keys[:, :computed]
    rest.pool.buffer[:, 1, slots] = text.values[:, :computed]
    rest.queries[1] = whole.queries[0][:, computed:].contiguous()
    found = rest.attend("native")[1]
    assert torch.equal(found, whole.attend("native")[0][:, computed:])


@needs_native
def test_a_chain_is_the_same_to_the_bit_as_prefix_or_as_tree() -> None:
    shape = Shape(group=3, dim=64, windows=(None, 40))
    chain = Batch(shape, [Part(60, (), None, 9)])
    tree = Batch(shape, [Part(60, (), tuple(range(-1, 8)), 9)])
    assert torch.equal(chain.attend("native")[0], tree.attend("native")[0])
