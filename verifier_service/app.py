"""Puts a verifier process together: model, engine, edge, server, registry."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

from outrider.model.info import model_info
from outrider.model.language_model import LanguageModel
from outrider.model.loading import load_language_model, torch_device
from outrider.model.tensor_parallel import ShardedModel, ignore_signals, join_ranks
from outrider.model.threads import set_threads
from outrider.registry import HeldBlocks, WorkerRecord, published, published_blocks
from outrider.serving.server import Server
from outrider.serving.telemetry import Tracing, tracing
from outrider.serving.worker_main import serve_until_stopped
from verifier_service.config import VerifierConfig
from verifier_service.engine import Engine
from verifier_service.service import SERVICE_NAMES, VerifierService

_log = logging.getLogger(__name__)


async def serve(config: VerifierConfig) -> None:
    """Run until asked to stop. Raises `ModelLoadError` or `ConfigError` at start."""
    async with tracing("verifier", config.otlp_endpoint, config.worker_id) as spans:
        await _serve(config, spans)


async def _serve(config: VerifierConfig, spans: Tracing | None) -> None:
    loop = asyncio.get_running_loop()
    # See outrider.model.threads: one thread for all that torch does.
    thread = ThreadPoolExecutor(1, thread_name_prefix="model")
    model = await loop.run_in_executor(thread, _load, config)
    if isinstance(model, ShardedModel):
        model.lead()
    info = model_info(model)
    _log.info(
        "model %s, %s on %s, fingerprint %s",
        info.model,
        info.dtype,
        model.device,
        info.model_fingerprint[:12],
    )
    incarnation = secrets.token_hex(16)
    service = VerifierService(
        info,
        model.tokenizer_files,
        incarnation=incarnation,
        sessions_max=config.engine.sessions_max,
        grammar_timeout_s=config.engine.grammar_timeout_s,
        kv_serves_max=config.engine.kv_serves_max,
        tls=config.tls,
        tracing=spans,
    )
    engine = Engine(model, config.engine, service.emit)
    service.attach(engine)
    blocks = HeldBlocks()
    if config.redis_url is not None:
        engine.pool.blocks.listener = blocks
    if config.engine.warm_up:
        await loop.run_in_executor(thread, engine.warm_up, _report_warm_up)
    engine.start(thread)
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
            role="verifier",
            worker=config.worker_id,
            incarnation=incarnation,
            address=config.advertise or address,
            model=info.model,
            model_fingerprint=info.model_fingerprint,
            capacity=config.engine.sessions_max,
            load=engine.load,
            state="draining" if service.draining else "ready",
            tokenizer_fingerprint=info.tokenizer_fingerprint or "",
            kv_tokens_used=engine.kv_tokens_used,
            kv_tokens_max=engine.pool.tokens_max,
        )

    @contextlib.asynccontextmanager
    async def publish(address: str) -> AsyncIterator[None]:
        url, worker = config.redis_url, config.worker_id
        async with (
            published(url, lambda: record(address)),
            published_blocks(url, blocks, worker=worker, incarnation=incarnation),
        ):
            yield

    try:
        await serve_until_stopped(
            server,
            publish=publish,
            drain=service.drain,
            load=lambda: engine.load,
            hang_up=service.hang_up,
            drain_s=config.drain_s,
            pulse=engine.pulse,
        )
    finally:
        await service.close()
        engine.stop()
        if isinstance(model, ShardedModel):
            model.dismiss()


def follow(config: VerifierConfig) -> None:
    """Compute this rank's share of the model until the leading rank ends.

    Raises `ModelLoadError` at start, RuntimeError if the leader is lost.
    """
    model = _load(config)
    assert isinstance(model, ShardedModel)
    ignore_signals()
    _log.info("rank %d of %d follows", model.ranks.rank, model.ranks.size)
    try:
        model.follow()
    except Exception as error:
        _log.critical(
            "rank %d ends, as it has lost the leader or failed: %s: %s",
            model.ranks.rank,
            type(error).__name__,
            next(iter(str(error).splitlines()), ""),
        )
        raise SystemExit(1) from None
    _log.info("stopped")


def _load(config: VerifierConfig) -> LanguageModel:
    set_threads(config.threads)
    return load_language_model(
        config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        device=config.device,
        compiled=config.compiled,
        cache_dir=config.cache_dir,
        ranks=join_ranks(torch_device(config.device)),
    )


def _report_warm_up(done: int, total: int) -> None:
    _log.info("warm-up %d/%d", done, total)
