"""Collections do not look at what was there when a service became ready."""

from __future__ import annotations

import gc

from outrider.serving.garbage import keep_what_is_loaded


class Thing:
    pass


def test_what_is_loaded_is_kept_and_what_comes_later_is_collected():
    before = [Thing() for _ in range(100)]
    try:
        keep_what_is_loaded()
        assert gc.get_freeze_count() >= len(before)
        watched = set(map(id, gc.get_objects()))
        assert not watched & set(map(id, before))
        later = Thing()
        assert id(later) in set(map(id, gc.get_objects()))
    finally:
        gc.unfreeze()
