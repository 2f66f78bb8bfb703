"""The command line before an orchestrator that talks to holders of certificates only."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import trustme
from click.testing import CliRunner, Result

from orchestrator.config import DriverConfig
from orchestrator.service import SERVICE_NAMES, GenerationService
from orchestrator.takeover import Takeover
from outrider.cli import main
from outrider.config import Tls
from outrider.domain import FinishReason, SessionSpec
from outrider.serving.server import Server
from outrider.v1 import generation_pb2_grpc, verifier_pb2
from tests.support.certificates import identity
from tests.support.fleet import orchestrator
from tests.support.scripted_verifier import commit, opened, scripted_verifier

HOST = "127.0.0.1"
COMMANDS = (("generate", "Hi", "--json"), ("chat", "Hi", "--json"), ("workers", "--json"))


def script(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    yield opened(spec)
    yield commit(spec, 0, b"AB", FinishReason.STOP)


@contextlib.asynccontextmanager
async def secured(tls: Tls) -> AsyncIterator[str]:
    """A second gRPC door of an orchestrator, with mutual TLS."""
    async with scripted_verifier(script) as target, orchestrator([target.address]) as running:
        takeover = Takeover(running.driver, running.fleet, None)
        service = GenerationService(running.driver, running.fleet, DriverConfig(), takeover)
        server = Server(SERVICE_NAMES, host=HOST, port=0, tls=tls)
        generation_pb2_grpc.add_GenerationServiceServicer_to_server(service, server.grpc)
        address = await server.start()
        try:
            yield address
        finally:
            await server.stop(0)


def options(tls: Tls) -> list[str]:
    files = {"cert": tls.certificate, "key": tls.private_key, "ca": tls.authority}
    given = [text for name, path in files.items() for text in (f"--tls-{name}", str(path))]
    return given if tls.server_name is None else [*given, "--tls-server-name", tls.server_name]


async def run(endpoint: str, command: Iterable[str], given: Iterable[str] = ()) -> Result:
    line = [*command, *given, "--endpoint", endpoint]
    return await asyncio.to_thread(CliRunner().invoke, main, line)


async def test_commands_show_their_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    ours = identity(authority, tmp_path / "a", "fleet.internal")
    mine = identity(authority, tmp_path / "b", "me")
    named = Tls(mine.certificate, mine.private_key, mine.authority, "fleet.internal")
    async with secured(ours) as endpoint:
        for command in COMMANDS:
            result = await run(endpoint, command, options(named))
            assert result.exit_code == 0, result.output
            told = json.loads(result.stdout)
            found = told[0]["model"] if command[0] == "workers" else told["text"]
            assert found == ("scripted" if command[0] == "workers" else "AB")


async def test_without_a_proper_certificate_they_say_so_in_a_line(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    ours = identity(authority, tmp_path / "a", HOST)
    foreign = identity(stranger, tmp_path / "b", "me", trusted=authority)
    nameless = identity(authority, tmp_path / "c", "me")
    wrong = Tls(nameless.certificate, nameless.private_key, nameless.authority, "other")
    async with secured(ours) as endpoint:
        for given in ([], options(foreign), options(wrong)):
            result = await run(endpoint, COMMANDS[2], given)
            assert result.exit_code == 1
            assert result.stderr.startswith("error: ")
            assert endpoint in result.stderr


async def test_half_of_the_files_are_refused(tmp_path: Path) -> None:
    mine = identity(trustme.CA(), tmp_path / "a", "me")
    result = await run("127.0.0.1:1", COMMANDS[0], ["--tls-ca", str(mine.authority)])
    assert result.exit_code == 2
    assert "give all of --tls-cert, --tls-key and --tls-ca, or none" in result.stderr
