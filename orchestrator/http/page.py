"""The live page: one answer, put together of its files."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files


def _read(name: str) -> str:
    return files("orchestrator.http").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


# In this order: what the second one does at the end needs both.
_STYLE, _SCRIPT = _read("page.css"), _read("page.js") + _read("page_fleet.js")

PAGE = _read("page.html").replace("{style}", _STYLE).replace("{script}", _SCRIPT)
"""The page, as HTML."""

PAGE_HEADERS = {
    # By hash: whatever else found its way into the page would not run.
    "content-security-policy": (
        f"default-src 'none'; script-src {_hash(_SCRIPT)}; style-src {_hash(_STYLE)};"
        " img-src data:; connect-src 'self'; frame-ancestors 'none'; base-uri 'none';"
        " form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}
