"""Text leaves only when no later token can change it, and stop strings are found wherever token borders fall."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.text import Settled, TextStream
from tests.engine import world

TOKENIZER = world.make_tokenizer()


def feed(text: str, stop: tuple[str, ...] = ()) -> list[Settled]:
    """What each byte of the text settles, up to a stop, and the rest."""
    stream, settled = TextStream(TOKENIZER, stop), []
    for byte in text.encode():
        settled.append(stream.push(byte))
        if settled[-1].stopped:
            return settled
    return [*settled, stream.flush()]


@given(st.text(max_size=40))
def test_without_stop_strings_the_pieces_are_the_text(text: str) -> None:
    settled = feed(text)
    assert "".join(piece.text for piece in settled) == text
    assert b"".join(bytes(piece.tokens) for piece in settled) == text.encode()


@given(st.text(max_size=40))
def test_no_piece_holds_a_broken_character(text: str) -> None:
    assert all("\ufffd" not in piece.text for piece in feed(text.replace("\ufffd", "")))


@given(st.text("abé", max_size=30), st.lists(st.text("abé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_stop_string_that_is_complete_first(text: str, stops: list[str]) -> None:
    settled = feed(text, tuple(stops))
    shown = "".join(piece.text for piece in settled)
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    if not ends:
        assert shown == text and not settled[-1].stopped
        return
    begun = text[: min(ends)]
    assert settled[-1].stopped
    assert shown == begun[: min(begun.find(stop) for stop in stops if stop in begun)]


@given(st.text("ab", max_size=30), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_nothing_is_shown_that_a_stop_string_takes_back(text: str, stops: list[str]) -> None:
    final = "".join(piece.text for piece in feed(text, tuple(stops)))
    shown = ""
    for piece in feed(text, tuple(stops)):
        shown += piece.text
        assert final.startswith(shown)


def test_an_unfinished_character_at_the_end_shows_as_replacement() -> None:
    stream = TextStream(TOKENIZER)
    assert stream.push("é".encode()[0]) == Settled("", (), ())
    assert stream.flush().text == "\ufffd"


def test_a_character_that_the_prompt_leaves_open_is_finished_by_the_answer() -> None:
    stream = TextStream(TOKENIZER)
    first, second = "é".encode()
    assert stream.prompt([ord("a"), first]) == "a"
    assert stream.push(second).text == "é"


def test_tokens_behind_a_stop_string_are_not_handed_out() -> None:
    settled = feed("abXYc", ("XY",))
    assert [token for piece in settled for token in piece.tokens] == list(b"ab")


class Words:
    """A tokenizer whose tokens are the given texts."""

    def __init__(self, *texts: str) -> None:
        self._texts = texts

    def token_bytes(self, token: int) -> bytes:
        return self._texts[token].encode()


def shown(texts: list[str], stop: tuple[str, ...]) -> str:
    """The text that tokens with these texts show."""
    stream, text = TextStream(Words(*texts), stop), ""  # type: ignore[arg-type]
    for token in range(len(texts)):
        settled = stream.push(token)
        text += settled.text
        if settled.stopped:
            return text
    return text + stream.flush().text


@given(st.lists(st.text("ab", max_size=5), max_size=12), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_where_tokens_end_makes_no_difference_to_the_text(texts: list[str], stops: list[str]) -> None:
    assert shown(texts, tuple(stops)) == shown(list("".join(texts)), tuple(stops))


def lines_run(call: Callable[[], object]) -> int:
    """Lines of Python that a call runs: a measure of its cost that no neighbour disturbs."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> object:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return count


@pytest.mark.parametrize("text", ["a", "ab", "abc"])
def test_the_cost_of_stop_strings_is_linear_in_the_text_whatever_is_held_back(text: str) -> None:
    def cost(length: int) -> int:
        stops = tuple("ab" * length + str(i) if text == "ab" else "a" * length + str(i) for i in range(16))
        return lines_run(lambda: shown(list(text * (length // len(text))), stops))

    assert cost(800) < 2.5 * cost(400)
