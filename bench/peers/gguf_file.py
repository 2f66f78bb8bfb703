"""Writes a Llama-shaped model as GGUF for peers that read nothing else, weights unquantized.

Matrices keep the precision that is asked for; vectors are in float32, as these engines want them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import safetensors
from numpy.typing import NDArray

from bench.peers.process import PeerError

_TYPES: Final = {
    "float32": (gguf.GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "float16": (gguf.GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bfloat16": (gguf.GGMLQuantizationType.BF16, gguf.LlamaFileType.MOSTLY_BF16),
}
_NAMES: Final = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP: Final = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_gguf(folder: Path, cache: Path, dtype: str) -> Path:
    """Write the model in `folder` once and return the file. Raises `PeerError`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "llama":
        raise PeerError(f"GGUF is written for Llama models only, not {config.get('model_type')!r}")
    path = cache / f"{folder.name}-{dtype}.gguf"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".new")
    writer = gguf.GGUFWriter(unfinished, "llama")
    _add_shape(writer, config, dtype)
    _add_tokenizer(writer, folder, config)
    for file in sorted(folder.glob("*.safetensors")):
        _add_tensors(writer, file, config, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    unfinished.replace(path)
    return path


def _add_shape(writer: gguf.GGUFWriter, config: dict[str, Any], dtype: str) -> None:
    heads = config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_name("bench")
    writer.add_file_type(_TYPES[dtype][1])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_rope_dimension_count(_head_dim(config))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def _add_tokenizer(writer: gguf.GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Ids go in and come out, so of the tokenizer only what makes engines load it."""
    data: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    size = config["vocab_size"]
    tokens = [f"[unused{number}]" for number in range(size)]
    types = [int(gguf.TokenType.UNUSED)] * size
    for text, number in data["model"]["vocab"].items():
        tokens[number], types[number] = text, int(gguf.TokenType.NORMAL)
    for added in data["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(gguf.TokenType.CONTROL)
    merges = [
        " ".join(pair) if isinstance(pair, list) else pair for pair in data["model"]["merges"]
    ]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    eos = config["eos_token_id"]
    writer.add_eos_token_id(eos[0] if isinstance(eos, list) else eos)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_add_bos_token(False)


def _add_tensors(writer: gguf.GGUFWriter, file: Path, config: dict[str, Any], dtype: str) -> None:
    deserialize: Any = safetensors.deserialize
    for name, entry in deserialize(file.read_bytes()):
        values = _float32(entry["data"], entry["dtype"]).reshape(entry["shape"])
        if name.endswith("q_proj.weight"):
            values = _interleaved(values, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            values = _interleaved(values, values.shape[0] // _head_dim(config))
        kind = _TYPES[dtype][0] if values.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(_name(name), gguf.quantize(values, kind), raw_dtype=kind)


def _float32(data: bytes, dtype: str) -> NDArray[np.float32]:
    if dtype == "BF16":
        return (np.frombuffer(data, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, {"F32": np.float32, "F16": np.float16}[dtype]).astype(np.float32)


def _interleaved(values: NDArray[np.float32], heads: int) -> NDArray[np.float32]:
    """Rows of a head from halves (as transformers rotates) to pairs (as llama.cpp does)."""
    rows, columns = values.shape
    halves = values.reshape(heads, 2, rows // heads // 2, columns)
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows, columns))


def _name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, _, number, rest = name.split(".", 3)
    return f"blk.{number}.{_NAMES[rest.removesuffix('.weight')]}.weight"


def _head_dim(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
