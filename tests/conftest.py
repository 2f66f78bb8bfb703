"""Set before torch is imported: test processes run side by side, and OpenMP teams of several
processes on the same cores wait for each other at every barrier, twenty times slower."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
