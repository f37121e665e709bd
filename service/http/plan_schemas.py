"""Bodies of what comes before an answer: plans, prefixes to keep, tokens of a text and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Discriminator, Field, PlainValidator, RootModel, Tag, WithJsonSchema, model_validator

from service.http.drawn_schemas import MOST_MESSAGES, ChatBody, CompletionBody, Message, TemplateOptions, check_options
from service.http.fields import OnePrompt, fault, token_ids
from service.http.read_schemas import EmbeddingBody, RerankBody, ScoreBody
from service.http.schemas import HINTED, NAMED, Attended, Body, Worded

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
        check_options(self.chat_template_kwargs)
        return self


class TokenizeBody(Worded):
    """POST /tokenize."""

    prompt: str


class DetokenizeBody(Body):
    """POST /detokenize. Integers have no decimal point (1, not 1.0)."""

    tokens: Annotated[
        Sequence[int], PlainValidator(token_ids), WithJsonSchema({"type": "array"})
    ]  # openapi.py knows the bounds
