"""A chat template taken apart: what stands before a user's turn, and between it and the answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from outrider.errors import ConfigError

# A character of a private-use area, which no template writes.
_MARK = "\ue000"


class ChatFrame:
    """Ids around a single user's turn; without a chat template there is nothing around it."""

    def __init__(self, tokenizer_files: Mapping[str, bytes]) -> None:
        self.tokenizer = Tokenizer.from_buffer(tokenizer_files["tokenizer.json"])
        text = _rendered(self.tokenizer, tokenizer_files)
        if text.count(_MARK) != 1:
            raise ConfigError("the chat template does not repeat a user's turn exactly once")
        before, after = text.split(_MARK)
        self.before: tuple[int, ...] = tuple(self.encode(before))
        self.after: tuple[int, ...] = tuple(self.encode(after))

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without any that the tokenizer would add."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def question(self, text: str) -> list[int]:
        """Return the ids of a conversation up to where its answer begins."""
        return [*self.before, *self.encode(text), *self.after]


def _rendered(tokenizer: Tokenizer, files: Mapping[str, bytes]) -> str:
    config: dict[str, Any] = json.loads(files.get("tokenizer_config.json", b"{}"))
    template = config.get("chat_template")
    if "chat_template.jinja" in files:
        template = files["chat_template.jinja"].decode()
    if not isinstance(template, str):
        return _MARK
    names = {
        name: config[name]
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if isinstance(config.get(name), str)
    }
    rendering: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    text: str = rendering.apply_chat_template(
        [{"role": "user", "content": _MARK}],
        chat_template=template,
        add_generation_prompt=True,
        tokenize=False,
    )
    return text
