"""Bytes of blocks, out of one pool and into another."""

from __future__ import annotations

import pytest
import torch

from outrider.kv_blocks import BLOCK_TOKENS
from outrider.model.block_bytes import BlockBytes
from outrider.model.kv_cache import KvLayout, KvPool

CPU = torch.device("cpu")


def pool_of(dtype: torch.dtype, device: torch.device = CPU, blocks: int = 3) -> KvPool:
    pool = KvPool(KvLayout(2, 3, 4, dtype, device), blocks * BLOCK_TOKENS, "fingerprint")
    count = pool.buffer.numel()
    values = torch.arange(count, dtype=torch.float32) % 251
    pool.buffer.copy_(values.reshape(pool.buffer.shape).to(dtype))
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_block_is_the_same_in_another_pool(dtype: torch.dtype) -> None:
    here, there = pool_of(dtype), pool_of(dtype, blocks=5)
    there.buffer.zero_()
    memory = BlockBytes(here)
    assert memory.block_bytes == BLOCK_TOKENS * 2 * 2 * 3 * 4 * dtype.itemsize
    BlockBytes(there).write(4, bytes(memory.read(1)))
    block, place = slice(BLOCK_TOKENS, 2 * BLOCK_TOKENS), slice(4 * BLOCK_TOKENS, None)
    assert torch.equal(there.buffer[:, :, place], here.buffer[:, :, block])
    assert not there.buffer[:, :, : 4 * BLOCK_TOKENS].any(), "nothing else was written"


def test_what_was_read_is_a_copy() -> None:
    pool = pool_of(torch.float32)
    data = BlockBytes(pool).read(0)
    before = bytes(data)
    pool.buffer.zero_()
    assert bytes(data) == before


@pytest.mark.parametrize("size", [-1, 1])
def test_only_whole_blocks_are_written(size: int) -> None:
    pool = pool_of(torch.float32)
    memory = BlockBytes(pool)
    with pytest.raises(ValueError, match="a block has 6144 bytes"):
        memory.write(0, bytes(memory.block_bytes + size))


def test_its_geometry_says_what_the_bytes_mean() -> None:
    geometry = BlockBytes(pool_of(torch.bfloat16)).geometry
    assert geometry.model_fingerprint == "fingerprint"
    assert (geometry.dtype, geometry.layers, geometry.kv_heads) == ("bfloat16", 2, 3)
    assert (geometry.head_dim, geometry.block_tokens) == (4, BLOCK_TOKENS)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_blocks_of_a_gpu() -> None:
    device = torch.device("cuda")
    here, there = pool_of(torch.bfloat16, device), pool_of(torch.bfloat16, device)
    there.buffer.zero_()
    data = bytes(BlockBytes(here).read(1))
    assert data == bytes(BlockBytes(pool_of(torch.bfloat16)).read(1)), "as on a CPU"
    BlockBytes(there).write(2, data)
    block = here.buffer[:, :, BLOCK_TOKENS : 2 * BLOCK_TOKENS]
    assert torch.equal(there.buffer[:, :, 2 * BLOCK_TOKENS :], block)
