"""Build hook: generates `outrider/v1` from `proto/`. Everything else is in pyproject.toml."""

from __future__ import annotations

import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from typing import ClassVar

from setuptools import Command, setup
from setuptools.command.build_py import build_py
from setuptools.errors import ExecError

ROOT = Path(__file__).parent
PROTO = ROOT / "proto"
GENERATED = Path("outrider", "v1")
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")


def plugin(name: str) -> str:
    """Find a protoc plugin on PATH (an isolated build), else beside the interpreter (a venv)."""
    path = shutil.which(name) or shutil.which(name, path=os.path.dirname(sys.executable))
    if path is None:
        raise ExecError(f"{name} not found: install mypy-protobuf")
    return path


def generate(output: Path) -> None:
    """Replace the generated modules and stubs under `output`/outrider/v1."""
    from grpc_tools import protoc  # a build requirement, absent when only metadata is asked for

    for stale in (output / GENERATED).glob("*_pb2*"):
        stale.unlink()
    arguments = ["protoc", f"-I{PROTO}", f"-I{files('grpc_tools') / '_proto'}"]
    arguments += [f"--plugin={name}={plugin(name)}" for name in PLUGINS]
    arguments += [f"--{kind}_out={output}" for kind in ("python", "grpc_python")]
    arguments += [f"--{kind}_out=quiet:{output}" for kind in ("mypy", "mypy_grpc")]
    arguments += [str(path) for path in sorted((PROTO / GENERATED).glob("*.proto"))]
    if protoc.main(arguments) != 0:
        raise ExecError("protoc failed; its messages are above")


class BuildPy(build_py):
    """Generates into the wheel, or into the working tree for an editable installation."""

    def run(self) -> None:
        super().run()
        generate(ROOT if self.editable_mode else Path(self.build_lib))


class Proto(Command):
    """Regenerates the working tree's code after a change in `proto/`: `make proto`."""

    description = "generate outrider/v1 from proto/"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = []

    def initialize_options(self) -> None:
        """Nothing to set."""

    def finalize_options(self) -> None:
        """Nothing to check."""

    def run(self) -> None:
        generate(ROOT)


setup(cmdclass={"build_py": BuildPy, "proto": Proto})
