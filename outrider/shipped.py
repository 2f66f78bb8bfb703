"""Drafters that come with Outrider, in `models/` of its repository."""

from __future__ import annotations

import sysconfig
from pathlib import Path

CORES_MIN = 4
"""Below it a model that guesses takes more from the target, whose cores it needs, than it wins."""

_DRAFTERS = {"smollm2": "smollm2-drafter"}
"""Folder of the drafter for a target, by the target's spec."""


def shipped_drafter(target: str) -> Path | None:
    """Return the folder of the drafter for a target; None if there is none."""
    name = _DRAFTERS.get(target)
    if name is None:
        return None
    # A checkout, or what an installed wheel has put beside Python's own data.
    places = (Path(__file__).parents[1] / "models", _installed())
    return next((place / name for place in places if (place / name).is_dir()), None)


def _installed() -> Path:
    return Path(sysconfig.get_path("data")) / "share" / "outrider" / "models"
