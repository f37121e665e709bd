"""What is longer than the model's context: refused with both numbers, or cut where the caller asks for it by name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from service.engine.request import ContextTooLong

Side = Literal["left", "right", "middle"]

UTF8_BYTES = 4  # of one character, at most


def check_text(text: str, longest_token_bytes: int | None, max_length: int, param: str) -> None:
    """Raise ContextTooLong for a text that no way of cutting it into tokens could fit: what is read costs time."""
    if longest_token_bytes is None or len(text) <= (most := max_length * longest_token_bytes) // UTF8_BYTES:
        return
    if (received := len(text.encode())) > most:
        raise ContextTooLong(
            f"the text has {received} bytes, but the model's context of {max_length} tokens holds {most} at most",
            param=param,
            details={"text_bytes": received, "most_bytes": most, "max_tokens": max_length},
        )


def check_tokens(count: int, max_length: int, param: str) -> None:
    """Raise ContextTooLong for more tokens than the context holds, an answer left out."""
    if count > max_length:
        raise ContextTooLong(
            f"the input has {count} tokens, but the model's context is {max_length} tokens",
            param=param,
            details={"prompt_tokens": count, "max_tokens": max_length},
        )


def cut(tokens: Sequence[int], most: int, side: Side, leading: int, trailing: int = 0) -> Sequence[int]:
    """At most so many of the tokens, those at one side or in the middle left out.

    The first `leading` and the last `trailing` ones, what the tokenizer puts around a text, stay, unless they are too many.
    """
    over = len(tokens) - most
    if over <= 0:
        return tokens
    first, last = min(leading, most), max(most - trailing, min(leading, most))
    head = {"left": first, "right": last, "middle": min(max((most + 1) // 2, first), last)}[side]
    return [*tokens[:head], *tokens[head + over :]]
