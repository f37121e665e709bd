"""Tokens to text, one token at a time: never half a character, never part of what may become a stop string."""

from __future__ import annotations

import codecs
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


@dataclass(frozen=True)
class _Piece:
    """A token with the span of characters it brought."""

    token: int
    logprob: TokenLogprob | None
    start: int
    end: int


class TextStream:
    """The growing text of one sample."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""  # decoded, not settled
        self._settled = 0  # characters settled so far
        self._pieces: list[_Piece] = []

    def prompt(self, tokens: Iterable[int]) -> str:
        """The prompt's text, for an answer that echoes it. A character it leaves open is finished by the answer."""
        return self._decoder.decode(b"".join(self._tokenizer.token_bytes(token) for token in tokens))

    def push(self, token: int, logprob: TokenLogprob | None = None) -> Settled:
        """Add a token and settle what can be settled, perhaps nothing."""
        start = self._settled + len(self._held)
        self._held += self._decoder.decode(self._tokenizer.token_bytes(token))
        is_open = bool(self._decoder.getstate()[0])
        self._pieces.append(_Piece(token, logprob, start, self._settled + len(self._held) + is_open))
        cut = min((at for at in (self._held.find(stop) for stop in self._stop) if at >= 0), default=None)
        if cut is not None:
            return self._stop_at(cut)
        return self._settle(len(self._held) - _held_back(self._held, self._stop))

    def flush(self) -> Settled:
        """Settle the rest: no further token comes. Bytes that begin a character show as U+FFFD."""
        self._held += self._decoder.decode(b"", final=True)
        self._pieces = [_Piece(p.token, p.logprob, p.start, 0) for p in self._pieces]
        return self._settle(len(self._held))

    def _settle(self, count: int, stopped: bool = False) -> Settled:
        text, self._held = self._held[:count], self._held[count:]
        self._settled += count
        ready = [piece for piece in self._pieces if piece.end <= self._settled]
        self._pieces = self._pieces[len(ready) :]
        logprobs = tuple(piece.logprob for piece in ready if piece.logprob is not None)
        return Settled(text, tuple(piece.token for piece in ready), logprobs, stopped)

    def _stop_at(self, cut: int) -> Settled:
        """Cut the held text and forget the tokens that begin behind the cut."""
        self._held = self._held[:cut]
        limit = self._settled + cut
        self._pieces = [_Piece(p.token, p.logprob, p.start, 0) for p in self._pieces if p.start < limit]
        return self._settle(cut, stopped=True)


def _held_back(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of `text` that begins a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
