"""The bodies we answer, as the served OpenAPI states them. `answers.py`, `routes.py` and `errors.py` build them as plain data;
the contract test holds what they send to these records, in both directions.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Seconds = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]


class Record(BaseModel):
    """Base of all: no field beside those named."""

    model_config = ConfigDict(extra="forbid")


class Receipt(Record):
    """What the prompts of one call took: phases of the slowest, sums of bytes, tokens and chunks, the most batch mates."""

    backend: str = Field(description="The attention backend that served.")
    why: str = Field(description="Why this one: request, candidate, default, what auto weighed, or what did not fit.")
    tokenize_seconds: Seconds | None
    queue_seconds: Seconds | None
    prefill_seconds: Seconds | None
    decode_seconds: Seconds | None
    prefill_chunks: Count
    cached_tokens: Count = Field(description="Of the input, whose state was kept from an earlier request.")
    dropped_tokens: Count = Field(description="Of the input, by truncate; 0: all of it was read.")
    guessed_tokens: Count = Field(description="By prompt lookup, looked over beside those that were drawn.")
    accepted_tokens: Count = Field(description="Of those, that stand in the answer.")
    seen_tokens: Count = Field(description="Of the input, by its last token in one layer.")
    reserved_bytes: Count = Field(description="State and workspace by the cost law.")
    measured_bytes: Count | None = Field(description="State and step as measured; null: the widest step was not.")
    batch_mates: Count


class PromptTokens(Record):
    cached_tokens: Count = Field(description="Of the prompt, whose state was kept from an earlier request.")


class CompletionTokens(Record):
    accepted_prediction_tokens: Count = Field(description="Of the answer, guessed by prompt lookup.")
    rejected_prediction_tokens: Count = Field(description="Guessed and not in the answer.")


class Usage(Record):
    prompt_tokens: Count
    completion_tokens: Count
    total_tokens: Count
    prompt_tokens_details: PromptTokens
    completion_tokens_details: CompletionTokens


class Logprobs(Record):
    """One entry per token in each list."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[Count]


class Choice(Record):
    index: Count
    text: str
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null: the sample goes on, in a stream.")


class CompletionAnswer(Record):
    """Every prompt's every sample; index = prompt * n + sample."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage
    longserve: Receipt


class CompletionChunk(Record):
    """The data of one server-sent event; the last one's data is [DONE], or after a failure an Error."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = Field(default=None, description="With stream_options: null but in the last, or counting up.")
    longserve: Receipt | None = Field(default=None, description="In the last chunk, with stream_options.include_usage.")


class TokenFacts(Record):
    token: str
    logprob: float
    bytes: list[Annotated[int, Field(ge=0, le=255)]]


class ToldToken(TokenFacts):
    top_logprobs: list[TokenFacts]


class ChatLogprobs(Record):
    content: list[ToldToken]
    refusal: None


class ChatMessage(Record):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(Record):
    index: Count
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(Record):
    """What the assistant says, n times."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    longserve: Receipt


class ChatDelta(Record):
    role: Literal["assistant"] | None = Field(default=None, description="In the first chunk of a choice.")
    content: str


class ChunkChoice(Record):
    index: Count
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"] | None = Field(description="null: the sample goes on.")


class ChatChunk(Record):
    """The data of one server-sent event of a conversation; the last one's data is [DONE], or after a failure an Error."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(default=None, description="With stream_options: null but in the last, or counting up.")
    longserve: Receipt | None = Field(default=None, description="In the last chunk, with stream_options.include_usage.")


class EmbeddingItem(Record):
    object: Literal["embedding"]
    index: Count
    embedding: list[float] | str = Field(description="Numbers, or little-endian float32 in base64.")
    input: Count | None = Field(default=None, description="With late_chunks: which text, from 0 on.")
    start: Count | None = Field(default=None, description="Its first character of the text; of token ids, its first token.")
    end: Count | None = Field(default=None, description="Behind its last one.")
    tokens: Count | None = Field(default=None, description="How many it has.")


class EmbeddingUsage(Record):
    prompt_tokens: Count
    total_tokens: Count


class EmbeddingAnswer(Record):
    object: Literal["list"]
    model: str
    data: list[EmbeddingItem]
    usage: EmbeddingUsage
    longserve: Receipt


class Scored(Record):
    """What answers of a classifier say alike."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    usage: EmbeddingUsage
    longserve: Receipt


class ClassItem(Record):
    index: Count
    label: str = Field(description="Of the highest score.")
    probs: list[float] = Field(description="The score of each label, in the checkpoint's order.")
    num_classes: Count


class ClassifyAnswer(Scored):
    data: list[ClassItem]


class ScoreItem(Record):
    object: Literal["score"]
    index: Count
    score: float


class ScoreAnswer(Scored):
    data: list[ScoreItem]


class Document(Record):
    text: str


class Ranked(Record):
    index: Count = Field(description="Among the documents as they were sent.")
    relevance_score: float
    document: Document | None = Field(default=None, description="Absent with return_documents: false.")


class RerankAnswer(Scored):
    results: list[Ranked] = Field(description="The highest score first.")


class Phases(Record):
    queue: Seconds
    prefill: Seconds
    decode: Seconds


class PlanItem(Record):
    """What one prompt would cost, and whether it would be let in now."""

    backend: str
    why: str
    prompt_tokens: Count
    cached_tokens: Count = Field(description="Of the input, whose state is kept now.")
    dropped_tokens: Count = Field(description="Of the input, by truncate; 0: all of it would be read.")
    total_tokens: Count
    terms: dict[str, Count] = Field(description="Bytes by term.")
    needed_bytes: Count
    budget_bytes: Count
    free_bytes: int
    verdict: Literal["runs", "queues", "refused"]
    reason: str | None = Field(description="The refusal's code.")
    longest_tokens: Count
    backends_that_fit: list[str]
    predicted_seconds: Phases


class PlanAnswer(Record):
    object: Literal["list"]
    data: list[PlanItem]


class Prefix(Record):
    """A pin: the beginning of a prompt, whose state is kept."""

    id: str
    object: Literal["prefix"]
    backend: str
    tokens: Count = Field(description="Of the beginning: whole chunks.")
    bytes: Count = Field(description="Of its state while it is kept.")
    is_kept: bool = Field(description="False: requests needed the room; the next one that begins alike puts it back.")
    expires_at: int = Field(description="Seconds since 1970.")
    replica: str = Field(description="Where it stands: other replicas know nothing of it.")


class PrefixList(Record):
    object: Literal["list"]
    data: list[Prefix]


class PrefixDeleted(Record):
    id: str
    object: Literal["prefix.deleted"]
    deleted: Literal[True]


class Model(Record):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["longserve"]
    max_model_len: int
    lossy: str | None = Field(description="Why answers are not those the checkpoint was trained to give; null: they are.")


class ModelList(Record):
    object: Literal["list"]
    data: list[Model]


class TokenizeAnswer(Record):
    tokens: list[Count]
    count: Count
    max_model_len: int


class DetokenizeAnswer(Record):
    prompt: str


class Health(Record):
    status: str = Field(description="ok, or why this replica should be replaced.")


class Attention(Record):
    default: str | None = Field(description="Null: the checkpoint's own, native where it has windows, else dense.")
    backends: dict[str, dict[str, Any] | None]
    auto: dict[str, Any] = Field(description="How auto picks: prefer, max_seconds, spill.")
    weights: dict[str, float] = Field(description="Shares of the calls without a wish that candidates answer.")


class Ready(Record):
    ready: bool
    replica: str
    attention: Attention | None = Field(description="In force.")
    asked: Attention | None = Field(description="Asked for last.")
    switching: bool
    degraded: str | None = Field(description="Why the last change failed.")
    withdrawn: dict[str, str] = Field(description="Backends that answer nothing, and why: they were off their definition.")


class BackendFacts(Record):
    name: str
    options: dict[str, Any]
    exact: bool
    impl: str
    lossy: str | None = Field(description="Why answers are not those the checkpoint was trained to give; null: they are.")


class AttentionFacts(Record):
    default: str
    backends: list[BackendFacts]


class Info(Record):
    model: str
    tasks: list[Literal["completion", "embedding", "classification"]] = Field(description="What it can be asked for.")
    labels: list[str] = Field(description="Of a classifier, in the order of its scores.")
    prompts: list[str] = Field(description="Names of those that prompt_name may have.")
    max_model_len: int
    parameters: int
    dtype: str
    dtype_reason: str
    weights: Literal["auto", "bf16", "int8", "int4"] = Field(description="Of matrices; auto: the dtype's.")
    weights_bytes: int = Field(description="Memory of the model's parameters.")
    kv: Literal["auto", "bf16", "int8"] = Field(description="Of a decoder's keys and values; auto: the dtype's.")
    impl: str = Field(description="Who computes what stands between a layer's products: native (C) or torch.")
    device: str
    threads: int
    attention: AttentionFacts
    memory_budget_bytes: int
    laws: dict[str, Any] = Field(description="What this replica predicts by, for `longserve capacity`: seconds, CPUs.")
    limits: dict[str, Any]
    engine: dict[str, Any]
    versions: dict[str, str]
    replica: dict[str, Any]


class Fault(Record):
    message: str
    type: str
    param: str | None = Field(description="The field or header at fault.")
    code: str
    details: dict[str, Any] | None = Field(default=None, description="Numbers behind a refusal; absent where there are none.")


class Error(Record):
    """Every answer that is no 2xx, in OpenAI's shape."""

    error: Fault
