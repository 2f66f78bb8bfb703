"""Attention of a ragged batch, as transformers' own modules call it.

All rows of a pass are laid end to end in one sequence [1, N]. What makes them independent is here:
each row attends over its own session's slots only, seeing its prefix and, within its tree, its
ancestors. The function is registered with transformers' attention interface under `ATTENTION`;
what a pass needs travels to it as a keyword argument, so nothing is global.

There are two ways. `NativeAttention` is one C++ operator per layer, for CPUs
(`outrider.model.native`). `GatheredAttention` is plain torch on any device: it gathers each row's
slots, pads the rows to one batch and calls scaled dot-product attention once. It is the reference
for the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional
from transformers import AttentionInterface

from outrider.errors import ModelLoadError
from outrider.model.kv_cache import KvPool
from outrider.model.step_inputs import StepInputs

ATTENTION = "outrider_ragged"
"""Name under which the attention is registered. No mask is registered: the rows bring theirs."""

_TILE = 8
"""Tokens of a row that one unit of native work attends for: they share the reading of the keys."""

_PADDED_MAX = 16
"""Rows of up to this many tokens are padded into one batch; longer ones go alone."""


class NativeAttention:
    """The plan of a pass for `torch.ops.outrider.attend`: addresses of arrays that live here.

    `words` is what the operator takes; the fields are those of `Plan` and `Window` in ops.cpp.
    """

    def __init__(self, inputs: StepInputs, pool: KvPool, windows: Sequence[int | None]) -> None:
        """`windows`: sliding window of each layer, None where it sees everything."""
        kinds = list(dict.fromkeys(windows))
        self._alive: list[npt.NDArray[Any]] = []
        words = [
            pool.buffer.data_ptr(),
            pool.buffer.shape[2],
            self._address(inputs.write_slots, np.int64),
            self._address(tasks := _tasks(inputs), np.int32),
            len(tasks),
            self._address(inputs.token_rows, np.int32),
            self._address(inputs.limits, np.int32),
            self._address(inputs.lengths, np.int32),
            self._address(inputs.tables, np.int32),
            inputs.tables.shape[1],
            self._address(np.array([kinds.index(window) for window in windows]), np.int32),
        ]
        for window in kinds:
            low, starts, visible = inputs.visibility(window)
            words += [
                self._address(low, np.int32),
                self._address(starts, np.int64),
                self._address(visible, np.uint8),
            ]
        self.words = torch.tensor(words, dtype=torch.int64)

    def _address(self, array: npt.NDArray[Any], dtype: Any) -> int:
        array = np.ascontiguousarray(array, dtype=dtype)
        self._alive.append(array)
        return int(array.ctypes.data)


class GatheredAttention:
    """A pass in plain torch; see the module's docstring."""

    def __init__(self, inputs: StepInputs, pool: KvPool, windows: Sequence[int | None]) -> None:
        self._pool = pool
        device = pool.layout.device
        self._write = torch.from_numpy(inputs.write_slots).to(device)
        sizes = np.diff(inputs.begins)
        short = [row for row, size in enumerate(sizes) if size <= _PADDED_MAX]
        groups = [short] if short else []
        groups += [[row] for row, size in enumerate(sizes) if size > _PADDED_MAX]
        masks = {
            window: [inputs.padded_mask(group, window) for group in groups]
            for window in dict.fromkeys(windows)
        }
        self._groups = []
        for index, group in enumerate(groups):
            tokens, real = inputs.padded_tokens(group)
            self._groups.append(
                _Padded(
                    torch.from_numpy(tokens).to(device),
                    torch.from_numpy(np.flatnonzero(real)).to(device),
                    torch.from_numpy(inputs.padded_slots(group)).to(device),
                    [torch.from_numpy(masks[window][index]).to(device) for window in windows],
                )
            )

    # It differs from pass to pass: the compiler calls it as it is.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scaling: float | None,
    ) -> torch.Tensor:
        """Store the new keys and values of a layer and attend.

        query [N, heads, head_dim], key and value [N, kv_heads, head_dim]; returns as query.
        """
        keys, values = self._pool.buffer[layer]
        keys.index_copy_(0, self._write, key)
        values.index_copy_(0, self._write, value)
        out = torch.empty_like(query)
        for group in self._groups:
            group.attend(layer, query, keys, values, scaling, out)
        return out


class _Padded:
    """Some rows of a pass as one rectangular batch."""

    def __init__(
        self,
        tokens: torch.Tensor,
        real: torch.Tensor,
        slots: torch.Tensor,
        masks: list[torch.Tensor],
    ) -> None:
        self.tokens = tokens  # [rows, n] index in the pass of each query; padding repeats the first
        self.real = real  # indices into the flattened [rows * n] that are no padding
        self.slots = slots  # [rows, length] slot of each key; padding repeats the first
        self.masks = masks  # per layer, bool [rows, n, length]

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float | None,
        out: torch.Tensor,
    ) -> None:
        rows, count = self.tokens.shape
        kv_heads, dim = keys.shape[1:]
        group = query.shape[1] // kv_heads
        # The query heads that share a KV head become more queries of that head: no key is
        # repeated, and one product per KV head replaces one per query head.
        folded = query[self.tokens].view(rows, count, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(
            folded.reshape(rows, kv_heads, group * count, dim),
            keys[self.slots].transpose(1, 2),
            values[self.slots].transpose(1, 2),
            attn_mask=self.masks[layer].repeat(1, group, 1)[:, None],
            scale=scaling,
        )
        unfolded = attended.view(rows, kv_heads, group, count, dim).permute(0, 3, 1, 2, 4)
        unfolded = unfolded.reshape(rows * count, -1, dim)
        out[self.tokens.flatten()[self.real]] = unfolded[self.real]


class Probe:
    """A plain pass that also refuses what this attention does not do; run once, at load.

    Raises ModelLoadError out of the model's forward pass. Afterwards `windows` holds the sliding
    window of each layer that called, None where it sees everything.
    """

    def __init__(self, attention: GatheredAttention, length_max: int) -> None:
        self.attention = attention
        self.length_max = length_max
        self.calls: list[int] = []
        self.windows: dict[int, int | None] = {}

    def check_call(self, module: torch.nn.Module, arguments: dict[str, Any]) -> None:
        """Note the call and refuse an argument that would change the result."""
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise ModelLoadError(f"its {type(module).__name__} does not say which layer it is")
        self.calls.append(layer)
        window = arguments.get("sliding_window")
        self.windows[layer] = None if window is None or window >= self.length_max else window
        for name, value in arguments.items():
            if value is not None and name != "sliding_window" and name not in _HARMLESS_ARGUMENTS:
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
    rows: torch.Tensor | GatheredAttention | Probe | None = None,
    **arguments: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention interface wants it.

    query [1, heads, N, head_dim], key and value [1, kv_heads, N, head_dim]; returns
    [1, N, heads, head_dim]. `rows` is `NativeAttention.words`, or one of the other two. Raises
    ModelLoadError if the pass did not get here, as the model drops keyword arguments.
    """
    if rows is None:
        raise ModelLoadError(
            f"{type(module).__name__} does not hand keyword arguments on to its attention"
        )
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    layer: int = module.layer_idx  # type: ignore[assignment]
    if isinstance(rows, torch.Tensor):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        attended = torch.ops.outrider.attend(query, key, value, rows, layer, scale)
        return attended[None], None
    if isinstance(rows, Probe):
        rows.check_call(module, arguments)
        rows = rows.attention
    return rows.attend(layer, query, key, value, scaling)[None], None


def register() -> None:
    """Make the attention known to transformers; may be called again."""
    AttentionInterface.register(ATTENTION, ragged_attention)


def _tasks(inputs: StepInputs) -> npt.NDArray[np.int32]:
    """Return [tasks, 2] token ranges, none across rows.

    Every other one first: a thread takes a stretch of them, and later tiles of a long chunk see
    more keys.
    """
    tiles = [
        (tile, min(tile + _TILE, int(end)))
        for begin, end in zip(inputs.begins[:-1], inputs.begins[1:], strict=True)
        for tile in range(int(begin), int(end), _TILE)
    ]
    return np.array(tiles[::2] + tiles[1::2], dtype=np.int32)
