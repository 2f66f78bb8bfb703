"""Specs of synthetic models: what they say, and what is wrong with those that say nonsense."""

from __future__ import annotations

from pathlib import Path

import pytest

from outrider.errors import ModelLoadError
from outrider.model.loading import load_language_model
from outrider.model.synthetic import StepTime, SyntheticSpec, parse_synthetic_spec


def test_every_parameter_is_read() -> None:
    spec = parse_synthetic_spec(
        "synthetic:draft?seed=3&step=1:2.5,16:2.5,32:4&kv_ms=0.5&jitter=0.02&agree=0.8,0.1,0.05"
        "&agree_decay=0.9&draft_seed=4&vocabulary=300&length_max=99"
    )
    step = StepTime(((1, 2.5), (16, 2.5), (32, 4.0)))
    assert spec == SyntheticSpec(
        "draft", 3, step, 0.5, 0.02, (0.8, 0.1, 0.05), 0.9, 4, vocabulary=300, length_max=99
    )


def test_a_name_is_enough() -> None:
    spec = parse_synthetic_spec("synthetic:target")
    assert spec == SyntheticSpec("target")
    assert (spec.vocabulary, spec.agree, spec.step.at_ms(512)) == (260, (), 0.0)


@pytest.mark.parametrize(
    ("tokens", "time_ms"),
    [(1, 22.0), (20, 22.0), (32, 22.0), (80, 25.0), (128, 28.0), (320, 64.0), (512, 100.0)],
)
def test_times_lie_on_straight_lines_between_the_knots(tokens: int, time_ms: float) -> None:
    step = StepTime(((8, 22.0), (32, 22.0), (128, 28.0), (512, 100.0)))
    assert step.at_ms(tokens) == pytest.approx(time_ms)


def test_times_go_on_beyond_the_last_knot() -> None:
    assert StepTime(((1, 10.0), (11, 20.0))).at_ms(31) == pytest.approx(40.0)
    assert StepTime(((1, 10.0), (11, 10.0))).at_ms(500) == 10.0
    assert StepTime(((4, 10.0),)).at_ms(500) == 10.0


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("synthetic:", "needs a name"),
        ("synthetic:x?sed=1", "unknown parameter 'sed'; there are seed, step, kv_ms"),
        ("synthetic:x?seed=one", "'seed' must be a whole number, got 'one'"),
        ("synthetic:x?step=22", "'step' must be tokens:milliseconds pairs"),
        ("synthetic:x?step=", "'step' must be tokens:milliseconds pairs"),
        ("synthetic:x?step=0:1", "from 1 on, in ascending order"),
        ("synthetic:x?step=4:1,4:2", "from 1 on, in ascending order"),
        ("synthetic:x?step=1:2,4:1", "do not descend"),
        ("synthetic:x?step=1:-1", "between 0 and 60000"),
        ("synthetic:x?step=1:nan", "between 0 and 60000"),
        ("synthetic:x?jitter=0.4", "jitter must lie between 0 and 0.3, got 0.4"),
        ("synthetic:x?jitter=nan", "jitter must lie"),
        ("synthetic:x?kv_ms=-1", "kv_ms must lie"),
        ("synthetic:x?agree=0.8,x", "'agree' must be probabilities"),
        ("synthetic:x?agree=0.8,0", "each above 0"),
        ("synthetic:x?agree=nan", "each above 0"),
        ("synthetic:x?agree=0.1,0.8", "must not ascend"),
        ("synthetic:x?agree=0.6,0.6", "nor exceed 1"),
        ("synthetic:x?agree=0.8&agree_decay=0", "agree_decay must lie above 0"),
        ("synthetic:x?agree_decay=0.9", "agree_decay is for a draft model"),
        ("synthetic:x?vocabulary=259", "vocabulary must lie between 260"),
        ("synthetic:x?length_max=0", "length_max must lie between 1"),
    ],
)
def test_wrong_specs_say_why(spec: str, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load_language_model(spec, cache_dir=Path("/nonexistent"))
    assert f"'{spec}'" in str(caught.value)


def test_there_are_no_weights_to_quantize() -> None:
    with pytest.raises(ModelLoadError, match="no weights to quantize"):
        load_language_model("synthetic:x", quantize="int8", cache_dir=Path("/nonexistent"))
