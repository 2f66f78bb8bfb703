"""Step times, calibration, and the choice of nodes."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.draft_tree import DraftTree, Node
from verifier_service.scheduling import KNOTS, Calibration, StepTimes, choose_nodes

thorough = settings(max_examples=150, deadline=None, derandomize=True)

# --- step times -------------------------------------------------------------------------------


def learnt(cost_s: Callable[[int], float], rounds: int = 60) -> StepTimes:
    """Step times after steps of the knots' sizes up to 256, in turn."""
    times = StepTimes()
    for _ in range(rounds):
        for size in (size for size in KNOTS if size <= 256):
            times.observe(size, cost_s(size))
    return times


def test_before_anything_was_seen_all_sizes_cost_the_same() -> None:
    times = StepTimes()
    assert {times.predict(size) for size in (0, 1, 7, 5000)} == {1.0}


@thorough
@given(
    samples=st.lists(
        st.tuples(st.integers(1, 3000), st.floats(1e-5, 10.0)), min_size=1, max_size=40
    )
)
def test_a_larger_step_is_never_predicted_to_be_cheaper(samples: list[tuple[int, float]]) -> None:
    times = StepTimes()
    for tokens, duration_s in samples:
        times.observe(tokens, duration_s)
    predicted = [times.predict(size) for size in range(0, 3000, 7)]
    assert all(math.isfinite(value) and value > 0 for value in predicted)
    assert all(b >= a * (1 - 1e-9) for a, b in itertools.pairwise(predicted))


def test_a_staircase_is_learnt() -> None:
    def staircase_s(tokens: int) -> float:
        return 0.010 if tokens <= 32 else 0.020 if tokens <= 64 else 0.055

    times = learnt(staircase_s)
    for size in (1, 5, 16, 31, 32, 64, 96, 200, 256):
        assert times.predict(size) == pytest.approx(staircase_s(size), rel=0.02), size
    # Between two steps something in between.
    assert 0.010 < times.predict(48) <= 0.020
    # Beyond what was seen it grows in proportion.
    assert times.predict(1024) == pytest.approx(4 * times.predict(256))


def test_sizes_between_the_knots_do_not_blur_the_knots() -> None:
    def linear_s(tokens: int) -> float:
        return 0.010 + 0.001 * tokens

    times = learnt(linear_s)
    for _ in range(300):
        times.observe(20, linear_s(20))
        times.observe(11, linear_s(11))
    for size in (8, 11, 12, 16, 20, 24, 32):
        assert times.predict(size) == pytest.approx(linear_s(size), rel=0.02), size


def test_one_slow_sample_is_forgotten() -> None:
    times = learnt(lambda _: 0.010)
    times.observe(16, 5.0)
    # It counts as twice the usual at most, a tenth of which is learnt.
    assert times.predict(16) <= 0.0111
    for _ in range(30):
        times.observe(16, 0.010)
    assert times.predict(16) == pytest.approx(0.010, rel=0.01)


def test_a_lasting_change_is_learnt() -> None:
    times = learnt(lambda _: 0.010)
    for _ in range(60):
        times.observe(16, 0.030)
    assert times.predict(16) == pytest.approx(0.030, rel=0.05)
    for _ in range(60):
        times.observe(16, 0.010)
    assert times.predict(16) == pytest.approx(0.010, rel=0.05)


# --- calibration ------------------------------------------------------------------------------


def play(
    calibration: Calibration,
    rounds: int,
    chance: random.Random,
    *,
    claims: Sequence[float],
    truth: Callable[[float], float],
) -> dict[float, float]:
    """Let a source claim and be found out; returns the mean calibrated probability by claim."""
    sums = dict.fromkeys(claims, 0.0)
    counts = dict.fromkeys(claims, 0)
    for _ in range(rounds):
        claim = chance.choice(claims)
        calibrated = calibration.apply(math.log(claim))
        sums[claim] += math.exp(calibrated)
        counts[claim] += 1
        calibration.observe(calibrated, chance.random() < truth(claim))
    return {claim: sums[claim] / counts[claim] for claim in claims}


def test_a_liars_estimates_sink() -> None:
    calibration = Calibration()
    assert math.exp(calibration.apply(math.log(0.9))) == pytest.approx(0.9)
    play(calibration, 100, random.Random(1), claims=[0.9], truth=lambda _: 0.0)
    assert math.exp(calibration.apply(math.log(0.9))) < 0.08
    play(calibration, 900, random.Random(1), claims=[0.9], truth=lambda _: 0.0)
    assert math.exp(calibration.apply(math.log(0.9))) < 0.01


def test_an_honest_sources_estimates_stay_what_they_are() -> None:
    claims = [0.1, 0.3, 0.6, 0.85]
    means = play(Calibration(), 4000, random.Random(2), claims=claims, truth=lambda claim: claim)
    for claim in claims:
        assert means[claim] == pytest.approx(claim, abs=0.05), means


@pytest.mark.parametrize("factor", [0.5, 0.8, 1.6])
def test_a_source_that_is_off_by_a_factor_is_corrected(factor: float) -> None:
    claims = [0.2, 0.4, 0.6]
    calibration = Calibration()
    play(calibration, 500, random.Random(3), claims=claims, truth=lambda claim: claim * factor)
    means = play(
        calibration, 4000, random.Random(4), claims=claims, truth=lambda claim: claim * factor
    )
    for claim in claims:
        assert means[claim] == pytest.approx(claim * factor, abs=0.05), means


def test_a_source_that_turns_honest_is_believed_again() -> None:
    calibration = Calibration()
    play(calibration, 5000, random.Random(5), claims=[0.9], truth=lambda _: 0.0)
    assert calibration.shift >= calibration.shift_min
    play(calibration, 200, random.Random(6), claims=[0.8], truth=lambda claim: claim)
    means = play(calibration, 2000, random.Random(7), claims=[0.8], truth=lambda claim: claim)
    assert means[0.8] == pytest.approx(0.8, abs=0.05)


def test_nothing_is_ever_certain() -> None:
    calibration = Calibration()
    for _ in range(1000):
        calibration.observe(calibration.apply(-2.0), accepted=True)
    assert math.exp(calibration.apply(-0.5)) == pytest.approx(0.99)
    assert calibration.shift <= 1.0


# --- the choice of nodes ----------------------------------------------------------------------


def grown(chance: random.Random, count: int, *, least: float = -3.0) -> DraftTree:
    tree = DraftTree(100, chance.randint(1, 9), nodes_max=64, depth_max=32)
    nodes = [tree.root]
    for token in range(count):
        child = tree.add(chance.choice(nodes), token, chance.uniform(least, 0.0), 1)
        assert child is not None
        nodes.append(child)
    return tree


def chain_tree(*logprobs: float) -> DraftTree:
    tree = DraftTree(100, 1, nodes_max=64, depth_max=64)
    node: Node | None = tree.root
    for logprob in logprobs:
        assert node is not None
        node = tree.add(node, 1, logprob, 1)
    return tree


def brute_force(
    trees: Sequence[DraftTree],
    depths_max: Sequence[int],
    times: StepTimes,
    other_tokens: int,
    nodes_max: int,
) -> float:
    """The best goodput over the prefixes of all usable nodes in order of path probability."""
    usable = [
        logprob
        for tree, depth_max in zip(trees, depths_max, strict=True)
        for logprob, node in tree.ranked()
        if node.position - tree.root.position <= depth_max
    ]
    usable.sort(reverse=True)
    rows = len(trees)
    return max(
        (rows + math.fsum(math.exp(logprob) for logprob in usable[:count]))
        / times.predict(rows + other_tokens + count)
        for count in range(min(nodes_max, len(usable)) + 1)
    )


@thorough
@given(
    seed=st.integers(0, 1 << 32),
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    nodes_max=st.integers(0, 24),
    other_tokens=st.sampled_from([0, 0, 5, 40]),
    base=st.floats(0.0, 10.0),
    step_at=st.integers(1, 30),
)
def test_the_choice_is_the_best_of_all_prefixes(
    seed: int, sizes: list[int], nodes_max: int, other_tokens: int, base: float, step_at: int
) -> None:
    chance = random.Random(seed)
    trees = [grown(chance, size) for size in sizes]
    depths_max = [chance.randint(0, 6) for _ in trees]
    slope = chance.choice([0.0, 0.01, 0.3, 1.0])
    times = learnt(lambda n: 0.001 + base + slope * n + (3.0 if n > step_at else 0.0), rounds=1)
    choice = choose_nodes(trees, depths_max, times, other_tokens=other_tokens, nodes_max=nodes_max)

    assert len(choice.nodes) == len(trees)
    count = sum(len(nodes) for nodes in choice.nodes)
    assert count <= nodes_max
    probability = 0.0
    for tree, depth_max, nodes in zip(trees, depths_max, choice.nodes, strict=True):
        paths = {node: logprob for logprob, node in tree.ranked()}
        chosen = {tree.root}
        for node in nodes:
            assert node.parent in chosen, "parents come first"
            chosen.add(node)
            assert node.position - tree.root.position <= depth_max
            probability += math.exp(paths[node])
    assert choice.expected_tokens == pytest.approx(len(trees) + probability)
    goodput = choice.expected_tokens / times.predict(len(trees) + other_tokens + count)
    best = brute_force(trees, depths_max, times, other_tokens, nodes_max)
    assert goodput == pytest.approx(best)


FLAT = learnt(lambda _: 0.02, rounds=1)
STEEP = learnt(lambda tokens: 0.001 * tokens, rounds=1)


def chosen_count(tree: DraftTree, times: StepTimes, *, depth_max: int = 32) -> int:
    choice = choose_nodes([tree], [depth_max], times, other_tokens=0, nodes_max=32)
    return len(choice.nodes[0])


def test_where_nodes_are_free_all_are_taken() -> None:
    assert chosen_count(chain_tree(*[-0.1] * 20), FLAT) == 20


def test_where_tokens_cost_their_time_none_is_taken() -> None:
    assert chosen_count(chain_tree(*[-0.1] * 20), STEEP) == 0


def test_hopeless_guesses_are_not_verified() -> None:
    mild = learnt(lambda tokens: 0.020 + 0.0001 * tokens, rounds=1)
    assert chosen_count(chain_tree(-0.1, -0.1), mild) == 2
    assert chosen_count(chain_tree(-8.0, -0.1), mild) == 0


def test_a_liar_is_not_given_a_token() -> None:
    calibration = Calibration()
    play(calibration, 1000, random.Random(1), claims=[0.9], truth=lambda _: 0.0)
    mild = learnt(lambda tokens: 0.020 + 0.0005 * tokens, rounds=1)
    assert chosen_count(chain_tree(math.log(0.9)), mild) == 1
    assert chosen_count(chain_tree(calibration.apply(math.log(0.9))), mild) == 0


def test_a_step_of_the_staircase_is_filled() -> None:
    # Up to 8 tokens cost the same, the ninth costs half as much again.
    stairs = learnt(lambda tokens: 0.02 if tokens <= 8 else 0.03, rounds=1)
    assert chosen_count(chain_tree(*[-0.05] * 8), stairs) == 7


def test_a_higher_step_is_taken_if_enough_lies_beyond_it() -> None:
    # The first guesses beyond the step cost more than they win; all of them together do not.
    stairs = learnt(lambda tokens: 0.02 if tokens <= 4 else 0.055, rounds=1)
    assert chosen_count(chain_tree(*[-0.01] * 4), stairs) == 3
    assert chosen_count(chain_tree(*[-0.01] * 12), stairs) == 12


def test_guesses_deeper_than_the_session_can_use_are_left_out() -> None:
    assert chosen_count(chain_tree(*[-0.1] * 20), FLAT, depth_max=3) == 3
    assert chosen_count(chain_tree(*[-0.1] * 20), FLAT, depth_max=0) == 0


def test_the_budget_goes_to_the_most_probable_of_all_sessions() -> None:
    sure, unsure = chain_tree(-0.1, -0.1, -0.1), chain_tree(-0.25, -3.0)
    choice = choose_nodes([unsure, sure], [9, 9], FLAT, other_tokens=0, nodes_max=3)
    assert [len(nodes) for nodes in choice.nodes] == [1, 2]


def test_without_sessions_nothing_is_chosen() -> None:
    choice = choose_nodes([], [], FLAT, other_tokens=10, nodes_max=8)
    assert (choice.nodes, choice.expected_tokens) == ((), 0.0)
