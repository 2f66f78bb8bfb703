"""How many processor threads torch may use in this process."""

from __future__ import annotations

import torch


def set_threads(count: int) -> None:
    """Give torch `count` threads; 0 leaves its default, one per core."""
    if count:
        torch.set_num_threads(count)
