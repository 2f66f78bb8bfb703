"""From a model spec to a model that runs: a packaged name, random weights, a folder, a hub id."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from outrider.errors import ModelLoadError
from outrider.model import attention, native, random_model
from outrider.model.compiling import can_compile, compile_steps
from outrider.model.fingerprint import folder_digest, model_fingerprint, parameters_digest
from outrider.model.language_model import LanguageModel, ModelIdentity, TransformersModel
from outrider.model.packaged import PACKAGES, packaged_model, progress, quiet_transformers
from outrider.model.packing import pack_linears, packing
from outrider.model.support import check_config, check_model
from outrider.tokenizer import TOKENIZER_FILES, byte_tokenizer_files, tokenizer_fingerprint

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

SPEC_FORMS = (
    f"a packaged model ({', '.join(PACKAGES)}), a tiny random one (random:NAME?seed=1), a folder"
    " with config.json, tokenizer.json and *.safetensors, or a Hugging Face id (owner/name)"
)
"""The forms of a model spec, for people."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_HUB_PATTERNS = ["*.safetensors", "*.json", "*.jinja"]


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model that lies in a local folder."""

    name: str
    folder: Path

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Return the contents of those `TOKENIZER_FILES` that exist, by name."""
        paths = [self.folder / name for name in TOKENIZER_FILES]
        return {path.name: path.read_bytes() for path in paths if path.is_file()}


def resolve_model(spec: str, cache_dir: Path) -> ModelFiles:
    """Find the folder of a model that is not random, fetching it if need be.

    Raises ModelLoadError if the spec has none of `SPEC_FORMS` or cannot be fetched. What looks
    like a path is never looked up on a network.
    """
    if spec in PACKAGES:
        return ModelFiles(spec, packaged_model(spec, cache_dir))
    folder = Path(spec).expanduser() if spec else None
    if folder is not None and folder.is_dir():
        return ModelFiles(folder.resolve().name, folder)
    if not _is_hub_id(spec):
        kind = "no such folder" if _is_path(spec) else "unknown model"
        raise ModelLoadError(f"cannot load model '{spec}': {kind}. A model is {SPEC_FORMS}.")
    return ModelFiles(spec, _fetch_from_hub(spec))


def load_language_model(
    spec: str,
    *,
    dtype: Dtype = "float32",
    device: Device = "auto",
    compiled: bool = False,
    cache_dir: Path,
) -> LanguageModel:
    """Load the model that `spec` names (see `SPEC_FORMS`), ready to run.

    `cache_dir` keeps what was fetched, converted or computed. `compiled`: see
    `outrider.model.compiling`; without a compiler at hand the model runs as it
    is. Raises ModelLoadError, whose message names the spec, for whatever keeps the model from being
    loaded or addressed.
    """
    attention.register()
    place = _device(device)
    compiled = compiled and can_compile(place)
    try:
        if spec.startswith(random_model.PREFIX):
            model = _load_random(spec, getattr(torch, dtype), place, compiled)
        else:
            files = resolve_model(spec, cache_dir)
            model = _load_folder(files, getattr(torch, dtype), place, cache_dir, compiled)
        check_model(model)
        if compiled:
            compile_steps(model.module)
    except ModelLoadError as error:
        if f"'{spec}'" in str(error):
            raise
        raise ModelLoadError(f"cannot load model '{spec}': {error}") from error
    return model


def _load_random(
    spec: str, dtype: torch.dtype, device: torch.device, compiled: bool
) -> TransformersModel:
    parsed = random_model.parse_random_spec(spec)
    with quiet_transformers():
        module = random_model.build_random_model(parsed, attention.ATTENTION)
    weights = parameters_digest(module)
    _place(module, device, dtype)
    return _assemble(parsed.name, module, weights, byte_tokenizer_files(), compiled)


def _load_folder(
    files: ModelFiles,
    dtype: torch.dtype,
    device: torch.device,
    cache_dir: Path,
    compiled: bool,
) -> TransformersModel:
    tokenizer_files = files.tokenizer_files()
    if not (files.folder / "config.json").is_file():
        raise ModelLoadError(f"there is no config.json in {files.folder}")
    if "tokenizer.json" not in tokenizer_files:
        raise ModelLoadError(f"there is no tokenizer.json in {files.folder}")
    # The expected ways in which somebody else's files are wrong; anything else is a defect.
    expected = (OSError, ValueError, KeyError, RuntimeError, ImportError)
    try:
        with quiet_transformers(), progress(f"Loading model '{files.name}'"):
            config = AutoConfig.from_pretrained(files.folder, trust_remote_code=False)
            check_config(config)
            weights = folder_digest(files.folder, cache_dir)
            module = _load_module(files.folder, dtype)
            _place(module, device, dtype)
    except expected as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelLoadError(reason) from error
    return _assemble(files.name, module, weights, tokenizer_files, compiled)


def _load_module(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    # Typed as Any: the annotation leaves out what output_loading_info does to the result.
    load: Any = AutoModelForCausalLM.from_pretrained
    module, report = load(
        folder,
        dtype=dtype,
        attn_implementation=attention.ATTENTION,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    # transformers would fill the gaps with random numbers and go on.
    gaps = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if gaps:
        raise ModelLoadError(f"{len(gaps)} weights are missing or misshapen, such as {gaps[0]}")
    assert isinstance(module, PreTrainedModel)
    return module


def _place(module: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    # By the base class: PreTrainedModel wraps `to` in a way that type checkers cannot follow.
    torch.nn.Module.to(module, device=device, dtype=dtype)


def _assemble(
    name: str,
    module: PreTrainedModel,
    weights: str,
    tokenizer_files: Mapping[str, bytes],
    compiled: bool,
) -> TransformersModel:
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelLoadError(f"its tokenizer.json cannot be read: {error}") from error
    attends = "native" if native.has_operators(module.device, module.dtype) else "gathered"
    kernels = f"{module.device.type}-{attends}"
    packed = packing(module.dtype, module.device, compiled=compiled)
    if packed is not None:
        pack_linears(module, packed)
        kernels += f"-{packed.__name__}"
    if compiled:
        kernels += "-compiled"
    config: dict[str, Any] = module.config.to_dict()
    identity = ModelIdentity(
        name=name,
        model_fingerprint=model_fingerprint(config, weights, module.dtype, kernels),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        tokenizer_files=tokenizer_files,
        eos_ids=_eos_ids(module, tokenizer_files),
    )
    return TransformersModel(module, identity)


def _eos_ids(module: PreTrainedModel, tokenizer_files: Mapping[str, bytes]) -> tuple[int, ...]:
    """Return the ids that end a text: those of the generation config, else of the config."""
    generation = json.loads(tokenizer_files.get("generation_config.json", b"{}"))
    ids = generation.get("eos_token_id")
    if ids is None:
        config: Any = module.config.get_text_config(decoder=True)
        ids = config.eos_token_id
    if ids is None:
        return ()
    return tuple(sorted({ids} if isinstance(ids, int) else set(ids)))


def _device(device: Device) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ModelLoadError("device 'cuda' was asked for, but this machine has none to use")
    return torch.device("cuda", torch.cuda.current_device())


def _is_path(spec: str) -> bool:
    return spec.startswith(("/", ".", "~")) or spec.count("/") > 1


def _is_hub_id(spec: str) -> bool:
    return bool(_HUB_ID.fullmatch(spec)) and "--" not in spec and ".." not in spec


def _fetch_from_hub(spec: str) -> Path:
    try:
        with progress(f"Fetching model '{spec}' from Hugging Face"):
            return Path(huggingface_hub.snapshot_download(spec, allow_patterns=_HUB_PATTERNS))
    except (OSError, ValueError, huggingface_hub.errors.HfHubHTTPError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelLoadError(
            f"cannot load model '{spec}': there is no such folder, and Hugging Face does not"
            f" give it: {reason}",
        ) from error
