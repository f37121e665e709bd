"""Late chunks: a text is read as a whole, and each of its chunks is told with its own vector and place."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest

from tests.http.client import Client

TEXT = (Path(__file__).read_text() + "é𝄞Ω " * 40) * 2


def embedded(service: Client, **fields: Any) -> list[dict[str, Any]]:
    reply = service.post("/v1/embeddings", {"attention": "sliding_window", **fields})
    assert reply.status == 200, reply.text
    data: list[dict[str, Any]] = reply.json["data"]
    return data


def test_chunks_cover_the_text_in_order_and_have_the_tokens_they_say(service: Client) -> None:
    chunks = embedded(service, input=[TEXT, "import os"], late_chunks=100)
    count = service.post("/tokenize", {"prompt": TEXT}).json["count"]
    first = [each for each in chunks if each["input"] == 0]
    assert [each["index"] for each in chunks] == list(range(len(chunks))) and len(first) == math.ceil(count / 100)
    assert {each["tokens"] for each in first[:-1]} == {100} and sum(each["tokens"] for each in first) == count
    assert first[0]["start"] == 0 and first[-1]["end"] == len(TEXT)
    for one, two in itertools.pairwise(first):
        assert one["end"] - 1 <= two["start"] <= one["end"]  # tokens may share a character
    assert chunks[-1]["input"] == 1 and TEXT[first[3]["start"] : first[3]["end"]].strip()


@pytest.mark.parametrize("size", [16, 100, 600, 10_000])
def test_the_mean_of_the_chunks_is_that_of_the_text(service: Client, size: int) -> None:
    [whole] = embedded(service, input=TEXT, normalize=False)
    chunks = embedded(service, input=TEXT, normalize=False, late_chunks=size)
    total = sum(each["tokens"] for each in chunks)
    for place, value in enumerate(whole["embedding"]):
        mean = sum(each["tokens"] * each["embedding"][place] for each in chunks) / total
        assert mean == pytest.approx(value, abs=1e-4)


def test_a_chunk_knows_what_came_before_it(service: Client) -> None:
    same = list(range(400, 432))
    _, one, _, two = embedded(service, input=[[300] * 32 + same, [301] * 32 + same], late_chunks=32)
    assert one["embedding"] != two["embedding"] and one["tokens"] == two["tokens"] == 32


def test_chunks_of_token_ids_have_places_in_tokens_and_dimensions_and_base64_hold(service: Client) -> None:
    chunks = embedded(service, input=list(range(300, 350)), late_chunks=20, dimensions=8)
    assert [(each["start"], each["end"]) for each in chunks] == [(0, 20), (20, 40), (40, 50)]
    assert all(len(each["embedding"]) == 8 for each in chunks)
    packed = embedded(service, input="import os", late_chunks=16, encoding_format="base64")
    assert isinstance(packed[0]["embedding"], str) and packed[0]["end"] == 9


@pytest.mark.parametrize("fields", [{"late_chunks": 15}, {"late_chunks": 16, "truncate": "left"}])
def test_chunks_that_cannot_be_are_refused(service: Client, fields: dict[str, Any]) -> None:
    reply = service.post("/v1/embeddings", {"input": "a", **fields})
    assert (reply.status, reply.error["param"]) == (400, "late_chunks")
