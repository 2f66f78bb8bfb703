"""One forward pass over a ragged batch of tree-shaped rows, with KV per session.

The verifier's tips, chosen nodes and prefill chunks, and a drafter's leaves, are all rows of this
one pass. Module definitions are transformers' own; the batch and the cache are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from outrider.errors import ModelLoadError
from outrider.kv_blocks import BLOCK_TOKENS
from outrider.model import attention, native
from outrider.model.kv_cache import Extension, KvLayout, KvPool, SessionCache
from outrider.model.memory import memory_bytes, resident_bytes
from outrider.model.step_inputs import StepInputs, step_inputs

Logits: TypeAlias = torch.Tensor
"""[rows, vocabulary]: named here for those who hand logits on and do not see torch."""


@dataclass(frozen=True, slots=True)
class Row:
    """New tokens of one session in a pass, and where their logits are wanted."""

    cache: SessionCache
    tokens: Sequence[int]
    """At least one id, each in [0, vocabulary_size)."""
    parents: Sequence[int] | None = None
    """None: a chain that extends the prefix (the cache must hold no tree). Otherwise one parent
    slot per token, -1 being the end of the prefix. The tokens get slots tree_size,
    tree_size + 1, ... in order, so a parent may be an older slot or an earlier token here."""
    wanted: Sequence[int] = field(default=())
    """Indices into `tokens` whose logits are wanted, in this order."""


def plan_rows(
    rows: Sequence[Row], layout: KvLayout, *, vocabulary_size: int, length_max: int
) -> list[Extension]:
    """Check a pass over `rows` and say where their tokens go. Changes nothing; raises ValueError.

    The sizes are those of the model that is to run them.
    """
    if len({id(row.cache) for row in rows}) != len(rows):
        raise ValueError("a cache may occur only once in a pass")
    extensions = []
    for row in rows:
        if row.cache.pool is not rows[0].cache.pool:
            raise ValueError("the caches of a pass must share one pool")
        if row.cache.layout != layout:
            raise ValueError("the cache was made for another model")
        if not row.tokens:
            raise ValueError("a row needs at least one token")
        if min(row.tokens) < 0 or max(row.tokens) >= vocabulary_size:
            raise ValueError(f"a token id lies outside [0, {vocabulary_size})")
        if row.wanted and (min(row.wanted) < 0 or max(row.wanted) >= len(row.tokens)):
            raise ValueError(f"wanted logits lie outside a row of {len(row.tokens)} tokens")
        extension = row.cache.plan(len(row.tokens), row.parents)
        last = extension.positions.max()
        if last >= length_max:
            raise ValueError(f"position {last} reaches the maximum length of {length_max}")
        extensions.append(extension)
    return extensions


class LanguageModel(Protocol):
    """What verifier and drafters need of a model; not safe for two threads at once."""

    @property
    def name(self) -> str:
        """Name for people and requests."""

    @property
    def vocabulary_size(self) -> int:
        """Number of ids, and the width of the logits."""

    @property
    def length_max(self) -> int:
        """Tokens a text may have: positions run from 0 to length_max - 1."""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, in ascending order."""

    @property
    def dtype(self) -> str:
        """ "float32", "bfloat16" or "float16"; "synthetic" where nothing is computed."""

    @property
    def device(self) -> torch.device:
        """Where weights and caches lie."""

    @property
    def model_fingerprint(self) -> str:
        """What must match for KV to be shared or an output to be continued exactly."""

    @property
    def tokenizer_fingerprint(self) -> str:
        """See `outrider.tokenizer.tokenizer_fingerprint`."""

    @property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Contents of the files named by `outrider.tokenizer.TOKENIZER_FILES`, as present."""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that a token takes in a session's cache."""

    def new_pool(self, tokens_max: int | None = None) -> KvPool:
        """Allocate a KV budget; None: what the machine has room for. It belongs to the caller."""

    def new_cache(self) -> SessionCache:
        """Create an empty cache in a pool of the model's own; the caller releases it.

        For drafters and tests; who must keep a budget makes a pool.
        """

    def forward(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Run the rows and return the wanted logits, float32 [sum(len(wanted)), vocabulary].

        Row after row, in the order of each row's `wanted`. The new tokens are then part of their
        caches. A row's logits do not depend on its company beyond rounding. Raises ValueError
        for wrong rows and OutOfBlocks where the KV budget has no room for the new tokens; in both
        cases no cache has changed what it holds.

        `meanwhile` is called once where it costs least time: while an accelerator computes, or
        before the processor does. The caches are as they were. What it raises ends the pass.
        """


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """What a model is called and what it must be told apart by."""

    name: str
    model_fingerprint: str
    tokenizer_fingerprint: str
    tokenizer_files: Mapping[str, bytes]
    eos_ids: tuple[int, ...]


class TransformersModel:
    """A `LanguageModel` around a causal LM of transformers that uses our attention.

    Made by `outrider.model.loading`, which has checked that the model can be addressed.
    """

    def __init__(self, module: PreTrainedModel, identity: ModelIdentity) -> None:
        self.module: Any = module.eval().requires_grad_(False)
        self.identity = identity
        config: Any = module.config.get_text_config(decoder=True)
        self.vocabulary_size: int = module.get_output_embeddings().out_features
        self.length_max: int = config.max_position_embeddings
        self.device: torch.device = module.device
        self.layout = _kv_layout(config, module)
        self.windows: tuple[int | None, ...] = (None,) * self.layout.layers
        """Sliding window of each layer, found out by `probe`."""
        self._native = native.has_operators(self.device, self.layout.dtype)
        self._pool: KvPool | None = None

    @property
    def name(self) -> str:
        """Name for people and requests."""
        return self.identity.name

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, in ascending order."""
        return self.identity.eos_ids

    @property
    def dtype(self) -> str:
        """ "float32", "bfloat16" or "float16"."""
        return str(self.layout.dtype).removeprefix("torch.")

    @property
    def model_fingerprint(self) -> str:
        """What must match for KV to be shared or an output to be continued exactly."""
        return self.identity.model_fingerprint

    @property
    def tokenizer_fingerprint(self) -> str:
        """See `outrider.tokenizer.tokenizer_fingerprint`."""
        return self.identity.tokenizer_fingerprint

    @property
    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Contents of the tokenizer's files, by name."""
        return self.identity.tokenizer_files

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of KV that a token takes in a session's cache."""
        return self.layout.bytes_per_token

    def new_pool(self, tokens_max: int | None = None) -> KvPool:
        """Allocate a KV budget; see `LanguageModel.new_pool`."""
        if tokens_max is None:
            tokens_max = _kv_tokens_default(self.layout)
        return KvPool(self.layout, tokens_max, self.model_fingerprint)

    def new_cache(self) -> SessionCache:
        """Create an empty cache; see `LanguageModel.new_cache`."""
        if self._pool is None:
            self._pool = self.new_pool()
        return self._pool.new_cache()

    def forward(
        self, rows: Sequence[Row], meanwhile: Callable[[], None] | None = None
    ) -> torch.Tensor:
        """Run the rows; see `LanguageModel.forward`."""
        extensions = self._planned(rows)
        accelerated = self.device.type != "cpu"
        if meanwhile is not None and not (rows and accelerated):
            meanwhile()
        if not rows:
            return torch.empty((0, self.vocabulary_size), device=self.device)
        logits = self.run(self._inputs(rows, extensions), rows[0].cache.pool)
        if meanwhile is not None and accelerated:
            # All is launched; whoever reads the logits waits for them.
            meanwhile()
        # Last, so that a pass that failed has not changed what the caches claim to hold.
        for row, extension in zip(rows, extensions, strict=True):
            row.cache.apply(extension)
        return logits

    def run(self, inputs: StepInputs, pool: KvPool) -> torch.Tensor:
        """Compute a pass; returns the wanted logits, float32 [M, vocabulary]."""
        with torch.inference_mode():
            if self._native:
                plan = attention.NativeAttention(inputs, pool, self.windows)
                return self._run(inputs, plan.words)
            plain = attention.GatheredAttention(inputs, pool, self.windows)
            return self._run(inputs, plain)

    def probe(self) -> None:
        """Check that the model's attention can be addressed, and learn its sliding windows.

        Raises ModelLoadError.
        """
        # In a pool of its own: the default one is most of the memory.
        cache = self.new_pool(BLOCK_TOKENS).new_cache()
        rows = [Row(cache, [0, 1], None, [0, 1])]
        layers = self.layout.layers
        try:
            inputs = self._inputs(rows, self._planned(rows))
            with torch.inference_mode():
                plain = attention.GatheredAttention(inputs, cache.pool, (None,) * layers)
                probe = attention.Probe(plain, self.length_max)
                self._run(inputs, probe)
        finally:
            cache.release()
        if sorted(probe.calls) != list(range(layers)):
            raise ModelLoadError(
                f"only {len(set(probe.calls))} of its {layers} layers use the attention interface"
                " once per pass"
            )
        self.windows = tuple(probe.windows[layer] for layer in range(layers))

    def _planned(self, rows: Sequence[Row]) -> list[Extension]:
        return plan_rows(
            rows, self.layout, vocabulary_size=self.vocabulary_size, length_max=self.length_max
        )

    def _inputs(self, rows: Sequence[Row], extensions: Sequence[Extension]) -> StepInputs:
        """Make room in the caches and lay the rows end to end."""
        for row, extension in zip(rows, extensions, strict=True):
            row.cache.reserve(extension.start + extension.size)
        return step_inputs(
            [row.tokens for row in rows],
            [row.cache for row in rows],
            extensions,
            [row.wanted for row in rows],
        )

    def _run(
        self,
        inputs: StepInputs,
        rows: torch.Tensor | attention.GatheredAttention | attention.Probe,
    ) -> torch.Tensor:
        """Run the modules; `rows` is what the attention takes."""
        places = torch.from_numpy(np.stack([inputs.tokens, inputs.positions])).to(self.device)
        output = self.module(
            input_ids=places[:1],
            position_ids=places[1:],
            use_cache=False,
            logits_to_keep=torch.from_numpy(inputs.wanted).to(self.device),
            rows=rows,
        )
        logits: torch.Tensor = output.logits[0]
        return logits.float()


_KV_TOKENS_DEFAULT = 65_536
_KV_MEMORY_SHARE_CPU = 0.4
"""Of the machine's memory, or of its container's."""
_KV_LEFT_SHARE_CPU = 0.7
"""Of what is left of that: steps need memory, too."""
_KV_MEMORY_SHARE_GPU = 0.85


def _kv_tokens_default(layout: KvLayout) -> int:
    """Return a KV budget in tokens that the memory at hand has room for."""
    if layout.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(layout.device)
        return max(BLOCK_TOKENS, int(free * _KV_MEMORY_SHARE_GPU) // max(1, layout.bytes_per_token))
    memory = memory_bytes()
    # The weights are there already, and take most of a small container.
    left = memory - resident_bytes()
    room = min(memory * _KV_MEMORY_SHARE_CPU, left * _KV_LEFT_SHARE_CPU)
    fits = int(room) // max(1, layout.bytes_per_token)
    return max(BLOCK_TOKENS, min(_KV_TOKENS_DEFAULT, fits))


def _kv_layout(config: Any, module: PreTrainedModel) -> KvLayout:
    """Return the sizes of a model's keys and values, from its configuration."""
    heads: int = config.num_attention_heads
    return KvLayout(
        layers=config.num_hidden_layers,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        dtype=module.dtype,
        device=module.device,
    )
