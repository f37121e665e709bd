"""Tokens to text, one token at a time: never half a character, never part of what may become a stop string."""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from service.engine.request import TokenLogprob
from service.model.tokenizer import Tokenizer


@dataclass(frozen=True)
class Settled:
    """Text that no later token can change, and the tokens whose last character stands in it."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    stopped: bool = False  # a stop string came; it and all behind it are cut off

    def __add__(self, rest: Settled) -> Settled:
        """Both, as one."""
        return Settled(self.text + rest.text, self.tokens + rest.tokens, self.logprobs + rest.logprobs, self.stopped)


@dataclass(frozen=True)
class _Piece:
    """A token with the span of characters it brought."""

    token: int
    logprob: TokenLogprob | None
    start: int
    end: int


class _Stop:
    """Looks for one string in a growing text, a character at a time (Knuth, Morris and Pratt 1977).

    `matched` is how many of the string's characters the text ends with. Cost: linear in the text, whatever is in it. The
    table grows with the longest match, so a long string that never begins costs nothing.
    """

    def __init__(self, string: str) -> None:
        self.matched = 0
        self._string = string
        self._borders = [0, 0]  # of the string's first i characters: the longest proper end that is a beginning too

    def completes(self, char: str) -> bool:
        """Add a character. Returns whether the string stands at the text's end; none may be added then."""
        self.matched = self._longer(self.matched, char)
        if self.matched == len(self._borders):
            self._borders.append(self._longer(self._borders[-1], char))
        return self.matched == len(self._string)

    def _longer(self, length: int, char: str) -> int:
        """Length of the match when `char` follows one of `length` characters."""
        while length and self._string[length] != char:
            length = self._borders[length]
        return length + (self._string[length] == char)


class TextStream:
    """The growing text of one sample."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = [_Stop(string) for string in stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, not settled
        self._settled = 0  # characters settled so far
        self._pieces: deque[_Piece] = deque()
        self._is_begun = False

    def prompt(self, tokens: Iterable[int]) -> str:
        """Text of the prompt's next tokens, for an answer that echoes it. A character left open is finished by the answer."""
        is_beginning, self._is_begun = not self._is_begun, True
        return self._decoder.decode(self._tokenizer.bytes_of(tokens, is_beginning))

    def follow(self, other: TextStream) -> None:
        """Begin where another stream stands, that of a sample with the same prompt."""
        self._decoder.setstate(other._decoder.getstate())

    def push(self, token: int, logprob: TokenLogprob | None = None) -> Settled:
        """Add a token and settle what can be settled, perhaps nothing."""
        start = self._settled + len(self._held)
        new = self._decoder.decode(self._tokenizer.token_bytes(token))
        self._held += new
        is_open = bool(self._decoder.getstate()[0])
        self._pieces.append(_Piece(token, logprob, start, self._settled + len(self._held) + is_open))
        for place, char in enumerate(new if self._stops else "", start + 1):
            complete = [stop.matched for stop in self._stops if stop.completes(char)]
            if complete:
                return self._stop_at(place - max(complete) - self._settled)
        return self._settle(len(self._held) - max((stop.matched for stop in self._stops), default=0))

    def flush(self) -> Settled:
        """Settle the rest: no further token comes. Bytes that begin a character show as U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        self._pieces = deque(_Piece(p.token, p.logprob, p.start, 0) for p in self._pieces)
        return self._settle(len(self._held))

    def _settle(self, count: int, stopped: bool = False) -> Settled:
        text, self._held = self._held[:count], self._held[count:]
        self._settled += count
        ready = []
        while self._pieces and self._pieces[0].end <= self._settled:  # ends only grow
            ready.append(self._pieces.popleft())
        logprobs = tuple(piece.logprob for piece in ready if piece.logprob is not None)
        return Settled(text, tuple(piece.token for piece in ready), logprobs, stopped)

    def _stop_at(self, cut: int) -> Settled:
        """Cut the held text and forget the tokens that begin behind the cut."""
        self._held = self._held[:cut]
        limit = self._settled + cut
        self._pieces = deque(_Piece(p.token, p.logprob, p.start, 0) for p in self._pieces if p.start < limit)
        return self._settle(cut, stopped=True)
