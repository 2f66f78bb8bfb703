"""Set before torch is imported: test processes run side by side, and OpenMP teams of several
processes on the same cores wait for each other at every barrier, twenty times slower."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

_NO_SECOND_CHANCE = {"test_equality.py", "test_fuzz.py"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options for sizes that take too long for every run."""
    parser.addoption(
        "--slow-readers",
        type=int,
        default=200,
        help="clients at once that read nothing (tests/service/test_slow_readers.py)",
    )
    parser.addoption(
        "--containers",
        action="store_true",
        help="run the images' pods with podman (tests/deploy/test_containers.py)",
    )
    parser.addoption(
        "--containers-model",
        default="random:tiny?seed=1",
        help="what they serve; '' for what the overlay names, which is fetched",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let no second try hide an output that was another one once."""
    for item in items:
        if item.path.name in _NO_SECOND_CHANCE or "statistical" in item.path.parts:
            item.add_marker(pytest.mark.flaky(reruns=0))


@pytest.fixture
def slow_readers(request: pytest.FixtureRequest) -> int:
    """How many clients at once read nothing."""
    count: int = request.config.getoption("--slow-readers")
    return count
