"""Log-probabilities as the two OpenAI formats spell them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from orchestrator.text import TextCodec
from outrider.domain import TokenLogprobs

LOGPROB_MIN = -9999.0
"""JSON knows no infinity."""


def chat_logprobs(entries: Sequence[TokenLogprobs], codec: TextCodec) -> dict[str, Any]:
    """Log-probabilities of a chat's tokens."""
    return {
        "content": [
            {
                **_named(entry.token, entry.logprob, codec),
                "top_logprobs": [_named(*other, codec) for other in entry.top],
            }
            for entry in entries
        ]
    }


def _named(token: int, logprob: float, codec: TextCodec) -> dict[str, Any]:
    data = codec.token_bytes(token)
    return {
        "token": data.decode(errors="replace"),
        "logprob": max(LOGPROB_MIN, logprob),
        "bytes": list(data),
    }


def completion_logprobs(
    entries: Sequence[TokenLogprobs | int], codec: TextCodec, offset: int, top: int
) -> tuple[dict[str, Any], int]:
    """Log-probabilities of a completion's tokens, and where the text behind them begins.

    `offset` is the number of characters before the first token, `top` the number of alternatives
    asked for. An entry that is a bare id has no log-probability: the first token of a prompt.
    """
    tokens: list[str] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    for entry in entries:
        token = entry if isinstance(entry, int) else entry.token
        text = token_text(token, codec)
        tokens.append(text)
        offsets.append(offset)
        offset += len(text)
        if isinstance(entry, int):
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(max(LOGPROB_MIN, entry.logprob))
        best: dict[str, float] = {}
        # The token itself is always among them, as in OpenAI's; of equal texts the best counts.
        for other, logprob in (*entry.top, (token, entry.logprob)):
            best.setdefault(token_text(other, codec), max(LOGPROB_MIN, logprob))
        tops.append(best if top else None)
    result = {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops if top else None,
        "text_offset": offsets,
    }
    return result, offset


def token_text(token: int, codec: TextCodec) -> str:
    """A token as text; one that is no whole character reads as its bytes."""
    data = codec.token_bytes(token)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
