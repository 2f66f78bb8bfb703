"""Mutual TLS between services: each shows a certificate and asks the other for one.

Certificates are files, and are read anew: by a server when they have changed, by a client when it
connects.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from pathlib import Path

import grpc
import grpc.aio

from outrider.config import Tls
from outrider.errors import ConfigError


def server_credentials(tls: Tls) -> grpc.ServerCredentials:
    """Credentials of a server that talks to holders of the authority's certificates only.

    Raises `ConfigError` if the files cannot be read.
    """
    return grpc.dynamic_ssl_server_credentials(
        _configuration(tls),
        _fetcher(tls),  # type: ignore[arg-type] # None means that nothing has changed.
        require_client_authentication=True,
    )


def channel_credentials(tls: Tls) -> grpc.ChannelCredentials:
    """Credentials of a client. Raises `ConfigError` if the files cannot be read."""
    return grpc.ssl_channel_credentials(
        _read(tls.authority), _read(tls.private_key), _read(tls.certificate)
    )


def channel_options(tls: Tls | None) -> Sequence[tuple[str, str]]:
    """Channel options that go with the credentials."""
    if tls is None or tls.server_name is None:
        return ()
    return (("grpc.ssl_target_name_override", tls.server_name),)


def is_loopback(host: str) -> bool:
    """True if only this machine can connect to a server that listens there."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _fetcher(tls: Tls) -> Callable[[], grpc.ServerCertificateConfiguration | None]:
    seen_s = _changed_s(tls)

    def fetch() -> grpc.ServerCertificateConfiguration | None:
        nonlocal seen_s
        # Called at each handshake. What cannot be read now leaves what was read before in force.
        try:
            changed_s = _changed_s(tls)
            if changed_s == seen_s:
                return None
            configuration = _configuration(tls)
        except ConfigError:
            return None
        seen_s = changed_s
        return configuration

    return fetch


def _configuration(tls: Tls) -> grpc.ServerCertificateConfiguration:
    pair = (_read(tls.private_key), _read(tls.certificate))
    return grpc.ssl_server_certificate_configuration([pair], _read(tls.authority))


def _changed_s(tls: Tls) -> tuple[float, ...]:
    try:
        return tuple(
            path.stat().st_mtime for path in (tls.certificate, tls.private_key, tls.authority)
        )
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be read: {error.strerror}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
