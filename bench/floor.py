"""The raw matrix products of a verify step: what no implementation in plain torch can avoid.

Seven `F.linear` a layer (query, key, value, output, gate, up, down) and the head, unfused and
unpacked, in the model's precision, on random weights of the model's shapes. No attention, no
norms, no cache: a step that is as fast as this has hidden everything else.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import AutoConfig


class Floor:
    """Weights of the shapes that `folder`'s configuration names. Use it on the model's thread."""

    def __init__(self, folder: Path, dtype: str) -> None:
        config: Any = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
        hidden, inner = config.hidden_size, config.intermediate_size
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or hidden // heads
        kv = (getattr(config, "num_key_value_heads", None) or heads) * head_dim
        queries = heads * head_dim
        layer = [(queries, hidden), (kv, hidden), (kv, hidden), (hidden, queries)]
        layer += [(inner, hidden), (inner, hidden), (hidden, inner)]
        shapes = layer * config.num_hidden_layers + [(config.vocab_size, hidden)]
        self._dtype: torch.dtype = getattr(torch, dtype)
        generator = torch.Generator().manual_seed(1)
        # Small, so that nothing overflows or becomes denormal.
        self._weights = [
            torch.randn(shape, generator=generator).mul_(0.02).to(self._dtype) for shape in shapes
        ]
        self._widths = sorted({width for _, width in shapes})

    def inputs(self, tokens: int) -> dict[int, torch.Tensor]:
        """Inputs for `run`, by width: made beforehand, since making them is no matrix product."""
        return {width: torch.ones((tokens, width), dtype=self._dtype) for width in self._widths}

    def run(self, inputs: dict[int, torch.Tensor]) -> None:
        """Compute all products of one step."""
        with torch.inference_mode():
            for weight in self._weights:
                functional.linear(inputs[weight.shape[1]], weight)
