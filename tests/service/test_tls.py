"""Mutual TLS between services: who shows no proper certificate is not talked to."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest
import trustme

from outrider.config import Tls
from outrider.errors import ConfigError
from outrider.serving.server import Server
from outrider.serving.tls import channel_credentials, channel_options
from outrider.v1 import verifier_pb2_grpc, worker_pb2, worker_pb2_grpc
from tests.support.certificates import identity
from tests.support.scripted_verifier import ScriptedVerifier

HOST = "127.0.0.1"


@contextlib.asynccontextmanager
async def worker(tls: Tls | None, **settings: bool) -> AsyncIterator[str]:
    server = Server((), host=HOST, port=0, tls=tls, **settings)
    verifier = ScriptedVerifier(lambda spec: [])
    verifier_pb2_grpc.add_VerifierServiceServicer_to_server(verifier, server.grpc)
    worker_pb2_grpc.add_WorkerServiceServicer_to_server(verifier, server.grpc)
    address = await server.start()
    try:
        yield address
    finally:
        await server.stop(0)


async def ask(address: str, tls: Tls | None, credentials: object = None) -> str:
    """Return the model's name. Raises AioRpcError."""
    if tls is not None:
        credentials = channel_credentials(tls)
    channel = (
        grpc.aio.insecure_channel(address)
        if credentials is None
        else grpc.aio.secure_channel(address, credentials, channel_options(tls))
    )
    async with channel:
        stub = worker_pb2_grpc.WorkerServiceStub(channel)
        answer = await stub.GetModelInfo(worker_pb2.GetModelInfoRequest(), timeout=5)
        return str(answer.info.model)


async def test_holders_of_the_authoritys_certificates_understand_each_other(tmp_path: Path) -> None:
    authority = trustme.CA()
    ours = identity(authority, tmp_path / "a", HOST)
    theirs = identity(authority, tmp_path / "b", "orchestrator")
    async with worker(ours) as address:
        assert await ask(address, theirs) == "scripted"


async def test_certificates_may_name_a_service_instead_of_addresses(tmp_path: Path) -> None:
    authority = trustme.CA()
    ours = identity(authority, tmp_path / "a", "verifier.internal")
    nameless = identity(authority, tmp_path / "b", "orchestrator")
    named = Tls(nameless.certificate, nameless.private_key, nameless.authority, "verifier.internal")
    async with worker(ours) as address:
        assert await ask(address, named) == "scripted"
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(address, nameless)


async def test_everybody_else_is_refused(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    ours = identity(authority, tmp_path / "a", HOST)
    foreign = identity(stranger, tmp_path / "b", "orchestrator", trusted=authority)
    bare = grpc.ssl_channel_credentials(ours.authority.read_bytes())
    async with worker(ours) as address:
        for tls, credentials in ((foreign, None), (None, bare), (None, None)):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(address, tls, credentials)
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_server_that_nobody_vouches_for_is_not_talked_to(tmp_path: Path) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    impostor = identity(stranger, tmp_path / "a", HOST, trusted=authority)
    ours = identity(authority, tmp_path / "b", "orchestrator")
    async with worker(impostor) as address:
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(address, ours)


async def test_renewed_certificates_are_used(tmp_path: Path) -> None:
    old, new = trustme.CA(), trustme.CA()
    ours = identity(old, tmp_path / "a", HOST)
    theirs = identity(old, tmp_path / "b", "orchestrator")
    async with worker(ours) as address:
        assert await ask(address, theirs) == "scripted"
        identity(new, tmp_path / "a", HOST)
        identity(new, tmp_path / "c", "orchestrator")
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(address, theirs)
        assert await ask(address, identity(new, tmp_path / "b", "orchestrator")) == "scripted"


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
async def test_plaintext_for_others_must_be_meant(host: str) -> None:
    server = Server((), host=host, port=0)
    with pytest.raises(ConfigError, match="--tls-cert"):
        await server.start()
    meant = Server((), host="0.0.0.0", port=0, plaintext=True)
    await meant.start()
    await meant.stop(0)


async def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    tls = Tls(tmp_path / "cert.pem", tmp_path / "key.pem", tmp_path / "ca.pem")
    with pytest.raises(ConfigError, match=r"key\.pem"):
        await Server((), host=HOST, port=0, tls=tls).start()
