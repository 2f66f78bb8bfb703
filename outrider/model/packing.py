"""Weights in the layout that the CPU's matrix kernels want, reordered once at load.

A pass over few tokens is bound by reading the weights. Products from plain row-major weights are
slow exactly there, above all with 2 to 8 rows, which is where speculation lives. With packing the
time also grows steadily with the rows, so nothing is gained by padding a batch.

`TiledLinear` is our own operator (`outrider.model.native`), the faster one for few rows in float32,
and in bfloat16 wherever the processor has no instructions for it. `PackedLinear` uses oneDNN
through the operators that torch's own compiler emits for CPU inference. They are not public, hence
the one small module, the check for their presence, and torch's exact pin.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from outrider.model import native

# The kernels choose their layout for a number of rows. Packed for 8, they were as fast at 1 row,
# and at any number above, as when packed for that number.
_ROWS_HINT = 8


class PackedLinear(nn.Module):
    """An `nn.Linear` for inference whose weight only the CPU kernels can read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        bias: Any = linear.bias  # annotated as if it were always there
        # Neither is a parameter: moving or casting the opaque layout is not possible.
        self._bias = None if bias is None else bias.detach()
        self._packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach(), _ROWS_HINT
        )

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        if not inputs.numel():
            return inputs.new_empty((*inputs.shape[:-1], self.out_features))
        outputs: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
            inputs, self._packed, self._bias, "none", [], ""
        )
        return outputs

    def extra_repr(self) -> str:
        """Describe the module as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class TiledLinear(nn.Module):
    """An `nn.Linear` for inference by our own operator, float32 or bfloat16.

    Bfloat16 weights stay bfloat16 in memory, half of what a small batch has to read, and are
    widened to float32 on the way to the registers. Sums are float32, results like the inputs.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        bias: Any = linear.bias
        self._bias = None if bias is None else bias.detach().float()
        self._packed: torch.Tensor = torch.ops.outrider.pack_weight(linear.weight.detach())

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Map [..., in_features] to [..., out_features]."""
        flat = inputs.reshape(-1, self.in_features)
        outputs: torch.Tensor = torch.ops.outrider.packed_linear(
            flat, self._packed, self._bias, self.out_features
        )
        return outputs.view(*inputs.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Describe the module as `nn.Linear` does."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def packing(
    dtype: torch.dtype, device: torch.device, *, compiled: bool = False
) -> type[nn.Module] | None:
    """Return the fastest packed linear layer for the precision on this processor, if any.

    `compiled`: only what torch's compiler can be told about.
    """
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    ours = TiledLinear if native.has_operators(device, dtype) else None
    if ours is not None and (dtype == torch.float32 or compiled):
        return ours
    probe = nn.Linear(16, 16, device=device, dtype=dtype)
    try:
        with torch.inference_mode():
            PackedLinear(probe)(torch.zeros((1, 16), dtype=dtype))
    except (AttributeError, RuntimeError):  # no such operator, or not for this processor
        return ours
    return None if compiled else PackedLinear


def pack_linears(module: nn.Module, packed: type[nn.Module]) -> None:
    """Replace every `nn.Linear` below `module`; its weights are freed as it goes.

    Tied weights stay in memory twice: once packed, once as the embedding.
    """
    for name, child in module.named_children():
        if type(child) is nn.Linear:  # a subclass may compute something else
            setattr(module, name, packed(child))
        else:
            pack_linears(child, packed)
