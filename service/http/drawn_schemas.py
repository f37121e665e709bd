"""Bodies that are answered by drawing tokens: completions and conversations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, WithJsonSchema, model_validator

from service.engine.request import quoted
from service.http.fields import INT64, Biases, Name, Penalty, Prompts, Stops, StopTokens, fault
from service.http.schemas import NEUTRAL, Cut, Worded, check_neutral

MOST_FORM = 2**16
"""Characters of a schema or a pattern that an answer must keep to."""

MOST_CHOICES = 1024

MOST_MESSAGES = 2048
"""Of one conversation, and parts of one message."""

MOST_OPTIONS = 16
"""Of a chat template."""

CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "web_search_options": (None,),
    "reasoning_effort": (None,),
    "verbosity": (None,),
    "add_special_tokens": (None, False),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "chat_template": (None,),
    "documents": (None, []),
    "echo": (None, False),
}
"""The same of a conversation."""

MESSAGE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "tool_calls": (None, []),
    "function_call": (None,),
    "refusal": (None,),
    "audio": (None,),
    "annotations": (None, []),
}
"""The same of a message: clients send back what an assistant's message had in it."""


class StreamOptions(BaseModel):
    """What a stream tells beside its text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: Literal[False] | None = Field(default=None, description="Not offered: leave it out or send false.")


class JsonSchema(BaseModel):
    """A JSON schema with a name."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    name: str | None = None
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = Field(default=None, description="The schema is always kept to.")


class TextFormat(BaseModel):
    """Any text."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["text"]


class ObjectFormat(BaseModel):
    """Any JSON object."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["json_object"]


class SchemaFormat(BaseModel):
    """JSON that a schema describes."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]

FORMS = ("response_format", "guided_json", "guided_regex", "guided_choice")
"""Fields that ask for an answer of a given form."""


class DrawnBody(Cut):
    """A body that is answered by drawing tokens."""

    max_tokens: int | None = Field(default=None, ge=0, le=INT64)
    max_completion_tokens: int | None = Field(default=None, ge=0, le=INT64, description="Says the same as max_tokens.")
    n: int | None = Field(default=None, ge=1, le=INT64)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=-1, le=INT64, description="0 or -1: all tokens.")
    min_p: float | None = Field(
        default=None,
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Leaves out tokens less likely than so many times the likeliest.",
    )
    presence_penalty: Penalty | None = Field(default=None, description="Off the logit of each token the answer has had.")
    frequency_penalty: Penalty | None = Field(default=None, description="The same, once for each time it has had it.")
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=100, allow_inf_nan=False, description="Of tokens of prompt and answer: above 1 makes them rarer."
    )
    logit_bias: Biases = ()
    stop: Stops = ()
    stop_token_ids: StopTokens = ()
    min_tokens: int | None = Field(
        default=None, ge=0, le=INT64, description="Before any token may end the answer. At most max_tokens."
    )
    prompt_lookup_num_tokens: int | None = Field(
        default=None,
        ge=0,
        le=INT64,
        description="Most tokens guessed from the text itself for a step, within the operator's bound. Changes no answer.",
    )
    seed: int | None = Field(default=None, ge=0, le=INT64)
    response_format: ResponseFormat | None = Field(default=None, description="What the answer must be; one form at most.")
    guided_json: dict[str, Any] | None = Field(default=None, description="A JSON schema that the answer keeps to.")
    guided_regex: str | None = Field(
        default=None, min_length=1, max_length=MOST_FORM, description="A regular expression for the whole answer."
    )
    guided_choice: list[Name] | None = Field(
        default=None, min_length=1, max_length=MOST_CHOICES, description="Texts of which the answer is one."
    )
    ignore_eos: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = Field(default=None, description="Needs stream: true.")
    user: str | None = Field(default=None, description="Let in for clients' sake and not used.")

    @model_validator(mode="after")
    def _says_one_thing(self) -> Self:
        if self.max_completion_tokens is not None and self.max_tokens not in (None, self.max_completion_tokens):
            message = f"received {self.max_tokens} and max_completion_tokens {self.max_completion_tokens}"
            raise fault("max_tokens", f"max_tokens and max_completion_tokens say the same: send one, {message}")
        if self.stream_options is not None and not self.stream:
            raise fault("stream_options", "stream_options needs stream: true")
        self._asks_for_one_form()
        return self

    def _asks_for_one_form(self) -> None:
        asked = [name for name in FORMS if getattr(self, name) not in (None, TextFormat(type="text"))]
        if len(asked) > 1:
            raise fault(asked[1], f"{asked[0]} and {asked[1]} both say what the answer must be: send one")
        for name in ("ignore_eos", "min_tokens"):
            if asked and getattr(self, name):
                raise fault(name, f"{name} and {asked[0]} contradict each other: send one")

    @property
    def samples(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def most_tokens(self) -> int | None:
        """Tokens of one answer under either of the field's two names; None: not said."""
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """Of each token, told with its log-probability; None: neither is asked for."""
        raise NotImplementedError


class CompletionBody(DrawnBody, Worded):
    """POST /v1/completions.

    Beside what the schema says: integers have no decimal point (1, not 1.0); prompt and max_tokens together fit the model's
    context; max_tokens left out means 16, and 0 needs echo: true; best_of equals n; model id@backend and attention agree; a
    field name one letter off one of these is refused.
    """

    prompt: Prompts
    best_of: int | None = Field(default=None, ge=1, le=INT64, description="Not offered: leave it out or send n.")
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None

    @model_validator(mode="after")
    def _is_one_question(self) -> CompletionBody:
        if self.best_of not in (None, self.samples):
            message = f"best_of is not offered: leave it out or send n ({self.samples}), received {self.best_of}"
            raise fault("best_of", message)
        if self.most_tokens == 0 and not self.echo:
            message = "max_tokens 0 asks for no answer; it needs echo: true, else max_tokens must be at least 1"
            raise fault("max_tokens", message)
        return self

    @property
    def alternatives(self) -> int | None:
        return self.logprobs


def content(value: Any) -> str:
    """A message's text, which may come in parts; those are joined by line breaks. Raises ValueError for what is no text."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not 0 < len(value) <= MOST_MESSAGES:
        received = f"must be a string or a list of 1 to {MOST_MESSAGES} text parts, received {quoted(value)}"
        raise ValueError(received)
    return "\n".join(_part(index, each) for index, each in enumerate(value))


def _part(index: int, value: Any) -> str:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind != "text" or not isinstance(value.get("text"), str) or len(value) > 2:
        received = quoted(value if kind in (None, "text") else kind)
        raise ValueError(
            f'part {index} must be {{"type": "text", "text": "..."}}, other kinds are not offered, received {received}'
        )
    return str(value["text"])


PART: dict[str, Any] = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
    "additionalProperties": False,
}

Content = Annotated[
    str,
    PlainValidator(content),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "maxItems": MOST_MESSAGES, "items": PART}]}),
]


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    role: Literal["developer", "system", "user", "assistant", "tool"] = Field(
        description="As far as the model's chat template knows it; one that knows no developer gets system instead."
    )
    content: Content
    name: str | None = Field(default=None, description="For templates that show it.")
    tool_call_id: str | None = Field(default=None, description="For templates that show it.")

    @model_validator(mode="before")
    @classmethod
    def _asks_only_for_what_is_offered(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in value.keys() & MESSAGE_NEUTRAL.keys():
            check_neutral(name, value[name], MESSAGE_NEUTRAL[name])
        return {name: each for name, each in value.items() if name not in MESSAGE_NEUTRAL}

    def plain(self) -> dict[str, str]:
        """As a template takes it."""
        return self.model_dump(exclude_none=True)


TEMPLATES_OWN = frozenset({"messages", "tools", "documents", "add_generation_prompt", "chat_template"})
"""What a template gets of the service, whatever the caller says."""


def scalar(value: Any) -> Any:
    """A template's option. Raises ValueError for an object or a list."""
    if isinstance(value, dict | list):
        raise ValueError(f"must be a string, a number, a boolean or null, received {quoted(value)}")
    return value


Option = Annotated[
    Any, PlainValidator(scalar), WithJsonSchema({"anyOf": [{"type": each} for each in ("string", "number", "boolean", "null")]})
]


TemplateOptions = Annotated[
    dict[str, Option] | None,
    Field(max_length=MOST_OPTIONS, description="Options of the model's chat template, such as enable_thinking."),
]


def check_options(options: Mapping[str, Any] | None) -> None:
    for name in options or {}:
        if not name.isidentifier() or name in TEMPLATES_OWN:
            raise fault("chat_template_kwargs", f"chat_template_kwargs may not set {quoted(name)}")


class ChatBody(DrawnBody):
    """POST /v1/chat/completions.

    Beside what the schema says: integers have no decimal point (1, not 1.0); the conversation, as the model's chat template
    writes it, and max_tokens together fit the model's context; max_tokens left out means 1024, or what the context leaves; the
    template may ask for an order of roles; top_logprobs needs logprobs: true; model id@backend and attention agree; a field
    name one letter off one of these is refused.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL | CHAT_NEUTRAL

    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, le=INT64)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=INT64, description="Says the same as max_tokens.")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20, description="Needs logprobs: true.")
    chat_template_kwargs: TemplateOptions = None

    @model_validator(mode="after")
    def _is_one_question(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise fault("top_logprobs", "top_logprobs needs logprobs: true")
        check_options(self.chat_template_kwargs)
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None
