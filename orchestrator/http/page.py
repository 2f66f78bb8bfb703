"""The live page: one static file."""

from __future__ import annotations

from importlib.resources import files

PAGE = files("orchestrator.http").joinpath("page.html").read_text(encoding="utf-8")
