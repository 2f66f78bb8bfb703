"""`python -m outrider.serving.probe`, as containers call it."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
import trustme

from outrider.config import Tls
from outrider.serving.server import Server
from tests.service.test_tls import identity

HOST = "127.0.0.1"
NAME = "outrider.v1.VerifierService"


async def probe(address: str, *arguments: str, **environment: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "outrider.serving.probe"),
        *("--port", address.rpartition(":")[2], *arguments),
        env={**os.environ, **environment},
        stderr=asyncio.subprocess.PIPE,
    )
    _, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, errors.decode()


def variables(tls: Tls) -> dict[str, str]:
    return {
        "OUTRIDER_TLS_CERT": str(tls.certificate),
        "OUTRIDER_TLS_KEY": str(tls.private_key),
        "OUTRIDER_TLS_CA": str(tls.authority),
        "OUTRIDER_TLS_SERVER_NAME": "outrider.internal",
    }


async def test_alive_and_ready_are_two_things() -> None:
    server = Server((NAME,), host=HOST, port=0)
    address = await server.start()
    try:
        assert await probe(address) == (0, "")
        code, errors = await probe(address, "--service", NAME)
        assert code == 1
        assert "is NOT_SERVING" in errors
        await server.set_ready(True)
        assert await probe(address, "--service", NAME) == (0, "")
        code, errors = await probe(address, "--service", "outrider.v1.Nobody")
        assert code == 1
        assert "NOT_FOUND" in errors
    finally:
        await server.stop(0)
    code, errors = await probe(address, "--timeout", "1")
    assert code == 1
    assert "does not answer" in errors


async def test_it_shows_the_services_own_certificate(tmp_path: Path) -> None:
    authority = trustme.CA()
    tls = identity(authority, tmp_path / "worker", "outrider.internal")
    server = Server((NAME,), host=HOST, port=0, tls=tls)
    address = await server.start()
    try:
        assert await probe(address, **variables(tls)) == (0, "")
        code, _ = await probe(address, "--timeout", "2")
        assert code == 1
    finally:
        await server.stop(0)


@pytest.mark.parametrize("lost", ["certificate", "authority"])
async def test_files_that_cannot_be_read_are_named(tmp_path: Path, lost: str) -> None:
    tls = identity(trustme.CA(), tmp_path / "worker", "outrider.internal")
    path: Path = getattr(tls, lost)
    os.unlink(path)
    code, errors = await probe(f"{HOST}:1", **variables(tls))
    assert code == 1
    assert f"{path} cannot be read" in errors
