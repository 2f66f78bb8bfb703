"""Domain types that check or compute something."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.domain import SamplingParams, SpeculationCounters, session_seed
from outrider.errors import InvalidRequest, OutriderError

thorough = settings(deadline=None, derandomize=True)
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.001),
        ("temperature", 100.001),
        ("temperature", NAN),
        ("temperature", INF),
        ("temperature", -INF),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", -0.5),
        ("top_p", 1.001),
        ("top_p", NAN),
        ("top_p", INF),
        ("min_p", -0.001),
        ("min_p", 1.001),
        ("min_p", NAN),
        ("min_p", INF),
    ],
)
def test_wrong_sampling_parameters_are_named(field: str, value: float) -> None:
    wrong: dict[str, Any] = {field: value}
    with pytest.raises(InvalidRequest) as raised:
        SamplingParams(**wrong)
    assert raised.value.field == f"sampling.{field}"
    assert str(value) in raised.value.message
    assert str(raised.value) == f"sampling.{field}: {raised.value.message}"
    assert isinstance(raised.value, OutriderError)


def test_the_edges_of_the_ranges_are_allowed() -> None:
    assert SamplingParams(temperature=0.0).greedy
    assert not SamplingParams(temperature=1e-9).greedy
    assert SamplingParams(100.0, 0, 1.0, 0.0) == SamplingParams(temperature=100.0)
    SamplingParams(top_k=1 << 31, top_p=5e-324, min_p=1.0)


def test_session_seeds_are_pinned_down() -> None:
    # A resumed session must have the noise it began with, whatever the release.
    assert session_seed(0, 0) == 0x69196560B459C07F
    assert session_seed(0, 1) == 0x66EA364FA7299780
    assert session_seed(1, 0) == 0x4EEE4072DEED10B4
    assert session_seed(42, 7) == 0x05FCFE60389DBB45
    assert session_seed((1 << 64) - 1, 3) == 0x17670E578BA222F4


def test_neighbouring_seeds_and_choices_are_independent() -> None:
    seeds = [session_seed(request, choice) for request in range(64) for choice in range(16)]
    assert len(set(seeds)) == len(seeds)
    # Each bit is set in about half of them (1024 fair coins: 6 standard deviations are 96), and
    # neighbours differ in about half of their bits.
    for bit in range(64):
        assert abs(sum(seed >> bit & 1 for seed in seeds) - 512) < 96
    pairs = itertools.pairwise(seeds)
    distances = [(a ^ b).bit_count() for a, b in pairs]
    assert abs(sum(distances) / len(distances) - 32) < 1
    assert min(distances) > 8


@thorough
@given(request=st.integers(0, (1 << 64) - 1), choice=st.integers(0, 1 << 20))
def test_session_seeds_fit_the_wire(request: int, choice: int) -> None:
    assert 0 <= session_seed(request, choice) < 1 << 64


@pytest.mark.parametrize("seed", [-1, 1 << 64])
def test_seeds_out_of_range_are_refused(seed: int) -> None:
    with pytest.raises(OverflowError):
        session_seed(seed, 0)


def test_counters_of_two_spells_add_up() -> None:
    first = SpeculationCounters(1, 2, 1, 4, {"digest": 1}, {"off_path": 2}, {1: 1}, {1: 2})
    second = SpeculationCounters(
        10, 20, 15, 40, {"epoch": 3, "digest": 1}, {"off_path": 1}, {1: 5, 2: 10}, {2: 20}
    )
    assert first.plus(second) == SpeculationCounters(
        11, 22, 16, 44, {"digest": 2, "epoch": 3}, {"off_path": 3}, {1: 6, 2: 10}, {1: 2, 2: 20}
    )
    assert first.plus(SpeculationCounters()) == first


def test_the_acceptance_rate_of_nothing_is_not_a_number() -> None:
    assert math.isnan(SpeculationCounters().acceptance_rate)
    assert SpeculationCounters(
        verified_draft_tokens=8, accepted_draft_tokens=2
    ).acceptance_rate == (0.25)
