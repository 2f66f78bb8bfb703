"""Tokenizers without torch and transformers: identity, files, and the byte-level one.

Two models may be paired only if the same id means the same piece of text to both, which is what
the fingerprint here says. The byte tokenizer belongs to the tiny random models.
"""

from __future__ import annotations

import hashlib
import json

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)
"""Files of a model's folder that text handling needs; only the first is always there.

`generation_config.json` is among them because it names the ids that end a text.
"""

END_OF_TEXT = "<|endoftext|>"
TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
PADDING = "<|padding|>"

BYTE_SPECIAL_TOKENS = (END_OF_TEXT, TURN_START, TURN_END, PADDING)
"""Special tokens of the byte tokenizer; their ids follow the 256 bytes, in this order."""

BYTE_VOCABULARY_SIZE = 256 + len(BYTE_SPECIAL_TOKENS)

BYTE_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML, as a Jinja template."""


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Return the SHA-256 (hex) over the sorted (id, token) pairs, added tokens included.

    Merges and normalization are left out on purpose: they decide how text becomes ids, not what
    an id means, and only the latter must agree between drafter and target.
    """
    digest = hashlib.sha256()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for token_id, token in sorted((token_id, token) for token, token_id in vocabulary.items()):
        # JSON ends unambiguously, so no token can imitate the start of the next pair.
        digest.update(json.dumps([token_id, token]).encode())
    return digest.hexdigest()


def byte_tokenizer() -> Tokenizer:
    """Build the tokenizer whose id b is byte b, for b in [0, 256), plus the special tokens."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_characters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in BYTE_SPECIAL_TOKENS]
    )
    return tokenizer


def byte_tokenizer_files() -> dict[str, bytes]:
    """Return the byte tokenizer as the files a model folder would have, by name."""
    end_ids = [256 + BYTE_SPECIAL_TOKENS.index(token) for token in (END_OF_TEXT, TURN_END)]
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "bos_token": END_OF_TEXT,
        "eos_token": TURN_END,
        "pad_token": PADDING,
    }
    return {
        "tokenizer.json": byte_tokenizer().to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2).encode(),
        "chat_template.jinja": BYTE_CHAT_TEMPLATE.encode(),
        "generation_config.json": json.dumps({"eos_token_id": end_ids}, indent=2).encode(),
    }


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level tokenizers write for each byte.

    The convention is GPT-2's: a byte that is a visible Latin-1 character stands for itself, the
    others take the code points from 256 on, in order.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    characters = []
    shifted = 256
    for byte in range(256):
        if byte in visible:
            characters.append(chr(byte))
        else:
            characters.append(chr(shifted))
            shifted += 1
    return characters
