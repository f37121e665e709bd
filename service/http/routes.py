"""The routes: OpenAI's for models, completions, chat and embeddings, vLLM's for classifiers; ours for tokens, plans and how
the service is.

One function per route, each in the order a reader would say it: what is asked, what it becomes, what is answered.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.types import ASGIApp

from service import exposition
from service.engine.request import InvalidRequest, PrefixNotKept, Request, quoted
from service.http import admin, answers, docs, errors
from service.http.answer_schemas import (
    ChatAnswer,
    ClassifyAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    EmbeddingAnswer,
    Health,
    Info,
    Model,
    ModelList,
    PlanAnswer,
    Prefix,
    PrefixDeleted,
    PrefixList,
    Ready,
    RerankAnswer,
    ScoreAnswer,
    TokenizeAnswer,
)
from service.http.answers import Completion
from service.http.auth import ApiKeys
from service.http.body import check_media_type
from service.http.drawn_schemas import ChatBody, CompletionBody, DrawnBody, StreamOptions
from service.http.edge import Edge
from service.http.errors import ModelNotFound, PrefixNotFound
from service.http.face import Host
from service.http.openapi import EXPOSED, TIMEOUT_HEADER, document, model_ids, operation
from service.http.plan_schemas import DetokenizeBody, PlanBody, PrefixBody, TokenizeBody
from service.http.prompts import (
    chat_requests,
    check_ids,
    check_model,
    chunk_places,
    classified_requests,
    completion_requests,
    embedding_requests,
    paired_requests,
    planned_requests,
    prefix_request,
)
from service.http.read_schemas import ClassifyBody, EmbeddingBody, RerankBody, ScoreBody
from service.http.reader import Call
from service.http.streaming import CompletionStream, complete, embed, read

if TYPE_CHECKING:
    from service.engine.pins import Pin

NUMBER = re.compile(r"[0-9]{1,20}(\.[0-9]{1,400})?([eE][+-]?[0-9]{1,3})?")  # Python's own reading takes 1_0 and nan too

B = TypeVar("B", bound=BaseModel)


def create_app(host: Host, keys: Sequence[str] = (), echoes_request_id: bool = True, admin_keys: Sequence[str] = ()) -> ASGIApp:
    """The ASGI app over one replica.

    Args:
        keys: API keys that let a caller in, beside those of the config's file; none, and no file: no key is asked for.
        echoes_request_id: False where a proxy in front answers with the request id itself.
        admin_keys: the keys that let into /admin; none: there is no /admin.
    """
    app = FastAPI(
        title="Longserve",
        description="Long inputs under switchable attention. A field that is not known is passed over, unless it is a slip.",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    errors.install(app)
    docs.install(app)
    app.openapi = lambda: document(app, host)  # type: ignore[method-assign]  # FastAPI's own way to extend it
    for add in (_add_inference, _add_prefixes, _add_models, _add_tokens, _add_state):
        add(app, host)
    if admin_keys:
        admin.install(app, host)
    operators = ApiKeys(admin_keys) if admin_keys else None
    edge = Edge(app, host, ApiKeys(keys, host.config.api_keys_file), echoes_request_id, operators)
    origins = host.config.cors_origins
    methods = ("GET", "POST", "DELETE")
    return CORSMiddleware(edge, origins, methods, ("*",), expose_headers=EXPOSED) if origins else edge


def _add_inference(app: FastAPI, host: Host) -> None:
    @app.post("/v1/completions", **operation(CompletionAnswer, CompletionBody, has_receipt=True))
    async def completions(caller: HttpRequest) -> Response:
        """Continue a prompt, or several."""
        call = _call(caller, host)
        body = await _body(call, CompletionBody, host)
        return await _drawn(call, body, await completion_requests(body, host, call), answers.TEXT, host)

    @app.post("/v1/chat/completions", **operation(ChatAnswer, ChatBody, has_receipt=True))
    async def chat(caller: HttpRequest) -> Response:
        """What the assistant says next in a conversation, which the model's own chat template writes as a prompt."""
        call = _call(caller, host)
        body = await _body(call, ChatBody, host)
        return await _drawn(call, body, await chat_requests(body, host, call), answers.CHAT, host)

    @app.post("/v1/embeddings", **operation(EmbeddingAnswer, EmbeddingBody, has_receipt=True))
    async def embeddings(caller: HttpRequest) -> Response:
        """The last hidden states of an input, or of several, pooled, at length one."""
        call = _call(caller, host)
        body = await _body(call, EmbeddingBody, host)
        requests = await embedding_requests(body, host, call)
        is_normalized = host.card.is_normalized if body.normalize is None else body.normalize
        places = [] if body.late_chunks is None else await chunk_places(body, requests, host, call)
        found = [vector for each in await embed(host, requests, caller) for vector in each.vectors]

        def answer() -> dict[str, Any]:
            vectors = [answers.cut(each, body.dimensions, is_normalized) for each in found]
            return answers.embeddings(vectors, requests, host, body.encoding_format == "base64", places)

        if len(found) <= answers.FEW_VECTORS:
            return JSONResponse(answer(), headers=answers.headers(requests))
        encoded = await asyncio.to_thread(lambda: answers.encoded_in_pieces(answer()))
        return _json(encoded, answers.headers(requests))

    @app.post("/v1/classify", **operation(ClassifyAnswer, ClassifyBody, has_receipt=True))
    async def classify(caller: HttpRequest) -> Response:
        """The label of an input, or of several, and the score of each label."""
        call = _call(caller, host)
        requests = await classified_requests(await _body(call, ClassifyBody, host), host, call)
        return await _scored(call, requests, answers.classified, host)

    @app.post("/v1/score", **operation(ScoreAnswer, ScoreBody, has_receipt=True))
    async def score(caller: HttpRequest) -> Response:
        """The scores of pairs of texts."""
        call = _call(caller, host)
        requests = await paired_requests(await _body(call, ScoreBody, host), host, call)
        return await _scored(call, requests, answers.scored, host)

    @app.post("/v1/rerank", **operation(RerankAnswer, RerankBody, has_receipt=True))
    async def rerank(caller: HttpRequest) -> Response:
        """Documents in the order of how well they answer a query."""
        call = _call(caller, host)
        body = await _body(call, RerankBody, host)
        requests = await paired_requests(body, host, call)
        return await _scored(call, requests, partial(answers.reranked, body=body), host)

    @app.post("/v1/plan", **operation(PlanAnswer, PlanBody))
    async def plan(caller: HttpRequest) -> Response:
        """What a call of one of the others would cost, and whether it would be let in now. Computes nothing."""
        call = _call(caller, host)
        body = await _body(call, PlanBody, host)
        data = []
        for each in await planned_requests(body, host, call):
            data.append(_planned(each, host))
            await asyncio.sleep(0)  # some milliseconds each
        return JSONResponse({"object": "list", "data": data})


def _add_prefixes(app: FastAPI, host: Host) -> None:
    def shown(pin: Pin, is_kept: bool) -> dict[str, Any]:
        return {
            "id": pin.id,
            "object": "prefix",
            "backend": pin.lane.name,
            "tokens": pin.tokens,
            "bytes": pin.num_bytes,
            "is_kept": is_kept,
            "expires_at": math.ceil(time.time() + pin.until - time.monotonic()),
            "replica": str(host.readiness()["replica"]),
        }

    def found(id: str, caller: HttpRequest) -> tuple[Pin, bool]:
        pins = host.engine.pins(_call(caller, host).owner)
        pin = next((each for each in pins if each.id == id), None)
        if pin is None:
            raise PrefixNotFound(f"no prefix {quoted(id)} is pinned here by this key")
        return pin, pins[pin]

    @app.post("/v1/prefixes", **operation(Prefix, PrefixBody, has_receipt=True))
    async def pin(caller: HttpRequest) -> Response:
        """Read a prompt's beginning, and keep its state for a while: who goes on from there does not pay for it again."""
        call = _call(caller, host)
        body = await _body(call, PrefixBody, host)
        pin, request = host.engine.pin(await prefix_request(body, host, call), body.ttl_seconds)
        try:
            await read(host, request, caller)
            if not host.engine.pins(call.owner).get(pin, False):
                raise PrefixNotKept(f"no room is left now for {pin.num_bytes} bytes beside what runs and is pinned")
            pin = host.engine.begin_pin(pin, body.ttl_seconds)
        except BaseException:
            host.engine.unpin(pin)
            raise
        return JSONResponse(shown(pin, True), headers=answers.headers([request]))

    @app.get("/v1/prefixes", **operation(PrefixList))
    async def prefixes(caller: HttpRequest) -> dict[str, Any]:
        """What this key has pinned at this replica."""
        pins = host.engine.pins(_call(caller, host).owner)
        return {"object": "list", "data": [shown(*each) for each in pins.items()]}

    @app.get("/v1/prefixes/{id}", **operation(Prefix, statuses=[404]))
    async def prefix(id: str, caller: HttpRequest) -> dict[str, Any]:
        """One of them."""
        return shown(*found(id, caller))

    @app.delete("/v1/prefixes/{id}", **operation(PrefixDeleted, statuses=[404]))
    async def unpin(id: str, caller: HttpRequest) -> dict[str, Any]:
        """Let go of one."""
        pin, _ = found(id, caller)
        host.engine.unpin(pin)
        return {"id": pin.id, "object": "prefix.deleted", "deleted": True}


def _add_models(app: FastAPI, host: Host) -> None:
    def cards() -> dict[str, dict[str, Any]]:
        shared = {
            "object": "model",
            "created": host.card.created,
            "owned_by": "longserve",
            "max_model_len": host.card.max_length,
        }
        backends = (host.engine.backends.default, *host.backends)  # under which each id is answered
        ids = zip(model_ids(host.card, host.backends), map(host.lossy, backends), strict=True)
        return {id: {"id": id, **shared, "lossy": lossy} for id, lossy in ids}

    @app.get("/v1/models", **operation(ModelList))
    async def models() -> dict[str, Any]:
        """The model, and the model under each backend."""
        return {"object": "list", "data": list(cards().values())}

    @app.get("/v1/models/{id:path}", **operation(Model, statuses=[404]))
    async def model(id: str) -> dict[str, Any]:
        """One of them."""
        if id not in cards():
            raise ModelNotFound(f"no model {quoted(id)} here, allowed: {', '.join(cards())}", param="model")
        return cards()[id]


def _add_tokens(app: FastAPI, host: Host) -> None:
    @app.post("/tokenize", **operation(TokenizeAnswer, TokenizeBody))
    async def tokenize(caller: HttpRequest) -> Response:
        """A text's token ids."""
        call = _call(caller, host)
        body = await _body(call, TokenizeBody, host)
        check_model(body, host)
        return _json(await host.reader.tokenized(body.prompt, body.with_special_tokens, host.card.max_length, call))

    @app.post("/detokenize", **operation(DetokenizeAnswer, DetokenizeBody))
    async def detokenize(caller: HttpRequest) -> Response:
        """The text of token ids."""
        call = _call(caller, host)
        body = await _body(call, DetokenizeBody, host)
        check_model(body, host)
        check_ids(body.tokens, host, "tokens")
        return _json(await host.reader.detokenized(body.tokens, call))


def _add_state(app: FastAPI, host: Host) -> None:
    @app.get("/health", **operation(Health))
    async def health() -> Response:
        """Alive: 200, or 503 with the reason why this replica should be replaced."""
        fault = host.fault()
        return JSONResponse({"status": "ok" if fault is None else fault}, 200 if fault is None else 503)

    @app.get("/ready", **operation(Ready))
    async def ready() -> Response:
        """Warmed up and answering: 200 or 503, with the state of the attention switch."""
        state = dict(host.readiness())
        return JSONResponse(state, 200 if state["ready"] else 503)

    @app.get("/info", **operation(Info))
    async def info() -> dict[str, Any]:
        """Model, backends, limits and versions in force."""
        return dict(host.info())

    @app.get("/metrics", **operation(None, response_class=PlainTextResponse))
    async def metrics(caller: HttpRequest) -> Response:
        """Every replica's metrics, up to a second old (`Cache-Control: no-cache`: as they are now).

        In Prometheus' text format, or in OpenMetrics for those who accept that.
        """
        format = exposition.format_of(caller.headers.get("accept", ""))
        is_fresh = "no-cache" in caller.headers.get("cache-control", "")
        return Response(await host.metrics(format, is_fresh), headers={"content-type": exposition.CONTENT_TYPES[format]})


def _planned(request: Request, host: Host) -> dict[str, Any]:
    return dataclasses.asdict(host.engine.plan(request)) | {"dropped_tokens": request.timings.dropped_tokens}


async def _drawn(call: Call, body: DrawnBody, requests: Sequence[Request], form: answers.Form, host: Host) -> Response:
    """The answer to a call that draws tokens, whole or as a stream."""
    completion = Completion(call.id, requests, host, bool(body.stream), form)
    if body.stream:
        return CompletionStream(host, requests, completion, body.stream_options or StreamOptions())
    return _json(await complete(host, requests, completion, call.caller), answers.headers(requests))


async def _scored(call: Call, requests: Sequence[Request], told: Callable[..., dict[str, Any]], host: Host) -> Response:
    """The answer to a call of a classifier."""
    scores = [each.vector for each in await embed(host, requests, call.caller)]
    return JSONResponse(told(call.id, scores, requests, host), headers=answers.headers(requests))


async def _body(call: Call, kind: type[B], host: Host) -> B:
    """The call's body. Raises WrongMediaType, InvalidRequest, and what `Reader` does."""
    check_media_type(call.caller.headers)
    return await host.reader.body(await call.caller.body(), kind, call)


def _json(encoded: bytes, headers: Mapping[str, str] | None = None) -> Response:
    return Response(encoded, headers=headers, media_type="application/json")


def _call(caller: HttpRequest, host: Host) -> Call:
    """Id and deadline of a call. Raises InvalidRequest for a timeout that is no positive number."""
    longest, given = host.config.request_timeout_seconds, caller.headers.get(TIMEOUT_HEADER)
    seconds = longest if given is None else float(given) if NUMBER.fullmatch(given) else 0.0
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER} must be a number above 0, received {quoted(given)}", param=TIMEOUT_HEADER)
    return Call(caller.state.request_id, time.monotonic() + min(seconds, longest), caller)
