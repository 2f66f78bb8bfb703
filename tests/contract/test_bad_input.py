"""Bad input gets a clear error that names the field, and nobody else notices.

Requests go out as protobuf, past the checks of our own client, while another session is running.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from typing import Any

import grpc
import grpc.aio
import pytest
import pytest_asyncio

from drafter_service.proposers.language_model import LanguageModelProposer
from outrider import wire
from outrider.client import Request
from outrider.domain import RejectionCode
from outrider.errors import InvalidRequest, UnknownModel
from outrider.serving.server import CHANNEL_OPTIONS
from outrider.serving.status import FIELD_KEY
from outrider.v1 import (
    drafter_pb2,
    drafter_pb2_grpc,
    generation_pb2,
    generation_pb2_grpc,
    types_pb2,
    verifier_pb2,
    verifier_pb2_grpc,
)
from tests.support.cases import answers, listen
from tests.support.fleet import (
    DRAFT,
    TARGET,
    RunningOrchestrator,
    RunningVerifier,
    drafter,
    info_of,
    load,
    lookup,
    orchestrator,
    until,
    verifier,
)
from tests.support.hostile import IDS_ONLY, nothing, scripted_drafter
from tests.support.raw import binding, drafter_stream, session, verifier_stream
from tests.support.reference import Case, expect
from verifier_service.config import EngineConfig

pytestmark = pytest.mark.asyncio(loop_scope="module")

INVALID = grpc.StatusCode.INVALID_ARGUMENT

BYSTANDER = Case(tuple(b"Somebody else's prompt"), 128, temperature=0.8, top_p=0.95, seed=5)


@dataclass(frozen=True, slots=True)
class Scene:
    """A small fleet and what its bystander must say."""

    target: RunningVerifier
    running: RunningOrchestrator
    expected: tuple[int, ...]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene() -> AsyncIterator[Scene]:
    config = EngineConfig(step_delay_s=0.01, warm_up=False)
    async with (
        verifier(load(TARGET), config=config) as target,
        drafter(lookup()) as helper,
        orchestrator([target.address], [helper.address]) as running,
    ):
        yield Scene(target, running, expect(TARGET, BYSTANDER).ids)


@contextlib.asynccontextmanager
async def undisturbed(scene: Scene) -> AsyncIterator[None]:
    """Somebody else generates before, meanwhile and after, and gets what it should."""
    bystander = listen(scene.running.client, replace(BYSTANDER, tokens_max=1_500))
    await bystander.until_ids(2)
    yield
    await bystander.until_ids(len(bystander.ids) + 6)
    heard = tuple(bystander.ids[: BYSTANDER.tokens_max])
    assert heard == scene.expected[: len(heard)]
    await bystander.close()


async def refused(address: str, message: generation_pb2.GenerateRequest) -> grpc.aio.AioRpcError:
    """Send a request as it is; returns how it failed."""
    options = [("grpc.max_send_message_length", -1), *CHANNEL_OPTIONS[:1]]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        call = generation_pb2_grpc.GenerationServiceStub(channel).Generate(message, timeout=20)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        return caught.value


def field_of(error: grpc.aio.AioRpcError) -> str | bytes | None:
    return {key: value for key, value in error.trailing_metadata() or ()}.get(FIELD_KEY)


def assert_clear(text: str) -> None:
    """For people who cannot see our code."""
    assert 10 < len(text) < 400
    assert "Traceback" not in text
    assert ".py" not in text
    assert "/work" not in text
    assert not re.search(r"0x[0-9a-f]{6,}", text)


def sampling(**values: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt="Hi", sampling=types_pb2.SamplingParams(**values))


def ids(*tokens: int, **others: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(
        token_ids=generation_pb2.TokenIds(ids=tokens), tokens_max=4, **others
    )


def plain(prompt: str = "Hi", **others: Any) -> generation_pb2.GenerateRequest:
    return generation_pb2.GenerateRequest(prompt=prompt, **others)


def chat(*contents: str) -> generation_pb2.GenerateRequest:
    messages = [generation_pb2.ChatMessage(role="user", content=text) for text in contents]
    return generation_pb2.GenerateRequest(chat=generation_pb2.Chat(messages=messages))


BAD: dict[str, tuple[generation_pb2.GenerateRequest, str]] = {
    "no input": (generation_pb2.GenerateRequest(tokens_max=4), "prompt"),
    "empty prompt": (plain(""), "prompt"),
    "empty chat": (chat(), "chat.messages"),
    "no ids": (ids(), "token_ids"),
    "prompt over the context": (plain("x" * 2048), "prompt"),
    "chat over the context": (chat("x" * 1500, "y" * 600), "chat"),
    "ids over the context": (ids(*[65] * 5000), "token_ids"),
    "id outside the vocabulary": (ids(65, 260), "token_ids"),
    "id far outside the vocabulary": (ids(65, 2**32 - 1), "token_ids"),
    "stop id outside the vocabulary": (ids(65, stop_ids=[10, 260]), "stop_ids"),
    "too many stop ids": (ids(65, stop_ids=[1] * 300), "stop_ids"),
    "negative temperature": (sampling(temperature=-0.5), "sampling.temperature"),
    "NaN temperature": (sampling(temperature=math.nan), "sampling.temperature"),
    "infinite temperature": (sampling(temperature=math.inf), "sampling.temperature"),
    "minus infinite temperature": (sampling(temperature=-math.inf), "sampling.temperature"),
    "zero top_p": (sampling(top_p=0.0), "sampling.top_p"),
    "negative top_p": (sampling(top_p=-0.1), "sampling.top_p"),
    "top_p over one": (sampling(top_p=1.01), "sampling.top_p"),
    "NaN top_p": (sampling(top_p=math.nan), "sampling.top_p"),
    "min_p over one": (sampling(min_p=1.5), "sampling.min_p"),
    "negative min_p": (sampling(min_p=-0.1), "sampling.min_p"),
    "NaN min_p": (sampling(min_p=math.nan), "sampling.min_p"),
    "negative top_k": (sampling(top_k=-1), "sampling.top_k"),
    "zero repetition_penalty": (sampling(repetition_penalty=0.0), "sampling.repetition_penalty"),
    "NaN repetition_penalty": (
        sampling(repetition_penalty=math.nan),
        "sampling.repetition_penalty",
    ),
    "presence_penalty over two": (sampling(presence_penalty=2.5), "sampling.presence_penalty"),
    "NaN presence_penalty": (sampling(presence_penalty=math.nan), "sampling.presence_penalty"),
    "frequency_penalty below": (sampling(frequency_penalty=-2.5), "sampling.frequency_penalty"),
    "bias of an id outside": (sampling(logit_bias={260: 1.0}), "sampling.logit_bias"),
    "bias over a hundred": (sampling(logit_bias={5: 101.0}), "sampling.logit_bias"),
    "NaN bias": (sampling(logit_bias={5: math.nan}), "sampling.logit_bias"),
    "too many biases": (
        sampling(logit_bias=dict.fromkeys(range(1025), 1.0)),
        "sampling.logit_bias",
    ),
    "tokens_min over tokens_max": (
        plain(tokens_max=4, sampling=types_pb2.SamplingParams(tokens_min=5)),
        "sampling.tokens_min",
    ),
    "tokens_min over the context": (sampling(tokens_min=2047), "sampling.tokens_min"),
    "grammar of no kind": (sampling(grammar=types_pb2.Grammar()), "sampling.grammar"),
    "empty regex": (sampling(grammar=types_pb2.Grammar(regex="")), "sampling.grammar.regex"),
    "empty schema": (
        sampling(grammar=types_pb2.Grammar(json_schema="")),
        "sampling.grammar.json_schema",
    ),
    "overlong regex": (
        sampling(grammar=types_pb2.Grammar(regex="x" * 65_537)),
        "sampling.grammar.regex",
    ),
    "grammar without an end": (
        plain(
            ignore_eos=True,
            sampling=types_pb2.SamplingParams(grammar=types_pb2.Grammar(regex="a+")),
        ),
        "ignore_eos",
    ),
    "no choices": (plain(n=0), "n"),
    "too many choices": (plain(n=17), "n"),
    "far too many choices": (plain(n=2**32 - 1), "n"),
    "too many logprobs": (plain(logprobs=21), "logprobs"),
    "too many prompt logprobs": (plain(prompt_logprobs=21), "prompt_logprobs"),
    "overlong salt": (plain(cache_salt="x" * 257), "cache_salt"),
    "no tokens wanted": (plain(tokens_max=0), "tokens_max"),
    "too many tokens wanted": (plain(tokens_max=2047), "tokens_max"),
    "far too many tokens wanted": (plain(tokens_max=2**32 - 1), "tokens_max"),
    "empty stop string": (plain(stop=["fine", ""]), "stop"),
    "too many stop strings": (plain(stop=[str(number) for number in range(17)]), "stop"),
    "overlong stop string": (plain(stop=["x" * 1025]), "stop"),
    "message over the cap": (plain("x" * (4 * 1024 * 1024 + 1)), "prompt"),
    "chat over the cap": (chat("x" * (4 * 1024 * 1024 + 1)), "chat"),
}


@pytest.mark.parametrize("name", BAD)
async def test_the_field_is_named(scene, name):
    message, field = BAD[name]
    async with undisturbed(scene):
        error = await refused(scene.running.address, message)
    assert error.code() is INVALID
    assert field_of(error) == field
    assert error.details().startswith(f"{field}: ")
    assert_clear(error.details())


async def test_a_model_that_nobody_serves(scene):
    async with undisturbed(scene):
        error = await refused(scene.running.address, plain(model="huge"))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    assert field_of(error) == "model"
    assert "'huge'" in error.details()
    assert "tiny" in error.details()  # what there is instead
    assert_clear(error.details())


async def test_a_message_that_no_server_of_ours_takes(scene):
    async with undisturbed(scene):
        error = await refused(scene.running.address, plain("x" * (65 * 1024 * 1024)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert_clear(error.details())


@pytest.mark.parametrize(
    ("asked", "field"),
    [
        (Request(), "prompt"),
        (Request(prompt="a", token_ids=[1]), "prompt"),
        (Request(prompt="a", seed=-1), "seed"),
        (Request(prompt="a", tokens_max=-1), "tokens_max"),
        (Request(prompt="a", stop_ids=[-1]), "stop_ids"),
        (Request(token_ids=[2**32]), "token_ids"),
        (Request(prompt="a", n=-1), "n"),
        (Request(prompt="a", n=0), "n"),
        (Request(prompt="a", n=2), "n"),
        (Request(prompt="a", logprobs=-1), "logprobs"),
        (Request(prompt="a", logprobs=21), "logprobs"),
        (Request(prompt="a", prompt_logprobs=-1), "prompt_logprobs"),
        (Request(prompt="a", tokens_min=-1), "sampling.tokens_min"),
        (Request(prompt="a", logit_bias={-1: 1.0}), "sampling.logit_bias"),
        (Request(prompt="a", logit_bias={260: 1.0}), "sampling.logit_bias"),
        (Request(prompt="a", regex="a", json_schema="{}"), "sampling.grammar"),
        (Request(prompt="a", regex=""), "sampling.grammar.regex"),
        (Request(prompt="a", json_schema={"enum": [object]}), "sampling.grammar.json_schema"),
        (Request(prompt="a", top_k=2**40), "sampling.top_k"),
        (Request(prompt="a", temperature=math.nan), "sampling.temperature"),
        (Request(prompt=""), "prompt"),
        (Request(chat=[]), "chat.messages"),
        (Request(token_ids=[]), "token_ids"),
    ],
    ids=str,
)
async def test_our_client_raises_the_same(scene, asked, field):
    with pytest.raises(InvalidRequest) as caught:
        await scene.running.client.complete(asked)
    assert caught.value.field == field
    assert str(caught.value).count(f"{field}: ") == 1


async def test_our_client_knows_an_unknown_model(scene):
    with pytest.raises(UnknownModel, match="huge"):
        await scene.running.client.complete(Request(prompt="a", model="huge"))


async def test_garbage_in_place_of_a_request(scene):
    async with undisturbed(scene):
        options = CHANNEL_OPTIONS
        async with grpc.aio.insecure_channel(scene.running.address, options=options) as channel:
            generate = channel.unary_stream("/outrider.v1.GenerationService/Generate")
            call = generate(b"\xff\xff\xff\xff\x01garbage", timeout=10)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
    assert "Traceback" not in (caught.value.details() or "")


# --- a verifier does not trust its orchestrator ---------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"prompt": (65, 260)}, "prompt"),
        ({"prompt": ()}, "prompt"),
        ({"committed": (2**32 - 1,)}, "committed"),
        ({"stop_ids": frozenset({260})}, "stop_ids"),
        ({"tokens_max": 0}, "tokens_max"),
        ({"committed": (1, 2), "tokens_max": 2}, "tokens_max"),
        ({"tokens_max": 2048}, "tokens_max"),
    ],
    ids=str,
)
async def test_a_session_that_a_verifier_cannot_open(scene, changes, field):
    async with undisturbed(scene), verifier_stream(scene.target.address) as stream:
        await stream.open(session(1, b"A", **changes))
        await stream.until(lambda: bool(stream.rejections))
        (rejection,) = stream.rejections
        assert rejection.code is RejectionCode.INVALID
        assert rejection.field == field
        assert_clear(rejection.message)


async def test_sampling_that_a_verifier_cannot_use(scene):
    async with undisturbed(scene), verifier_stream(scene.target.address) as stream:
        message = wire.session_to_pb(session(1, b"A"))
        message.sampling.temperature = math.nan
        await stream.send(opens=[message])
        await stream.until(lambda: bool(stream.rejections))
        assert stream.rejections[0].field == "sampling.temperature"


# --- parties that do not fit ----------------------------------------------------------------------


async def test_a_drafter_with_another_tokenizer_is_refused_at_pairing(scene):
    model = load(DRAFT)
    info = replace(info_of(model, "stranger", "language-model"), tokenizer_fingerprint="f" * 64)
    target = scene.target.address
    async with (
        drafter(LanguageModelProposer(model, info)) as stranger,
        drafter(lookup()) as helper,
        orchestrator([target], [stranger.address, helper.address]) as running,
    ):
        states = {worker.address: worker for worker in await running.client.workers()}
        assert states[stranger.address].state == "refused"
        reason = states[stranger.address].reason
        assert "tokenizer mismatch" in reason
        assert "ffffffffffff" in reason
        assert_clear(reason)
        assert states[helper.address].state == "ready"
        (found,) = await answers(running.client, [BYSTANDER])
        assert found.token_ids == scene.expected
        assert stranger.grower.load == 0


async def test_a_drafter_refuses_a_target_with_another_tokenizer(scene):
    model = load(DRAFT)
    proposer = LanguageModelProposer(model, info_of(model, "draft", "language-model"))
    async with drafter(proposer) as helper, drafter_stream(helper.address) as call:
        specs = [
            binding(1, b"A", "f" * 64),
            binding(2, b"A", ""),
            binding(3, b"A", model.tokenizer_fingerprint),
        ]
        await call.write(drafter_pb2.ProposeRequest(binds=[wire.bind_to_pb(s) for s in specs]))
        rejections, bound = [], []
        while len(rejections) + len(bound) < 3:
            response = await call.read()
            rejections += response.rejections
            bound += response.bound
        assert [(row.session, row.binding) for row in bound] == [(3, 1)]
        assert {row.session for row in rejections} == {1, 2}
        for row in rejections:
            assert row.code == types_pb2.REJECTION_CODE_MISMATCH
            assert row.field == "tokenizer_fingerprint"
            assert_clear(row.message)


async def test_another_protocol_version_is_refused_by_workers(scene):
    hello = types_pb2.Hello(orchestrator="future", protocol_version=99)
    async with (
        undisturbed(scene),
        drafter(lookup()) as helper,
        grpc.aio.insecure_channel(scene.target.address) as verifier_channel,
        grpc.aio.insecure_channel(helper.address) as drafter_channel,
    ):
        verify = verifier_pb2_grpc.VerifierServiceStub(verifier_channel).Verify()
        await verify.write(verifier_pb2.VerifyRequest(hello=hello))
        propose = drafter_pb2_grpc.DrafterServiceStub(drafter_channel).Propose()
        await propose.write(drafter_pb2.ProposeRequest(hello=hello))
        for call in (verify, propose):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call.read()
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "hello.protocol_version" in caught.value.details()
            assert "99" in caught.value.details()
            assert_clear(caught.value.details())


async def test_another_protocol_version_is_refused_by_the_orchestrator(scene):
    info = replace(IDS_ONLY, protocol_version=99)
    async with (
        scripted_drafter(nothing, info=info) as future,
        orchestrator([scene.target.address], [future.address], wait=False) as running,
    ):

        async def told() -> bool:
            states = {w.role: (w.state, w.reason) for w in await running.client.workers()}
            return states["verifier"][0] == "ready" and "protocol 99" in states["drafter"][1]

        await until(told, what="the reason for which the worker is not used")
        (found,) = await answers(running.client, [BYSTANDER])
        assert found.token_ids == scene.expected
        assert not future.drafter.binds
