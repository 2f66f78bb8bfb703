"""Makes the proposer that the settings name."""

from __future__ import annotations

from drafter_service.config import LANGUAGE_MODEL, DrafterConfig, stages_of
from drafter_service.datastore import open_datastore
from drafter_service.proposers.base import Proposer
from drafter_service.proposers.cascade import CascadeProposer
from drafter_service.proposers.datastore import DatastoreProposer
from drafter_service.proposers.lookup import LookupProposer
from drafter_service.proposers.recycling import RecyclingProposer
from outrider.errors import ConfigError
from outrider.kv_blocks import BlockPool


def make_proposer(config: DrafterConfig) -> tuple[Proposer, BlockPool | None]:
    """Return what guesses, and the books of its KV if it has any.

    Raises `ModelLoadError` or `ConfigError`. Called by the thread that steps the model afterwards.
    """
    stages: list[Proposer] = []
    blocks: BlockPool | None = None
    for name in stages_of(config.proposer):
        if name == LANGUAGE_MODEL:
            stage, blocks = _language_model(config)
        else:
            stage = _modelless(name, config)
        stages.append(stage)
    if len(stages) == 1:
        return stages[0], blocks
    return CascadeProposer(stages, enough_tokens=config.cascade_tokens), blocks


def _modelless(name: str, config: DrafterConfig) -> Proposer:
    if name == "datastore":
        if config.datastore is None:
            raise ConfigError("datastore: the datastore proposer needs one")
        return DatastoreProposer(open_datastore(config.datastore))
    return RecyclingProposer() if name == "recycling" else LookupProposer()


def _language_model(config: DrafterConfig) -> tuple[Proposer, BlockPool]:
    # Imported only here: a drafter without a model runs without torch.
    from drafter_service.proposers.language_model import load_language_model_proposer

    if config.model is None:
        raise ConfigError("model: the language-model proposer needs one")
    proposer = load_language_model_proposer(
        config.model,
        dtype=config.dtype,
        quantize=config.quantize,
        device=config.device,
        compiled=config.compiled,
        cache_dir=config.cache_dir,
        target=config.target,
        threads=config.threads,
        leaves_max=config.leaves_max,
        kv_tokens_max=config.kv_tokens_max,
    )
    return proposer, proposer.blocks
