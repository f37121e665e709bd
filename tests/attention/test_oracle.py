"""Backends and implementations against definitions written down a second time, over drawn shapes, options and chunkings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention import AttentionBackend, HeadShape, Segments, build
from attention.kernels.softmax import native
from attention.truth import BOUNDS
from tests.attention import oracle
from tests.attention.laws import extend_in, need_native, tokens

OPTIONS: dict[str, dict[str, st.SearchStrategy[Any]]] = {
    "sliding_window": {"window": st.integers(1, 150), "sinks": st.integers(0, 150)},
    "longformer": {"window": st.integers(1, 150), "global_tokens": st.integers(0, 150)},
    "chunked": {"chunk": st.integers(1, 150)},
    "bigbird": {
        "block": st.integers(1, 40),
        "window_blocks": st.sampled_from((1, 3, 5)),
        "random_blocks": st.integers(0, 4),
        "global_blocks": st.integers(0, 3),
        "closing_blocks": st.sampled_from((0, 0, 1, 2)),
        "seed": st.integers(0, 99),
    },
    "topk": {
        "block": st.integers(1, 20),
        "blocks": st.integers(1, 9),
        "window": st.integers(20, 60),
        "sinks": st.integers(0, 50),
    },
    "performer": {
        "features": st.sampled_from((1, 3, 16, 32, 37, 64)),
        "hyperbolic": st.booleans(),
        "local_chunk": st.sampled_from((0, 0, 64, 65)),
        "seed": st.integers(0, 99),
    },
}
CASES = [(name, impl) for name in oracle.KNOWN for impl in ("torch", "native")]


@st.composite
def backends(draw: st.DrawFn, name: str, impl: str) -> AttentionBackend:
    """A backend of any shape and options that the implementation takes."""
    width = st.sampled_from((32, 64, 96, 128, 256)) if impl == "native" else st.sampled_from((1, 2, 7, 16, 33, 64, 128, 256))
    dtypes = [torch.float32, torch.bfloat16, torch.float64]
    if impl == "native":
        dtypes = [dtype for dtype in dtypes if native.obstacle(HeadShape(2, 2, 64, dtype)) is None]
    groups = draw(st.integers(1, 2))
    shape = HeadShape(groups * draw(st.sampled_from((1, 2, 3))), groups, draw(width), draw(st.sampled_from(dtypes)))
    options = draw(st.fixed_dictionaries(OPTIONS.get(name, {})))
    if impl == "native" and name == "performer":
        options["features"] = draw(st.sampled_from((32, 64, 96)))
    return build(name, {**options, "impl": impl}, shape)


@st.composite
def chunkings(draw: st.DrawFn, count: int) -> list[int]:
    """Lengths that sum to `count`: chunks, and runs of single steps."""
    chunks: list[int] = []
    while left := count - sum(chunks):
        chunks += draw(st.sampled_from(([draw(st.integers(1, left))], [1] * min(left, 5))))
    return chunks


def distance(ours: Tensor, wanted: Any) -> float:
    return float(np.abs(ours.double().numpy() - wanted).max())


@pytest.mark.parametrize(("name", "impl"), CASES)
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(data=st.data())
def test_answers_are_those_of_the_definitions(name: str, impl: str, data: st.DataObject) -> None:
    if impl == "native":
        need_native(HeadShape(2, 2, 64))
    with torch.inference_mode():
        backend = data.draw(backends(name, impl))
        first, second = data.draw(st.integers(1, 20)), data.draw(st.integers(1, 150))
        q, k, v = tokens(backend.shape, first + second, seed=data.draw(st.integers(0, 99)))
        own = slice(first, None)
        for causal in backend.directions:
            wanted = oracle.answer(backend, q[own], k[own], v[own], causal=causal)
            packed = backend.attend(q, k, v, Segments((first, second)), causal=causal)
            assert distance(packed[own], wanted) <= BOUNDS[backend.shape.dtype]
            if causal:
                chunks = data.draw(chunkings(second))
                assert distance(extend_in(backend, q[own], k[own], v[own], chunks), wanted) <= BOUNDS[backend.shape.dtype]
