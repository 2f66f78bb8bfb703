"""A tiny target, and a run in which it has written a little."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from outrider.domain import SamplingParams
from outrider.model.distillation import stages
from outrider.model.distillation.generation import GenerationConfig
from outrider.model.distillation.openings import KINDS_FILE, read_openings
from outrider.model.distillation.stages import Run
from outrider.model.language_model import TransformersModel

TARGET = "random:tiny?seed=1&layers=4"
GENERATION = GenerationConfig(
    tokens_max=4_000,
    answer_tokens_max=40,
    turn_tokens_max=8,
    rows=16,
    file_conversations=8,
    answer_params=SamplingParams(temperature=1.0),
)


@pytest.fixture(scope="package", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def target() -> TransformersModel:
    return stages.load_target(TARGET, Path("/nonexistent"), device="cpu", threads=1)


@pytest.fixture(scope="package")
def written(tmp_path_factory: pytest.TempPathFactory, target: TransformersModel) -> Run:
    """A run whose corpus is complete; not to be changed."""
    run = stages.open_run(tmp_path_factory.mktemp("run"), TARGET, Path("/nonexistent"))
    stages.generate(run, read_openings(KINDS_FILE), GENERATION, device="cpu", threads=1)
    return run
