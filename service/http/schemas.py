"""The bodies callers send, in OpenAI's shapes. Our one field more is `attention`.

A field we do not know is passed over, as OpenAI's clients expect. A field whose meaning we know and cannot honour is refused
unless its value changes nothing: no answer differs in silence from what was asked.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

Prompt = str | list[int]

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "logit_bias": (None, {}),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
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


def prompts(value: Any) -> list[Prompt]:
    """One or many prompts, as text or token ids, as a list. Raises ValueError for anything else, and for nothing."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list):
        raise ValueError(
            f"must be a string, or a list of strings, of token ids or of such lists, received {type(value).__name__}"
        )
    if _are_tokens(value):
        return [value]
    if value and (all(isinstance(each, str) for each in value) or all(isinstance(each, list) for each in value)):
        for index, each in enumerate(value):
            if isinstance(each, list) and not _are_tokens(each):
                raise ValueError(f"entry {index} must be a list of token ids, at least one, received something else")
        return list(value)
    raise ValueError("must hold at least one entry, and only strings, only token ids or only lists of token ids")


def _are_tokens(value: list[Any]) -> bool:
    return bool(value) and all(type(each) is int for each in value)  # a bool is an int, but no token


Prompts = Annotated[
    list[Prompt],
    PlainValidator(prompts),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {"type": "array", "items": {"type": "string"}},
                {"type": "array", "items": {"type": "integer"}},
                {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}},
            ]
        }
    ),
]


class Body(BaseModel):
    """Base of all bodies: no value is converted, fields we do not know are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    model: str | None = Field(default=None, description="A model id, or id@backend; left out: the one model served here.")

    @model_validator(mode="before")
    @classmethod
    def _asks_only_for_what_is_offered(cls, value: Any) -> Any:
        for name in NEUTRAL.keys() & value.keys() - cls.model_fields.keys() if isinstance(value, dict) else ():
            if value[name] not in NEUTRAL[name]:
                allowed = " or ".join(repr(each) for each in NEUTRAL[name] if each is not None) or "null"
                raise ValueError(f"{name} is not offered: leave it out or send {allowed}, received {value[name]!r:.80}")
        return value


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

    attention: str | None = Field(default=None, description="The backend; left out: the default of the config in force.")


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class CompletionBody(Attended):
    """POST /v1/completions."""

    prompt: Prompts
    max_tokens: int | None = Field(
        default=None, ge=0, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"), description="Left out: 16."
    )
    n: int | None = Field(default=None, ge=1)
    best_of: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, description="0 or -1: all tokens.")
    stop: Annotated[tuple[str, ...], PlainValidator(lambda value: _stops(value))] = ()
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None

    @model_validator(mode="after")
    def _is_one_question(self) -> CompletionBody:
        if self.best_of not in (None, self.samples):
            raise ValueError(f"best_of is not offered: leave it out or send n ({self.samples}), received {self.best_of}")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens 0 asks for no answer; it needs echo: true, else max_tokens must be at least 1")
        return self

    @property
    def samples(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1


def _stops(value: Any) -> tuple[str, ...]:
    found = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(found, (list, tuple)) or not all(isinstance(each, str) for each in found):
        raise ValueError("must be null, a string or a list of strings")
    if len(found) > 16 or any(not each for each in found):
        raise ValueError("may hold 16 strings, none of them empty")
    return tuple(found)


class EmbeddingBody(Attended):
    """POST /v1/embeddings."""

    input: Prompts
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="Left out: float.")
    user: str | None = None


class PlanBody(Attended):
    """POST /v1/plan: the body of a completion (`prompt`) or of an embedding (`input`)."""

    prompt: Prompts | None = None
    input: Prompts | None = None
    max_tokens: int | None = Field(default=None, ge=0, validation_alias=AliasChoices("max_tokens", "max_completion_tokens"))
    n: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _asks_about_one(self) -> PlanBody:
        if (self.prompt is None) == (self.input is None):
            raise ValueError("send prompt (a completion) or input (an embedding), and not both")
        return self


class TokenizeBody(Worded):
    """POST /tokenize."""

    prompt: str


class DetokenizeBody(Body):
    """POST /detokenize."""

    tokens: list[int]
