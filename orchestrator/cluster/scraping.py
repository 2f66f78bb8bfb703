"""Asks every orchestrator for its metrics, over HTTP."""

from __future__ import annotations

import asyncio
import logging
import ssl
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import aiohttp
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.scaling.reading import NAMES, PREFIX, Sample, Scrape
from outrider.errors import ConfigError

TIMEOUT_S = 5.0
_BYTES_MAX = 16 * 1024 * 1024
_AT_ONCE = 32

_log = logging.getLogger(__name__)


class Scraper:
    """A client of the orchestrators' /metrics."""

    def __init__(
        self,
        *,
        key_file: Path | None = None,
        authority: Path | None = None,
        server_name: str | None = None,
        timeout_s: float = TIMEOUT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`key_file` holds an API key and is read anew each time; `authority` (PEM) is who signs
        the orchestrators' certificates, for `server_name`; None: plaintext. `clock` is that
        of whoever decides, in seconds."""
        self._clock = clock
        self._key_file, self._authority, self._server_name = key_file, authority, server_name
        self._gate = asyncio.Semaphore(_AT_ONCE)
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            # Pods come and go: a kept connection would often be to one that is gone.
            connector=aiohttp.TCPConnector(force_close=True),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._session.close()

    async def scrape(self, addresses: Iterable[str]) -> list[Scrape]:
        """Ask all at once; whoever does not answer in time, or nonsense, is left out.

        Raises `ConfigError` if key or authority cannot be read.
        """
        headers: dict[str, str] = {}
        tls: ssl.SSLContext | bool = False
        try:
            if self._key_file is not None:
                key = await asyncio.to_thread(self._key_file.read_text)
                headers["authorization"] = f"Bearer {key.strip()}"
            if self._authority is not None:
                # Anew each time, so that it may be renewed.
                tls = await asyncio.to_thread(
                    ssl.create_default_context, cafile=str(self._authority)
                )
        except OSError as error:
            raise ConfigError(f"metrics of orchestrators cannot be asked for: {error}") from None
        found = await asyncio.gather(*(self._ask(each, headers, tls) for each in addresses))
        return [scrape for scrape in found if scrape is not None]

    async def _ask(
        self, address: str, headers: Mapping[str, str], tls: ssl.SSLContext | bool
    ) -> Scrape | None:
        scheme = "http" if self._authority is None else "https"
        async with self._gate:
            try:
                async with self._session.get(
                    f"{scheme}://{address}/metrics",
                    headers=headers,
                    ssl=tls,
                    server_hostname=self._server_name if self._authority is not None else None,
                    allow_redirects=False,
                ) as response:
                    if response.status != 200:
                        _log.warning("orchestrator %s answers %d", address, response.status)
                        return None
                    at_s = self._clock()
                    text = await response.content.read(_BYTES_MAX)
                # Thousands of workers make megabytes of text.
                samples = await asyncio.to_thread(read_samples, text.decode())
                return Scrape(address, at_s, samples)
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                _log.warning("orchestrator %s: %s %s", address, type(error).__name__, error)
                return None


def read_samples(text: str) -> dict[str, list[Sample]]:
    """Read what the policy wants of Prometheus' text format. Raises `ValueError`."""
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name = sample.name.removeprefix(PREFIX)
            if name in NAMES and sample.name.startswith(PREFIX):
                found.setdefault(name, []).append((sample.labels, float(sample.value)))
    return found
