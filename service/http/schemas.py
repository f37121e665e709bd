"""The bodies callers send, in OpenAI's shapes. Our one field more is `attention`.

A field we do not know is passed over, as OpenAI's clients expect; one that is a letter off a field of ours is refused as the
slip it is. A field whose meaning we know and cannot honour is refused unless its value changes nothing: no answer differs in
silence from what was asked.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

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

from service.engine.request import Pooling, quoted
from service.http.length import Side

Prompt = str | Sequence[int]

INT64 = 2**63 - 1
"""Largest integer of any field: what lies beyond fits no counter underneath."""

MOST_FIELDS = 128
"""Fields of one body, known or not."""

MOST_STOPS = 16

MOST_PREFERRED = 16
"""Backends of one wish."""

MOST_PROMPTS = 2048
"""In one call, whatever the config allows: OpenAI's bound."""

MOST_BIASES = 1024
"""Tokens of one `logit_bias`, and of `stop_token_ids`."""

MOST_BIAS, MOST_PENALTY = 100.0, 2.0
"""OpenAI's bounds, either side of zero."""

MOST_FORM = 2**16
"""Characters of a schema or a pattern that an answer must keep to."""

MOST_CHOICES = 1024

LEAST_CHUNK = 16
"""Tokens of a text that make one of its embeddings."""

MOST_MESSAGES = 2048
"""Of one conversation, and parts of one message."""

MOST_OPTIONS = 16
"""Of a chat template."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "top_a": (None, 0),
    "max_new_tokens": (None,),
    "store": (None, False),
    "typical_p": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "bad_words": (None, []),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "guided_grammar": (None,),
    "dimensions": (None,),
}
"""Fields of OpenAI's and other servers' that are not offered here, with the values that ask for nothing."""

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


class Body(BaseModel):
    """Base of all bodies: no value is converted, fields we do not know are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL
    """Known fields that are not offered, with the values that ask for nothing."""

    model: str | None = Field(default=None, description="A model id, or id@backend; left out: the one model served here.")

    @model_validator(mode="before")
    @classmethod
    def _asks_only_for_what_is_offered(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise ValueError(f"the body may have {MOST_FIELDS} fields, received {len(value)}")
        for name in value.keys() - cls.model_fields.keys():
            if name in cls.neutral:
                _check_neutral(name, value[name], cls.neutral[name])
            elif meant := _meant(name, (*cls.model_fields, *cls.neutral)):
                raise fault(name, f"{quoted(name)} is no field, did you mean {meant}?")
        return value


def _check_neutral(name: str, value: Any, neutral: Sequence[Any]) -> None:
    """Raise a fault unless the value of a field that is not offered asks for nothing."""
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
        allowed = " or ".join(json.dumps(each) for each in neutral if each is not None) or "null"
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


class AutoHints(BaseModel):
    """What a caller asks of auto, in place of the config's own rules."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Predicted, queue included: who takes longer is passed over."
    )
    prefer: list[Name] | None = Field(
        default=None, min_length=1, max_length=MOST_PREFERRED, description="Backends, the best first; no other is picked."
    )


class AutoWish(BaseModel):
    """Auto, with hints."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    auto: AutoHints


NAMED, HINTED = "a name", "auto with hints"
"""Tags of what `attention` may be; no field has such a name."""

Wish = Annotated[
    Annotated[Name, Tag(NAMED)] | Annotated[AutoWish, Tag(HINTED)],
    Discriminator(lambda value: HINTED if isinstance(value, dict | AutoWish) else NAMED),
]


class Attended(Body):
    """A body that is answered by attending."""

    attention: Wish | None = Field(
        default=None, description="The backend, or auto; left out: the default of the config in force."
    )


class Cut(Attended):
    """A body whose input may be cut to the model's context."""

    truncate: Side | None = Field(
        default=None,
        description="Where to leave tokens out of too long an input; the receipt says how many. Left out: it is refused.",
    )


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
            _check_neutral(name, value[name], MESSAGE_NEUTRAL[name])
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


def _check_options(options: Mapping[str, Any] | None) -> None:
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
        _check_options(self.chat_template_kwargs)
        return self

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class EmbeddingBody(Cut, Worded):
    """POST /v1/embeddings.

    Beside what the schema says: integers have no decimal point (1, not 1.0); an input fits the model's context; model
    id@backend and attention agree; a field name one letter off one of these is refused.
    """

    input: Prompts
    dimensions: int | None = Field(
        default=None,
        ge=1,
        le=INT64,
        description="The first so many numbers, at length one again; the model was not trained for it.",
    )
    pooling: Pooling | None = Field(
        default=None,
        description="Of the last hidden states: their mean, the last or the first (cls) token's, or the largest number in each "
        "place. Left out: as the checkpoint has it, else mean.",
    )
    normalize: bool | None = Field(default=None, description="To length one. Left out: as the checkpoint has it, else true.")
    late_chunks: int | None = Field(
        default=None,
        ge=LEAST_CHUNK,
        le=INT64,
        description="An embedding for each so many tokens of a text that is read as a whole, each with its place in the text.",
    )
    prompt_name: Name | None = Field(
        default=None, description="Which of the checkpoint's prompts, such as query, stands before the texts."
    )
    encoding_format: Literal["float", "base64"] | None = Field(default=None, description="Left out: float.")
    user: str | None = Field(default=None, description="Let in for clients' sake and not used.")

    @model_validator(mode="after")
    def _tells_true_places(self) -> EmbeddingBody:
        if self.late_chunks is not None and self.truncate is not None:
            raise fault("late_chunks", "late_chunks and truncate contradict each other: chunks have places in the whole text")
        return self


class ScoredBody(Cut):
    """A body that is answered by a classifier."""

    use_activation: bool | None = Field(
        default=None,
        description="false: scores as the model's last layer gives them. Left out: as the checkpoint has it, else by sigmoid "
        "(one label) or softmax (several).",
    )
    user: str | None = Field(default=None, description="Let in for clients' sake and not used.")


class ClassifyBody(ScoredBody, Worded):
    """POST /v1/classify, as vLLM has it.

    Beside what the schema says: integers have no decimal point (1, not 1.0); an input fits the model's context; model
    id@backend and attention agree; a field name one letter off one of these is refused.
    """

    input: Prompts


def texts(value: Any) -> list[str]:
    """One or many texts as a list. Raises ValueError for anything else, and for nothing."""
    found = [value] if isinstance(value, str) else value
    if not isinstance(found, list) or not 0 < len(found) <= MOST_PROMPTS or not all(isinstance(each, str) for each in found):
        raise ValueError(f"must be a string, or a list of 1 to {MOST_PROMPTS} strings, received {quoted(value)}")
    return found


def documents(value: Any) -> list[str]:
    """Texts, some perhaps as objects. Raises ValueError for anything else, and for nothing."""
    if not isinstance(value, list):
        raise ValueError(f"must be a list of strings, or of objects with a text, received {quoted(value)}")
    return texts([each["text"] if isinstance(each, dict) and each.keys() == {"text"} else each for each in value])


Texts = Annotated[
    list[str], PlainValidator(texts), WithJsonSchema({"description": "One or many."})
]  # openapi.py knows the bounds

Documents = Annotated[
    list[str], PlainValidator(documents), WithJsonSchema({"description": 'Texts, as strings or as {"text": "..."}.'})
]


class ScoreBody(ScoredBody):
    """POST /v1/score, as vLLM has it: one text_1 with every text_2, or as many of both, pair by pair.

    Beside what the schema says: integers have no decimal point (1, not 1.0); a pair fits the model's context; model id@backend
    and attention agree; a field name one letter off one of these is refused.
    """

    text_1: Texts
    text_2: Texts

    @model_validator(mode="after")
    def _makes_pairs(self) -> ScoreBody:
        if len(self.text_1) not in (1, len(self.text_2)):
            raise fault(
                "text_1", f"text_1 must hold 1 text or as many as text_2 ({len(self.text_2)}), received {len(self.text_1)}"
            )
        return self

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """Who is scored with whom."""
        firsts = self.text_1 * (len(self.text_2) if len(self.text_1) == 1 else 1)
        return list(zip(firsts, self.text_2, strict=True))


RERANK_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "max_chunks_per_doc": (None,),
    "max_tokens_per_doc": (None,),
    "rank_fields": (None, ["text"]),
}
"""Of other servers' rerankers, and not offered."""


class RerankBody(ScoredBody):
    """POST /v1/rerank, as Jina, Cohere and vLLM have it: the documents by their score with the query, the highest first.

    Beside what the schema says: integers have no decimal point (1, not 1.0); query and document together fit the model's
    context; model id@backend and attention agree; a field name one letter off one of these is refused.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL | RERANK_NEUTRAL

    query: str
    documents: Documents
    top_n: int | None = Field(default=None, ge=1, le=INT64, description="So many of them; left out: all.")
    return_documents: bool | None = Field(default=None, description="Left out: true.")

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The query with every document."""
        return [(self.query, each) for each in self.documents]


PLANS = {
    "prompt": "a completion's plan",
    "messages": "a conversation's plan",
    "input": "a plan of an embedding, or of a classification",
    "text_2": "a score's plan",
    "documents": "a reranking's plan",
}
"""Tags by the field that tells the bodies apart; no field has such a name."""


def _planned(value: Any) -> str | None:
    """Which of them this is; None for several and for none."""
    asked = [PLANS[name] for name in PLANS if name in value]
    return asked[0] if len(asked) == 1 else None


Planned = Annotated[
    Annotated[CompletionBody, Tag(PLANS["prompt"])]
    | Annotated[ChatBody, Tag(PLANS["messages"])]
    | Annotated[EmbeddingBody, Tag(PLANS["input"])]
    | Annotated[ScoreBody, Tag(PLANS["text_2"])]
    | Annotated[RerankBody, Tag(PLANS["documents"])],
    Discriminator(
        _planned,
        custom_error_type="plan",
        custom_error_message="send the body of a completion (prompt), a chat (messages), an embedding or a classification "
        "(input), a score (text_2) or a reranking (documents), and of one",
    ),
]


TAGS = frozenset({*PLANS.values(), NAMED, HINTED})
"""What stands in the path of a fault without being a field."""


class PlanBody(RootModel[Planned]):
    """POST /v1/plan: the body of another route that computes, under the same rules."""


MOST_PIN_SECONDS = 7 * 86400


class PrefixBody(Attended, Worded):
    """POST /v1/prefixes: what later prompts, or conversations, begin with; one of `prompt` and `messages`.

    Beside what the schema says: integers have no decimal point (1, not 1.0); at least one whole chunk of tokens; model
    id@backend and attention agree; a field name one letter off one of these is refused.
    """

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {"truncate": (None,)}

    prompt: OnePrompt | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MOST_MESSAGES)
    chat_template_kwargs: TemplateOptions = None
    ttl_seconds: float = Field(default=3600, gt=0, le=MOST_PIN_SECONDS, description="How long it is kept.")

    @model_validator(mode="after")
    def _is_one_text(self) -> PrefixBody:
        if (self.prompt is None) == (self.messages is None):
            raise fault("prompt", "send one of prompt and messages")
        _check_options(self.chat_template_kwargs)
        return self


class TokenizeBody(Worded):
    """POST /tokenize."""

    prompt: str


class DetokenizeBody(Body):
    """POST /detokenize. Integers have no decimal point (1, not 1.0)."""

    tokens: Annotated[
        Sequence[int], PlainValidator(token_ids), WithJsonSchema({"type": "array"})
    ]  # openapi.py knows the bounds
