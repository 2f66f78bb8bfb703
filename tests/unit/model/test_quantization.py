"""Weights in 8 bits: what they cost, what they are worth, and where they are used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from outrider.errors import ModelLoadError
from outrider.model.language_model import Row, TransformersModel
from outrider.model.loading import load_language_model
from outrider.model.quantization import Int8Linear, quantize_linears, stored_bytes
from outrider.model.random_model import build_random_model, parse_random_spec

SPEC = "random:tiny?seed=1&hidden=128"


def load(spec: str = SPEC, **options: Any) -> TransformersModel:
    model = load_language_model(spec, device="cpu", cache_dir=Path("/nonexistent"), **options)
    assert isinstance(model, TransformersModel)
    return model


def logits(model: TransformersModel, tokens: list[int]) -> torch.Tensor:
    return model.forward([Row(model.new_cache(), tokens, None, range(len(tokens)))])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 8, 9, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_product_is_that_of_the_dequantized_weight(dtype, rows, bias):
    generator = torch.Generator().manual_seed(rows)
    linear = nn.Linear(48, 24_001, bias=bias)  # more than one tile, and no multiple of one
    linear.weight.data.normal_(generator=generator)
    quantize_(linear, Int8WeightOnlyConfig(set_inductor_config=False))
    ours = Int8Linear(linear)
    inputs = torch.randn((1, rows, 48), generator=generator).to(dtype)
    with torch.inference_mode():
        found = ours(inputs)
        weight = linear.weight.dequantize()
        expected = nn.functional.linear(inputs.float(), weight, linear.bias)
    assert found.shape == (1, rows, 24_001)
    assert found.dtype == dtype
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma3"])
def test_logits_are_near_the_float_ones_and_greedy_choices_mostly_the_same(arch, dtype):
    spec = f"{SPEC}&arch={arch}"
    tokens = list(range(4, 250))
    plain, quantized = (logits(load(spec, **how), tokens) for how in ({}, _int8(dtype)))
    deviation = float((plain - quantized).square().mean().sqrt() / plain.std())
    assert 1e-4 < deviation < 0.05
    same = (plain.argmax(-1) == quantized.argmax(-1)).float().mean()
    assert same > 0.9


def _int8(dtype: str) -> dict[str, Any]:
    return {"quantize": "int8", "dtype": dtype}


def test_weights_take_a_quarter_of_the_memory():
    module = build_random_model(parse_random_spec("random:tiny?seed=1&hidden=256"), "eager")
    embedding = module.get_input_embeddings().weight.numel() * 4
    before = stored_bytes(module)
    quantize_linears(module, "int8")
    assert stored_bytes(module) - embedding < 0.28 * (before - embedding)
    assert not [child for child in module.modules() if type(child) is nn.Linear]


def test_a_quantized_model_is_another_model():
    fingerprints = {load(quantize=kind).model_fingerprint for kind in ("none", "int8")}
    assert len(fingerprints) == 2


def test_the_same_weights_give_the_same_integers():
    first, second = (load(quantize="int8") for _ in range(2))
    assert first.model_fingerprint == second.model_fingerprint
    assert torch.equal(logits(first, [1, 2, 3]), logits(second, [1, 2, 3]))


def test_torchao_missing_is_said_to_people(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ModelLoadError, match=r"--quantize int8 needs torchao.*outrider\[quant"):
        load(quantize="int8")
    assert load().vocabulary_size  # not needed otherwise
