"""Command-line options that services share; each can also be set by environment variable."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from outrider.config import DEFAULT_CACHE, Tls
from outrider.errors import OutriderError
from outrider.serving.logs import LogFormat, configure_logging

F = TypeVar("F", bound=Callable[..., Any])


def apply(command: F, *options: Callable[[Any], Any]) -> F:
    """Add options in the order in which `--help` shall list them."""
    for option in reversed(options):
        command = option(command)
    return command


def service_options(service: str, *, traces: bool = True) -> Callable[[F], F]:
    """Add what every service has: --log-level and --log-format, and --otlp-endpoint with `traces`.

    The command finds its logs configured and gets `otlp_endpoint`, perhaps None, if it has traces.
    Errors of ours end the process with status 2 and one line.
    """

    def decorate(command: F) -> F:
        @functools.wraps(command)
        def with_logs(*, log_level: str, log_format: LogFormat, **others: Any) -> Any:
            configure_logging(service, level=log_level, fmt=log_format)
            try:
                return command(**others)
            except OutriderError as error:
                click.echo(f"error: {error}", err=True)
                sys.exit(2)

        decorated = cast(F, with_logs)
        return _with_logs(_with_traces(decorated) if traces else decorated)

    return decorate


def _with_logs(command: F) -> F:
    return apply(
        command,
        click.option(
            "--log-level",
            type=click.Choice(["debug", "info", "warning", "error"]),
            default="info",
            envvar="OUTRIDER_LOG_LEVEL",
            show_default=True,
            help="What is logged at least; never a prompt or an answer.",
        ),
        click.option(
            "--log-format",
            type=click.Choice(["text", "json"]),
            default="text",
            envvar="OUTRIDER_LOG_FORMAT",
            show_default=True,
            help="Lines for people, or a JSON object each.",
        ),
    )


def _with_traces(command: F) -> F:
    return apply(
        command,
        click.option(
            "--otlp-endpoint",
            envvar="OUTRIDER_OTLP_ENDPOINT",
            help="Send traces to this OpenTelemetry collector, http://host:4317 (OTLP over gRPC)."
            " Needs outrider[otel].  [default: no traces]",
        ),
    )


def address_options(command: F) -> F:
    """Add --host, --port, --redis, --drain and what is needed for TLS."""
    return apply(
        _with_tls(command),
        click.option("--host", default="127.0.0.1", show_default=True, help="Listen here."),
        click.option(
            "--port",
            type=click.IntRange(0, 65535),
            default=0,
            show_default=True,
            help="0 picks a free one.",
        ),
        click.option(
            "--redis",
            "redis_url",
            envvar="REDIS_URL",
            help="Redis for finding each other, redis://host:port.",
        ),
        click.option(
            "--drain",
            "drain_s",
            type=click.FloatRange(min=0),
            default=10.0,
            show_default=True,
            help="Seconds that sessions under way get to finish after SIGTERM.",
        ),
        *_tls_options(
            "Certificate for gRPC, shown to clients and servers alike; PEM.",
            "Authority that the others' certificates are from; PEM.",
            "Name in the servers' certificates.  [default: the address]",
        ),
        click.option(
            "--plaintext",
            is_flag=True,
            envvar="OUTRIDER_PLAINTEXT",
            help="Serve gRPC to other machines without TLS.",
        ),
    )


def client_tls_options(command: F) -> F:
    """Add what a client needs for a fleet with TLS; the command gets `tls`, perhaps None."""
    return apply(
        _with_tls(command),
        *_tls_options(
            "Your certificate, for a fleet with mutual TLS; PEM. Goes with --tls-key and --tls-ca.",
            "Authority that the orchestrator's certificate must be from; PEM.",
            "Name in the orchestrator's certificate.  [default: the address]",
        ),
    )


def _tls_options(certificate: str, authority: str, server_name: str) -> list[Callable[[Any], Any]]:
    """The options of `Tls`, with these help texts."""
    files = (("cert", certificate), ("key", "Its private key; PEM."), ("ca", authority))
    return [
        *(
            click.option(
                f"--tls-{name}",
                type=click.Path(path_type=Path, exists=True, dir_okay=False),
                envvar=f"OUTRIDER_TLS_{name.upper()}",
                help=text,
            )
            for name, text in files
        ),
        click.option("--tls-server-name", envvar="OUTRIDER_TLS_SERVER_NAME", help=server_name),
    ]


def _with_tls(command: F) -> F:
    """Turn the TLS options into one argument, `tls`."""

    @functools.wraps(command)
    def with_tls(
        *,
        tls_cert: Path | None,
        tls_key: Path | None,
        tls_ca: Path | None,
        tls_server_name: str | None,
        **others: Any,
    ) -> Any:
        tls = None
        if tls_cert and tls_key and tls_ca:
            tls = Tls(tls_cert, tls_key, tls_ca, tls_server_name)
        elif tls_cert or tls_key or tls_ca or tls_server_name:
            raise click.UsageError("give all of --tls-cert, --tls-key and --tls-ca, or none")
        return command(tls=tls, **others)

    return cast(F, with_tls)


def worker_options(command: F) -> F:
    """Add what every worker needs: address, name, Redis."""
    return apply(
        command,
        address_options,
        click.option(
            "--advertise",
            help="host:port by which orchestrators reach this worker.  [default: where it listens]",
        ),
        click.option("--worker-id", help="Stable name, such as the pod's.  [default: random]"),
    )


def check_advertised(host: str, redis_url: str | None, advertise: str | None) -> None:
    """Refuse to publish an address that nobody can reach. Raises `click.UsageError`."""
    if redis_url and not advertise and host in ("0.0.0.0", "::", "[::]"):
        raise click.UsageError(
            f"--host {host} listens everywhere, which is no address to be found by; add "
            "--advertise host:port"
        )


def engine_options(command: F) -> F:
    """Add what every process with a model needs."""
    return apply(
        command,
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
            help="Precision of weights and activations.",
        ),
        click.option(
            "--quantize",
            type=click.Choice(["none", "int8"]),
            default="none",
            show_default=True,
            help="Keep the weights of linear layers as 8-bit integers: saves memory, costs some"
            " accuracy; on a CPU steps of few tokens take longer than without. Needs torchao.",
        ),
        click.option(
            "--device",
            type=click.Choice(["auto", "cpu", "cuda"]),
            default="auto",
            show_default=True,
            help="Where the model runs; auto takes a GPU if there is one.",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=0),
            default=0,
            show_default=True,
            help="Processor threads of the model; 0 leaves it to torch.",
        ),
        click.option(
            "--compile/--no-compile",
            "compiled",
            default=False,
            show_default=True,
            help="Compile the model's steps: faster ones for a minute or more at the first start.",
        ),
        cache_option,
    )


def cache_option(command: F) -> F:
    """Add --cache-dir."""
    return apply(
        command,
        click.option(
            "--cache-dir",
            type=click.Path(path_type=Path),
            default=DEFAULT_CACHE,
            envvar="OUTRIDER_CACHE",
            show_default=True,
            help="Where models are kept.",
        ),
    )
