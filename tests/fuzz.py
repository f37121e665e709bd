"""Generated calls of the compiled kernels through their Python faces, at the edges of shapes, strides, options and pasts.

Each is answered as by the reading in torch, or refused. Run by `test_memory_safety.py` in a process of its own with
the kernels built under sanitizers; as `pytest tests/fuzz.py`, with the ones installed.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from attention import NATIVE, AttentionBackend, HeadShape, Passage, Segments, build, names, shares
from attention.kernels import int8
from attention.kernels.features import native as features
from attention.kernels.library import NUMBER, VIEW, Kernel
from attention.kernels.softmax import native as softmax
from attention.truth import BOUNDS
from service.model import encoder_layer, families
from service.model import native as layer
from service.model.checkpoint import EMBEDDED
from service.model.quantized import BITS, Quantized, eight
from service.model.transformer import Layer, Transformer, rotate

SANITIZED = os.environ.get("SANITIZED")
if SANITIZED:
    for kernel in (softmax, features, int8, layer, encoder_layer):
        kernel.KERNEL.home = Path(SANITIZED)
DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if softmax.obstacle(HeadShape(4, 2, 64, dtype)) is None]
CASE = Path(SANITIZED or ".pytest_cache") / f"case-{os.getppid()}"  # the call under way, for a process that does not survive it
CALLS = os.environ.get("LONGSERVE_FUZZ_CALLS")


def generated(share: float) -> Any:
    """So many of the generated calls; the same ones each time unless another number is asked for."""
    return settings(
        max_examples=int(share * int(CALLS or 500)),
        derandomize=CALLS is None,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


EDGES = (1, 2, 15, 16, 17, 63, 65, 127, 128, 129, 200, 256, 511, 512, 513, 700)
HUGE = (1 << 31, (1 << 63) - 1, 1 << 63, 1 << 70)
OPTIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "dense": {},
    "sliding_window": {"window": (1, 15, 16, 127, 300, 1000, *HUGE), "sinks": (0, 1, 4, 17, 130, *HUGE)},
    "longformer": {"window": (1, 16, 127, 1000, *HUGE), "global_tokens": (0, 1, 17, 140, *HUGE)},
    "bigbird": {
        "block": (5, 16, 64, 511, 512, 513, 600, 1024, *HUGE),
        "window_blocks": (1, 3, (1 << 31) - 1, *HUGE),
        "random_blocks": (0, 1, 3, *HUGE),
        "global_blocks": (0, 1, 2, *HUGE),
        "closing_blocks": (0, 0, 1, *HUGE),
        "seed": (0, 3, *HUGE),
    },
    "chunked": {"chunk": (1, 16, 127, 128, 129, 513, 1024, *HUGE)},
    "performer": {
        "features": (32, 64, 96),
        "hyperbolic": (False, True),
        "local_chunk": (0, 64, 70, 129),
        "seed": (0, 3, *HUGE),
    },
    "linear": {},
    "topk": {
        "block": (1, 5, 16, 17, 64, 129, *HUGE),
        "blocks": (1, 2, 16, 256, *HUGE),
        "window": (16, 64, 127, 129, 300, *HUGE),
        "sinks": (0, 1, 4, 130, *HUGE),
    },
    "distinct": {
        "window": (1, 16, 129, 300, *HUGE),
        "kept": (1, 30, 128, 700, *HUGE),
        "sinks": (0, 1, 4, 130, *HUGE),
        "block": (1, 16, 17, 129, *HUGE),
    },
}


@dataclass(frozen=True)
class Layout:
    """Where a tensor's elements lie: elements before it, and between its rows and its heads, and from one to the next."""

    offset: int = 0
    row: int = 0
    head: int = 0
    element: int = 1

    def of(self, x: Tensor) -> Tensor:
        _, heads, width = x.shape
        head = width * self.element + self.head
        strides = (heads * head + self.row, head, self.element)
        length = self.offset + sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
        return torch.zeros(length, dtype=x.dtype).as_strided(x.shape, strides, self.offset).copy_(x)


@dataclass(frozen=True)
class Case:
    """A backend, sequences, and how they are asked about: whole, or in chunks, one list of them for each sequence."""

    name: str
    options: dict[str, Any]
    shape: HeadShape
    layouts: tuple[Layout, Layout, Layout]
    chunks: tuple[tuple[int, ...], ...]
    how: str  # attend, both (sides), extend; or extend with a wrong pool, past, slot, layer or out
    poison: str  # of one token: none, q, k, v
    seed: int


@st.composite
def cases(draw: Any) -> Case:
    name = draw(st.sampled_from(names()))
    options = {option: draw(st.sampled_from(values)) for option, values in OPTIONS.get(name, {}).items() if draw(st.booleans())}
    heads = draw(st.sampled_from(((1, 1), (2, 1), (4, 2), (6, 2), (7, 1), (3, 3))))
    width, dtype = draw(st.sampled_from((32, 64, 96, 256))), draw(st.sampled_from(DTYPES))
    shape = HeadShape(*heads, width, dtype, kv=draw(st.sampled_from((None, None, torch.int8))))
    small = st.sampled_from((0, 0, 1, 2, 3, 8))
    layout = st.builds(Layout, small, small, small, st.sampled_from((1, 1, 1, 1, 2)))
    tight = draw(st.booleans())
    layouts = tuple(Layout() if tight else draw(layout) for _ in range(3))
    chunks = draw(st.lists(st.lists(st.sampled_from(EDGES), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3))
    how = draw(st.sampled_from(("attend", "both", "extend", "extend", "extend", "pool", "past", "slot", "layer", "out")))
    poison = draw(st.sampled_from(("none", "none", "none", "q", "k", "v")))
    return Case(name, options, shape, layouts, tuple(chunks), how, poison, draw(st.integers(0, 999)))  # type: ignore[arg-type]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of all sequences, packed, tight."""
    shape, generator = case.shape, torch.Generator().manual_seed(case.seed)
    total = sum(map(sum, case.chunks))
    drawn = [
        torch.randn(total, heads, shape.head_width, generator=generator) * scale
        for heads, scale in ((shape.query_heads, 0.5), (shape.key_value_heads, 0.7), (shape.key_value_heads, 1.0))
    ]
    if case.poison != "none":
        drawn["qkv".index(case.poison)][case.seed % total] = float("nan")
    q, k, v = (x.to(shape.dtype) for x in drawn)
    return q, k, v


def laid(case: Case, qkv: Sequence[Tensor]) -> list[Tensor]:
    """The same, each in its layout."""
    return [layout.of(x) for layout, x in zip(case.layouts, qkv, strict=True)]


def answer(backend: AttentionBackend, case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """What the case asks for."""
    lengths = tuple(map(sum, case.chunks))
    if case.how in ("attend", "both"):
        return backend.attend(*laid(case, qkv), Segments(lengths), causal=case.how == "attend")
    pool, layers = backend.new_pool(2, 1 << 40), 1
    slots = [pool.allocate(length) for length in lengths]
    starts, past = [start for start, _, _ in Segments(lengths).spans()], [0] * len(lengths)
    found = qkv[0].new_empty(qkv[0].shape)
    for turn in range(max(map(len, case.chunks))):
        live = [n for n, chunks in enumerate(case.chunks) if turn < len(chunks)]
        take = {n: case.chunks[n][turn] for n in live}
        spans = [slice(starts[n] + past[n], starts[n] + past[n] + take[n]) for n in live]
        parts = laid(case, [torch.cat([x[span] for span in spans]) for x in qkv])
        segments = Segments(tuple(take[n] for n in live), tuple(past[n] for n in live))
        told = backend.extend(*parts, segments, pool, layers, [slots[n] for n in live])
        for span, rows in zip(spans, told.split(segments.lengths), strict=True):
            found[span] = rows
        past = [done + take.get(n, 0) for n, done in enumerate(past)]
    return found


def ask_wrongly(backend: AttentionBackend, case: Case, qkv: tuple[Tensor, Tensor, Tensor]) -> None:
    """A call that has no answer, since one thing about it is wrong."""
    shape, count = backend.shape, len(qkv[0])
    pool = backend.new_pool(1, 1 << 40)
    slot, out = pool.allocate(2 * count), qkv[0].new_empty(qkv[0].shape)
    segments, layers, slots = Segments((count,), (0,)), 0, [slot]
    if case.how == "pool":
        other = HeadShape(1, 1, 32, torch.float32 if case.seed % 2 else shape.dtype)
        pool = build(names()[case.seed % len(names())], {}, other).new_pool(1, 1 << 40)
        slots = [pool.allocate(2 * count)]
    if case.how == "past":
        segments = Segments((count,), (min(count, 1 + case.seed),))
    if case.how == "slot":
        slots = [slot + 1]
    if case.how == "layer":
        layers = -1 if case.seed % 2 else 1
    if case.how == "out":
        out = (out[: count // 2], out[..., :16], out.double(), out[:1].expand(out.shape) if count > 1 else out[:0])[
            case.seed % 4
        ]
    for _ in backend.extending(*laid(case, qkv), segments, pool, layers, slots, out):
        pass


def note(case: object) -> None:
    CASE.parent.mkdir(exist_ok=True)
    CASE.write_text(repr(case))


@generated(0.75)
@given(cases())
@torch.inference_mode()
def test_attention_answers_like_its_slow_reading_or_refuses(case: Case) -> None:
    note(case)
    try:
        ours, slow = (build(case.name, {**case.options, "impl": impl}, case.shape) for impl in ("native", "torch"))
    except ValueError:
        return
    causal, qkv = case.how != "both", inputs(case)
    is_wrong = case.how not in ("attend", "both", "extend") or any(layout.element > 1 for layout in case.layouts)
    if is_wrong or causal not in ours.directions:
        with pytest.raises((ValueError, KeyError)):
            (answer if case.how in ("attend", "both", "extend") else ask_wrongly)(ours, case, qkv)
        return
    tight = replace(case, layouts=(Layout(), Layout(), Layout()))
    found, wanted = answer(ours, case, qkv).double(), answer(slow, tight, qkv).double()
    assert torch.equal(found.isfinite(), wanted.isfinite())
    apart = (found - wanted).abs().nan_to_num(0.0).amax()
    assert apart <= 2 * BOUNDS[case.shape.dtype], float(apart)


@generated(0.25)
@given(
    cases(), st.sampled_from((None, 1, 15, 127, 300)), st.sampled_from((1e-38, 0.1, 1.5, 50.0, 1e30, -1.0, math.inf, math.nan))
)
@torch.inference_mode()
def test_capped_attention_answers_like_its_slow_reading_or_refuses(case: Case, window: int | None, cap: float) -> None:
    note((case, window, cap))
    case = replace(case, layouts=tuple(replace(layout, element=1) for layout in case.layouts))  # type: ignore[arg-type]
    case = case if case.how == "attend" else replace(case, how="extend")
    options, is_wrong = {"windows": (window,), "score_cap": cap if 0 < cap < math.inf else 1.0}, not 0 < cap < math.inf
    (ours,), (slow,) = (shares(build(NATIVE, options | {"impl": impl}, case.shape)) for impl in ("native", "torch"))
    if is_wrong:
        ours.softmax = softmax.NativeCapped(cap)  # type: ignore[attr-defined]
        with pytest.raises(RuntimeError, match="cap must be a number"):
            answer(ours, case, inputs(case))
        return
    found, wanted = answer(ours, case, inputs(case)).double(), answer(slow, case, inputs(case)).double()
    assert torch.equal(found.isfinite(), wanted.isfinite())
    assert (found - wanted).abs().nan_to_num(0.0).amax() <= 2 * BOUNDS[case.shape.dtype]


TABLES: dict[str, list[tuple[int, int, tuple[int, ...]]]] = {
    "attend": [(3, 5, (0, 1, 2, 3, 4)), (5, 5, (0, 1, 2, 3, 4))],
    "step": [(1, 9, (0, 6, 7, 8))],
    "choose": [(3, 4, (0, 1, 2, 3))],
    "chosen": [(3, 4, (0, 1, 2, 3))],
}
"""Of a function its tables: which arguments are address and rows, a row's words, and which of them say nothing of memory."""
STRANGE = (-(1 << 63), -(1 << 40) - 1, -1, 0, 1, 2, 15, 17, 64, 128, 256, 257, 512, 4097, 1 << 31, 1 << 40, (1 << 63) - 1)


def places_in(kernel: Kernel, told: object) -> list[int]:
    """Where a struct, if a kernel is told one, has numbers that say nothing of memory."""
    memory = tuple(f"_{part}" for part in (*VIEW, "bytes"))
    return [
        getattr(struct, name).offset
        for struct in kernel.structs
        if isinstance(told, bytes) and len(told) == ctypes.sizeof(struct)
        for name, kind, *_ in struct._fields_
        if kind is NUMBER and not name.endswith(memory)
    ]


def lying(real: Any, draws: random.Random) -> Any:
    """`Kernel.call` with one number of what the C is told changed, now and then."""

    def call(kernel: Kernel, function: str, *arguments: Any) -> None:
        told, value = list(arguments), draws.choice(STRANGE)
        tables = [(at, words, which) for at, words, which in TABLES.get(function, []) if told[at + 1]]
        if tables and draws.random() < 0.5:
            at, words, which = draws.choice(tables)
            row = (NUMBER * words).from_address(told[at] + 8 * words * draws.randrange(told[at + 1]))
            row[draws.choice(which)] = draws.choice((value, row[draws.choice(which)]))  # strange, or what stands beside it
        elif (places := places_in(kernel, told[0])) and draws.random() < 0.5:
            at, packed = draws.choice(places), bytearray(told[0])
            packed[at : at + 8] = value.to_bytes(8, "little", signed=True)
            told[0] = bytes(packed)
        real(kernel, function, *told)

    return call


@generated(0.5)
@given(cases(), st.randoms(use_true_random=False))
@torch.inference_mode()
def test_a_kernel_that_is_told_what_cannot_be_refuses_or_touches_nothing_else(case: Case, draws: random.Random) -> None:
    tight = (Layout(), Layout(), Layout())
    case = replace(case, layouts=tight, how="attend" if case.how == "attend" else "extend")
    note((case, "lied to"))
    try:
        backend = build(case.name, {**case.options, "impl": "native"}, case.shape)
    except ValueError:
        return
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(RuntimeError, ValueError):
        patch.setattr(Kernel, "call", lying(Kernel.call, draws))
        answer(backend, case, inputs(case))


layouts = st.builds(Layout, st.sampled_from((0, 1, 3)), st.sampled_from((0, 1, 2, 5)))


@generated(0.25)
@given(
    st.sampled_from(DTYPES),
    st.sampled_from((1, 2, 32, 33, 100)),
    st.sampled_from((1, 2, 3, 5)),
    st.sampled_from((16, 32, 64, 96, 128, 256, 272, 288)),
    st.lists(layouts, min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from((0, 0, 0, 1, -1)),
)
@torch.inference_mode()
def test_a_layer_answers_like_its_slow_reading_or_refuses(
    dtype: torch.dtype, rows: int, heads: int, depth: int, where: list[Layout], is_normed: bool, off: int
) -> None:
    note((dtype, rows, heads, depth, where, is_normed, off))
    generator = torch.Generator().manual_seed(rows + depth)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    x = where[0].of(drawn(rows, 1, (heads + 1) * depth))[:, 0]
    cos, sin = (place.of(drawn(rows + off, 1, depth)) if rows + off else drawn(0, 1, depth) for place in where[1:])
    weights = drawn(heads, depth) if is_normed else None
    bound = {torch.float32: 2e-5, torch.bfloat16: 2**-5}[dtype]

    def near(found: Tensor, wanted: Tensor) -> bool:
        return float(((found.double() - wanted).abs() / wanted.abs().clamp_min(1.0)).max()) <= bound

    wide, weight = x.double(), drawn(x.shape[1] + 16 * off if x.shape[1] > 16 else 16)
    if weight.numel() < x.shape[1]:
        with pytest.raises(RuntimeError, match="weight must hold a row"):
            layer.norm(x, weight, 1e-6)
    else:
        wanted = functional.rms_norm(wide, (x.shape[1],), weight[: x.shape[1]].double(), 1e-6)
        assert near(layer.norm(x, weight, 1e-6), wanted)
    if (x.shape[1] // 2) % 16 == 0 and x.shape[1] % 2 == 0:
        gate, up = wide.chunk(2, dim=1)
        assert near(layer.gate(x), functional.silu(gate) * up)
    if depth % 32 or depth > 256 or off < 0:
        with pytest.raises(RuntimeError, match="the native kernel was given what it cannot take"):
            layer.turn(x, weights, heads, depth, 1e-6, cos, sin)
        return
    qk = wide[:, : heads * depth].unflatten(1, (heads, depth))
    if weights is not None:
        qk = functional.rms_norm(qk, (depth,), None, 1e-6) * weights.double()
    assert near(layer.turn(x, weights, heads, depth, 1e-6, cos, sin), rotate(qk, cos[:rows].double(), sin[:rows].double()))


@generated(0.1)
@given(
    st.sampled_from((1, 2, 5, 6, 7, 13)),
    st.sampled_from((64, 128, 192)),
    st.sampled_from((64, 320)),
    st.sampled_from(((1, 1, 64), (4, 2, 64), (2, 1, 128), (2, 1, 32), (4, 2, 96), (2, 2, 256), (2, 2, 288))),
    st.lists(layouts, min_size=4, max_size=4),
    st.sampled_from(("none", "none", "none", "rows", "width", "shape", "scales", "matrix")),
    st.sampled_from(("auto", "int8", "int4")),
)
@torch.inference_mode()
def test_a_layer_in_a_decode_step_answers_like_its_slow_reading_or_refuses(
    rows: int, width: int, inner: int, shape: tuple[int, int, int], where: list[Layout], wrong: str, weights: str
) -> None:
    note((rows, width, inner, shape, where, wrong, weights))
    (heads, _, depth), generator = shape, torch.Generator().manual_seed(rows + width)
    block = decoder(width, inner, shape, weights)
    if block.packed is None or (wrong == "matrix" and weights == "auto"):
        return

    def drawn(count: int, heads: int, depth: int) -> Tensor:
        return torch.randn(count, heads, depth, generator=generator).bfloat16()

    x, answer = where[0].of(drawn(rows, 1, width))[:, 0], where[1].of(drawn(rows, heads, depth))
    turns = where[2].of(drawn(rows, 1, depth)), where[3].of(drawn(rows, 1, depth))
    if wrong != "none" or (where[1].head and heads > 1):
        packed = block.packed
        norms, scales, matrices = packed._weights
        sizes = width, inner, *shape
        if wrong == "width":
            x = x[:, : width - 1]
        if wrong == "shape":
            packed = layer.PackedLayer(norms, scales, matrices, (*sizes[:2], 2 * heads, *sizes[3:]), 1e-6)
        if wrong == "scales":
            packed = layer.PackedLayer(norms, scales[:1], matrices, sizes, 1e-6)
        if wrong == "matrix":
            short = [Quantized(each.data.flatten()[:-1], each.shape, each.bits) for each in matrices]
            packed = layer.PackedLayer(norms, scales, short, sizes, 1e-6)
        if wrong == "rows":
            turns = turns[0][: rows - 1], turns[1]
        with pytest.raises(RuntimeError, match="the native kernel was given what it cannot take"):
            packed.question(x, turns)
            packed.output(x, answer)
        return
    for found, wanted in zip(block.packed.question(x, turns), block.question(x, turns), strict=True):
        assert float((found.double() - wanted.double()).abs().max()) <= 2**-5 * max(1.0, float(wanted.abs().max()))
    found, wanted = block.packed.output(x, answer), block.output(x, answer)
    assert float((found.double() - wanted.double()).abs().max()) <= 2**-5 * max(1.0, float(wanted.abs().max()))


@generated(0.1)
@given(
    st.sampled_from((1, 6, 7, 95, 96, 97, 200)),
    st.sampled_from((64, 128, 192)),
    st.sampled_from((64, 320)),
    st.sampled_from((1, 2, 4)),
    st.sampled_from(("gelu", "gelu_new", "relu")),
    st.lists(layouts, min_size=2, max_size=2),
    st.sampled_from(("none", "none", "none", "rows", "width", "heads", "matrix", "bias", "norm")),
    st.sampled_from(("auto", "int8", "int4")),
)
@torch.inference_mode()
def test_an_encoders_layer_answers_like_its_slow_reading_or_refuses(
    rows: int, width: int, inner: int, heads: int, activation: str, where: list[Layout], wrong: str, weights: str
) -> None:
    note((rows, width, inner, heads, activation, where, wrong, weights))
    sizes = {"hidden_size": width, "intermediate_size": inner, "num_attention_heads": heads, "hidden_act": activation}
    block = made({"model_type": "bert", "architectures": ["BertModel"], **sizes}, weights)
    packed, generator = block.packed, torch.Generator().manual_seed(rows + width)
    if not isinstance(packed, encoder_layer.EncoderLayer) or (wrong == "matrix" and weights == "auto"):
        return
    x = where[0].of(torch.randn(rows, 1, width, generator=generator).bfloat16())[:, 0]
    answer = where[1].of(torch.randn(rows, heads, width // heads, generator=generator).bfloat16())
    if wrong != "none" or (where[1].head and heads > 1):
        matrices, biases, norms = (list(each) for each in packed._weights)
        if wrong == "width":
            x = x[:, : width - 1]
        if wrong == "rows":
            answer = answer[: rows - 1]
        if wrong == "heads":
            answer = answer[..., : width // heads - 1]
        if wrong == "matrix":
            matrices[1] = Quantized(matrices[1].data.flatten()[:-1], matrices[1].shape, matrices[1].bits)
        if wrong == "bias":
            biases[2] = biases[2][:-1]
        if wrong == "norm":
            norms[3] = norms[3][:-1]
        with pytest.raises(RuntimeError, match="the native kernel was given what it cannot take"):
            encoder_layer.EncoderLayer(block.config, matrices, biases, norms).output(x, answer)
        return
    for found, wanted in zip(packed.question(x, None), block.question(x, None), strict=True):
        assert float((found.double() - wanted.double()).abs().max()) <= 2**-5 * max(1.0, float(wanted.abs().max()))
    found, wanted = packed.output(x, answer), block.output(x, answer)
    assert float((found.double() - wanted.double()).abs().max()) <= 2**-5 * max(1.0, float(wanted.abs().max()))


PASSING: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("sliding_window", {}),
    ("sliding_window", {"window": 62, "sinks": 0}),
    ("sliding_window", {"window": 252, "sinks": 3}),
    ("chunked", {}),
    ("chunked", {"chunk": 1}),
    ("chunked", {"chunk": 64}),
    ("bigbird", {"block": 16}),
    ("bigbird", {"block": 5, "global_blocks": 0, "random_blocks": 7}),
    ("distinct", {"window": 64, "kept": 32, "block": 16}),
    ("distinct", {"window": 1, "kept": 1, "sinks": 0, "block": 7}),
    ("linear", {}),
    ("performer", {"features": 64}),
    ("performer", {"features": 64, "local_chunk": 64}),
]
"""Backends whose steps are in C, on both sides of the places where what they keep comes round."""


@generated(0.1)
@given(
    st.lists(st.sampled_from((0, 1, 15, 16, 63, 64, 255, 256, 257, 600)), min_size=1, max_size=4),
    st.sampled_from(((1, 1, 64), (4, 2, 64), (2, 1, 128), (2, 2, 32), (4, 2, 96))),
    st.sampled_from(PASSING),
    st.sampled_from(("auto", "int8", "int4")),
    st.sampled_from((None, torch.int8)),
    st.sampled_from(("none", "none", "none", "rows", "layers", "turns", "full", "width", "nobody")),
)
@torch.inference_mode()
def test_a_step_through_layers_answers_as_one_by_one_or_refuses(
    past: list[int],
    shape: tuple[int, int, int],
    chosen: tuple[str, dict[str, Any]],
    weights: str,
    kv: torch.dtype | None,
    wrong: str,
) -> None:
    note((past, shape, chosen, weights, kv, wrong))
    block = decoder(64, 128, shape, weights)
    if block.packed is None:
        return
    stack, rows, (name, options) = layer.PackedStack([block.packed] * 2), len(past), chosen
    try:
        backend = build(name, options, HeadShape(*shape, torch.bfloat16, kv=kv))
    except ValueError:  # keeps nothing that could lie in 8 bits
        return
    pool, generator = backend.new_pool(2, 1 << 40), torch.Generator().manual_seed(rows)
    both = [[pool.allocate(max(1, count + (wrong != "full"))) for count in past] for _ in range(2)]
    for slots in both:
        for slot, count in zip(slots, past, strict=True):
            for own, tensor in pool.tensors(slot).items():
                drawn = torch.rand(tensor.shape, generator=torch.Generator().manual_seed(count))  # sums are positive
                if tensor.dtype == torch.int8 and own in ("k", "v"):
                    drawn = torch.rand(*tensor.shape[:-1], shape[1] * shape[2], generator=torch.Generator().manual_seed(count))
                    heads = drawn.bfloat16().view(-1, *shape[1:])
                    drawn = int8.quantize(heads, heads, "torch")[0].view(tensor.shape)
                tensor.copy_(drawn)
            pool.pretend(slot, count)
    segments = Segments((1,) * rows, tuple(past))
    x, cos, sin = (torch.randn(rows, 1, width, generator=generator).bfloat16() for width in (64, shape[2], shape[2]))
    x, turns, passage = x[:, 0], (cos, sin), Passage.of(pool, both[0], segments)
    if passage is None:  # some have far keys, others none; or a block leaves its window
        assert name in ("performer", "distinct")
        return
    if wrong != "none" and not (wrong == "full" and not any(past)):
        if wrong == "layers":
            passage.at = [(*passage.at[0][:2], 2)] * 2
        if wrong == "nobody":
            passage.at = [(0, *passage.at[0][1:])] * 2
        stream = {"rows": x[1:], "width": x[:, :32]}.get(wrong, x).clone()
        with pytest.raises((RuntimeError, ValueError), match=r"cannot take|holds at most"):
            list(stack.passing(stream, [(cos[1:] if wrong == "turns" else cos, sin)] * 2, passage))
        return
    stream = x.clone()
    list(stack.passing(stream, [turns] * 2, passage))
    for number in range(2):
        answer = backend.extend(*block.packed.question(x, turns), segments, pool, number, both[1])
        x = block.packed.output(x, answer)
    assert torch.equal(stream, x)


def decoder(width: int, inner: int, shape: tuple[int, int, int], weights: str) -> Layer:
    """A packed layer of these sizes, its matrices kept so."""
    names = "num_attention_heads", "num_key_value_heads", "head_dim"
    sizes = dict(zip(names, shape, strict=True)) | {"hidden_size": width, "intermediate_size": inner}
    return made(json.loads((EMBEDDED / "config.json").read_text()) | sizes, weights)


def made(config: dict[str, Any], weights: str) -> Layer:
    """The layer of a packed model of one, its matrices kept so."""
    config |= {"num_hidden_layers": 1, "vocab_size": 64}
    torch.manual_seed(config["hidden_size"])
    model = Transformer(families.read(config)).to(torch.bfloat16).requires_grad_(False)
    for matrix in (block := model.stack[0]).qkv, block.out, block.gate_up, block.down:
        if weights in BITS:
            matrix.quantize(BITS[weights])
    model.pack()
    return block


@generated(0.1)
@given(
    st.sampled_from((1, 2, 6, 7, 95, 96, 97, 200)),
    st.sampled_from((1, 15, 16, 64, 65, 130)),
    st.sampled_from((64, 128, 320)),
    st.sampled_from((8, 4)),
    layouts,
    st.booleans(),
    st.sampled_from(("none", "none", "none", "matrix", "inputs", "outputs", "bits", "bias")),
)
@torch.inference_mode()
def test_a_product_of_fewer_bits_answers_like_its_slow_reading_or_refuses(
    rows: int, outputs: int, inputs: int, bits: int, where: Layout, is_biased: bool, wrong: str
) -> None:
    note((rows, outputs, inputs, bits, where, is_biased, wrong))
    generator = torch.Generator().manual_seed(rows + outputs)
    kept = Quantized.of(torch.randn(outputs, inputs, generator=generator), bits)
    if not kept.is_native or (wrong == "bias" and outputs == 1):  # an empty one is none
        return
    x = where.of(torch.randn(rows, 1, inputs, generator=generator).bfloat16())[:, 0]
    bias = torch.randn(outputs, generator=generator).bfloat16() if is_biased else None
    if wrong != "none":
        data, sizes = kept.data, (outputs, inputs)
        if wrong == "matrix":
            data = data.flatten()[:-1].clone()
        if wrong == "inputs":
            x = x[:, : inputs - 1]
        if wrong == "outputs":
            sizes = (outputs + 64, inputs)
        if wrong == "bias":
            bias = torch.zeros(outputs - 1, dtype=torch.bfloat16)
        broken = Quantized(data, sizes, 3 if wrong == "bits" else bits)
        with pytest.raises(RuntimeError, match="the native kernel was given what it cannot take"):
            layer.product(x, broken, sizes[0], bias)
        return
    wanted = functional.linear(eight(x).double(), kept.dense().double(), None if bias is None else bias.double())
    for found in (layer.product(x, kept, outputs, bias), layer.product(x, kept, outputs, bias, wide=True)):
        assert float((found.double() - wanted).abs().max()) <= 2**-7 * max(1.0, float(wanted.abs().max()))


@generated(0.5)
@given(
    st.sampled_from((0, 1, 2, 33, 200)),
    st.sampled_from((1, 15, 63, 64, 65, 130)),
    st.sampled_from((2, 30, 64, 66, 320)),
    st.sampled_from(("none", "none", "none", "matrix", "outputs", "inputs", "ids")),
    st.integers(-(2**63), 2**63 - 1),
)
@torch.inference_mode()
def test_a_packed_table_answers_like_its_slow_reading_or_refuses(
    rows: int, outputs: int, inputs: int, wrong: str, stray: int
) -> None:
    note((rows, outputs, inputs, wrong, stray))
    generator = torch.Generator().manual_seed(rows + outputs)
    weight, ids = torch.randn(outputs, inputs, generator=generator).bfloat16(), torch.randint(outputs, (rows,))
    x = torch.randn(rows, inputs, generator=generator).bfloat16()
    if not layer.Packed.suits(weight) or (wrong == "ids" and 0 <= stray < outputs):
        return
    kept = layer.Packed.of(weight.clone())
    if wrong != "none":
        words = kept.words.flatten()[:-1].clone() if wrong == "matrix" else kept.words
        sizes = outputs + 64 * (wrong == "outputs"), inputs - (wrong == "inputs")
        ids = torch.cat((ids, torch.tensor([stray if wrong == "ids" else 0])))
        with pytest.raises(RuntimeError, match="the native kernel was given what it cannot take"):
            layer.Packed(words, sizes).rows(ids)
        return
    assert torch.equal(kept.rows(ids), functional.embedding(ids, weight))
    if not rows:
        return
    wanted = functional.linear(x.double(), weight.double())
    assert bool(((kept.logits(x).double() - wanted).abs() <= 2**-7 * wanted.abs().clamp_min(1.0)).all())
