"""What a synthetic model is told to be like; see `outrider.model.synthetic`."""

from __future__ import annotations

import dataclasses
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any
from urllib.parse import parse_qsl

from outrider.errors import ModelLoadError
from outrider.tokenizer import BYTE_VOCABULARY_SIZE

PREFIX = "synthetic:"

RANKS_MAX = 16
JITTER_MAX = 0.3
"""Draws are cut at three standard deviations, so that a step's time stays positive."""
_STEP_MS_MAX = 60_000.0
_SIZE_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class StepTime:
    """T(N): milliseconds of a pass over N tokens. Raises ModelLoadError for impossible knots.

    Straight lines between the knots; as at the first before it; beyond the last, the line through
    the last two goes on (with a single knot: as at that one).
    """

    knots: tuple[tuple[int, float], ...] = ((1, 0.0),)
    """(tokens, milliseconds), tokens ascending and times not descending."""

    def __post_init__(self) -> None:
        sizes, times = [size for size, _ in self.knots], [time_ms for _, time_ms in self.knots]
        if not sizes or sizes[0] < 1 or any(b <= a for a, b in pairwise(sizes)):
            raise ModelLoadError("step needs knots at token counts from 1 on, in ascending order")
        if not all(0.0 <= time_ms <= _STEP_MS_MAX for time_ms in times) or times != sorted(times):
            raise ModelLoadError(
                f"step needs times between 0 and {_STEP_MS_MAX:g} milliseconds that do not descend"
            )

    def at_ms(self, tokens: int) -> float:
        """Return T(tokens)."""
        knots = self.knots
        if len(knots) == 1 or tokens <= knots[0][0]:
            return knots[0][1]
        right = min(bisect_right(knots, (tokens, math.inf)), len(knots) - 1)
        (low, low_ms), (high, high_ms) = knots[right - 1], knots[right]
        return low_ms + (high_ms - low_ms) * (tokens - low) / (high - low)


@dataclass(frozen=True, slots=True)
class SyntheticSpec:
    """A synthetic model's name and behaviour. Raises ModelLoadError for what cannot be."""

    name: str
    seed: int = 0
    """The world: targets and drafts with the same seed continue texts alike."""
    step: StepTime = field(default=StepTime())
    """T(N) of a pass over N tokens, prefill included."""
    kv_ms: float = 0.0
    """Milliseconds more for each 1000 tokens that the rows of a pass already hold."""
    jitter: float = 0.0
    """Relative standard deviation of a pass's time, up to `JITTER_MAX`."""
    agree: tuple[float, ...] = ()
    """Probabilities that the first, second, ... choice is the target's token. None: a target."""
    agree_decay: float = 1.0
    """All of `agree` are multiplied by this for each token of the context that is a guess."""
    draft_seed: int = 0
    """Draft models that differ here err at different places."""
    vocabulary: int = BYTE_VOCABULARY_SIZE
    """Width of the logits. Texts are printable ASCII, whatever it is."""
    length_max: int = 32_768

    def __post_init__(self) -> None:
        for name, least in (("vocabulary", BYTE_VOCABULARY_SIZE), ("length_max", 1)):
            if not least <= getattr(self, name) <= _SIZE_MAX:
                raise ModelLoadError(
                    f"{name} must lie between {least} and {_SIZE_MAX}, got {getattr(self, name)}"
                )
        # Written so that NaN is refused.
        if not 0.0 <= self.jitter <= JITTER_MAX:
            raise ModelLoadError(
                f"jitter must lie between 0 and {JITTER_MAX:g}, got {self.jitter:g}"
            )
        if not 0.0 <= self.kv_ms <= _STEP_MS_MAX:
            raise ModelLoadError(
                f"kv_ms must lie between 0 and {_STEP_MS_MAX:g}, got {self.kv_ms:g}"
            )
        self._check_agreement()

    def _check_agreement(self) -> None:
        if len(self.agree) > RANKS_MAX or not all(0.0 < share <= 1.0 for share in self.agree):
            raise ModelLoadError(f"agree has at most {RANKS_MAX} probabilities, each above 0")
        if list(self.agree) != sorted(self.agree, reverse=True) or sum(self.agree) > 1.0 + 1e-9:
            raise ModelLoadError(
                "the probabilities of agree must not ascend, nor exceed 1 together"
            )
        if not 0.0 < self.agree_decay <= 1.0:
            raise ModelLoadError(
                f"agree_decay must lie above 0 and at most at 1, got {self.agree_decay:g}"
            )
        if self.agree_decay < 1.0 and not self.agree:
            raise ModelLoadError("agree_decay is for a draft model, which states agree")

    @property
    def decisive(self) -> dict[str, Any]:
        """What decides the model's output: all but its name and its times."""
        timing = ("name", "step", "kv_ms", "jitter")
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in timing
        }


def parse_synthetic_spec(spec: str) -> SyntheticSpec:
    """Parse `synthetic:NAME?key=value&...`. Raises ModelLoadError."""
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    if not name:
        raise ModelLoadError("a synthetic model needs a name, as in synthetic:target?step=1:22")
    values: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in _PARAMETERS:
            raise ModelLoadError(f"unknown parameter '{key}'; there are {', '.join(_PARAMETERS)}")
        kind, read = _PARAMETERS[key]
        try:
            values[key] = read(value)
        except ValueError:
            raise ModelLoadError(f"parameter '{key}' must be {kind}, got '{value}'") from None
    return SyntheticSpec(name, **values)


def _step_time(text: str) -> StepTime:
    knots = []
    for knot in text.split(","):
        tokens, _, time_ms = knot.partition(":")
        knots.append((int(tokens), float(time_ms)))
    return StepTime(tuple(knots))


def _probabilities(text: str) -> tuple[float, ...]:
    return tuple(float(share) for share in text.split(","))


_WHOLE = ("a whole number", int)
_NUMBER = ("a number", float)
_PARAMETERS: Mapping[str, tuple[str, Callable[[str], Any]]] = {
    "seed": _WHOLE,
    "step": ("tokens:milliseconds pairs, as in 1:22,32:22,128:28", _step_time),
    "kv_ms": _NUMBER,
    "jitter": _NUMBER,
    "agree": ("probabilities, as in 0.8,0.1,0.05", _probabilities),
    "agree_decay": _NUMBER,
    "draft_seed": _WHOLE,
    "vocabulary": _WHOLE,
    "length_max": _WHOLE,
}
