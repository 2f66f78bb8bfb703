"""What is loaded at start is there to stay, and need not be looked at again and again."""

from __future__ import annotations

import gc

_FULL_EVERY = 200
"""Collections of the middle generation between two full ones, at least; Python's default is 10.
A full one looks at every session there is, and while many come one follows the other."""


def keep_what_is_loaded() -> None:
    """Take all present objects out of the collector's sight. Called once a service is ready.

    A full collection walks them all with every thread standing still: with torch and a model
    library loaded that is most of a second, which every session's next token would wait for.
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _FULL_EVERY)
