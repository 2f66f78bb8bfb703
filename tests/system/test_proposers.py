"""Every proposer as a process of its own beside a real verifier: lossless, and it wins something.

What each of them guesses is tested with the units; here are handshake, protocol and settings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from drafter_service.datastore import open_datastore
from drafter_service.datastore_building import build_datastore
from drafter_service.proposers.datastore import DatastoreProposer
from orchestrator.config import DriverConfig
from orchestrator.http.metrics import Exposition
from outrider.client import Completion
from outrider.model.random_model import build_random_model, parse_random_spec
from outrider.tokenizer import byte_tokenizer, byte_tokenizer_files
from tests.support.cases import SAMPLED, answers, request, totals
from tests.support.fleet import (
    DRAFT,
    TARGET,
    RunningOrchestrator,
    drafter,
    load,
    orchestrator,
    settled,
    until,
    verifier,
)
from tests.support.processes import free_port, running
from tests.support.reference import Case, Expected, Tally, expect
from verifier_service.config import EngineConfig

pytestmark = pytest.mark.slow

ENGINE = EngineConfig(step_delay_s=0.02, warm_up=False)
PROMPTS = (b"The quick brown fox", b"one two three one two three one two", b"abcabcabc")
CASES = [
    *(Case(tuple(prompt), 40, ignore_eos=True) for prompt in PROMPTS),
    *(Case(tuple(prompt), 40, ignore_eos=True, seed=3, **SAMPLED) for prompt in PROMPTS),
]


def expected() -> list[Expected]:
    return [expect(TARGET, case) for case in CASES]


def corpus(folder: Path, count: int = len(CASES)) -> Path:
    """A datastore that holds what is going to be said, in the first so many cases."""
    known = list(zip(CASES, expected(), strict=True))[:count]
    documents = [(*case.prompt, *said.ids) for case, said in known]
    build_datastore(folder / "corpus.store", documents, byte_tokenizer())
    return folder / "corpus.store"


@contextlib.asynccontextmanager
async def drafters(*settings: Sequence[str]) -> AsyncIterator[list[str]]:
    """Run a drafter process for each of the settings; yields their addresses."""
    async with contextlib.AsyncExitStack() as stack:
        addresses: list[str] = []
        for options in settings:
            port = free_port()
            command = [sys.executable, "-m", "drafter_service", "--port", str(port), *options]
            await stack.enter_async_context(running(command))
            addresses.append(f"127.0.0.1:{port}")
        yield addresses


@contextlib.asynccontextmanager
async def fleet(*settings: Sequence[str]) -> AsyncIterator[RunningOrchestrator]:
    """A verifier, such drafters, and an orchestrator that binds all of them to each session."""
    config = DriverConfig(drafters_per_session=len(settings))
    async with (
        verifier(load(TARGET), config=ENGINE) as target,
        drafters(*settings) as addresses,
        orchestrator([target.address], addresses, config=config, wait=False) as found,
    ):
        # A process that loads torch takes its time.
        await settled(found.client, 1 + len(settings), timeout_s=60.0)
        yield found


def assert_lossless(found: Sequence[Completion]) -> None:
    tally = Tally()
    for case, answer, completion in zip(CASES, expected(), found, strict=True):
        tally.check(TARGET, case, answer, completion.token_ids)
    tally.assert_identical()


def won(found: Sequence[Completion]) -> dict[str, int]:
    """Accepted guesses by proposer."""
    total: dict[str, int] = {}
    for completion in found:
        for name, (_, accepted) in completion.finished.by_proposer.items():
            total[name] = total.get(name, 0) + accepted
    return total


MODEL = ("--model", DRAFT, "--dtype", "float32", "--device", "cpu", "--threads", "1")


@pytest.mark.parametrize(
    ("proposer", "options"),
    [
        ("lookup", ()),
        ("datastore", ()),
        ("recycling", ()),
        ("cascade:lookup,recycling", ()),
        ("cascade:lookup,datastore,recycling,language-model", MODEL),
    ],
)
async def test_each_proposer_wins_something_and_changes_nothing(
    tmp_path: Path, proposer: str, options: Sequence[str]
) -> None:
    more = ("--datastore", str(corpus(tmp_path))) if "datastore" in proposer else ()
    async with fleet(("--proposer", proposer, *more, *options)) as found:
        # The second time recycling knows what the target said.
        for _ in range(2):
            answered = await answers(found.client, CASES)
            assert_lossless(answered)
    assert won(answered)[proposer] > 0


async def test_trees_of_several_drafters_unite(tmp_path: Path) -> None:
    # Of the other half the model knows more.
    store = str(corpus(tmp_path, len(CASES) // 2))
    async with fleet(
        ("--proposer", "datastore", "--datastore", store),
        ("--proposer", "language-model", *MODEL),
    ) as found:
        answered = [*await answers(found.client, CASES), *await answers(found.client, CASES)]
        assert_lossless(answered[: len(CASES)])
        assert_lossless(answered[len(CASES) :])
        metrics = Exposition(found.driver, found.fleet, {}, vllm_names=False).text().decode()
        [traced] = await answers(found.client, CASES[:1], trace=True)
    shares = won(answered)
    counters = totals(answered)
    assert set(shares) == {"datastore", "language-model"}
    assert all(shares.values()), shares
    assert sum(shares.values()) == counters.accepted_draft_tokens
    assert sum(counters.verified_by_source.values()) == counters.verified_draft_tokens
    for name, accepted in shares.items():
        line = next(
            line
            for line in metrics.splitlines()
            if line.startswith("outrider_proposer_accepted_tokens_total") and f'"{name}"' in line
        )
        assert float(line.split()[-1]) == accepted
    names = json.loads(traced.finished.trace)["otherData"]["sources"]
    assert set(names.values()) <= set(shares)
    assert names


async def test_candidates_are_computed_only_if_a_drafter_asks_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[int] = []

    def counted(logits: object, count: int) -> list[tuple[int, ...]]:
        asked.append(count)
        return []

    monkeypatch.setattr("verifier_service.sampling_step.top_candidates", counted)
    async with fleet(("--proposer", "lookup")) as found:
        assert_lossless(await answers(found.client, CASES))
        assert asked == []
    async with fleet(("--proposer", "recycling")) as found:
        await answers(found.client, CASES[:1], speculation=False)
        assert asked == []
        # What the verifier says of candidates here is nonsense, and harmless.
        assert_lossless(await answers(found.client, CASES))
        assert set(asked) == {8}


async def test_a_datastore_of_another_tokenizer_is_refused(tmp_path: Path) -> None:
    other: Tokenizer = byte_tokenizer()
    other.add_tokens(["<|more|>"])
    build_datastore(tmp_path / "other.store", ["some text"], other)
    proposer = DatastoreProposer(open_datastore(tmp_path / "other.store"))
    async with (
        verifier(load(TARGET), config=ENGINE) as target,
        drafter(proposer) as foreign,
        orchestrator([target.address], [foreign.address]) as found,
    ):
        statuses = {status.role: status for status in await found.client.workers()}
        assert statuses["drafter"].state == "refused"
        assert "tokenizer mismatch" in statuses["drafter"].reason
        [completion] = await answers(found.client, CASES[:1])
        assert completion.finished.speculation.received_draft_tokens == 0


async def test_a_corrupt_datastore_ends_the_drafter_with_a_clear_word(tmp_path: Path) -> None:
    store = corpus(tmp_path)
    content = bytearray(store.read_bytes())
    content[len(content) // 2] ^= 1
    store.write_bytes(content)
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "drafter_service", "--proposer", "datastore"),
        *("--datastore", str(store)),
        stderr=asyncio.subprocess.PIPE,
    )
    _, said = await process.communicate()
    assert process.returncode == 2
    assert f"error: datastore {store} is corrupt" in said.decode()


async def test_sessions_share_what_was_recycled_within_their_salt_only() -> None:
    async with fleet(("--proposer", "recycling")) as found:
        case = CASES[0]

        async def accepted(salt: str) -> int:
            asked = request(case, cache_salt=salt)
            completion = await found.client.complete(asked, timeout_s=60)
            assert completion.token_ids == expected()[0].ids
            return completion.finished.speculation.accepted_draft_tokens

        first = await accepted("mine")
        again = await accepted("mine")
        assert again > first
        assert await accepted("yours") <= first + (again - first) // 2


def save_model(spec: str, folder: Path) -> None:
    """Write a tiny random model as a folder, tokenizer included."""
    build_random_model(parse_random_spec(spec), "eager").save_pretrained(folder)
    for name, data in byte_tokenizer_files().items():
        (folder / name).write_bytes(data)


async def test_weights_are_swapped_while_serving(tmp_path: Path) -> None:
    bad, good = "random:tiny?seed=9", TARGET
    save_model(bad, tmp_path / "1")
    save_model(good, tmp_path / "2")
    link = tmp_path / "model"
    link.symlink_to("1")
    port = free_port()
    model = ("--model", str(link), *MODEL[2:])
    command = [sys.executable, "-m", "drafter_service", "--proposer", "language-model", *model]
    async with (
        verifier(load(TARGET), config=ENGINE) as target,
        running([*command, "--port", str(port)]) as process,
        orchestrator([target.address], [f"127.0.0.1:{port}"], wait=False) as found,
    ):
        await settled(found.client, 2, timeout_s=60.0)
        [drafting] = found.fleet.drafters.values()
        first = drafting.source
        long = Case(CASES[0].prompt, 400, ignore_eos=True)
        under_way = asyncio.create_task(found.client.complete(request(long), timeout_s=90))

        async def bound() -> bool:
            return bool(drafting.sessions)

        await until(bound, what="a session with the drafter")
        (tmp_path / "new").symlink_to("2")
        (tmp_path / "new").rename(link)
        process.send_signal(signal.SIGHUP)

        async def swapped() -> bool:
            return drafting.source != first

        await until(swapped, what="the new version is known", timeout_s=60.0)
        completion = await under_way
        assert process.returncode is None
        [again] = await answers(found.client, CASES[:1])
        metrics = Exposition(found.driver, found.fleet, {}, vllm_names=False).text().decode()
    tally = Tally()
    for case, answer in ((long, completion), (CASES[0], again)):
        tally.check(TARGET, case, expect(TARGET, case), answer.token_ids)
    tally.assert_identical()
    # Who guesses like the target is always right, and who does not hardly ever is.
    accepted = again.finished.speculation.accepted_by_source
    assert set(accepted) == {drafting.source}
    versions = {
        line.split('version="')[1].split('"')[0]: float(line.split()[-1])
        for line in metrics.splitlines()
        if line.startswith('outrider_proposer_accepted_tokens_total{proposer="language-model"')
    }
    assert len(versions) == 2
    assert versions[found.fleet.guessers[drafting.source].version[:12]] > 0
