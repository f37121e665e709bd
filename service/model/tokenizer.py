"""Text to tokens and back: a Hugging Face `tokenizer.json`, run by the `tokenizers` library.

The chat and padding machinery of transformers is left out. Which special tokens go around a text, Llama's begin-of-text for
one, is what the file's own post-processor says.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import tokenizers


class Tokenizer:
    """A tokenizer loaded from a checkpoint directory. Safe to call from several threads."""

    def __init__(self, core: tokenizers.Tokenizer, eos_id: int | None, max_length: int | None = None) -> None:
        self._core = core
        self.eos_id = eos_id
        self.max_length = max_length
        self._core.no_padding()
        self._core.no_truncation()  # a file may ask for it; nothing is cut in silence here
        self._core.encode_special_tokens = True  # a caller's text cannot smuggle in a control token

    @classmethod
    def load(cls, directory: str | Path, eos_id: int | None = None) -> Tokenizer:
        """Read `tokenizer.json` and, if there, `tokenizer_config.json`. Raises FileNotFoundError naming what is missing."""
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"no tokenizer.json in {directory}")
        core = tokenizers.Tokenizer.from_file(str(path))
        settings = _read_settings(Path(directory) / "tokenizer_config.json")
        if eos_id is None and settings.get("eos_token"):
            token = settings["eos_token"]
            eos_id = core.token_to_id(token["content"] if isinstance(token, dict) else token)
        return cls(core, eos_id, settings.get("model_max_length"))

    @property
    def vocab_size(self) -> int:
        """Number of token ids, added tokens included."""
        return int(self._core.get_vocab_size(with_added_tokens=True))

    @cached_property
    def leading(self) -> int:
        """How many special tokens `add_special_tokens` puts in front of a text."""
        return int(self._core.encode("a", add_special_tokens=True).special_tokens_mask.index(0))

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, with the special tokens around it that the file adds when asked to.

        What looks like a special token within the text is encoded as the plain text it is.
        """
        return list(self._core.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Special tokens show as their text."""
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for. Raises IndexError for an id that is no token."""
        return self._bytes[token]

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = {i: token.content for i, token in self._core.get_added_tokens_decoder().items()}
        byte_level = "ByteLevel" in json.dumps(json.loads(self._core.to_str())["decoder"])
        spell = _byte_level_bytes if byte_level else _sentencepiece_bytes
        tokens = ((i, self._core.id_to_token(i)) for i in range(self.vocab_size))
        return [added[i].encode() if i in added else spell(token or "") for i, token in tokens]


def _read_settings(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_text())) if path.is_file() else {}


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as byte-level BPE files spell it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_alphabet()
    return bytes(table[char] for char in token)


def _sentencepiece_bytes(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()
