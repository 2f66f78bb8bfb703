"""The choice of nodes."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outrider.draft_tree import DraftTree, Node
from verifier_service.scheduling import GAIN_MIN, KNOTS, StepTimes, choose_nodes

thorough = settings(max_examples=150, deadline=None, derandomize=True)


def learnt(cost_s: Callable[[int], float]) -> StepTimes:
    """Step times after one step of each of the knots' sizes up to 256."""
    times = StepTimes()
    for size in (size for size in KNOTS if size <= 256):
        times.observe(size, cost_s(size))
    return times


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


def cost_s(times: StepTimes, rows: int, other_tokens: int, count: int) -> float:
    """Duration of a step with so many nodes, less what its prompts take."""
    prompts_s = times.predict(rows + other_tokens) - times.predict(rows)
    return times.predict(rows + other_tokens + count) - prompts_s


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
    usable = sorted((value for value in usable if value >= math.log(0.004)), reverse=True)
    rows = len(trees)
    return max(
        (rows + math.fsum(math.exp(logprob) for logprob in usable[:count]))
        / cost_s(times, rows, other_tokens, count)
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
    times = learnt(lambda n: 0.001 + base + slope * n + (3.0 if n > step_at else 0.0))
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
    goodput = choice.expected_tokens / cost_s(times, len(trees), other_tokens, count)
    best = brute_force(trees, depths_max, times, other_tokens, nodes_max)
    none = brute_force(trees, depths_max, times, other_tokens, 0)
    if best > none * (1 + GAIN_MIN) * (1 + 1e-9):
        assert goodput == pytest.approx(best)
    elif best < none * (1 + GAIN_MIN) * (1 - 1e-9):
        assert count == 0, "what gains next to nothing is not worth its trouble"
    probable = [
        math.exp(logprob)
        for tree, depth_max in zip(trees, depths_max, strict=True)
        for logprob, node in tree.ranked()
        if node.position - tree.root.position <= depth_max
    ]
    if count:
        assert choice.pay_min <= max(probable), "something was chosen below what is said to pay"


FLAT = learnt(lambda _: 0.02)
STEEP = learnt(lambda tokens: 0.001 * tokens)


def chosen_count(tree: DraftTree, times: StepTimes, *, depth_max: int = 32) -> int:
    choice = choose_nodes([tree], [depth_max], times, other_tokens=0, nodes_max=32)
    return len(choice.nodes[0])


def test_where_nodes_are_free_all_are_taken() -> None:
    assert chosen_count(chain_tree(*[-0.1] * 20), FLAT) == 20
    # But not those that are as good as impossible.
    assert chosen_count(chain_tree(-0.1, -5.0, -1.0, -0.1), FLAT) == 2


def test_where_tokens_cost_their_time_none_is_taken() -> None:
    assert chosen_count(chain_tree(*[-0.1] * 20), STEEP) == 0


def test_a_guess_is_not_cheaper_beside_a_prompt() -> None:
    """A step of 200 prompt tokens takes long, and one of its tokens is little of it."""
    times = learnt(lambda tokens: 0.02 + 0.002 * tokens)
    for probability, worth in ((0.15, True), (0.08, False)):
        tree = chain_tree(math.log(probability))
        for other_tokens in (0, 200):
            choice = choose_nodes([tree], [9], times, other_tokens=other_tokens, nodes_max=8)
            assert bool(choice.nodes[0]) is worth, (probability, other_tokens)


def test_hopeless_guesses_are_not_verified() -> None:
    mild = learnt(lambda tokens: 0.020 + 0.0001 * tokens)
    assert chosen_count(chain_tree(-0.1, -0.1), mild) == 2
    assert chosen_count(chain_tree(-8.0, -0.1), mild) == 0


def test_a_step_of_the_staircase_is_filled() -> None:
    # Up to 8 tokens cost the same, the ninth costs half as much again.
    stairs = learnt(lambda tokens: 0.02 if tokens <= 8 else 0.03)
    assert chosen_count(chain_tree(*[-0.05] * 8), stairs) == 7


def test_a_higher_step_is_taken_if_enough_lies_beyond_it() -> None:
    # The first guesses beyond the step cost more than they win; all of them together do not.
    stairs = learnt(lambda tokens: 0.02 if tokens <= 4 else 0.055)
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


def test_the_price_of_a_node_is_told() -> None:
    # One row; each further token costs a quarter of the first.
    times = learnt(lambda tokens: 0.03 + 0.01 * tokens)
    choice = choose_nodes([chain_tree()], [9], times, other_tokens=0, nodes_max=8)
    assert choice.pay_min == pytest.approx(0.25, abs=0.02)
    # Nothing pays in a step without room, and next to anything where tokens are free.
    assert choose_nodes([chain_tree()], [9], times, other_tokens=0, nodes_max=0).pay_min == math.inf
    assert choose_nodes([chain_tree()], [9], FLAT, other_tokens=0, nodes_max=8).pay_min < 0.01


def test_estimates_are_calibrated_when_nodes_are_chosen() -> None:
    worth = {1: -5.0, 2: -0.1}
    tree = DraftTree(
        100, 1, nodes_max=9, depth_max=9, calibrate=lambda source, claim: claim + worth[source]
    )
    tree.add(tree.root, 1, 0.0, 1)
    tree.add(tree.root, 2, -0.5, 2)
    mild = learnt(lambda tokens: 0.020 + 0.0005 * tokens)

    def chosen() -> list[int]:
        choice = choose_nodes([tree], [9], mild, other_tokens=0, nodes_max=8)
        return [node.token for node in choice.nodes[0]]

    assert chosen() == [2]
    worth[1] = -0.2  # believed again: what is in the tree already counts at once
    assert chosen() == [1, 2]
    # Where sources agree on a node, the more believable counts.
    worth[1] = -5.0
    tree.add(tree.root, 1, -0.3, 2)
    assert chosen() == [1, 2]


def test_a_session_without_hints_costs_the_others_nothing() -> None:
    choice = choose_nodes(
        [chain_tree(), chain_tree(-0.1)], [9, 9], FLAT, other_tokens=0, nodes_max=8
    )
    assert [len(nodes) for nodes in choice.nodes] == [0, 1]


def test_a_gain_too_small_to_be_known_is_left() -> None:
    # More probable than what is never verified, but one row gains less than a hundredth.
    assert chosen_count(chain_tree(math.log(0.008)), FLAT) == 0
    assert chosen_count(chain_tree(math.log(0.012)), FLAT) == 1
