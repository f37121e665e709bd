"""What a field of a body may hold: prompts, tokens, stops, biases, from the values that JSON has. No value is converted."""

from __future__ import annotations

import re
from array import array
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field, PlainValidator, WithJsonSchema
from pydantic_core import PydanticCustomError

from service.engine.request import quoted

Prompt = str | Sequence[int]

INT64 = 2**63 - 1
"""Largest integer of any field: what lies beyond fits no counter underneath."""

MOST_STOPS = 16

MOST_PROMPTS = 2048
"""In one call, whatever the config allows: OpenAI's bound."""

MOST_BIASES = 1024
"""Tokens of one `logit_bias`, and of `stop_token_ids`."""

MOST_BIAS, MOST_PENALTY = 100.0, 2.0
"""OpenAI's bounds, either side of zero."""


def fault(param: str, message: str) -> PydanticCustomError:
    """A fault of the field `param` that the schema alone cannot tell, for a validator to raise."""
    return PydanticCustomError("field", "{message}", {"message": message, "param": param})


def prompts(value: Any) -> list[Prompt]:
    """One or many prompts, as text or token ids, as a list. Raises ValueError for anything else, and for nothing."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(f"must be a string, or a list of strings, of token ids or of such lists, received {quoted(value)}")
    kinds = set(map(type, value))
    if kinds == {int}:
        return [token_ids(value)]
    if len(value) > MOST_PROMPTS and kinds <= {str, list}:
        raise ValueError(f"may hold {MOST_PROMPTS} strings or lists at most, received {len(value)}")
    if kinds == {str}:
        return list(value)
    if kinds == {list}:
        return [_entry(index, each) for index, each in enumerate(value)]
    raise ValueError("must hold at least one entry, and only strings, only token ids or only lists of token ids")


def prompt(value: Any) -> Prompt:
    """One prompt, as text or token ids. Raises ValueError for anything else, and for nothing."""
    if not isinstance(value, str) and (not isinstance(value, list) or set(map(type, value)) != {int}):
        raise ValueError(f"must be a string or a list of token ids, received {quoted(value)}")
    return prompts(value)[0]


def _entry(index: int, value: list[Any]) -> Sequence[int]:
    if set(map(type, value)) != {int}:
        raise ValueError(f"entry {index} must be a list of token ids, at least one, received something else")
    return token_ids(value)


def token_ids(value: Any) -> Sequence[int]:
    """A list of token ids as an array, four bytes each. Raises ValueError for any other value."""
    if not isinstance(value, list) or not set(map(type, value)) <= {int}:  # a bool is an int, but no token
        raise ValueError(f"must be a list of token ids, received {quoted(value)}")
    try:
        return array("i", value)
    except OverflowError:
        place, wrong = next((place, each) for place, each in enumerate(value) if not -(2**31) <= each < 2**31)
        raise ValueError(f"token ids have 31 bits at most, received {quoted(wrong)} at place {place}") from None


def stops(value: Any) -> tuple[str, ...]:
    """The strings that end an answer. Raises ValueError."""
    found = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
        raise ValueError("must be null, a string or a list of strings")
    if len(found) > MOST_STOPS or any(not each for each in found):
        raise ValueError(f"may hold {MOST_STOPS} strings, none of them empty")
    return tuple(found)


TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")


def biases(value: Any) -> tuple[tuple[int, float], ...]:
    """What is added to the logits of single tokens, from an object. Raises ValueError."""
    found = {} if value is None else value
    if not isinstance(found, dict) or len(found) > MOST_BIASES:
        raise ValueError(f"must be an object of {MOST_BIASES} token ids at most, received {quoted(value)}")
    return tuple(_bias(token, bias) for token, bias in found.items())


def _bias(token: str, bias: Any) -> tuple[int, float]:
    if not TOKEN_ID.fullmatch(token):
        raise ValueError(f"keys are token ids, received {quoted(token)}")
    if type(bias) not in (int, float) or not -MOST_BIAS <= bias <= MOST_BIAS:
        raise ValueError(f"a bias is a number from {-MOST_BIAS:g} to {MOST_BIAS:g}, received {quoted(bias)} for token {token}")
    return int(token), float(bias)


def stop_tokens(value: Any) -> tuple[int, ...]:
    """The tokens that end an answer. Raises ValueError."""
    found = token_ids([] if value is None else value)
    if len(found) > MOST_BIASES:
        raise ValueError(f"may hold {MOST_BIASES} token ids, received {len(found)}")
    return tuple(found)


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}

Prompts = Annotated[
    list[Prompt],
    PlainValidator(prompts),
    WithJsonSchema({"description": "One or many, as text or as token ids."}),  # openapi.py knows the bounds
]

OnePrompt = Annotated[Prompt, PlainValidator(prompt), WithJsonSchema({"description": "As text or as token ids."})]

Stops = Annotated[
    tuple[str, ...],
    PlainValidator(stops),
    WithJsonSchema({"anyOf": [TEXT, {"type": "array", "maxItems": MOST_STOPS, "items": TEXT}, {"type": "null"}]}),
]

Biases = Annotated[
    tuple[tuple[int, float], ...],
    PlainValidator(biases),
    WithJsonSchema({"description": "Added to the logits of single tokens."}),
]

StopTokens = Annotated[
    tuple[int, ...],
    PlainValidator(stop_tokens),
    WithJsonSchema({"description": "Tokens that end the answer, and are not shown."}),
]

Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY, allow_inf_nan=False)]

Name = Annotated[str, Field(min_length=1)]
