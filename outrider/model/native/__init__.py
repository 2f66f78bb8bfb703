"""Our C++ operators for CPUs: built at first use for the processor at hand, then kept.

`ops.cpp` holds what a ragged step needs and torch has no operator for: attention over a paged KV
pool with token trees, products of few rows, and the one rule (`rule.h`). Without a C++ compiler
everything works all the same, in plain torch and slower.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from filelock import FileLock
from torch import library as torch_library

from outrider.config import DEFAULT_CACHE

_log = logging.getLogger(__name__)

_SOURCES = (Path(__file__).with_name("ops.cpp"), Path(__file__).with_name("rule.h"))
"""What is compiled, and what it includes."""
_FLAGS = (
    "-std=gnu++20",
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-shared",
    "-w",
)
_BUILD_TIMEOUT_S = 600
OFF = "OUTRIDER_NATIVE"
"""Environment variable: set to 0, the operators are neither built nor used."""
FOLDER = "OUTRIDER_NATIVE_CACHE"
"""Environment variable: where built operators are kept, if not beside the models."""


def has_operators(device: torch.device, dtype: torch.dtype) -> bool:
    """True if the operators are there for this device and precision."""
    if device.type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return False
    return available()


@functools.cache
def available() -> bool:
    """True if the operators are loaded; builds them at the first call, which takes seconds."""
    if os.environ.get(OFF, "1") == "0":
        return False
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        _log.warning("no C++ compiler is found: steps on the CPU run in plain torch, slower")
        return False
    try:
        torch.ops.load_library(str(_library(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or str(error)
        _log.warning(
            "the CPU operators cannot be built: steps run in plain torch, slower: %s",
            reason.strip().splitlines()[0] if reason.strip() else type(error).__name__,
        )
        return False
    _describe_to_compiler()
    return True


def _describe_to_compiler() -> None:
    """Tell torch's compiler what the operators return."""

    def attend(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        plan: torch.Tensor,
        layer: int,
        scaling: float,
    ) -> torch.Tensor:
        return query.new_empty(query.shape)

    def packed_linear(
        x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, outputs: int
    ) -> torch.Tensor:
        return x.new_empty((x.shape[0], outputs))

    torch_library.register_fake(torch.ops.outrider.attend.default, attend)
    torch_library.register_fake(torch.ops.outrider.packed_linear.default, packed_linear)


def _library(compiler: str) -> Path:
    """Return the built library, from the cache if it was built for this very set-up."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True)
    described = "\0".join(
        [
            *(source.read_text() for source in _SOURCES),
            *_FLAGS,
            version.stdout,
            torch.__version__,
            _processor(),
        ]
    )
    digest = hashlib.sha256(described.encode()).hexdigest()[:16]
    folder = _cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"ops-{digest}.so"
    if library.exists():
        return library
    with FileLock(f"{library}.lock"):
        if not library.exists():
            _log.info("building the CPU operators (once, some seconds)")
            _build(compiler, library)
    return library


def _build(compiler: str, library: Path) -> None:
    from torch.utils.cpp_extension import include_paths, library_paths

    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        subprocess.run(
            [
                compiler,
                *_FLAGS,
                f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
                *(flag for path in include_paths() for flag in ("-isystem", path)),
                str(_SOURCES[0]),
                "-o",
                str(built),
                *(f"-L{path}" for path in library_paths()),
                "-ltorch_cpu",
                "-lc10",
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=_BUILD_TIMEOUT_S,
        )
        built.rename(library)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return torch.backends.cpu.get_cpu_capability()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache_folder() -> Path:
    base = os.environ.get(FOLDER)
    return Path(base) if base else DEFAULT_CACHE / "native"
