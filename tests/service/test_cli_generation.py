"""`outrider generate`, `chat` and `workers` before an orchestrator whose verifier is a script."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
from click.testing import CliRunner, Result

from outrider.cli import main
from outrider.domain import (
    FinishReason,
    Grammar,
    GrammarKind,
    SamplingParams,
    SessionSpec,
    session_seed,
)
from outrider.v1 import verifier_pb2
from tests.support.fleet import orchestrator
from tests.support.scripted_verifier import (
    RunningScript,
    commit,
    opened,
    prompt_scores,
    scripted_verifier,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

SEED = 3
STEP = verifier_pb2.StepReport(duration_s=0.012, rows=1, tokens=1, kv_tokens_used=345, waiting=6)


def script(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    choice = [session_seed(SEED, number) for number in range(3)].index(spec.seed)
    yield opened(spec)
    if spec.prompt_logprobs is not None:
        yield prompt_scores(spec, 1, len(spec.prompt))
    yield commit(spec, 0, b"AB", step=STEP)
    yield commit(spec, 2, b"%d" % choice, FinishReason.STOP)


@dataclass(frozen=True, slots=True)
class Terminal:
    """Somebody at a command line."""

    endpoint: str
    verifier: RunningScript

    async def run(self, command: str, *arguments: str, given: str | None = None) -> Result:
        line = [command, *arguments, "--endpoint", self.endpoint]
        self.verifier.verifier.opens.clear()
        return await asyncio.to_thread(CliRunner().invoke, main, line, input=given)

    @property
    def spec(self) -> SessionSpec:
        """What the last command made of the request."""
        return self.verifier.verifier.opens[0]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def terminal() -> AsyncIterator[Terminal]:
    async with (
        scripted_verifier(script) as target,
        orchestrator([target.address]) as running,
    ):
        yield Terminal(running.address, target)


async def test_the_simple_case_is_text_and_a_summary(terminal: Terminal) -> None:
    result = await terminal.run("generate", "Hi", "--seed", "3")
    assert result.exit_code == 0
    assert result.stdout == "AB0\n"
    assert result.stderr.startswith("[stop; 3 tokens in ")
    assert terminal.spec.prompt == tuple(b"Hi")
    assert terminal.spec.sampling == SamplingParams()
    assert (terminal.spec.logprobs, terminal.spec.prompt_logprobs) == (None, None)
    from_input = await terminal.run("generate", "--seed", "3", given="Ho")
    assert from_input.stdout == "AB0\n"
    assert terminal.spec.prompt == tuple(b"Ho")


async def test_every_option_has_its_effect(terminal: Terminal) -> None:
    await terminal.run(
        *("generate", "Hi", "--seed", "3", "--temperature", "0.5", "--top-k", "7"),
        *("--top-p", "0.5", "--min-p", "0.25", "--repetition-penalty", "1.5"),
        *("--presence-penalty", "-0.5", "--frequency-penalty", "0.5"),
        *("--logit-bias", "9=-100", "--logit-bias", "4=1.5"),
        *("--tokens-min", "2", "--tokens-max", "30", "--regex", "[A-Z]+[0-9]"),
        *("--logprobs", "2", "--prompt-logprobs", "0", "--cache-salt", "mine"),
    )
    assert terminal.spec.sampling == SamplingParams(
        temperature=0.5,
        top_k=7,
        top_p=0.5,
        min_p=0.25,
        repetition_penalty=1.5,
        presence_penalty=-0.5,
        frequency_penalty=0.5,
        logit_bias=((4, 1.5), (9, -100.0)),
        tokens_min=2,
        grammar=Grammar(GrammarKind.REGEX, "[A-Z]+[0-9]"),
    )
    assert (terminal.spec.tokens_max, terminal.spec.cache_salt) == (30, "mine")
    assert (terminal.spec.logprobs, terminal.spec.prompt_logprobs) == (2, 0)


@pytest.mark.parametrize("command", ["generate", "chat"])
async def test_a_schema_is_a_file_or_itself(
    terminal: Terminal, tmp_path: Path, command: str
) -> None:
    schema = ' {"type": "integer"}'
    file = tmp_path / "schema.json"
    file.write_text(schema)
    for given in (schema, str(file)):
        result = await terminal.run(command, "Hi", "--seed", "3", "--json-schema", given)
        assert result.exit_code == 0
        assert terminal.spec.sampling.grammar == Grammar(GrammarKind.JSON_SCHEMA, schema)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--json-schema", "/no/such/file"], "No such file"),
        (["--logit-bias", "x"], "not ID=VALUE, such as 42=-100"),
        (["--logit-bias", "1.5=2"], "not ID=VALUE"),
        (["--logit-bias", "5=101"], "sampling.logit_bias: "),
        (["--n", "17"], "n: must lie between 1 and 16"),
        (["--regex", "a", "--json-schema", "{}"], "at most one of json_schema and regex"),
    ],
)
async def test_mistakes_are_explained(terminal: Terminal, arguments: list[str], text: str) -> None:
    result = await terminal.run("generate", "Hi", *arguments)
    assert result.exit_code != 0
    assert text in result.stderr
    assert "Traceback" not in result.output


async def test_choices_are_shown_one_after_the_other(terminal: Terminal) -> None:
    result = await terminal.run("generate", "Hi", "--seed", "3", "--n", "3")
    blocks = {f"choice {number}:\nAB{number}\n" for number in range(3)}
    assert all(block in result.stdout for block in blocks)
    assert len(result.stdout) == sum(map(len, blocks))
    assert result.stderr.count("[stop; 3 tokens") == 3


async def test_log_probabilities_are_shown_by_token(terminal: Terminal) -> None:
    options = ["--seed", "3", "--logprobs", "2", "--prompt-logprobs", "0"]
    result = await terminal.run("generate", "Hi", *options)
    assert result.stdout.splitlines() == [
        "prompt, from its second token on:",
        "     105   -13.1250",
        "AB0",
        "      65    -8.1250  0:0.0000  1:-0.2500",
        "      66    -8.2500  0:0.0000  1:-0.2500",
        "      48    -6.0000  0:0.0000  1:-0.2500",
    ]


async def test_json_has_what_was_asked_for(terminal: Terminal) -> None:
    plain = json.loads((await terminal.run("generate", "Hi", "--seed", "3", "--json")).stdout)
    assert (plain["text"], plain["seed"], plain["token_ids"]) == ("AB0", 3, [65, 66, 48])
    assert not plain.keys() & {"logprobs", "prompt_logprobs", "choice", "choices"}
    options = ["--n", "2", "--logprobs", "1", "--prompt-logprobs", "0", "--json"]
    both = json.loads((await terminal.run("generate", "Hi", "--seed", "3", *options)).stdout)
    assert list(both) == ["choices"]
    for number, choice in enumerate(both["choices"]):
        assert (choice["choice"], choice["text"]) == (number, f"AB{number}")
        assert choice["logprobs"][0] == {
            "token": 65,
            "logprob": -8.125,
            "top": [{"token": 0, "logprob": 0.0}],
        }
        assert [entry["token"] for entry in choice["prompt_logprobs"]] == [ord("i")]


async def test_workers_show_their_load(terminal: Terminal) -> None:
    await terminal.run("generate", "Hi", "--seed", "3")
    (row,) = json.loads((await terminal.run("workers", "--json")).stdout)
    assert (row["kv_tokens_used"], row["waiting"]) == (345, 6)
    header, line = (await terminal.run("workers")).stdout.splitlines()
    assert header.split()[5:8] == ["step", "kv", "waiting"]
    assert line.split()[5:] == ["12", "ms", "345", "6"]


async def test_workers_say_what_a_prompt_would_cost_there(terminal: Terminal) -> None:
    prompt = "Hello! " * 10
    await terminal.run("generate", prompt, "--seed", "3")
    (row,) = json.loads((await terminal.run("workers", "--for", prompt, "--json")).stdout)
    assert row["placement"].startswith("costs ")
    assert "holds 64 tokens, misses 6;" in row["placement"]
    (row,) = json.loads((await terminal.run("workers", "--json")).stdout)
    assert row["placement"] == ""
    refused = await terminal.run("workers", "--for", "")
    assert refused.exit_code != 0
