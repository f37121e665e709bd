"""The xformers path: its masks mean what ours mean, it is refused where it cannot run, and on a GPU it answers right."""

from __future__ import annotations

import pytest
import torch

from attention import HeadShape, Segments, build, cuda, reference
from attention.truth import BOUNDS
from tests.attention.laws import largest, tokens


@pytest.mark.parametrize(
    ("name", "options", "causal"),
    [("dense", {}, True), ("dense", {}, False)]
    + [("sliding_window", {"window": window, "sinks": 0}, True) for window in (1, 6, 40)],
)
def test_the_mask_given_to_xformers_is_our_definition_in_each_segment(name: str, options: dict[str, int], causal: bool) -> None:
    pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers is the extra gpu; its masks work on CPU")
    backend, segments = build(name, options, HeadShape(2, 2, 16)), Segments((1, 7, 20))
    theirs = cuda.bias(segments, causal=causal, window=options.get("window")).materialize((28, 28)) == 0
    ours = torch.zeros(28, 28, dtype=torch.bool)
    for a, b, _ in segments.spans():
        ours[a:b, a:b] = reference.visible(backend, torch.arange(b - a), b - a, causal)
    assert torch.equal(theirs, ours)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "options"), [("dense", {}), ("sliding_window", {"window": 30, "sinks": 0})])
def test_the_answer_on_a_gpu_equals_the_reference(name: str, options: dict[str, int], dtype: torch.dtype) -> None:
    segments = Segments((1, 100, 333))
    for impl in ("torch", "xformers"):
        backend = build(name, {**options, "impl": impl}, HeadShape(4, 2, 64, dtype, torch.device("cuda")))
        q, k, v = tokens(backend.shape, segments.total)
        for causal in (True, False):
            answer = backend.attend(q.cuda(), k.cuda(), v.cuda(), segments, causal=causal).cpu()
            for a, b, _ in segments.spans():
                wanted = reference.answer(backend, q[a:b], k[a:b], v[a:b], causal=causal)
                assert largest(answer[a:b].double() - wanted) <= BOUNDS[dtype]
