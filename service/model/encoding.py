"""Texts through the tokenizers library, whose panics are told as errors."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Encoding

Text = str | tuple[str, str]


class TextRefused(ValueError):
    """The tokenizer gives up on a text: a pattern of its file, on tens of millions of spaces for one. The message says why."""


def encoded(read: Callable[..., list[Encoding]], text: Text, add_special_tokens: bool) -> Encoding:
    """A text or a pair, read by `encode_batch`, or by `encode_batch_fast`, which keeps no places; `encode` keeps Python's lock.

    Raises:
        TextRefused: the library panics, which is no `Exception` and would end the process.
    """
    try:
        (encoding,) = read([text], add_special_tokens=add_special_tokens)
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a type that is made at run time
            raise
        raise TextRefused(f"the model's tokenizer gives up on this text: {error}") from None
    return encoding
