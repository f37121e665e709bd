"""The served OpenAPI is complete and true: what it lets in is answered as it says, what it does not is refused as it says.

Schemathesis makes the calls, valid ones and invalid, from the document that the service itself serves: its examples, the edges
of each schema one by one, and random ones.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.http.bad_requests import POSTS
from tests.http.client import Client

CONFIG = Path(__file__).with_name("schemathesis.toml")
ROOT = CONFIG.parents[2]
LONGEST_SECONDS = 300  # it takes about 30 alone on two cores, and must not hang


def test_whatever_is_sent_the_service_answers_as_its_document_says(impatient: Client) -> None:
    url = f"{impatient.url}/openapi.json"
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG), "run", url, "--max-examples", "20"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LONGEST_SECONDS)
    assert made.returncode == 0, made.stdout + made.stderr


def test_every_route_is_in_the_document_and_no_body_is_undescribed(impatient: Client) -> None:
    document = impatient.get("/openapi.json").json
    operations = {(method, path) for path, found in document["paths"].items() for method in found}
    posts = {("post", path) for path in POSTS}
    gets = {("get", path) for path in ("/v1/models", "/v1/models/{id}", "/health", "/ready", "/info", "/metrics")}
    pins = {(method, path) for path in ("/v1/prefixes", "/v1/prefixes/{id}") for method in ("get", "delete")}
    assert operations == posts | gets | pins - {("delete", "/v1/prefixes")}
    for method, path in operations:
        operation = document["paths"][path][method]
        assert {"200", "400", "401", "408", "413", "415", "429", "500", "503"} <= operation["responses"].keys()
        assert ("requestBody" in operation) == (method == "post")
        assert all("schema" in kind for answer in operation["responses"].values() for kind in answer["content"].values())


def test_the_bounds_of_the_document_are_those_in_force(impatient: Client) -> None:
    schemas, card = impatient.get("/openapi.json").json["components"]["schemas"], impatient.replica.card
    completion = schemas["CompletionBody"]["properties"]
    assert completion["max_tokens"]["maximum"] == card.max_length
    assert completion["n"]["maximum"] == impatient.replica.config.max_samples
    assert completion["attention"]["anyOf"][0]["enum"] == [None, *impatient.replica.backends, "auto"]
    *_, several = completion["prompt"]["anyOf"]
    assert several["maxItems"] == impatient.replica.config.max_prompts
    assert several["items"]["items"]["maximum"] == impatient.replica.tokenizer.vocab_size - 1
