"""The bytes of a pool's blocks, for who hands them to another verifier or takes them from one."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from outrider.kv_blocks import BLOCK_TOKENS
from outrider.kv_transfer import KvGeometry
from outrider.model.kv_cache import KV_LAYOUT, KvPool


class BlockBytes:
    """Reads and writes whole blocks of a pool.

    A block that is published and held is never written, so that any thread may read it. Writing
    belongs to the thread that owns the pool.
    """

    def __init__(self, pool: KvPool) -> None:
        layout = pool.layout
        self._buffer = pool.buffer
        self.block_bytes = layout.bytes_per_token * BLOCK_TOKENS
        """Of each block; 0 if a pool keeps nothing."""
        self.geometry = KvGeometry(
            pool.model_fingerprint,
            KV_LAYOUT,
            str(layout.dtype).removeprefix("torch."),
            layout.layers,
            layout.kv_heads,
            layout.head_dim,
        )
        # On a CPU without torch: a second thread of its own would cost the first one its speed.
        self._plain: npt.NDArray[np.uint8] | None = None
        if layout.device.type == "cpu":
            self._plain = self._buffer.view(torch.uint8).numpy()

    def read(self, block: int) -> memoryview:
        """Copy a block out. For any thread, while somebody holds the block."""
        slots = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
        if self._plain is not None:
            copy = np.ascontiguousarray(self._plain[:, :, slots])
        else:
            copy = self._buffer[:, :, slots].contiguous().cpu().view(torch.uint8).numpy()
        return copy.reshape(-1).data

    def write(self, block: int, data: bytes | bytearray) -> None:
        """Fill a block that nobody else uses. Raises ValueError if the size is another."""
        if len(data) != self.block_bytes:
            raise ValueError(f"a block has {self.block_bytes} bytes, got {len(data)}")
        slots = slice(block * BLOCK_TOKENS, (block + 1) * BLOCK_TOKENS)
        if self._plain is not None:
            target = self._plain[:, :, slots]
            target[...] = np.frombuffer(data, np.uint8).reshape(target.shape)
            return
        place = self._buffer[:, :, slots]
        words = torch.frombuffer(bytearray(data), dtype=self._buffer.dtype)
        place.copy_(words.reshape(place.shape))
