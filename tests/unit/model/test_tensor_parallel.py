"""What a split model refuses, and what keeps leader and followers in step."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from transformers import LlamaConfig

from outrider.errors import ModelLoadError
from outrider.model.kv_cache import Extension
from outrider.model.step_inputs import step_inputs
from outrider.model.tensor_parallel import Move, NewPool, Ranks, Run, check_divisible, ranks_started


def ranks(size: int) -> Ranks:
    nothing: Any = None
    return Ranks(0, size, nothing, nothing)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "reason"),
    [
        (8, 4, 4, None),
        (8, 4, 1, None),
        (8, 2, 4, "its 2 key-value heads cannot be split evenly over 4"),
        (6, 6, 4, "its 6 attention heads cannot be split evenly over 4"),
    ],
)
def test_heads_must_be_dealt_out_evenly(heads, kv_heads, size, reason):
    config = LlamaConfig(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=48)
    if reason is None:
        check_divisible(config, ranks(size))
    else:
        with pytest.raises(ModelLoadError, match=reason):
            check_divisible(config, ranks(size))


def test_ranks_are_those_of_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert ranks_started() == (0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert ranks_started() == (3, 4)


class OneBlock:
    """A cache of five tokens in block 2, as far as a pass wants to know."""

    blocks = (2,)
    prefix_length = 5
    tree_positions = np.zeros(0, dtype=np.int64)


def test_orders_arrive_as_they_were_given():
    cache: Any = OneBlock()
    plan = Extension(5, np.array([5, 5]), np.eye(2, dtype=np.bool_), (-1, -1))
    inputs = step_inputs([[7, 8]], [cache], [plan], [[0, 1]])
    run = pickle.loads(pickle.dumps(Run(1, inputs)))
    assert run.pool == 1
    for name in ("tokens", "positions", "begins", "lengths", "tables", "limits", "wanted"):
        assert np.array_equal(getattr(run.inputs, name), getattr(inputs, name)), name
    assert np.array_equal(run.inputs.tails[0], np.eye(2))
    assert np.array_equal(run.inputs.write_slots, inputs.write_slots)
    move = pickle.loads(pickle.dumps(Move(1, np.array([1]), np.array([2]))))
    assert (move.pool, move.sources[0], move.targets[0]) == (1, 1, 2)
    pool = NewPool(0, 64, ())
    assert pickle.loads(pickle.dumps(pool)) == pool
