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

from outrider.config import Quantize
from outrider.errors import ModelLoadError
from outrider.model import attention, native, random_model, synthetic
from outrider.model.compiling import can_compile, compile_steps
from outrider.model.distillation.drafting import DistilledModel
from outrider.model.distillation.folder import is_distilled, read_folder
from outrider.model.distillation.student import empty_student, fill_student
from outrider.model.distillation.target import borrowed_embeddings, target_digest
from outrider.model.fingerprint import folder_digest, model_fingerprint, parameters_digest
from outrider.model.language_model import LanguageModel, ModelIdentity, TransformersModel
from outrider.model.packaged import PACKAGES, packaged_model, progress, quiet_transformers
from outrider.model.packing import pack_linears, packing
from outrider.model.quantization import quantize_linears
from outrider.model.support import check_config, check_model
from outrider.model.tensor_parallel import (
    Ranks,
    ShardedModel,
    accelerator_type,
    check_divisible,
    distributed_config,
    own_shares,
    shard_module,
)
from outrider.tokenizer import TOKENIZER_FILES, byte_tokenizer_files, tokenizer_fingerprint

Dtype = Literal["float32", "bfloat16", "float16"]
Device = Literal["auto", "cpu", "cuda"]

SPEC_FORMS = (
    f"a packaged model ({', '.join(PACKAGES)}), a tiny random one (random:NAME?seed=1), one that"
    " computes nothing (synthetic:NAME?step=1:22), a folder with config.json, tokenizer.json and"
    " *.safetensors, a drafter's folder made by `outrider distill`, or a Hugging Face id"
    " (owner/name)"
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
    quantize: Quantize = "none",
    device: Device = "auto",
    compiled: bool = False,
    cache_dir: Path,
    ranks: Ranks | None = None,
    target: str | None = None,
) -> LanguageModel:
    """Load the model that `spec` names (see `SPEC_FORMS`), ready to run.

    With `ranks`, all of them must call this, and get a `ShardedModel`. `compiled`: see
    `outrider.model.compiling`; where there is no compiler, and with `ranks`, the model runs as it
    is. `cache_dir` keeps what was fetched, converted or computed. `target` says where the target of
    a distilled drafter is, if not where it was when that was made. Raises ModelLoadError, whose
    message names the spec, for whatever keeps the model from being loaded or addressed.
    """
    attention.register()
    place = torch_device(device)
    compiled = compiled and ranks is None and can_compile(place)
    how = _How(getattr(torch, dtype), place, quantize, compiled, ranks)
    try:
        if ranks is not None and quantize != "none":
            raise ModelLoadError(f"--quantize {quantize} cannot be used with several processes")
        if spec.startswith(synthetic.PREFIX):
            return _load_synthetic(spec, how)
        if is_distilled(spec):
            return _load_distilled(Path(spec).expanduser(), how, cache_dir, target)
        if target is not None:
            raise ModelLoadError("only a distilled drafter borrows from a target")
        if spec.startswith(random_model.PREFIX):
            model = _load_random(spec, how)
        else:
            files = resolve_model(spec, cache_dir)
            model = _load_folder(files, how, cache_dir)
        check_model(model)
        if compiled:
            compile_steps(model.module)
    except ModelLoadError as error:
        if f"'{spec}'" in str(error):
            raise
        raise ModelLoadError(f"cannot load model '{spec}': {error}") from error
    return model


@dataclass(frozen=True, slots=True)
class _How:
    """How to run what is loaded."""

    dtype: torch.dtype
    device: torch.device
    quantize: Quantize
    compiled: bool
    ranks: Ranks | None


def _load_synthetic(spec: str, how: _How) -> synthetic.SyntheticModel:
    parsed = synthetic.parse_synthetic_spec(spec)
    if how.quantize != "none" or how.ranks is not None:
        raise ModelLoadError("a synthetic model has no weights to quantize or to split")
    return synthetic.SyntheticModel(parsed)


def _load_random(spec: str, how: _How) -> TransformersModel:
    parsed = random_model.parse_random_spec(spec)
    with quiet_transformers():
        module = random_model.build_random_model(parsed, attention.ATTENTION)
    weights = parameters_digest(module)
    _place(module, how.device, how.dtype)
    if how.ranks is not None:
        check_divisible(module.config, how.ranks)
        shard_module(module, how.ranks)
    return _assemble(parsed.name, module, weights, byte_tokenizer_files(), how)


def _load_distilled(
    folder: Path, how: _How, cache_dir: Path, target: str | None
) -> TransformersModel:
    """Load a drafter around its target's embeddings and tokenizer."""
    if how.ranks is not None:
        raise ModelLoadError("a distilled drafter runs in a single process")
    drafter = read_folder(folder)
    place = target or drafter.target.model
    files = None if place.startswith(random_model.PREFIX) else resolve_model(place, cache_dir)
    lent = None if files is None else files.folder
    with progress(f"Loading drafter '{drafter.name}'"):
        digest = target_digest(place, lent, cache_dir)
        if digest != drafter.target.digest:
            raise ModelLoadError(
                f"it was made for another target: for '{drafter.target.model}' with weights"
                f" {drafter.target.digest[:12]}, while those of '{place}' are {digest[:12]}"
            )
        embeddings = borrowed_embeddings(place, lent)
        module = empty_student(
            drafter.model_config, embeddings, len(drafter.kept), attention.ATTENTION
        )
        fill_student(module, drafter.weights)
        _place(module, how.device, how.dtype)
    tokenizer_files = byte_tokenizer_files() if files is None else files.tokenizer_files()
    student = _assemble(drafter.name, module, drafter.digest, tokenizer_files, how)
    check_model(student)
    if how.compiled:
        compile_steps(student.module)
    return DistilledModel(student, student.identity, drafter.kept, len(embeddings))


def _load_folder(files: ModelFiles, how: _How, cache_dir: Path) -> TransformersModel:
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
            if how.ranks is not None:
                check_divisible(config, how.ranks)
            weights = folder_digest(files.folder, cache_dir)
            module = _load_module(files.folder, how)
            _place(module, how.device, how.dtype)
    except expected as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ModelLoadError(reason) from error
    return _assemble(files.name, module, weights, tokenizer_files, how)


def _load_module(folder: Path, how: _How) -> PreTrainedModel:
    # transformers splits weights as it reads them, but only for the machine's own accelerator.
    shares = how.ranks is not None and how.device.type == accelerator_type()
    split = {"distributed_config": distributed_config(how.ranks)} if how.ranks and shares else {}
    # Typed as Any: the annotation leaves out what output_loading_info does to the result.
    load: Any = AutoModelForCausalLM.from_pretrained
    module, report = load(
        folder,
        dtype=how.dtype,
        attn_implementation=attention.ATTENTION,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **split,
    )
    # transformers would fill the gaps with random numbers and go on.
    gaps = [*report["missing_keys"], *(str(key) for key in report["mismatched_keys"])]
    if gaps:
        raise ModelLoadError(f"{len(gaps)} weights are missing or misshapen, such as {gaps[0]}")
    assert isinstance(module, PreTrainedModel)
    if how.ranks is not None and not shares:
        shard_module(module, how.ranks)
    return module


def _place(module: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    # By the base class: PreTrainedModel wraps `to` in a way that type checkers cannot follow.
    torch.nn.Module.to(module, device=device, dtype=dtype)


def _assemble(
    name: str,
    module: PreTrainedModel,
    weights: str,
    tokenizer_files: Mapping[str, bytes],
    how: _How,
) -> TransformersModel:
    try:
        tokenizer = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelLoadError(f"its tokenizer.json cannot be read: {error}") from error
    attends = "native" if native.has_operators(module.device, module.dtype) else "gathered"
    kernels = f"{module.device.type}-{attends}"
    quantize_linears(module, how.quantize)
    # Layers that are split are left as transformers has made them.
    packed = None
    if how.ranks is None:
        packed = packing(module.dtype, module.device, compiled=how.compiled)
    if packed is not None:
        pack_linears(module, packed)
        kernels += f"-{packed.__name__}"
    if how.compiled:
        kernels += "-compiled"
    config: dict[str, Any] = module.config.to_dict()
    identity = ModelIdentity(
        name=name,
        model_fingerprint=model_fingerprint(
            config,
            weights,
            module.dtype,
            kernels,
            quantization=how.quantize,
            parallelism=1 if how.ranks is None else how.ranks.size,
        ),
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        tokenizer_files=tokenizer_files,
        eos_ids=_eos_ids(module, tokenizer_files),
    )
    if how.ranks is not None:
        own_shares(module)
        return ShardedModel(module, identity, how.ranks)
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


def torch_device(device: Device) -> torch.device:
    """Return where to run. Raises ModelLoadError if there is no such device."""
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
