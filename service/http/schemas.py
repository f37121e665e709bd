"""The bodies callers send, in OpenAI's shapes. Our one field more is `attention`.

A field we do not know is passed over, as OpenAI's clients expect; one that is a letter off a field of ours is refused as the
slip it is. A field whose meaning we know and cannot honour is refused unless its value changes nothing: no answer differs in
silence from what was asked.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    RootModel,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from service.engine.request import quoted

Prompt = str | Sequence[int]

INT64 = 2**63 - 1
"""Largest integer of any field: what lies beyond fits no counter underneath."""

MOST_FIELDS = 128
"""Fields of one body, known or not."""

MOST_STOPS = 16

MOST_PROMPTS = 2048
"""In one call, whatever the config allows: OpenAI's bound."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "top_a": (None, 0),
    "min_tokens": (None, 0),
    "max_new_tokens": (None,),
    "typical_p": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "guided_json": (None,),
    "guided_regex": (None,),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "dimensions": (None,),
}
"""Fields of OpenAI's and other servers' that are not offered here, with the values that ask for nothing."""


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


TEXT: dict[str, Any] = {"type": "string", "minLength": 1}

Prompts = Annotated[
    list[Prompt],
    PlainValidator(prompts),
    WithJsonSchema({"description": "One or many, as text or as token ids."}),  # openapi.py knows the bounds
]

Stops = Annotated[
    tuple[str, ...],
    PlainValidator(stops),
    WithJsonSchema({"anyOf": [TEXT, {"type": "array", "maxItems": MOST_STOPS, "items": TEXT}, {"type": "null"}]}),
]

Name = Annotated[str, Field(min_length=1)]


class Body(BaseModel):
    """Base of all bodies: no value is converted, fields we do not know are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model: str | None = Field(default=None, description="A model id, or id@backend; left out: the one model served here.")

    @model_validator(mode="before")
    @classmethod
    def _asks_only_for_what_is_offered(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise ValueError(f"the body may have {MOST_FIELDS} fields, received {len(value)}")
        for name in value.keys() - cls.model_fields.keys():
            if name in NEUTRAL:
                _check_neutral(name, value[name])
            elif meant := _meant(name, (*cls.model_fields, *NEUTRAL)):
                raise fault(name, f"{quoted(name)} is no field, did you mean {meant}?")
        return value


def _check_neutral(name: str, value: Any) -> None:
    """Raise a fault unless the value of a field that is not offered asks for nothing."""
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in NEUTRAL[name]):
        allowed = " or ".join(json.dumps(each) for each in NEUTRAL[name] if each is not None) or "null"
        raise fault(name, f"{name} is not offered: leave it out or send {allowed}, received {quoted(value)}")


def _meant(name: str, known: Iterable[str]) -> str | None:
    """The known field of which a name is a slip: other case or hyphens, or one letter added, lost, changed or swapped."""
    return next((each for each in known if _is_slip(_plain(name), _plain(each))), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _is_slip(name: str, known: str) -> bool:
    if name == known or min(len(name), len(known)) < 3 or abs(len(name) - len(known)) > 1:
        return name == known
    if len(name) != len(known):
        longer, shorter = sorted((name, known), key=len, reverse=True)
        return any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
    wrong = [i for i, (a, b) in enumerate(zip(name, known, strict=True)) if a != b]
    first, last = wrong[0], wrong[-1]
    return first == last or (last == first + 1 and name[first : last + 1] == known[last] + known[first])


class Worded(Body):
    """A body with text that becomes tokens."""

    add_special_tokens: bool | None = Field(
        default=None, description="Whether text gets the tokenizer's special tokens; token ids never do. Left out: true."
    )

    @property
    def with_special_tokens(self) -> bool:
        """Whether text gets begin-of-text and what else the tokenizer's file puts around it."""
        return self.add_special_tokens is not False


class Attended(Worded):
    """A body that is answered by attending."""

    attention: Name | None = Field(default=None, description="The backend; left out: the default of the config in force.")


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = Field(default=None, description="Not offered: leave it out or send false.")


class CompletionBody(Attended):
    """POST /v1/completions.

    Beside what the schema says: integers have no decimal point (1, not 1.0); prompt and max_tokens together fit the model's
    context; max_tokens 0 needs echo: true; best_of equals n; model id@backend and attention agree; a field name one letter
    off one of these is refused.
    """

    prompt: Prompts
    max_tokens: int | None = Field(default=None, ge=0, le=INT64, description="Left out: 16.")
    max_completion_tokens: int | None = Field(default=None, ge=0, le=INT64, description="Says the same as max_tokens.")
    n: int | None = Field(default=None, ge=1, le=INT64)
    best_of: int | None = Field(default=None, ge=1, le=INT64, description="Not offered: leave it out or send n.")
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=INT64, description="0 or -1: all tokens.")
    stop: Stops = ()
    seed: int | None = Field(default=None, ge=0, le=INT64)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(default=None, description="Needs stream: true.")
    user: str | None = Field(default=None, description="Let in for clients' sake and not used.")

    @model_validator(mode="after")
    def _is_one_question(self) -> CompletionBody:
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            message = f"received {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}"
            raise fault("max_tokens", f"max_tokens and max_completion_tokens say the same: send one, {message}")
        if self.best_of not in (None, self.samples):
            message = f"best_of is not offered: leave it out or send n ({self.samples}), received {self.best_of}"
            raise fault("best_of", message)
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "stream_options needs stream: true")
        if self.most_tokens == 0 and not self.echo:
            message = "max_tokens 0 asks for no answer; it needs echo: true, else max_tokens must be at least 1"
            raise fault("max_tokens", message)
        return self

    @property
    def samples(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:
        """Tokens of one answer under either of the field's two names; None: not said."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens


class EmbeddingBody(Attended):
    """POST /v1/embeddings.

    Beside what the schema says: integers have no decimal point (1, not 1.0); an input fits the model's context; model
    id@backend and attention agree; a field name one letter off one of these is refused.
    """

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="Left out: float.")
    user: str | None = Field(default=None, description="Let in for clients' sake and not used.")


COMPLETION, EMBEDDING = "a completion's plan", "an embedding's plan"
"""Tags of the two, for no field has such a name."""


def _planned(value: Any) -> str | None:
    """Which of the two bodies this is; None for both and for neither."""
    asked = value.keys() & {"prompt", "input"}
    return None if len(asked) != 1 else COMPLETION if "prompt" in asked else EMBEDDING


Planned = Annotated[
    Annotated[CompletionBody, Tag(COMPLETION)] | Annotated[EmbeddingBody, Tag(EMBEDDING)],
    Discriminator(
        _planned,
        custom_error_type="plan",
        custom_error_message="send the body of a completion (prompt) or of an embedding (input), and not of both",
    ),
]


class PlanBody(RootModel[Planned]):
    """POST /v1/plan: the body of a completion or of an embedding, under the same rules."""


class TokenizeBody(Worded):
    """POST /tokenize."""

    prompt: str


class DetokenizeBody(Body):
    """POST /detokenize. Integers have no decimal point (1, not 1.0)."""

    tokens: Annotated[
        Sequence[int], PlainValidator(token_ids), WithJsonSchema({"type": "array"})
    ]  # openapi.py knows the bounds
