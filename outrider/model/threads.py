"""The one thread of a process that runs torch, and how many processor threads it may use.

Loading, warming up and stepping all happen on it. That keeps torch off the event loop, and it
matters for speed: each thread that ever runs a parallel region gets an OpenMP team of its own,
and as soon as all teams together have more threads than there are processors, libgomp stops
spinning at barriers and sleeps, so that a model loaded on one thread and stepped on another is
markedly slower.
"""

from __future__ import annotations

import torch


def set_threads(count: int) -> None:
    """Give torch `count` processors, 0: its default, one per core. Call it on that thread."""
    if count:
        torch.set_num_threads(count)
