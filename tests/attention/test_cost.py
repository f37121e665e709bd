"""The cost laws against what really happens: the profiler's peak, and the count of pairs that `visible` names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention import HeadShape, Segments, backend_class, build, names, native, reference
from attention.memory import peak_bytes

MIB = 1 << 20
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "sliding_window": ({"window": 256, "sinks": 0}, {"window": 256}, {}),
    "longformer": ({"global_tokens": 64}, {"global_tokens": 0}),
    "bigbird": ({}, {"global_blocks": 1, "closing_blocks": 1}),
    "performer": ({}, {"hyperbolic": True}, {"local_chunk": 512}, {"local_chunk": 1024, "features": 64}),
}
PLAIN = [(name, options) for name in names() for options in OPTIONS.get(name, ({},))]
CHOOSING = [case for case in PLAIN if "impl" in backend_class(case[0]).Options.model_fields]
IMPLS = ("torch",) if native.obstacle(HeadShape(8, 8, 64, torch.bfloat16)) else ("torch", "native")
CASES = [case for case in PLAIN if case not in CHOOSING]
CASES += [(name, {**options, "impl": impl}) for name, options in CHOOSING for impl in IMPLS]


def near(law: int, measured: int) -> bool:
    """Within 10 % or 1 MiB: the allocator's rounding and the libraries' own scratch are not ours to know."""
    return abs(law - measured) <= max(0.1 * measured, MIB)


def test_the_profiler_sees_a_peak_that_is_known() -> None:
    assert peak_bytes(lambda: (torch.empty(MIB) + 1).sum()) == pytest.approx(8 * MIB, abs=64)
    assert peak_bytes(lambda: [torch.empty(MIB).sum() for _ in range(3)]) == pytest.approx(4 * MIB, abs=64)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_peak_of_attend_is_the_workspace_that_the_law_states(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    for heads, count in (((8, 8), 100), ((8, 8), 1000), ((8, 8), 5000), ((4, 2), 2000)):
        backend = build(name, options, HeadShape(*heads, 64, dtype))
        q, k, v = (torch.ones(count, n, 64, dtype=dtype) for n in (heads[0], heads[1], heads[1]))
        for causal in backend.directions:
            law = backend.cost(count, count, causal=causal).workspace_bytes
            measured = peak_bytes(lambda: backend.attend(q, k, v, Segments((q.shape[0],)), causal=causal))  # noqa: B023
            assert near(law, measured), (heads, count, causal, law, measured)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_the_peak_of_a_chunk_behind_a_history_is_the_workspace_that_the_law_states(name: str, options: dict[str, Any]) -> None:
    backend = build(name, options, HeadShape(4, 2, 64, torch.bfloat16))
    if True not in backend.directions:
        pytest.skip(f"{name} has no causal form")
    for past, count in ((3000, 1), (3000, 512), (9000, 2048)):
        q, k, v = (torch.ones(past + count, n, 64, dtype=torch.bfloat16) for n in (4, 2, 2))
        pool = backend.new_pool(1, 1 << 30)
        slot = pool.allocate(past + count)
        backend.extend(q[:past], k[:past], v[:past], Segments((past,)), pool, 0, [slot])
        new, step = slice(past, None), Segments((count,), (past,))
        measured = peak_bytes(lambda: backend.extend(q[new], k[new], v[new], step, pool, 0, [slot]))  # noqa: B023
        law = backend.cost(count, past + count, causal=True)
        assert near(law.workspace_bytes, measured), (past, count, law.workspace_bytes, measured)
        assert law.state_bytes == pool.bytes_in_use


@pytest.mark.parametrize(("name", "options"), PLAIN)
def test_the_flops_of_an_exact_backend_are_those_of_the_pairs_it_sees(name: str, options: dict[str, Any]) -> None:
    backend = build(name, options, HeadShape(4, 2, 64))
    if not backend.exact:
        pytest.skip(f"{name} is counted by its products, not by pairs")
    count = 3000
    for causal in backend.directions:
        pairs = int(reference.visible(backend, torch.arange(count), count, causal).sum())
        law = backend.cost(count, count, causal=causal).flops
        assert law == pytest.approx(4 * 4 * 64 * pairs, rel=0.25)  # the law leaves the sequence's two ends out


def test_linear_work_grows_with_the_tokens_and_dense_work_with_their_square() -> None:
    for name in names():
        backend = build(name, {}, HeadShape(4, 2, 64))
        causal = backend.directions[0]
        ratio = backend.cost(65536, 65536, causal=causal).flops / backend.cost(16384, 16384, causal=causal).flops
        assert ratio == pytest.approx(16 if name == "dense" else 4, rel=0.1)
