"""Puts a drafter process together: proposer, growing thread, edge, server, registry."""

from __future__ import annotations

import asyncio
import logging
import secrets
from concurrent.futures import ThreadPoolExecutor

from drafter_service.config import DrafterConfig
from drafter_service.growing import Grower
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.lookup import LookupProposer
from drafter_service.service import SERVICE_NAMES, DrafterService
from outrider.registry import WorkerRecord, published
from outrider.serving.server import Server
from outrider.serving.worker_main import serve_until_stopped

_log = logging.getLogger(__name__)


async def serve(config: DrafterConfig) -> None:
    """Run until asked to stop. Raises `ModelLoadError` or `ConfigError` at start."""
    # One thread for loading and stepping; outrider.model.threads says why.
    thread = ThreadPoolExecutor(1, thread_name_prefix="proposer")
    proposer = await asyncio.get_running_loop().run_in_executor(thread, _proposer, config)
    info = proposer.info
    _log.info("proposer %s, model %s", info.proposer, info.model)
    incarnation = secrets.token_hex(16)
    service = DrafterService(
        info, incarnation=incarnation, sessions_max=config.growing.sessions_max
    )
    grower = Grower(proposer, config.growing, service.emit)
    service.attach(grower)
    grower.start(thread)
    server = Server(SERVICE_NAMES, host=config.host, port=config.port)
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

    try:
        await serve_until_stopped(
            server,
            publish=lambda address: published(config.redis_url, lambda: record(address)),
            drain=service.drain,
            load=lambda: 0,  # mirrors are disposable: nothing to wait for
            drain_s=config.drain_s,
        )
    finally:
        grower.stop()


def _proposer(config: DrafterConfig) -> Proposer:
    if config.proposer == "lookup" or config.model is None:
        return LookupProposer()
    # Imported only here: a lookup drafter runs without torch.
    from drafter_service.proposers.language_model import load_language_model_proposer

    return load_language_model_proposer(
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
