"""Command-line options of the HTTP front door."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from orchestrator.config import HttpConfig
from outrider.serving.options import apply

_DEFAULT = HttpConfig(host="", port=0)
_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


def http_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of the HTTP front door; the command gets `http`, a config or None."""

    @functools.wraps(command)
    def with_config(
        *,
        http_address: str,
        http_certificate: Path | None,
        http_private_key: Path | None,
        http_keys: Path | None,
        http_open: bool,
        http_connections_max: int,
        http_body_max: int,
        http_write_timeout: float,
        metrics_compat: str,
        **others: Any,
    ) -> Any:
        http = None
        if http_address != "off":
            host, port = _address(http_address)
            http = HttpConfig(
                host=host,
                port=port,
                certificate=http_certificate,
                private_key=http_private_key,
                keys=http_keys,
                open_to_all=http_open,
                vllm_metrics=metrics_compat == "vllm",
                connections_max=http_connections_max,
                body_bytes_max=http_body_max,
                write_timeout_s=http_write_timeout,
            )
        return command(http=http, **others)

    return apply(
        with_config,
        click.option(
            "--http-address",
            default="127.0.0.1:8080",
            show_default=True,
            help="Listen here for HTTP, host:port; port 0 picks a free one, 'off' does without.",
        ),
        click.option(
            "--http-cert",
            "http_certificate",
            type=_FILE,
            help="Certificate for HTTPS, PEM with intermediates; read anew when it changes.",
        ),
        click.option("--http-key", "http_private_key", type=_FILE, help="Its private key, PEM."),
        click.option(
            "--api-keys",
            "http_keys",
            type=_FILE,
            help="API keys, TOML: [keys.NAME] with sha256, and requests_max and"
            " requests_per_minute if limited; read anew when it changes.",
        ),
        click.option(
            "--http-open",
            is_flag=True,
            help="Serve other machines although TLS or keys are missing.",
        ),
        click.option(
            "--http-connections-max",
            type=click.IntRange(min=1),
            default=_DEFAULT.connections_max,
            show_default=True,
            help="Connections at once; on others only health and metrics are served.",
        ),
        click.option(
            "--http-body-max",
            type=click.IntRange(min=1_024),
            default=_DEFAULT.body_bytes_max,
            show_default=True,
            help="Bytes of a request's body, at most.",
        ),
        click.option(
            "--http-write-timeout",
            type=click.FloatRange(min=0.1),
            default=_DEFAULT.write_timeout_s,
            show_default=True,
            help="Seconds after which a client that reads nothing is given up.",
        ),
        click.option(
            "--metrics-compat",
            type=click.Choice(["none", "vllm"]),
            default="none",
            show_default=True,
            help="Also export metrics under another engine's names.",
        ),
    )


def _address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not (colon and host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise click.BadParameter("must be host:port", param_hint="--http-address")
    return host, int(port)
