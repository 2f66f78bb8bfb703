"""Who may pass the HTTP door, and what hostile clients cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import socket
import ssl
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme

from orchestrator.config import HttpConfig
from orchestrator.http.app import Door
from orchestrator.http.connections import SPARE_CONNECTIONS
from orchestrator.http.keys import ApiKey, Keyring, Limiter, RateLimited
from orchestrator.http.server import check_exposure
from outrider.domain import SessionSpec
from outrider.errors import ConfigError
from outrider.v1 import verifier_pb2
from tests.support.fleet import until
from tests.support.http_door import RunningDoor, http_door
from tests.support.scripted_verifier import (
    RunningScript,
    Script,
    answer,
    commit,
    opened,
    scripted_verifier,
)

KEY = "sk-right"
COMPLETE = "/v1/completions"
JSON = {"content-type": "application/json"}
BODY = {"model": "scripted", "prompt": "Say"}


def honest(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    return answer(spec, b"hello")


def endless(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
    return [opened(spec), commit(spec, 0, b"on and on")]


def key_file(tmp_path: Path, **limits: float) -> Path:
    path = tmp_path / "keys.toml"
    lines = [
        "[keys.alice]",
        f'sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"',
        *(f"{name} = {value}" for name, value in limits.items()),
    ]
    path.write_text("\n".join(lines))
    return path


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@contextlib.asynccontextmanager
async def serving(
    script: Script = honest, **settings: Any
) -> AsyncIterator[tuple[RunningDoor, RunningScript]]:
    async with scripted_verifier(script) as target, http_door([target.address], **settings) as door:
        yield door, target


async def talk(door: RunningDoor, data: bytes) -> bytes:
    """Send bytes and read until the server closes; b"" if it cuts the connection off."""
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        with contextlib.suppress(ConnectionError):
            writer.write(data)
            await writer.drain()
            return await asyncio.wait_for(reader.read(), 10)
        return b""
    finally:
        writer.close()


# --- keys -------------------------------------------------------------------------------------


async def test_every_route_but_health_needs_a_key(tmp_path: Path) -> None:
    async with serving(keys=key_file(tmp_path)) as (door, target):
        assert len(door.door.paths) >= 11
        for path in door.door.paths:
            path = path.replace("{model:path}", "scripted")
            for headers in (
                {},
                bearer("sk-wrong"),
                {"authorization": KEY},
                {"authorization": "Bearer"},
            ):
                response = await door.client.get(path, headers=headers)
                if path.startswith("/health"):
                    assert response.status_code == 200
                    continue
                assert response.status_code == 401, path
                assert "Bearer" in response.headers["www-authenticate"]
                assert response.json()["error"]["code"] == "invalid_api_key"
        # Not even that a path does not exist.
        assert (await door.client.get("/nowhere")).status_code == 401
        assert (await door.client.post(COMPLETE, json=BODY)).status_code == 401
        assert not target.verifier.opens


async def test_the_right_key_is_let_in(tmp_path: Path) -> None:
    async with serving(keys=key_file(tmp_path)) as (door, _):
        response = await door.client.post(COMPLETE, json=BODY, headers=bearer(KEY))
        assert response.status_code == 200
        # As a browser sends it once it has asked for it.
        page = await door.client.get("/", auth=httpx.BasicAuth("anything", KEY))
        assert page.status_code == 200


async def test_keys_do_not_share_caches(tmp_path: Path) -> None:
    async with serving(keys=key_file(tmp_path)) as (door, target):
        door.door.keyring = Keyring(
            [ApiKey(name, hashlib.sha256(name.encode()).digest()) for name in ("one", "two")]
        )
        for name, salt in (("one", None), ("two", None), ("one", "x"), ("one", None)):
            wanted = {**BODY, "cache_salt": salt}
            await door.client.post(COMPLETE, json=wanted, headers=bearer(name))
        salts = [spec.cache_salt for spec in target.verifier.opens]
        assert salts[0] == salts[3]
        assert len({*salts, ""}) == 4


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "tables"),
        ("[keys]", "tables"),
        ("[keys.a]", "sha256"),
        ('[keys.a]\nsha256 = "sk-in-the-clear"', "sha256"),
        (f'[keys.a]\nsha256 = "{"0" * 64}"\nrequests_max = 0', "requests_max"),
        (f'[keys.a]\nsha256 = "{"0" * 64}"\nrequests_max = true', "requests_max"),
        (f'[keys.a]\nsha256 = "{"0" * 64}"\nquota = 1', "quota"),
        ("keys = ", "cannot be read"),
    ],
)
def test_a_wrong_key_file_says_what_is_wrong(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint):
        Keyring.load(path)


# --- limits -----------------------------------------------------------------------------------


async def test_a_key_has_so_many_requests_at_once(tmp_path: Path) -> None:
    async with serving(endless, keys=key_file(tmp_path, requests_max=1)) as (door, _):
        wanted = {"json": {**BODY, "stream": True}, "headers": bearer(KEY)}
        async with door.client.stream("POST", COMPLETE, **wanted) as first:
            assert first.status_code == 200
            second = await door.client.post(COMPLETE, **wanted)
            assert second.status_code == 429
            assert second.json()["error"]["code"] == "rate_limit_exceeded"
            assert second.headers["retry-after"]

        async def over() -> bool:
            return door.orchestrator.driver.load == 0

        await until(over, what="the first one has ended")
        async with door.client.stream("POST", COMPLETE, **wanted) as third:
            assert third.status_code == 200


def test_a_rate_fills_up_again() -> None:
    limiter, key = Limiter(), ApiKey("a", requests_per_minute=2)
    for now_s in (0.0, 0.0, 30.0):
        with limiter.admit(key, now_s):
            pass
    with pytest.raises(RateLimited) as caught, limiter.admit(key, 45.0):
        pass
    assert caught.value.retry_after_s == pytest.approx(15.0)
    with limiter.admit(key, 60.0), limiter.admit(ApiKey("b", requests_per_minute=1), 60.0):
        pass


# --- hostile input ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"null",
        b"[]",
        b'"text"',
        b"{",
        b"\xff\xfe",
        b'{"model":"scripted","prompt":"a"' + b"," * 100,
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"model":"scripted","prompt":"\\ud800"}',
        b'{"model":"scripted","prompt":"a","temperature":NaN}',
        b'{"model":"scripted","prompt":"a","seed":1e400}',
        b'{"model":"scripted","prompt":"a","max_tokens":' + b"9" * 5_000 + b"}",
        b'{"model":"scripted","prompt":[1.5]}',
        b'{"model":"scripted","prompt":[[]]}',
        b'{"model":"scripted","prompt":[-1]}',
        b'{"model":"' + b"m" * 10_000 + b'","prompt":"a"}',
    ],
)
async def test_malformed_bodies_are_the_clients_fault(data: bytes) -> None:
    async with serving() as (door, _):
        for path in (COMPLETE, "/v1/chat/completions"):
            response = await door.client.post(path, content=data, headers=JSON)
            assert response.status_code == 400, response.text
            assert len(response.content) < 2_000
        assert (await door.client.get("/health")).status_code == 200


async def test_large_bodies_are_refused_told_or_not() -> None:
    async with serving(body_bytes_max=10_000) as (door, _):
        large = json.dumps({**BODY, "prompt": "a" * 10_000}).encode()

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(large), 1_000):
                yield large[start : start + 1_000]

        for content in (large, pieces()):
            response = await door.client.post(COMPLETE, content=content, headers=JSON)
            assert response.status_code == 413
            assert response.json()["error"]["code"] == "request_too_large"


async def test_bodies_that_never_come_time_out() -> None:
    async with serving(body_timeout_s=0.05) as (door, _):
        head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n"
        head += b"content-type: application/json\r\n\r\n{"
        assert b" 408 " in (await talk(door, head)).split(b"\r\n")[0] + b" "


async def test_heads_are_bounded_in_size_and_time() -> None:
    async with serving(header_bytes_max=2_000, header_timeout_s=0.2) as (door, _):
        line = b"GET /health HTTP/1.1\r\nhost: x\r\n"
        fine = await talk(door, line + b"connection: close\r\nx-pad: " + b"a" * 1_000 + b"\r\n\r\n")
        assert fine.startswith(b"HTTP/1.1 200")
        for head in (
            line + b"x-pad: " + b"a" * 3_000 + b"\r\n\r\n",
            line + b"x-pad: " + b"a" * 3_000_000,
            line + b"x: y\r\n" * 1_000 + b"\r\n",
            b"GET /" + b"a" * 3_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",
            line,
            b"",
        ):
            answered = await talk(door, head)
            assert not answered or answered.startswith(b"HTTP/1.1 400"), answered[:100]


async def test_a_full_door_is_not_dead() -> None:
    """Idle clients may keep others out, but not have the orchestrator taken for dead."""
    async with (
        serving(connections_max=2, header_timeout_s=30.0) as (door, _),
        AsyncExitStack() as idle,
    ):
        host, port = door.url.removeprefix("http://").split(":")

        async def come() -> asyncio.StreamReader:
            reader, writer = await asyncio.open_connection(host, int(port))
            idle.callback(writer.close)
            return reader

        for _ in range(2):
            await come()
        for path in ("/health/live", "/health/ready", "/metrics"):
            assert (await door.client.get(path)).status_code == 200, path
        refused = await door.client.post(COMPLETE, json=BODY)
        assert refused.status_code == 429
        assert refused.headers["retry-after"]
        assert refused.headers["connection"] == "close"
        assert "2 connections" in refused.json()["error"]["message"]
        assert "outrider_connections 3.0" in (await door.client.get("/metrics")).text
        # There is an end to it: these do not even get an answer.
        surplus = [await come() for _ in range(SPARE_CONNECTIONS + 2)]
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(surplus[-1].read(), 10) == b""

    async with serving(connections_max=2) as (door, _):
        assert (await door.client.post(COMPLETE, json=BODY)).status_code == 200


async def test_a_client_that_reads_nothing_is_given_up() -> None:
    def flood(spec: SessionSpec) -> Iterable[verifier_pb2.VerifyResponse]:
        yield opened(spec)
        for done in range(0, 400_000, 1_000):
            yield commit(spec, done, b"a" * 1_000)

    loop = asyncio.get_running_loop()
    async with serving(flood, write_timeout_s=0.1) as (door, target):
        host, port = door.url.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            data = json.dumps({**BODY, "stream": True, "max_tokens": 2_000}).encode()
            head = f"POST {COMPLETE} HTTP/1.1\r\nhost: x\r\ncontent-length: {len(data)}\r\n"
            head += "content-type: application/json\r\n\r\n"
            await loop.sock_sendall(client, head.encode() + data)

            async def aborted() -> bool:
                return bool(target.verifier.aborts) and not door.orchestrator.driver.load

            await until(aborted, what="the generation of a client that does not read is aborted")


# --- exposure ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "lacking"),
    [
        ({"host": "0.0.0.0"}, "--http-cert and --api-keys"),
        ({"host": "::", "certificate": Path("c")}, "--api-keys"),
        ({"host": "example.com", "keys": Path("k")}, "--http-cert"),
        ({"host": "127.0.0.1", "private_key": Path("k")}, "certificate"),
    ],
)
def test_others_are_not_served_in_the_open_by_accident(
    settings: dict[str, Any], lacking: str
) -> None:
    with pytest.raises(ConfigError, match=lacking):
        check_exposure(HttpConfig(port=0, **settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "127.0.0.1"},
        {"host": "::1"},
        {"host": "localhost"},
        {"host": "0.0.0.0", "open_to_all": True},
        {"host": "0.0.0.0", "keys": Path("k"), "certificate": Path("c")},
    ],
)
def test_what_may_be_served(settings: dict[str, Any]) -> None:
    check_exposure(HttpConfig(port=0, **settings))


async def test_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    trusting = ssl.create_default_context()
    authority.configure_trust(trusting)
    settings = {"certificate": certificate, "private_key": key, "verify": trusting}
    async with serving(**settings) as (door, _):
        assert door.url.startswith("https://")
        assert (await door.client.post(COMPLETE, json=BODY)).status_code == 200
        with pytest.raises(httpx.ConnectError):  # Nobody vouches for the server.
            async with httpx.AsyncClient() as doubting:
                await doubting.get(door.url + "/health")
        with pytest.raises(httpx.HTTPError):
            await door.client.get(door.url.replace("https", "http") + "/health")


async def test_new_keys_and_certificates_are_taken_up(tmp_path: Path) -> None:
    """Each by itself: keys that are broken or gone do not keep a certificate from being renewed."""
    first, second = trustme.CA(), trustme.CA()
    certificate, key, keys = tmp_path / "cert.pem", tmp_path / "key.pem", key_file(tmp_path)

    def issue(authority: trustme.CA) -> ssl.SSLContext:
        issued = authority.issue_cert("127.0.0.1")
        certificate.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        trusting = ssl.create_default_context()
        authority.configure_trust(trusting)
        return trusting

    settings = {"certificate": certificate, "private_key": key, "keys": keys, "reload_s": 0.02}
    async with serving(verify=issue(first), **settings) as (door, _):

        async def answers(trusting: ssl.SSLContext, secret: str) -> int:
            async with httpx.AsyncClient(base_url=door.url, verify=trusting) as client:
                return (await client.get("/version", headers=bearer(secret))).status_code

        assert (await door.client.get("/version", headers=bearer(KEY))).status_code == 200
        keys.write_text(keys.read_text().replace(hashlib.sha256(KEY.encode()).hexdigest(), "oops"))
        renewed = issue(second)

        async def served_with_the_new_one() -> bool:
            with contextlib.suppress(httpx.ConnectError):
                return await answers(renewed, KEY) == 200  # The old keys stay in force.
            return False

        await until(served_with_the_new_one, what="the new certificate is shown")
        other = hashlib.sha256(b"sk-new").hexdigest()
        keys.write_text(f'[keys.bob]\nsha256 = "{other}"\n')

        async def served_by_the_new_key() -> bool:
            return await answers(renewed, "sk-new") == 200

        await until(served_by_the_new_key, what="the new key is known")
        assert await answers(renewed, KEY) == 401


async def test_a_certificate_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "cert.pem"
    path.write_text("no certificate")
    with pytest.raises(ConfigError, match="certificate"):
        async with http_door([], wait=False, certificate=path):
            pass


async def test_internal_errors_tell_nothing() -> None:
    async with serving() as (door, _):
        assert isinstance(door.door, Door)

        def broken(*_: object) -> None:
            raise RuntimeError("a secret path")

        door.orchestrator.fleet.models = broken  # type: ignore[method-assign,assignment]
        response = await door.client.get("/v1/models")
        assert response.status_code == 500
        assert "secret" not in response.text
        assert "incident" in response.json()["error"]["message"]
