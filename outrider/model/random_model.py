"""Tiny models with random weights, for tests and demonstrations: no download, loads at once.

    random:NAME?seed=1&layers=2&hidden=64&heads=4&kv_heads=2&length_max=2048&arch=llama

`arch` is llama, qwen3, mistral or gemma3; the last two attend within a sliding window of `window`
tokens, which by default is as wide as the longest text.

Weights are a function of the seed and the parameter's name, so a model with fewer layers is the
bottom of one with more. `noise` (a fraction of each weight's spread) and `noise_seed` perturb
the weights: that is how a draft model is made that agrees with its target only partly. For the
default sizes the greedy choices agree in about 80, 60, 36 and 20 percent of the positions of the
target's own text with a noise of 0.05, 0.1, 0.2 and 0.3, and in 35 percent with one layer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from outrider.errors import ModelLoadError
from outrider.tokenizer import BYTE_SPECIAL_TOKENS, BYTE_VOCABULARY_SIZE

PREFIX = "random:"

_ARCHITECTURES = ("llama", "qwen3", "mistral", "gemma3")
_ARCHITECTURES_SLIDING = ("mistral", "gemma3")

# Spread of the weights, found by trial: next-token distributions of 2.3 nats in the mean, greedy
# text that neither repeats one token nor falls into a short loop, and less than two near-ties
# (best two logits within 1e-3) in a thousand tokens.
_LOGIT_SPREAD = 3.2
_QUERY_KEY_GAIN = 1.5
_RESIDUAL_GAIN = 1.0


@dataclass(frozen=True, slots=True)
class RandomSpec:
    """A random model's name and sizes. Raises ModelLoadError for sizes that do not fit."""

    name: str
    seed: int = 0
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    length_max: int = 2048
    noise: float = 0.0
    noise_seed: int = 1
    arch: str = "llama"
    window: int = 0
    """Width of the sliding window in tokens; 0: as wide as the longest text."""

    def __post_init__(self) -> None:
        if self.arch not in _ARCHITECTURES:
            raise ModelLoadError(f"arch must be one of {', '.join(_ARCHITECTURES)}")
        for field in ("layers", "hidden", "heads", "kv_heads", "length_max"):
            if not 1 <= getattr(self, field) <= 1 << 20:
                raise ModelLoadError(f"{field} must be positive, got {getattr(self, field)}")
        if self.hidden % (2 * self.heads) or self.heads % self.kv_heads:
            raise ModelLoadError(
                "hidden must be an even multiple of heads, and heads a multiple of kv_heads"
            )
        if not 0 <= self.window <= self.length_max:
            raise ModelLoadError(
                f"window must lie between 0 and {self.length_max}, got {self.window}"
            )
        if self.window and self.arch not in _ARCHITECTURES_SLIDING:
            raise ModelLoadError(
                f"window is for arch {' and '.join(_ARCHITECTURES_SLIDING)}; {self.arch} has none"
            )
        if not 0.0 <= self.noise <= 100.0:
            raise ModelLoadError(f"noise must lie between 0 and 100, got {self.noise}")


def parse_random_spec(spec: str) -> RandomSpec:
    """Parse `random:NAME?key=value&...`. Raises ModelLoadError."""
    name, _, query = spec.removeprefix(PREFIX).partition("?")
    if not name:
        raise ModelLoadError("a random model needs a name, as in random:tiny?seed=1")
    types: dict[str, Any] = {
        field.name: type(field.default) for field in dataclasses.fields(RandomSpec)[1:]
    }
    values: dict[str, Any] = {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key not in types:
            raise ModelLoadError(f"unknown parameter '{key}'; there are {', '.join(types)}")
        try:
            values[key] = types[key](value)
        except ValueError:
            raise ModelLoadError(
                f"parameter '{key}' must be of type {types[key].__name__}, got '{value}'"
            ) from None
    return RandomSpec(name, **values)


def build_random_model(spec: RandomSpec, attention: str) -> PreTrainedModel:
    """Build the model in float32 on the CPU, with the named attention."""
    config = _config(spec)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, dtype=torch.float32
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weights(spec, name, parameter.shape))
    return model


def _config(spec: RandomSpec) -> Any:
    arch = "gemma3_text" if spec.arch == "gemma3" else spec.arch
    window = {}
    if spec.arch in _ARCHITECTURES_SLIDING:
        window["sliding_window"] = spec.window or spec.length_max
    return AutoConfig.for_model(
        arch,
        vocab_size=BYTE_VOCABULARY_SIZE,
        hidden_size=spec.hidden,
        intermediate_size=2 * spec.hidden,
        num_hidden_layers=spec.layers,
        num_attention_heads=spec.heads,
        num_key_value_heads=spec.kv_heads,
        head_dim=spec.hidden // spec.heads,
        max_position_embeddings=spec.length_max,
        tie_word_embeddings=False,
        bos_token_id=256,
        eos_token_id=258,
        pad_token_id=259,
        **window,
    )


def _weights(spec: RandomSpec, name: str, shape: torch.Size) -> torch.Tensor:
    """Return a parameter's values, float32 of the given shape."""
    if len(shape) == 1:
        # Norms. Gemma's add one to their weight.
        return torch.full(shape, 0.0 if spec.arch == "gemma3" else 1.0)
    weights = _normal(spec.seed, name, shape)
    if spec.noise:
        weights += spec.noise * _normal(spec.noise_seed, f"noise/{name}", shape)
    if name.endswith("embed_tokens.weight"):
        return weights if spec.arch != "gemma3" else weights / spec.hidden**0.5
    weights *= _gain(name) / shape[1] ** 0.5
    if name == "lm_head.weight":
        # Specials keep probability, but a text does not end by accident all the time.
        weights[-len(BYTE_SPECIAL_TOKENS) :] = 0.0
    return weights


def _gain(name: str) -> float:
    if name == "lm_head.weight":
        return _LOGIT_SPREAD
    if "q_proj" in name or "k_proj" in name:
        return _QUERY_KEY_GAIN
    return _RESIDUAL_GAIN


def _normal(seed: int, name: str, shape: torch.Size) -> torch.Tensor:
    """Return standard normal values that depend on the seed and the name alone."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator)
