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
from tokenizers import decoders, models, pre_tokenizers, processors

from service.engine.text import TextStream
from service.model.checkpoint import EMBEDDED
from service.model.encoding import TextRefused
from service.model.tokenizer import NFC_SHRINKS, Tokenizer

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


WORDS = ("the", "a", "n't", "not", "do", ".", ",", "'", "s", "é", "##ing", "##s", "Ġ", "the▁a")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
SPACES = decoders.Replace("▁", " ")
DECODERS = {
    "llama": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([SPACES, decoders.ByteFallback(), decoders.Fuse()]),
    "metaspace": decoders.Metaspace(),
    "metaspace that prepends nothing": decoders.Metaspace(prepend_scheme="never"),
    "wordpiece": decoders.WordPiece(),
    "wordpiece as it stands": decoders.WordPiece(cleanup=False),
    "none": None,
}


def toy(decoder: str) -> Tokenizer:
    """Words, words that begin with sentencepiece's mark, and bytes, spelled by one of DECODERS."""
    tokens = ["<s>", *WORDS, "▁", "▁▁", *(f"▁{word}" for word in WORDS), *BYTES]
    core = tokenizers.Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    if DECODERS[decoder] is not None:
        core.decoder = DECODERS[decoder]
    core.add_special_tokens(["<s>"])
    return Tokenizer(core, None)


@pytest.mark.parametrize("decoder", DECODERS)
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_streamed_text_is_what_transformers_makes_of_the_tokens(decoder: str, data: st.DataObject) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = toy(decoder)
    words = 3 + 2 * len(WORDS) + data.draw(st.sampled_from((0, 128)))  # with or without bytes that are characters
    ids = data.draw(st.lists(st.integers(0, words - 1), min_size=1, max_size=12))
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._core)
    whole = theirs.decode(ids)
    assert tokenizer.decode(ids) == whole
    cut = data.draw(st.integers(1, len(ids)))
    stream = TextStream(tokenizer)
    streamed = [stream.prompt(ids[:cut]), *(stream.push(token).text for token in ids[cut:]), stream.flush().text]
    assert "".join(streamed) == whole


def test_a_text_that_begins_with_a_space_byte_loses_it_as_it_loses_a_mark() -> None:
    tokenizer = toy("llama")
    assert tokenizer.decode([tokenizer._core.token_to_id(token) for token in ("<0x20>", "a")]) == "a"


def test_bytes_of_one_character_that_come_one_by_one_become_it() -> None:
    tokenizer = toy("llama")
    ids = [tokenizer._core.token_to_id(token) for token in ("▁the", "<0xC3>", "<0xA9>", "<0x0A>", "▁a")]
    assert tokenizer.decode(ids) == "theé\n a"


def test_a_decoder_whose_pieces_depend_on_what_follows_is_refused_by_name() -> None:
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    core.decoder = decoders.BPEDecoder()
    with pytest.raises(ValueError, match="BPEDecoder"):
        Tokenizer(core, None)


def test_control_tokens_beyond_the_model_are_none_and_other_tokens_there_are_refused() -> None:
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<image>"])
    assert sorted(Tokenizer(core, None, vocab_size=2).ids) == [0, 1]
    with pytest.raises(ValueError, match="not of one model"):
        Tokenizer(core, None, vocab_size=1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("tokenizer.model", b"x", "AutoTokenizer"),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        ("tokenizer.json", b"{", "download it again"),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named_with_what_to_do(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        Tokenizer.load(tmp_path)


def test_a_directory_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Tokenizer.load(tmp_path)


def test_control_tokens_beyond_the_model_that_stand_around_every_text_are_refused() -> None:
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    assert Tokenizer(core, None, vocab_size=3).encode("ab", add_special_tokens=True) == [2, 0, 1]
    with pytest.raises(ValueError, match="puts token 2 around a text, the model has 2 tokens"):
        Tokenizer(core, None, vocab_size=2)


def endless() -> Tokenizer:
    """One whose pattern takes exponential time, of which the library's own bound makes a panic."""
    core = tokenizers.Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex("(a+)+b"), "isolated")
    return Tokenizer(core, None)


def test_a_text_that_a_pattern_gives_up_on_is_refused_and_the_next_one_read() -> None:
    tokenizer, text = endless(), "a" * 40
    readings = (tokenizer.encode, lambda x: tokenizer.spans(x, False, 2), lambda x: tokenizer.encode_pair(x, x))
    for read in readings:
        with pytest.raises(TextRefused, match="gives up on this text"):
            read(text)
    assert tokenizer.encode("aab") == [0, 0, 1]


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
