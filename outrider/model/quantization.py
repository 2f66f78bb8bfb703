"""Weights in fewer bits, quantized by torchao when a model is loaded.

"int8" keeps each row of a linear layer's weight as 8-bit integers with one float32 scale, symmetric
around zero; activations stay as they are (weight-only). Embeddings and norms are left alone.

torchao computes the integers everywhere, and the products on accelerators. Its product widens
the whole weight for every call, which for the few tokens of a verify step costs several times the
product itself on a CPU; there `Int8Linear` widens a tile at a time, that stays in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from outrider.config import Quantize
from outrider.errors import ModelLoadError

_TILE_WEIGHTS = 1 << 19
"""Weights widened at a time: 2 MiB, about a core's share of the cache."""

_ROWS_FEW = 8
"""Up to as many tokens in bfloat16, torch's own int8 product is the faster one."""


class Int8Linear(nn.Module):
    """An `nn.Linear` for inference on a CPU, with 8-bit weights. Sums are float32."""

    def __init__(self, quantized: nn.Linear) -> None:
        """`quantized`: a layer that torchao has quantized by rows."""
        super().__init__()
        self.in_features = quantized.in_features
        self.out_features = quantized.out_features
        weight: Any = quantized.weight
        bias: Any = quantized.bias  # annotated as if it were always there
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.bias: torch.Tensor | None
        self.register_buffer("weight", weight.qdata)  # int8 [out, in]
        self.register_buffer("scale", weight.scale.reshape(-1).float())  # [out]
        self.register_buffer("bias", None if bias is None else bias.detach().float())
        self._tile = max(1, _TILE_WEIGHTS // self.in_features)
        # The operator wants scales in bfloat16, which would make them wrong by up to 0.4 %.
        self._ones = torch.ones(self.out_features, dtype=torch.bfloat16)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        flat = inputs.reshape(-1, self.in_features)
        if flat.dtype == torch.bfloat16 and len(flat) <= _ROWS_FEW:
            outputs = torch._weight_int8pack_mm(flat, self.weight, self._ones).float()
        else:
            outputs = self._tiled(flat.float())
        outputs.mul_(self.scale)
        if self.bias is not None:
            outputs.add_(self.bias)
        return outputs.to(inputs.dtype).view(*inputs.shape[:-1], self.out_features)

    def _tiled(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs.new_empty((len(inputs), self.out_features))
        for begin in range(0, self.out_features, self._tile):
            tile = self.weight[begin : begin + self._tile].float()
            outputs[:, begin : begin + len(tile)] = inputs @ tile.t()
        return outputs

    def extra_repr(self) -> str:
        """Describe the module as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def quantize_linears(module: nn.Module, kind: Quantize) -> None:
    """Quantize every `nn.Linear` below `module` in place; its weights are freed as it goes.

    A head that shares its weight with the embedding gets one of its own. Raises ModelLoadError if
    torchao is missing.
    """
    if kind == "none":
        return
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise ModelLoadError(
            f"--quantize {kind} needs torchao, which is not installed:"
            f" pip install 'outrider[quantization]' ({error})"
        ) from error
    # Its recommended settings for torch's compiler are global ones.
    config = Int8WeightOnlyConfig(set_inductor_config=False)
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:  # a subclass may compute something else
                quantize_(child, config)
                if child.weight.device.type == "cpu":
                    setattr(parent, name, Int8Linear(child))


def stored_bytes(module: nn.Module) -> int:
    """Bytes that parameters and buffers take, quantized ones as they are stored."""
    total = 0
    for tensor in {id(t): t for t in (*module.parameters(), *module.buffers())}.values():
        stored = [tensor]
        integers = getattr(tensor, "qdata", None)
        if integers is not None:  # torchao's tensors give the size of what they stand for
            stored = [integers, tensor.scale]  # type: ignore[attr-defined]
        total += sum(part.numel() * part.element_size() for part in stored)
    return total
