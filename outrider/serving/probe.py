"""`python -m outrider.serving.probe`: asks a service on this machine how it is; 0 means well.

For container runtimes without probes for gRPC, and for services with mutual TLS, which the
kubelet's own gRPC probe does not speak. It takes certificates from where the service has them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from outrider.config import Tls
from outrider.errors import ConfigError
from outrider.serving.tls import channel_credentials, channel_options

_FILE = click.Path(path_type=Path, dir_okay=False)


def check(address: str, service: str, tls: Tls | None, timeout_s: float) -> str | None:
    """Return what is wrong with a service, None if nothing is.

    `service` as in grpc.health.v1: empty asks for the process, a name for whether it takes work.
    """
    options = [*channel_options(tls), ("grpc.enable_http_proxy", 0)]
    try:
        if tls is None:
            channel = grpc.insecure_channel(address, options)
        else:
            channel = grpc.secure_channel(address, channel_credentials(tls), options)
    except ConfigError as error:
        return str(error)
    with channel:
        # As Any: the published stubs leave out its methods.
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=timeout_s)
        except grpc.RpcError as error:
            return f"{address} does not answer: {error.code().name}: {error.details()}"
    if answer.status != health_pb2.HealthCheckResponse.SERVING:
        state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        return f"{service or 'the process'} at {address} is {state}"
    return None


@click.command("probe")
@click.option("--port", type=click.IntRange(1, 65535), required=True, help="Of the service.")
@click.option("--service", default="", help="As in grpc.health.v1.  [default: the process]")
@click.option("--timeout", "timeout_s", type=click.FloatRange(min=0.1), default=5.0)
@click.option("--tls-cert", type=_FILE, envvar="OUTRIDER_TLS_CERT")
@click.option("--tls-key", type=_FILE, envvar="OUTRIDER_TLS_KEY")
@click.option("--tls-ca", type=_FILE, envvar="OUTRIDER_TLS_CA")
@click.option("--tls-server-name", envvar="OUTRIDER_TLS_SERVER_NAME")
def command(
    port: int,
    service: str,
    timeout_s: float,
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    tls_server_name: str | None,
) -> None:
    """Ask a service on this machine how it is; exit 0 if it is well, else 1."""
    tls = None
    if tls_cert and tls_key and tls_ca:
        tls = Tls(tls_cert, tls_key, tls_ca, tls_server_name)
    fault = check(f"127.0.0.1:{port}", service, tls, timeout_s)
    if fault is not None:
        click.echo(fault, err=True)
        sys.exit(1)


if __name__ == "__main__":
    command()
