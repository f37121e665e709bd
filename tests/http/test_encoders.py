"""Encoders served: embeddings by the folder's recipe, scores and rerankings as transformers has them, and refusals."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.config import AttentionConfig, HttpConfig, ServiceConfig, UserConfig
from service.plain import listening_in_thread
from tests.http.client import Client
from tests.model.encoders import their_hidden, theirs, write, write_modules

CLASSIFIER = "AutoModelForSequenceClassification"
PROMPTS = {"query": "query ", "passage": "passage "}
BACKENDS: dict[str, Any] = {"dense": {}, "longformer": {"window": 8}, "performer": {"features": 32}}
QUERY, DOCUMENTS = "how to list a folder", ["get the pid", "list it by name", "walk", "list it by name"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write(tmp_path_factory.mktemp("encoder") / "tiny-bert", "bert")
    write_modules(made, "cls_token", prompts=PROMPTS, default_prompt_name=None)
    (made / "sentence_bert_config.json").write_text('{"max_seq_length": 60}')
    return made


@pytest.fixture(scope="module")
def crossing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("crossing") / "tiny-cross", "bert", CLASSIFIER, num_labels=1)


@pytest.fixture(scope="module")
def telling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    names = {0: "sad", 1: "so so", 2: "glad"}
    return write(tmp_path_factory.mktemp("telling") / "tiny-moods", "roberta", CLASSIFIER, id2label=names)


def serving(directory: Path) -> Iterator[Client]:
    user = UserConfig(attention=AttentionConfig(backends=BACKENDS))
    settings = ServiceConfig(model=str(directory), dtype="float32", threads=1, http=HttpConfig(max_prompts=4))
    with listening_in_thread(settings, user) as (url, replica):
        yield Client(url, replica)


@pytest.fixture(scope="module")
def embedder(folder: Path) -> Iterator[Client]:
    yield from serving(folder)


@pytest.fixture(scope="module")
def reranker(crossing: Path) -> Iterator[Client]:
    yield from serving(crossing)


@pytest.fixture(scope="module")
def classifier(telling: Path) -> Iterator[Client]:
    yield from serving(telling)


def embedded(service: Client, text: Any, **fields: Any) -> Tensor:
    return torch.tensor(service.post("/v1/embeddings", {"input": text, **fields}).json["data"][0]["embedding"])


def test_an_embedding_is_that_of_transformers_by_the_folders_recipe(embedder: Client, folder: Path) -> None:
    ids = embedder.replica.tokenizer.encode(QUERY, add_special_tokens=True)
    assert (ids[0], ids[-1]) == (2, 3)
    (hidden,) = their_hidden(theirs(folder), [torch.tensor(ids)])
    expected = torch.nn.functional.normalize(hidden[0], dim=0)
    torch.testing.assert_close(embedded(embedder, QUERY), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(embedded(embedder, QUERY, normalize=False), hidden[0], rtol=0, atol=1e-4)
    mean = torch.nn.functional.normalize(hidden.mean(0), dim=0)
    torch.testing.assert_close(embedded(embedder, QUERY, pooling="mean"), mean, rtol=0, atol=1e-5)
    first = embedded(embedder, QUERY, normalize=False, dimensions=5)
    torch.testing.assert_close(first, hidden[0][:5], rtol=0, atol=1e-4)


def test_a_prompt_by_name_stands_before_each_text(embedder: Client) -> None:
    named = embedded(embedder, "a folder", prompt_name="query")
    torch.testing.assert_close(named, embedded(embedder, "query a folder"), rtol=0, atol=1e-6)
    assert (named - embedded(embedder, "a folder")).abs().max() > 1e-4
    refused = embedder.post("/v1/embeddings", {"input": "a", "prompt_name": "question"})
    assert (refused.status, refused.error["param"]) == (400, "prompt_name")
    assert "query, passage" in refused.error["message"]
    tokens = embedder.post("/v1/embeddings", {"input": [5, 6], "prompt_name": "query"})
    assert (tokens.status, tokens.error["param"]) == (400, "prompt_name")


def test_a_text_beyond_the_folders_length_is_refused_and_cut_only_when_asked(embedder: Client) -> None:
    long = "word " * 30  # four letters each, so many tokens
    refused = embedder.post("/v1/embeddings", {"input": long})
    assert (refused.status, refused.error["code"]) == (400, "context_length_exceeded")
    assert "60 tokens" in refused.error["message"]
    whole = embedder.replica.tokenizer.encode(long, add_special_tokens=True)
    cut = embedded(embedder, long, truncate="right")
    torch.testing.assert_close(cut, embedded(embedder, [*whole[:59], whole[-1]]), rtol=0, atol=1e-6)


def test_an_embedding_under_another_backend_is_another_and_is_told_to_be_lossy(embedder: Client) -> None:
    text = "a longer text that reaches beyond its window"
    assert (embedded(embedder, text) - embedded(embedder, text, attention="longformer")).abs().max() > 1e-4
    told = {each["name"]: each["lossy"] for each in embedder.get("/info").json["attention"]["backends"]}
    assert told["dense"] is None and "trained to see the whole text" in told["longformer"] and "performer" in told["performer"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/classify", {"input": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
        ("/v1/plan", {"prompt": "a"}),
    ],
)
def test_a_route_that_an_encoder_cannot_answer_names_what_it_can(embedder: Client, path: str, body: dict[str, Any]) -> None:
    refused = embedder.post(path, body)
    assert (refused.status, refused.error["code"]) == (400, "task_not_offered")
    assert "offers embedding (/v1/embeddings)" in refused.error["message"]


def scores_of(directory: Path, service: Client, pairs: list[tuple[str, str]]) -> Tensor:
    """transformers' logits of pairs, tokenized by the file's template."""
    model, found = theirs(directory, CLASSIFIER), []
    for first, second in pairs:
        encoding = service.replica.tokenizer._core.encode(first, second)
        with torch.inference_mode():
            ids, types = torch.tensor([encoding.ids]), torch.tensor([encoding.type_ids])
            found.append(model(ids, token_type_ids=types).logits[0])
    return torch.stack(found)


def test_documents_come_in_the_order_of_their_scores(reranker: Client, crossing: Path) -> None:
    expected = scores_of(crossing, reranker, [(QUERY, each) for each in DOCUMENTS])[:, 0].sigmoid()
    assert expected.std() > 5e-4, "scores that are all alike would show nothing"
    body = {"query": QUERY, "documents": [DOCUMENTS[0], {"text": DOCUMENTS[1]}, *DOCUMENTS[2:]]}
    answer = reranker.post("/v1/rerank", body).json
    results = answer["results"]
    scores = torch.tensor([each["relevance_score"] for each in results])
    order = [each["index"] for each in results]
    torch.testing.assert_close(scores, expected[order], rtol=0, atol=1e-6)
    assert scores.tolist() == sorted(scores.tolist(), reverse=True) and sorted(order) == [0, 1, 2, 3]
    assert order.index(1) < order.index(3), "of equals the earlier comes first"
    assert [each["document"]["text"] for each in results] == [DOCUMENTS[i] for i in order]
    (best,) = reranker.post("/v1/rerank", {**body, "top_n": 1, "return_documents": False}).json["results"]
    assert best == {"index": order[0], "relevance_score": pytest.approx(scores[0].item(), abs=1e-6)}


def test_pairs_are_scored_one_with_all_or_one_by_one(reranker: Client, crossing: Path) -> None:
    logits = scores_of(crossing, reranker, [(QUERY, DOCUMENTS[0]), (QUERY, DOCUMENTS[1]), ("walk", DOCUMENTS[1])])[:, 0]
    body = {"text_1": QUERY, "text_2": DOCUMENTS[:2], "use_activation": False}
    found = [each["score"] for each in reranker.post("/v1/score", body).json["data"]]
    torch.testing.assert_close(torch.tensor(found), logits[:2], rtol=0, atol=1e-4)
    body = {"text_1": [QUERY, "walk"], "text_2": DOCUMENTS[:2]}
    found = [each["score"] for each in reranker.post("/v1/score", body).json["data"]]
    torch.testing.assert_close(torch.tensor(found), logits[[0, 2]].sigmoid(), rtol=0, atol=1e-5)


def test_texts_get_the_likeliest_label_and_the_score_of_each(classifier: Client, telling: Path) -> None:
    texts, model = ["a fine day", "rain"], theirs(telling, CLASSIFIER)
    answer = classifier.post("/v1/classify", {"input": texts}).json
    assert answer["longserve"]["backend"] == "dense"
    for text, told in zip(texts, answer["data"], strict=True):
        ids = classifier.replica.tokenizer.encode(text, add_special_tokens=True)
        with torch.inference_mode():
            expected = model(torch.tensor([ids])).logits[0].softmax(0)
        torch.testing.assert_close(torch.tensor(told["probs"]), expected, rtol=0, atol=1e-5)
        assert told["label"] == ("sad", "so so", "glad")[int(expected.argmax())] and told["num_classes"] == 3
    (plan,) = classifier.post("/v1/plan", {"input": texts[0]}).json["data"]
    assert plan["verdict"] == "runs" and plan["terms"]["state"] == 0


def test_a_classifier_of_several_labels_scores_no_pairs(classifier: Client) -> None:
    for path, body in (("/v1/score", {"text_1": "a", "text_2": "b"}), ("/v1/rerank", {"query": "a", "documents": ["b"]})):
        refused = classifier.post(path, body)
        assert (refused.status, refused.error["code"]) == (400, "task_not_offered")
        assert "3 labels" in refused.error["message"]
    refused = classifier.post("/v1/embeddings", {"input": "a"})
    assert (refused.status, refused.error["code"]) == (400, "task_not_offered")


def test_of_a_pair_the_second_text_is_cut_and_only_when_asked(reranker: Client, crossing: Path) -> None:
    long, most = "word " * 60, reranker.replica.card.max_length
    body = {"text_1": "walk", "text_2": long, "use_activation": False}
    whole = reranker.replica.tokenizer._core.encode("walk", long)
    ids, types = ([*each[: most - 1], each[-1]] for each in (whole.ids, whole.type_ids))
    with torch.inference_mode():
        expected = theirs(crossing, CLASSIFIER)(torch.tensor([ids]), token_type_ids=torch.tensor([types])).logits[0, 0]
    answer = reranker.post("/v1/score", {**body, "truncate": "right"}).json
    assert answer["data"][0]["score"] == pytest.approx(expected.item(), abs=1e-4)
    assert answer["longserve"]["dropped_tokens"] == len(whole.ids) - most
    for asked, param in (({"truncate": "left"}, "truncate"), ({"truncate": "right", "text_1": long}, "text_2"), ({}, "text_2")):
        refused = reranker.post("/v1/score", {**body, **asked})
        assert (refused.status, refused.error["param"]) == (400, param)


def test_what_may_be_asked_stands_in_info(embedder: Client, reranker: Client, classifier: Client) -> None:
    told = [{name: each.get("/info").json[name] for name in ("tasks", "labels", "prompts")} for each in (embedder, classifier)]
    assert told[0] == {"tasks": ["embedding"], "labels": [], "prompts": ["query", "passage"]}
    assert told[1] == {"tasks": ["classification"], "labels": ["sad", "so so", "glad"], "prompts": []}
    assert reranker.get("/info").json["labels"] == ["LABEL_0"]


def test_more_documents_than_a_call_may_have_are_refused(reranker: Client) -> None:
    refused = reranker.post("/v1/rerank", {"query": "a", "documents": ["b"] * 5})
    assert (refused.status, refused.error["param"]) == (400, "documents")
    assert "4 entries, received 5" in refused.error["message"]
    long = reranker.post("/v1/score", {"text_1": "a", "text_2": "word " * 60})
    assert (long.status, long.error["code"], long.error["param"]) == (400, "context_length_exceeded", "text_2")
