"""Puts a drafter process together: proposer, growing thread, edge, server, registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from drafter_service.config import DrafterConfig
from drafter_service.growing import Grower, Swap
from drafter_service.making import make_proposer
from drafter_service.proposers.base import Proposer
from drafter_service.service import SERVICE_NAMES, DrafterService
from outrider.kv_blocks import BlockPool
from outrider.registry import HeldBlocks, WorkerRecord, published, published_blocks
from outrider.serving.server import Server
from outrider.serving.telemetry import Tracing, tracing
from outrider.serving.worker_main import serve_until_stopped

_log = logging.getLogger(__name__)


async def serve(config: DrafterConfig) -> None:
    """Run until asked to stop. Raises `ModelLoadError` or `ConfigError` at start."""
    async with tracing("drafter", config.otlp_endpoint, config.worker_id) as spans:
        await _serve(config, spans)


async def _serve(config: DrafterConfig, spans: Tracing | None) -> None:
    # One thread for loading and stepping; outrider.model.threads says why.
    thread = ThreadPoolExecutor(1, thread_name_prefix="proposer")
    loop = asyncio.get_running_loop()
    proposer, pool = await loop.run_in_executor(thread, make_proposer, config)
    info = proposer.info
    _log.info("proposer %s, model %s", info.proposer, info.model)
    incarnation = secrets.token_hex(16)
    service = DrafterService(
        info,
        incarnation=incarnation,
        sessions_max=config.growing.sessions_max,
        tracing=spans,
    )
    grower = Grower(proposer, config.growing, service.emit)
    service.attach(grower)
    del proposer  # which a swap shall free
    blocks = HeldBlocks()
    if config.redis_url is not None and pool is not None:
        pool.listener = blocks
    grower.start(thread)
    _swap_at_hangup(config, grower, service, pool, blocks)
    server = Server(
        SERVICE_NAMES,
        host=config.host,
        port=config.port,
        tls=config.tls,
        plaintext=config.plaintext,
    )
    service.register(server)

    def record(address: str) -> WorkerRecord:
        return WorkerRecord(
            role="drafter",
            worker=config.worker_id,
            incarnation=incarnation,
            address=config.advertise or address,
            model=service.info.model,
            model_fingerprint=service.info.model_fingerprint,
            capacity=config.growing.sessions_max,
            load=grower.load,
            state="draining" if service.draining else "ready",
            tokenizer_fingerprint=info.tokenizer_fingerprint or "",
        )

    @contextlib.asynccontextmanager
    async def publish(address: str) -> AsyncIterator[None]:
        url, worker = config.redis_url, config.worker_id
        async with (
            published(url, lambda: record(address)),
            published_blocks(
                None if pool is None else url, blocks, worker=worker, incarnation=incarnation
            ),
        ):
            yield

    try:
        await serve_until_stopped(
            server,
            publish=publish,
            drain=service.drain,
            load=lambda: 0,  # mirrors are disposable: nothing to wait for
            hang_up=service.hang_up,
            drain_s=config.drain_s,
            pulse=grower.pulse,
        )
    finally:
        grower.stop()


def _swap_at_hangup(
    config: DrafterConfig,
    grower: Grower,
    service: DrafterService,
    pool: BlockPool | None,
    blocks: HeldBlocks,
) -> None:
    """Have SIGHUP load what the settings name anew: other weights, or another corpus."""
    pools = [pool]

    def make() -> Proposer:
        # On the growing thread, which is silent meanwhile; outrider.model.threads says why.
        proposer, new = make_proposer(config)
        pools.append(new)
        return proposer

    def swapped(proposer: Proposer) -> None:
        old, new = pools[0], pools[-1]
        pools[:] = [new]
        if old is not None:
            old.listener = None
        for digest in blocks.everything():
            blocks.dropped(digest)
        if new is not None and config.redis_url is not None:
            new.listener = blocks
        service.swapped(proposer.info)

    def swap() -> None:
        _log.info("asked to swap: loading what %s guesses with anew", config.proposer)
        grower.submit(Swap(make, swapped))

    if hasattr(signal, "SIGHUP"):
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, swap)
