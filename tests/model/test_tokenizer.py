"""Text survives encode and decode, whatever it is, and cannot smuggle in control tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unicodedata import normalize

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from service.model.checkpoint import EMBEDDED
from service.model.tokenizer import NFC_SHRINKS, Tokenizer, _sentencepiece_bytes

TOKENIZER = Tokenizer.load(EMBEDDED)


@settings(max_examples=300, deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_source_round_trips_and_shrinks() -> None:
    text = Path(__file__).read_text()
    tokens = TOKENIZER.encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert len(tokens) < len(text) / 2


def test_bytes_of_every_single_byte_token_cover_all_bytes() -> None:
    singles = {TOKENIZER.token_bytes(token) for token in range(TOKENIZER.vocab_size)}
    assert {bytes([byte]) for byte in range(256)} <= singles


def test_the_end_of_text_token_is_plain_text_in_a_prompt() -> None:
    tokens = TOKENIZER.encode("<|endoftext|>")
    assert TOKENIZER.eos_id is not None and TOKENIZER.eos_id not in tokens
    assert TOKENIZER.decode(tokens) == "<|endoftext|>"


def test_a_text_begins_with_the_special_tokens_of_its_file() -> None:
    assert TOKENIZER.eos_id is not None and TOKENIZER.leading == 1
    assert TOKENIZER.encode("import os", add_special_tokens=True) == [TOKENIZER.eos_id, *TOKENIZER.encode("import os")]


def test_a_file_that_adds_no_special_token_gets_none(tmp_path: Path) -> None:
    raw = json.loads((EMBEDDED / "tokenizer.json").read_text()) | {"post_processor": None}
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    plain = Tokenizer.load(tmp_path)
    assert plain.leading == 0
    assert plain.encode("import os", add_special_tokens=True) == plain.encode("import os")


@settings(max_examples=300, deadline=None)
@given(st.text() | st.text(alphabet=" \n-=a", max_size=500))
def test_no_text_has_more_bytes_than_its_tokens_can_stand_for(text: str) -> None:
    assert TOKENIZER.longest_token_bytes is not None
    assert len(text.encode()) <= len(TOKENIZER.encode(text)) * TOKENIZER.longest_token_bytes


def test_a_character_shrinks_under_nfc_by_no_more_than_is_allowed_for() -> None:
    """The longest spelling of each composed character: the longest stand-in for each of its parts."""
    characters = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    longest: dict[str, int] = {}
    for each in characters:
        if len(part := normalize("NFD", each)) == 1:
            longest[part] = max(longest.get(part, 0), len(each.encode()))
    composed = (each for each in characters if normalize("NFC", each) == each)
    worst = max(sum(longest[part] for part in normalize("NFD", each)) / len(each.encode()) for each in composed)
    assert NFC_SHRINKS - 1 < worst <= NFC_SHRINKS


@pytest.mark.parametrize(
    ("change", "factor"),
    [
        ({}, 1),
        ({"normalizer": {"type": "NFC"}}, NFC_SHRINKS),
        (
            {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Prepend", "prepend": "a"}]}},
            NFC_SHRINKS,
        ),
        ({"normalizer": {"type": "Lowercase"}}, None),
        ({"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}}, None),
        ({"normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": ""}}, None),
        ({"pre_tokenizer": {"type": "Whitespace"}}, None),
        ({"pre_tokenizer": None}, None),
    ],
)
def test_a_file_that_may_drop_text_gives_no_bound(tmp_path: Path, change: dict[str, Any], factor: int | None) -> None:
    raw = json.loads((EMBEDDED / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    bound, plain = Tokenizer.load(tmp_path).longest_token_bytes, TOKENIZER.longest_token_bytes
    assert bound == (factor if factor is None or plain is None else factor * plain)


def test_half_a_character_shows_as_a_replacement_mark() -> None:
    tokens = TOKENIZER.encode("é")
    assert TOKENIZER.decode(tokens[:1]) == "�" or len(tokens) == 1


def test_encoding_agrees_with_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(EMBEDDED)
    text = Path(json.__file__).read_text()
    assert theirs(text, add_special_tokens=False)["input_ids"] == TOKENIZER.encode(text)
    assert theirs(text)["input_ids"] == TOKENIZER.encode(text, add_special_tokens=True)
    assert theirs.model_max_length == 32768


def test_sentencepiece_spellings_become_their_bytes() -> None:
    assert _sentencepiece_bytes("▁the") == b" the"
    assert _sentencepiece_bytes("<0x0A>") == b"\n"
    assert _sentencepiece_bytes("é") == "é".encode()


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_ids_between_tokens_are_strangers_and_what_lies_behind_a_hole_is_known() -> None:
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 2, "Ġ": 7}, merges=[]))
    core.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer(core, None)
    assert (sorted(tokenizer.ids), tokenizer.vocab_size) == ([0, 2, 7], 8)
    assert tokenizer.decode([0, 7, 2]) == "a b"
    for token in (1, 3, 8, -1):
        with pytest.raises(KeyError):
            tokenizer.token_bytes(token)
        assert tokenizer.stranger([0, 7, token, 2, token]) == 2
    assert tokenizer.stranger([0, 2**70]) == 1
    assert tokenizer.stranger([0, 2, 7]) is None and tokenizer.stranger([]) is None
