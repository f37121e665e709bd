"""Bodies whose texts are read, and no token is drawn: embeddings, classes, scores, rankings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PlainValidator, WithJsonSchema, model_validator

from service.engine.request import Pooling, quoted
from service.http.fields import INT64, MOST_PROMPTS, Name, Prompts, fault
from service.http.schemas import NEUTRAL, Cut, Worded

LEAST_CHUNK = 16
"""Tokens of a text that make one of its embeddings."""


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
