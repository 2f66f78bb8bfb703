"""Linear layers in the layouts of the CPU's kernels compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.nn import functional

from outrider.model import native
from outrider.model.packing import PackedLinear, TiledLinear, pack_linears, packing

CPU = torch.device("cpu")
ROWS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 13, 33)

needs_native = pytest.mark.skipif(
    not native.available(), reason="no C++ compiler is found: the CPU operators cannot be built"
)
needs_packed = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"),
    reason="this torch has no packed kernels",
)


def linear(inputs: int, outputs: int, bias: bool, dtype: torch.dtype) -> torch.nn.Linear:
    torch.manual_seed(inputs * 1000 + outputs)
    return torch.nn.Linear(inputs, outputs, bias=bias).to(dtype)


def check_widened(inputs: int, outputs: int, bias: bool, rows: int) -> None:
    plain = linear(inputs, outputs, bias, torch.bfloat16)
    layer = TiledLinear(plain)
    x = torch.randn(rows, inputs).bfloat16()
    with torch.inference_mode():
        found = layer(x)
        wide_bias = plain.bias.float() if bias else None
        expected = functional.linear(x.float(), plain.weight.float(), wide_bias)
    assert (found.dtype, found.shape) == (torch.bfloat16, (rows, outputs))
    # Sums are float32; only the result is rounded, to eight bits.
    torch.testing.assert_close(found.float(), expected, atol=1e-5, rtol=2.0**-8)


@needs_native
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", [1, 7, 8, 9, 16, 17, 49])
def test_widened_weights_give_the_float32_product(bias: bool, rows: int, outputs: int) -> None:
    check_widened(48, outputs, bias, rows)


@needs_native
@settings(max_examples=100, deadline=None, derandomize=True)
@example(inputs=1, outputs=1, bias=True, rows=1)
@given(st.integers(1, 100), st.integers(1, 100), st.booleans(), st.integers(0, 30))
def test_widened_weights_of_any_size(inputs: int, outputs: int, bias: bool, rows: int) -> None:
    check_widened(inputs, outputs, bias, rows)


@needs_native
def test_widened_rows_do_not_depend_on_their_company() -> None:
    layer = TiledLinear(linear(72, 33, True, torch.bfloat16))
    x = torch.randn(13, 72).bfloat16()
    with torch.inference_mode():
        together = layer(x)
        for row in range(13):
            assert torch.equal(layer(x[row : row + 1])[0], together[row])
        assert torch.equal(layer(x.view(1, 13, 72))[0], together)
        # Rows that do not lie end to end.
        assert torch.equal(layer(x.repeat(1, 2)[:, :72]), together)


@needs_native
def test_a_widened_layer_refuses_what_does_not_fit() -> None:
    layer = TiledLinear(linear(8, 8, False, torch.bfloat16))
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 8))
    with pytest.raises(RuntimeError):
        layer(torch.zeros(2, 9, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError, match="bfloat16"):
        TiledLinear(linear(8, 8, False, torch.float64))


@needs_packed
@pytest.mark.parametrize("bias", [False, True])
def test_packed_linears_compute_the_same(bias: bool) -> None:
    plain = linear(48, 80, bias, torch.float32)
    layer = PackedLinear(plain)
    with torch.inference_mode():
        for rows in ROWS:
            inputs = torch.randn(1, rows, 48)
            torch.testing.assert_close(layer(inputs), plain(inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_linear_below_a_module_is_replaced(dtype: torch.dtype) -> None:
    kind = packing(dtype, CPU)
    if kind is None:
        pytest.skip(f"there are no kernels for {dtype} on this processor")

    class Special(torch.nn.Linear):
        """May compute something else."""

    plain = linear(16, 24, True, dtype)
    inner = torch.nn.Sequential(linear(16, 24, True, dtype), torch.nn.ReLU())
    module = torch.nn.ModuleDict({"a": inner, "b": Special(3, 3), "c": torch.nn.Embedding(4, 4)})
    pack_linears(module, kind)
    assert isinstance(module.get_submodule("a.0"), kind)
    assert type(module.get_submodule("b")) is Special
    assert [name for name, _ in module.named_parameters()] == ["b.weight", "b.bias", "c.weight"]
    x = torch.randn(5, 16).to(dtype)
    with torch.inference_mode():
        found = module.get_submodule("a.0")(x)
        expected = functional.linear(x.float(), plain.weight.float(), plain.bias.float())
    torch.testing.assert_close(found.float(), expected, atol=1e-2, rtol=1e-2)
    assert "in_features=16, out_features=24" in repr(module)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_there_are_packed_layers_for_two_precisions_on_cpus_only(dtype: torch.dtype) -> None:
    assert packing(dtype, CPU) is None
    assert packing(torch.float32, torch.device("meta")) is None


def test_bfloat16_is_widened_where_the_processor_cannot_multiply_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("not for this processor")

    monkeypatch.setattr(PackedLinear, "forward", refuse)
    for there in (True, False):
        monkeypatch.setattr(native, "available", lambda there=there: there)
        assert packing(torch.bfloat16, CPU) is (TiledLinear if there else None)
        assert packing(torch.float32, CPU) is (TiledLinear if there else None)
