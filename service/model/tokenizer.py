"""Text to tokens and back: a Hugging Face `tokenizer.json`, run by the `tokenizers` library.

The padding machinery of transformers is left out; chat is `chat.py`'s. Which special tokens go around a text, Llama's
begin-of-text for one, is what the file's own post-processor says.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterable, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from service.model import files
from service.model.chat import ChatTemplate, NoTemplate
from service.model.encoding import encoded


class Tokenizer:
    """A tokenizer loaded from a checkpoint directory. Safe to call from several threads."""

    def __init__(
        self,
        core: tokenizers.Tokenizer,
        eos_id: int | None,
        max_length: int | None = None,
        vocab_size: int | None = None,
        directory: Path | None = None,
    ) -> None:
        """vocab_size: the model's; a control token beyond it is none here. directory: where the chat template is.

        Raises ValueError for another token beyond the vocabulary, and for a control token there that stands around texts.
        """
        self._core = core
        self._directory = directory
        self.eos_id = eos_id
        self.max_length = max_length
        self._core.no_padding()
        self._core.no_truncation()  # a file may ask for it; nothing is cut in silence here
        self._core.encode_special_tokens = True  # a caller's text cannot smuggle in a control token
        self._spelling = Spelling(json.loads(core.to_str())["decoder"])
        self._bytes = _token_bytes(core, self._spelling)
        if vocab_size is not None:
            self._forget_beyond(vocab_size)

    def _forget_beyond(self, vocab_size: int) -> None:
        """Drop control tokens that the model has no embedding for, as a text model's tokenizer may have for images."""
        beyond, added = [i for i in self._bytes if i >= vocab_size], self._core.get_added_tokens_decoder()
        if any(i not in added for i in beyond):
            raise ValueError(f"tokenizer.json has {max(beyond) + 1} tokens, the model {vocab_size}: they are not of one model")
        for i in beyond:
            del self._bytes[i]
        around = self.encode("a", add_special_tokens=True)
        if (place := self.stranger(around)) is not None:
            told = f"puts token {around[place]} around a text, the model has {vocab_size} tokens"
            raise ValueError(f"tokenizer.json {told}: they are not of one model")

    @classmethod
    def load(cls, directory: str | Path, eos_id: int | None = None, vocab_size: int | None = None) -> Tokenizer:
        """Read `tokenizer.json` and, if there, `tokenizer_config.json`.

        Raises:
            FileNotFoundError, ValueError: a file is missing or damaged, named with what to do, or is another model's.
        """
        directory = Path(directory)
        core = _read_core(directory)
        settings = files.read_json_if_there(directory / "tokenizer_config.json")
        if eos_id is None and settings.get("eos_token"):
            token = settings["eos_token"]
            eos_id = core.token_to_id(token["content"] if isinstance(token, dict) else token)
        return cls(core, eos_id, settings.get("model_max_length"), vocab_size, Path(directory))

    @property
    def ids(self) -> Collection[int]:
        """The ids that are tokens, added ones included. There may be holes between them."""
        return self._bytes.keys()

    @cached_property
    def controls(self) -> Collection[int]:
        """The ids of special tokens, which are no part of a text."""
        return frozenset(i for i, token in self._core.get_added_tokens_decoder().items() if token.special)

    def stranger(self, ids: Sequence[int]) -> int | None:
        """The place of the first id that is no token; None when all are."""
        wide = np.asarray(ids)
        strange = (wide < 0) | (wide >= len(self._known))
        strange[~strange] = ~self._known[wide[~strange].astype(np.int64)]
        return int(strange.argmax()) if strange.any() else None

    @cached_property
    def _known(self) -> NDArray[np.bool_]:
        return np.isin(np.arange(self.vocab_size), list(self._bytes))

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return max(self._bytes) + 1

    @cached_property
    def leading(self) -> int:
        """How many special tokens `add_special_tokens` puts in front of a text."""
        return int(self._core.encode("a", add_special_tokens=True).special_tokens_mask.index(0))

    @cached_property
    def trailing(self) -> int:
        """How many it puts behind one."""
        return int(self._core.encode("a", add_special_tokens=True).special_tokens_mask[::-1].index(0))

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int, int | None]:
        """Token ids of a pair of texts, special tokens around them.

        Returns:
            the ids, where those of the second text begin (behind all, where it has none), and where those of the second type,
            if any do.
        """
        encoding = encoded(self._core.encode_batch_fast, (first, second), add_special_tokens=True)
        texts, types = encoding.sequence_ids, encoding.type_ids
        return list(encoding.ids), texts.index(1) if 1 in texts else len(texts), types.index(1) if 1 in types else None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of a text, with the special tokens around it that the file adds when asked to.

        What looks like a special token within the text is encoded as the plain text it is. Raises TextRefused.
        """
        return list(encoded(self._core.encode_batch_fast, text, add_special_tokens).ids)

    def spans(self, text: str, add_special_tokens: bool, size: int) -> list[tuple[int, int]]:
        """Where each `size` tokens of `encode(text)` begin and end, in characters, those that they share included."""
        encoding = encoded(self._core.encode_batch, text, add_special_tokens)
        found, at = list[tuple[int, int]](), 0
        for start in range(0, len(encoding.ids), size):
            places = [place for place in encoding.offsets[start : start + size] if place[1] > place[0]]  # special tokens: none
            found.append((places[0][0], places[-1][1]) if places else (at, at))
            at = found[-1][1]
        return found

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids; bytes that are no UTF-8 become U+FFFD. Special tokens show as their text."""
        return self.bytes_of(ids).decode("utf-8", errors="replace")

    def bytes_of(self, ids: Iterable[int], is_beginning: bool = True) -> bytes:
        """The bytes that tokens stand for, joined. Raises KeyError for an id that is no token.

        is_beginning: whether a text begins with them. Some files begin a text without the space that their first token has.
        """
        pieces = list(map(self._bytes.__getitem__, ids := list(ids)))
        if is_beginning and ids and self._spelling.is_other_at_beginning:
            pieces[0] = self._spelling.first(self._core.id_to_token(ids[0]) or "")
        return b"".join(pieces)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token stands for within a text. Raises KeyError for an id that is no token."""
        return self._bytes[token]

    @cached_property
    def chat(self) -> ChatTemplate:
        """The checkpoint's chat template. Raises NoTemplate, which says why there is none."""
        if self._directory is None:
            raise NoTemplate("it has no files")
        return ChatTemplate.load(self._directory, self._core)

    @cached_property
    def longest_token_bytes(self) -> int | None:
        """Most bytes of text that one token can stand for. None where the file's own steps may drop text without a bound."""
        file = json.loads(self._core.to_str())
        shrinking = _shrinking(file["normalizer"])
        keeps_all = _keeps_all(file["pre_tokenizer"]) and not any(
            each["lstrip"] or each["rstrip"] for each in file["added_tokens"]
        )
        covers_all = file["model"]["type"] == "BPE" and (file["model"]["byte_fallback"] or self._spells_every_byte(file))
        if shrinking is None or not keeps_all or not covers_all:
            return None
        return shrinking * max(map(len, self._bytes.values()))

    def _spells_every_byte(self, file: dict[str, Any]) -> bool:
        singles = {each for each in self._bytes.values() if len(each) == 1}
        return _has(file["pre_tokenizer"], "ByteLevel") and len(singles) == 256


def _read_core(directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a directory. Raises FileNotFoundError or ValueError, as `Tokenizer.load`."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        others = [
            name for name in ("tokenizer.model", "vocab.json", "vocab.txt", "tekken.json") if (directory / name).is_file()
        ]
        told = f"; there is {others[0]}, of which transformers' AutoTokenizer makes one with save_pretrained" if others else ""
        raise FileNotFoundError(f"no tokenizer.json in {directory}{told}")
    try:
        return tokenizers.Tokenizer.from_file(str(files.whole(path)))
    except Exception as error:  # the library has no kind of its own
        if isinstance(error, (ValueError, OSError)):
            raise
        raise ValueError(f"{path} is no tokenizer ({error}): download it again") from error


def _token_bytes(core: tokenizers.Tokenizer, spelling: Spelling) -> dict[int, bytes]:
    """The bytes of every token by its id, as within a text."""
    spelled = {i: spelling.within(token) for token, i in core.get_vocab(with_added_tokens=True).items()}
    if spelling.is_byte_level:  # which spells text, not what was added to it
        spelled |= {i: token.content.encode() for i, token in core.get_added_tokens_decoder().items()}
    return spelled


class Spelling:
    """How a file's decoder spells tokens: each by itself, but for the one that a text begins with.

    That holds for all decoders that are known here, so text can be streamed token by token. Raises ValueError for another.
    """

    def __init__(self, decoder: dict[str, Any] | None) -> None:
        steps = _steps(decoder, "decoders")
        kinds = [step["type"] for step in steps]
        known = {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}
        strange = [kind for kind in kinds if kind not in known]
        strange += [s["type"] for s in steps if s["type"] == "Replace" and "String" not in s["pattern"]]
        strange += [s["type"] for i, s in enumerate(steps) if s["type"] == "Strip" and (s["stop"] or "Fuse" not in kinds[:i])]
        if strange:
            raise ValueError(f"tokenizer.json decodes by {', '.join(strange)}, which this service does not know")
        self.is_byte_level = "ByteLevel" in kinds
        self._steps = steps
        self.is_other_at_beginning = not steps or any(kind in ("Strip", "Metaspace", "WordPiece") for kind in kinds)

    def within(self, token: str) -> bytes:
        """A token's bytes where others came before."""
        return self._spell(token, is_first=False)

    def first(self, token: str) -> bytes:
        """A token's bytes at the beginning of a text."""
        return self._spell(token, is_first=True)

    def _spell(self, token: str, is_first: bool) -> bytes:
        if self.is_byte_level:
            return _byte_level_bytes(token)
        if not self._steps:  # the library then joins tokens by spaces
            return token.encode() if is_first else b" " + token.encode()
        for step in self._steps:
            if step["type"] == "ByteFallback" and _BYTE.fullmatch(token):
                if (value := int(token[3:5], 16)) > 127:
                    return bytes([value])  # part of a character, which no later step touches
                token = chr(value)
            token = _STEPS[step["type"]](token, step, is_first)
        return token.encode()


_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _replaced(token: str, step: dict[str, Any], is_first: bool) -> str:
    return token.replace(step["pattern"]["String"], step["content"])


def _stripped(token: str, step: dict[str, Any], is_first: bool) -> str:
    if not is_first:
        return token
    kept = token.lstrip(step["content"])
    return token[min(step["start"], len(token) - len(kept)) :]


def _word_marked(token: str, step: dict[str, Any], is_first: bool) -> str:
    mark = step["replacement"]
    is_dropped = is_first and step.get("prepend_scheme", "always") != "never"
    return token.replace(mark, "" if is_dropped else " ")


def _word_piece(token: str, step: dict[str, Any], is_first: bool) -> str:
    if not is_first:
        token = token.removeprefix(step["prefix"]) if token.startswith(step["prefix"]) else f" {token}"
    if step["cleanup"]:
        for spaced, close in _CLEAN:
            token = token.replace(spaced, close)
    return token


def _unchanged(token: str, step: dict[str, Any], is_first: bool) -> str:
    return token


_STEPS = {
    "Replace": _replaced,
    "ByteFallback": _unchanged,
    "Fuse": _unchanged,
    "Strip": _stripped,
    "Metaspace": _word_marked,
    "WordPiece": _word_piece,
}
_CLEAN = (
    *((" " + mark, mark) for mark in ".?!,"),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)
"""What a WordPiece decoder writes closer together, in this order."""


NFC_SHRINKS = 4
"""Times fewer bytes of UTF-8 that a character may have after NFC than before, rounded up: 3.5, Greek with three marks."""


def _shrinking(normalizer: dict[str, Any] | None) -> int | None:
    """How many times fewer bytes a text may have after the normalizer; None: without a bound, or unknown."""
    steps = _steps(normalizer, "normalizers")
    known = {"Prepend": 1, "NFC": NFC_SHRINKS}
    factors = [1 if _is_word_mark(step) else known.get(step["type"]) for step in steps]
    return None if None in factors else math.prod(each for each in factors if each is not None)


def _is_word_mark(step: dict[str, Any]) -> bool:
    """Whether a step writes sentencepiece's mark for each space, which only makes text longer."""
    return bool(step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == "▁")


def _keeps_all(pre_tokenizer: dict[str, Any] | None) -> bool:
    """Whether every character of a text comes out of the pre-tokenizer."""
    steps = _steps(pre_tokenizer, "pretokenizers")
    return all(
        step["type"] in ("ByteLevel", "Metaspace", "Digits", "Split") and step.get("behavior") != "Removed" for step in steps
    )


def _has(pre_tokenizer: dict[str, Any] | None, kind: str) -> bool:
    return any(step["type"] == kind for step in _steps(pre_tokenizer, "pretokenizers"))


def _steps(node: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer, in order."""
    if node is None:
        return []
    return [step for each in node[inner] for step in _steps(each, inner)] if node["type"] == "Sequence" else [node]


@cache
def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, as byte-level BPE files spell it."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


def _byte_level_bytes(token: str) -> bytes:
    table = _byte_alphabet()
    try:
        return bytes(table[char] for char in token)
    except KeyError:  # spelled in no byte alphabet: its text is itself, as the library's own decoder has it
        return token.encode()
