"""Attention of a ragged batch, as transformers' own modules call it.

All rows of a pass are laid end to end in one sequence [1, N]. What makes them independent is here:
each row attends over its own session's buffer only, seeing its prefix and, within its tree, its
ancestors. The function is registered with transformers' attention interface under `ATTENTION`;
the pass travels to it as a keyword argument, so nothing is global.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import AttentionInterface

from outrider.errors import ModelLoadError
from outrider.model.kv_cache import Extension, SessionCache

ATTENTION = "outrider_ragged"
"""Name under which the attention is registered. No mask is registered: the rows bring theirs."""


class RowAttention:
    """Where one row of a pass writes its keys and values, and what it sees.

    Views are made once per pass, for all layers at once: a slice in every layer would cost more
    than the attention of a short row.
    """

    __slots__ = ("begin", "end", "keys", "mask", "new_keys", "new_values", "values")

    def __init__(self, cache: SessionCache, extension: Extension, begin: int, group: int) -> None:
        """`begin`: index of the row's first token in the pass; `group`: query per KV head."""
        self.begin = begin
        self.end = begin + extension.size
        start, total = extension.start, extension.start + extension.size
        # Each is a tuple over layers; [1, kv_heads, tokens, head_dim] as attention wants it.
        keys, values = cache.buffer[:, :1, :, :total], cache.buffer[:, 1:, :, :total]
        self.keys = keys.unbind(0)
        self.values = values.unbind(0)
        self.new_keys = keys[:, :, :, start:].unbind(0)
        self.new_values = values[:, :, :, start:].unbind(0)
        self.mask = _mask(cache, extension, group)


class PassAttention:
    """All rows of a pass, end to end; at least one."""

    def __init__(self, rows: Sequence[RowAttention]) -> None:
        self.rows = rows

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Store the new keys and values of a layer and attend.

        query [1, heads, N, head_dim], key and value [1, kv_heads, N, head_dim]. Returns
        [1, N, heads, head_dim].
        """
        heads, kv_heads, head_dim = query.shape[1], key.shape[1], query.shape[3]
        group = heads // kv_heads
        out = query.new_empty((query.shape[2], kv_heads, group, head_dim))
        for row in self.rows:
            begin, end = row.begin, row.end
            row.new_keys[layer].copy_(key[:, :, begin:end])
            row.new_values[layer].copy_(value[:, :, begin:end])
            # The query heads that share a KV head become more queries of that head: no key is
            # repeated, and one small product per KV head replaces one per query head.
            folded = query[:, :, begin:end].reshape(1, kv_heads, -1, head_dim)
            attended = functional.scaled_dot_product_attention(
                folded, row.keys[layer], row.values[layer], attn_mask=row.mask, scale=scaling
            )
            unfolded = attended.view(kv_heads, group, end - begin, head_dim)
            out[begin:end] = unfolded.permute(2, 0, 1, 3)
        return out.view(1, -1, heads, head_dim)

    def check_call(self, module: torch.nn.Module, arguments: dict[str, Any]) -> None:
        """Look at how a layer calls attention. Only `ProbeAttention` does."""


class ProbeAttention(PassAttention):
    """A pass that also refuses what this attention does not do; run once, at load.

    Raises ModelLoadError out of the model's forward pass. `calls` counts the calls per layer.
    """

    def __init__(self, rows: Sequence[RowAttention], length_max: int) -> None:
        super().__init__(rows)
        self.length_max = length_max
        self.calls: dict[int, int] = {}

    def check_call(self, module: torch.nn.Module, arguments: dict[str, Any]) -> None:
        """Count the call and refuse an argument that would change the result."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ModelLoadError(f"its {type(module).__name__} does not say which layer it is")
        self.calls[layer] = self.calls.get(layer, 0) + 1
        for name, value in arguments.items():
            if value is None or name in _HARMLESS_ARGUMENTS:
                continue
            if name == "sliding_window" and value >= self.length_max:
                continue
            if name == "sliding_window":
                raise ModelLoadError(
                    f"it attends within a sliding window of {value} tokens, less than its"
                    f" maximum length of {self.length_max}, which is not supported"
                )
            raise ModelLoadError(f"its attention needs '{name}', which is not supported")


_HARMLESS_ARGUMENTS = frozenset(
    {
        "is_causal",
        "use_cache",
        "position_ids",
        "position_embeddings",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "dropout",
    }
)
"""Arguments that change nothing in this attention: it is causal, and dropout is off."""


def ragged_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    *,
    scaling: float | None = None,
    rows: PassAttention | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention interface wants it; shapes as in `PassAttention`.

    Raises ModelLoadError if the pass did not get here, as the model drops keyword arguments.
    """
    if rows is None:
        raise ModelLoadError(
            f"{type(module).__name__} does not hand keyword arguments on to its attention"
        )
    rows.check_call(module, arguments)
    layer: int = module.layer_idx  # type: ignore[assignment]
    return rows.attend(layer, query, key, value, scaling), None


def register() -> None:
    """Make the attention known to transformers; may be called again."""
    AttentionInterface.register(ATTENTION, ragged_attention)


def _mask(cache: SessionCache, extension: Extension, group: int) -> torch.Tensor | None:
    """Return the additive mask [group * n, start + n] of a row, or None if all is visible."""
    layout, count, total = cache.layout, extension.size, extension.start + extension.size
    if layout.layers == 0 or (count == 1 and extension.visible is None):
        return None
    if extension.visible is None:
        hidden = torch.ones((count, count), dtype=torch.bool).triu_(1)
    else:
        hidden = torch.from_numpy(~extension.visible)
    if not hidden.any():
        return None
    mask = torch.zeros((count, total), dtype=layout.dtype)
    mask[:, total - hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    return mask.to(layout.device).repeat(group, 1)
