"""Blocks of KV in pieces: what is sent arrives, and what was changed on the way is noticed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider import kv_transfer
from outrider.kv_transfer import (
    CHUNK_BYTES_MAX,
    Assembly,
    CorruptKv,
    KvChunk,
    KvGeometry,
    chunk_checksum,
    chunks_of,
    geometry_fault,
)

BLOCK = bytes(range(256)) * 40
DIGESTS = [bytes([number]) * 32 for number in range(3)]
GEOMETRY = KvGeometry("f", "layer-kv-slot-head-2", "float32", 2, 2, 16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_transfer, "CHUNK_BYTES_MAX", 3_000)


def sent() -> list[KvChunk]:
    return [
        chunk
        for index, digest in enumerate(DIGESTS)
        for chunk in chunks_of(index, digest, memoryview(BLOCK))
    ]


def received(chunks: list[KvChunk]) -> list[bytes]:
    assembly = Assembly(DIGESTS, len(BLOCK))
    blocks = [assembly.add(chunk) for chunk in chunks]
    assert assembly.blocks == sum(block is not None for block in blocks)
    return [bytes(block) for block in blocks if block is not None]


def test_a_message_is_far_below_what_grpc_takes() -> None:
    assert CHUNK_BYTES_MAX == 1 << 20
    assert [len(chunk.data) for chunk in sent()[:4]] == [3_000, 3_000, 3_000, 1_240]


def test_what_is_sent_arrives() -> None:
    assert received(sent()) == [BLOCK] * 3
    assert received(sent()[:6]) == [BLOCK], "half a block is none"


@given(st.integers(0, 11), st.integers(0, 1_239), st.integers(1, 255))
@settings(deadline=None, derandomize=True)
def test_a_changed_byte_is_noticed(number: int, place: int, change: int) -> None:
    chunks = sent()
    data = bytearray(chunks[number].data)
    data[place] ^= change
    chunks[number] = replace(chunks[number], data=bytes(data))
    with pytest.raises(CorruptKv, match=f"checksum of block {number // 4} is wrong"):
        received(chunks)


@pytest.mark.parametrize(
    "order",
    [[1, 0], [0, 0], [0, 2], [0, 1, 2, 4], [4], [*range(12), 11]],
    ids=["swapped", "twice", "left out", "end left out", "another block", "too many"],
)
def test_what_is_not_in_its_place_is_noticed(order: list[int]) -> None:
    chunks = sent()
    with pytest.raises(CorruptKv, match="came where"):
        received([chunks[index] for index in order])


def test_a_chunk_that_claims_another_place_is_noticed() -> None:
    first, second = sent()[:2]
    with pytest.raises(CorruptKv, match="checksum"):
        received([first, replace(sent()[2], offset=second.offset)])
    with pytest.raises(CorruptKv, match="checksum"):
        received([*sent()[:4], replace(first, block=1)])


def test_more_bytes_than_a_block_has_are_not_kept() -> None:
    data = BLOCK + b"x"
    with pytest.raises(CorruptKv, match="more came"):
        received([KvChunk(0, 0, data, chunk_checksum(DIGESTS[0], 0, data))])
    with pytest.raises(CorruptKv):
        received([KvChunk(0, 0, b"", chunk_checksum(DIGESTS[0], 0, b""))])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_fingerprint", "g"),
        ("layout", "slot-layer"),
        ("dtype", "bfloat16"),
        ("layers", 3),
        ("kv_heads", 1),
        ("head_dim", 32),
        ("block_tokens", 16),
    ],
)
def test_all_of_a_geometry_must_agree(field: str, value: object) -> None:
    other = replace(GEOMETRY, **{field: value})
    fault = geometry_fault(GEOMETRY, other)
    assert fault is not None
    assert fault.startswith(f"geometry.{field}: {value!r}")
    assert geometry_fault(GEOMETRY, replace(other, **{field: getattr(GEOMETRY, field)})) is None
