"""Closed forms, against published figures."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.planner.formulas import (
    Figures,
    chain_tokens,
    colocated_chain,
    colocated_tree,
    cost_per_million_tokens,
    drafters_per_verifier,
    lockstep,
    lockstep_break_even_s,
    pearl,
    pull,
    push,
    target_only,
)
from outrider.errors import ConfigError

FIGURES = Figures(step=((1, 0.022),), draft=((1, 0.0025),), agreement=(0.8, 0.1, 0.05))
CHEAP = replace(FIGURES, draft=((1, 0.0067),))

# Speed-ups at the best length: T = 22 ms, acceptance 0.8, 85% of the outcomes foreseen.
TABLE = [
    (FIGURES, 0.5, 2.32, 2.49, 3.79, 3.83),
    (FIGURES, 2, 2.23, 2.34, 3.59, 3.83),
    (FIGURES, 10, 1.85, 1.76, 2.85, 3.22),
    (FIGURES, 20, 1.54, 1.35, 2.25, 2.34),
    (FIGURES, 60, 0.94, 0.69, 1.22, 1.18),
    (CHEAP, 2, 1.47, 1.74, 2.43, 2.65),
    (CHEAP, 5, 1.38, 1.54, 2.38, 2.37),
    (CHEAP, 10, 1.26, 1.30, 2.12, 2.11),
]


@pytest.mark.parametrize(
    ("figures", "rtt_ms", "sync", "parallel", "pulled", "pushed"),
    TABLE,
    ids=lambda value: f"{value:g}" if isinstance(value, int | float) else "",
)
def test_the_published_table(
    figures: Figures, rtt_ms: float, sync: float, parallel: float, pulled: float, pushed: float
) -> None:
    plain = target_only(figures).tokens_per_s
    expected = {lockstep: sync, pearl: parallel, pull: pulled, push: pushed}
    for mode, speedup in expected.items():
        reached = mode(figures, rtt_ms / 1e3).tokens_per_s / plain
        assert reached == pytest.approx(speedup, abs=0.0151), mode.__name__


def test_colocated_modes() -> None:
    plain = target_only(FIGURES).tokens_per_s
    assert plain == pytest.approx(1 / 0.022)
    chain = colocated_chain(FIGURES)
    assert chain.tokens_per_s / plain == pytest.approx(2.35, abs=0.005)
    assert chain.length == 5
    assert colocated_tree(FIGURES).tokens_per_s / plain == pytest.approx(3.14, rel=0.01)


def test_a_tree_of_one_leaf_and_one_choice_is_a_chain() -> None:
    chainlike = replace(FIGURES, leaves=1, agreement=(0.8,))
    tree, chain = colocated_tree(chainlike), colocated_chain(chainlike)
    assert tree.tokens_per_s == pytest.approx(chain.tokens_per_s)
    assert tree.length == chain.length


def test_a_tree_keeps_the_leaves_that_it_did_not_expand() -> None:
    """Second choices are good, so the third draft step goes back to the first level."""
    figures = Figures(((1, 1.0),), ((1, 0.15),), (0.5, 0.45), leaves=1)
    tree = colocated_tree(figures)
    nodes = (0.5, 0.45, 0.25, 0.225, 0.225, 0.2025)
    assert tree.length == 3
    assert tree.tokens_per_s == pytest.approx((1 + sum(nodes)) / 1.45)


def test_tokens_of_a_chain() -> None:
    assert chain_tokens(0.8, 0) == pytest.approx(1.0)
    assert chain_tokens(0.5, 2) == pytest.approx(1.75)
    assert chain_tokens(1.0, 7) == 8.0
    assert chain_tokens(0.0, 7) == 1.0


def test_pearl_as_its_two_modes_say() -> None:
    # T long enough that 8 guesses fit: 2.549 tokens a round, checked against a Monte Carlo.
    figures = replace(FIGURES, draft=((1, 0.022 / 8),))
    rate = pearl(figures, 0.0)
    assert rate.length == 8
    assert rate.tokens_per_s * 0.022 == pytest.approx(2.549, abs=0.001)


@pytest.mark.parametrize(("acceptance", "rtt_ms"), [(0.7, 47), (0.85, 108), (0.9, 134)])
def test_break_even_of_lockstep_as_published(acceptance: float, rtt_ms: float) -> None:
    """K = 5, draft step 10 ms, T = 50 ms; the best K reaches further."""
    figures = Figures(step=((1, 0.05),), draft=((1, 0.01),), agreement=(acceptance,))
    at_five_s = (chain_tokens(acceptance, 5) - 1) * 0.05 - 5 * 0.01
    assert at_five_s * 1e3 == pytest.approx(rtt_ms, abs=1.0)
    break_even_s = lockstep_break_even_s(figures)
    assert break_even_s >= at_five_s
    plain = target_only(figures).tokens_per_s
    assert lockstep(figures, break_even_s * 1.01).tokens_per_s < plain
    assert lockstep(figures, break_even_s * 0.99).tokens_per_s > plain


def test_capacity_and_cost() -> None:
    # 32 rows, 8 steps of 2.5 ms for 16 leaves: two batches, 40 ms of work in a round of 22 ms.
    count = drafters_per_verifier(32, 1, 8, ((1, 0.0025),), 16, 0.022)
    assert count == 2
    assert cost_per_million_tokens(3.6, 1_000.0) == pytest.approx(1.0)


def test_many_rows_share_steps_and_nodes() -> None:
    loaded = replace(FIGURES, rows=64, step=((1, 0.022), (32, 0.022), (128, 0.04)), nodes_max=256)
    assert target_only(loaded).tokens_per_s == pytest.approx(64 / loaded.verify_s(0))
    # 64 rows take four draft steps of 16 leaves for each token of their chains.
    assert loaded.chain_draft_s() == pytest.approx(0.01)
    per_row = colocated_chain(loaded).tokens_per_s / 64
    assert per_row < colocated_chain(FIGURES).tokens_per_s
    # Nothing to verify with: plain decoding.
    assert colocated_chain(replace(FIGURES, nodes_max=0)).length == 0
    assert colocated_tree(replace(FIGURES, nodes_max=0)).length == 0


@settings(max_examples=50, deadline=None)
@given(
    alpha=st.floats(0.01, 0.99),
    draft_s=st.floats(1e-4, 0.05),
    rtt_s=st.floats(0.0, 0.1),
    rows=st.integers(1, 8),
)
def test_order_of_the_modes(alpha: float, draft_s: float, rtt_s: float, rows: int) -> None:
    figures = Figures(((1, 0.02),), ((1, draft_s),), (alpha,), rows=rows, nodes_max=64)
    plain, tree = target_only(figures), colocated_tree(figures)
    assert tree.tokens_per_s >= plain.tokens_per_s
    for mode in (lockstep, pearl, pull, push):
        assert mode(figures, rtt_s).tokens_per_s <= mode(figures, 0.0).tokens_per_s * (1 + 1e-9)
    assert lockstep(figures, 0.0).tokens_per_s == colocated_chain(figures).tokens_per_s


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", ()), ("agreement", (1.2,)), ("leaves", 0), ("rows", 0), ("hit_rate", 1.5)],
)
def test_errors_name_the_field(field: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}: "):
        replace(FIGURES, **{field: value})  # type: ignore[arg-type]
