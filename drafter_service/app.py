"""Puts a drafter process together: proposer, growing thread, edge, server, registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from drafter_service.config import DrafterConfig
from drafter_service.growing import Grower
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.lookup import LookupProposer
from drafter_service.service import SERVICE_NAMES, DrafterService
from outrider.kv_blocks import BlockPool
from outrider.registry import HeldBlocks, WorkerRecord, published, published_blocks
from outrider.serving.server import Server
from outrider.serving.worker_main import serve_until_stopped

_log = logging.getLogger(__name__)


async def serve(config: DrafterConfig) -> None:
    """Run until asked to stop. Raises `ModelLoadError` or `ConfigError` at start."""
    # One thread for loading and stepping; outrider.model.threads says why.
    thread = ThreadPoolExecutor(1, thread_name_prefix="proposer")
    loop = asyncio.get_running_loop()
    proposer, pool = await loop.run_in_executor(thread, _proposer, config)
    info = proposer.info
    _log.info("proposer %s, model %s", info.proposer, info.model)
    incarnation = secrets.token_hex(16)
    service = DrafterService(
        info, incarnation=incarnation, sessions_max=config.growing.sessions_max
    )
    grower = Grower(proposer, config.growing, service.emit)
    service.attach(grower)
    blocks = HeldBlocks()
    if config.redis_url is not None and pool is not None:
        pool.listener = blocks
    grower.start(thread)
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
            model=info.model,
            model_fingerprint=info.model_fingerprint,
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
        )
    finally:
        grower.stop()


def _proposer(config: DrafterConfig) -> tuple[Proposer, BlockPool | None]:
    """Return what guesses, and the books of its KV if it has any."""
    if config.proposer == "lookup" or config.model is None:
        return LookupProposer(), None
    # Imported only here: a lookup drafter runs without torch.
    from drafter_service.proposers.language_model import load_language_model_proposer

    proposer = load_language_model_proposer(
        config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        device=config.device,
        compiled=config.compiled,
        cache_dir=config.cache_dir,
        threads=config.threads,
        leaves_max=config.leaves_max,
        kv_tokens_max=config.kv_tokens_max,
    )
    return proposer, proposer.blocks
