"""`python -m attention.benchmark`: this library beside what a user would install instead, one process, one machine, one run.

Every contest interleaves both sides and takes medians of at least five runs, after one run to warm up (which takes the
compile time of compiled peers). A peer is timed in each dtype it can do and the faster one counts; its projections are left
out, so that attention meets attention. `off by` is the largest difference between the two answers where both claim the same
function. Theory stands beside measurement: flops and peak bytes by the cost law, peak bytes by the profiler.

For people a table, growth and decode; then one line of JSON. Peers (`peers.py`) are the extra `bench`; one that is missing is
named and left out. Cost: some minutes at 16,384 tokens; `--quick` (4,096 tokens) stays below three.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attention import AttentionBackend, HeadShape, Segments, build
from attention.memory import peak_bytes
from attention.parts import finish
from attention.peers import (
    BLOCK,
    CHUNK,
    COMPILED,
    FEATURES,
    GLOBALS,
    HEADS,
    WIDTH,
    WINDOW,
    Call,
    Peer,
    flex,
    flex_chosen,
    flex_kept,
    linear_attention_transformer,
    local_attention,
    performer_pytorch,
    sdpa,
    sdpa_by_chunk,
    transformers_bigbird,
    transformers_longformer,
)

REPEATS = 5
STEPS = 21  # of a decode measurement, the first to warm up
GROWTH_REPEATS = 15  # an exponent is read to 0.01, a disturbed median of 5 moves it by 0.1
LONG = 1.0  # seconds: a first run this long is warm enough to judge a dtype by, but for one that compiles
DTYPES = (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Contest:
    """One backend at its options against peers for the same work."""

    backend: str
    options: Mapping[str, Any]
    causal: bool
    peers: Mapping[str, Peer]
    dtypes: Sequence[torch.dtype] = (torch.bfloat16,)
    same: bool = True  # both compute the same function, so the answers can be compared


BAND = {"window": WINDOW, "sinks": 0}
CONTESTS = (
    Contest("dense", {}, False, {"torch SDPA": sdpa}, DTYPES),
    Contest("dense", {}, True, {"torch SDPA": sdpa}),
    Contest(
        "sliding_window",
        BAND,
        False,
        {
            "torch SDPA, dense": sdpa,
            "transformers Longformer": transformers_longformer,
            "local-attention": local_attention,
            "flex_attention, compiled": flex,
        },
        DTYPES,
    ),
    Contest("sliding_window", BAND, True, {"local-attention": local_attention}),
    Contest("topk", {}, True, {"torch SDPA, dense": sdpa, "flex_attention, compiled": flex_chosen}),
    Contest("distinct", {}, True, {"torch SDPA, dense": sdpa, "flex_attention, compiled": flex_kept}),
    Contest(
        "longformer",
        {"window": WINDOW, "global_tokens": GLOBALS},
        False,
        {"transformers Longformer": partial(transformers_longformer, global_tokens=GLOBALS)},
    ),
    Contest(
        "bigbird",
        {"block": BLOCK, "global_blocks": 1, "closing_blocks": 1},
        False,
        {"transformers BigBird": transformers_bigbird},
        same=False,  # its drawn blocks are all block 0
    ),
    Contest("chunked", {"chunk": CHUNK}, True, {"torch SDPA, chunk by chunk": sdpa_by_chunk}),
    Contest("performer", {"features": FEATURES}, False, {"performer-pytorch": performer_pytorch}, DTYPES, same=False),
    Contest("performer", {"features": FEATURES}, True, {"performer-pytorch": performer_pytorch}, same=False),
    Contest("linear", {}, False, {"linear-attention-transformer": linear_attention_transformer}, same=False),
    Contest("linear", {}, True, {"linear-attention-transformer": linear_attention_transformer}, same=False),
)


@dataclass
class Row:
    """One line of the JSON."""

    backend: str
    impl: str
    dtype: str
    causal: bool
    tokens: int
    seconds: float
    peak_bytes: int
    predicted_bytes: int
    peer: str
    peer_seconds: float
    ratio: float


@dataclass
class Seen:
    """A row, and what only the table for people shows."""

    row: Row
    flops: int
    peer_dtype: str
    off_by: float | None = None

    def line(self) -> str:
        row = self.row
        rate = self.flops / row.seconds / 1e9
        off = "-" if self.off_by is None else f"{self.off_by:.1e}"
        form = "causal" if row.causal else "both"
        return (
            f"{row.backend:15}{row.dtype:9}{form:8}{row.seconds * 1e3:10.1f}{rate:8.0f}{row.peak_bytes / 2**20:9.1f}"
            f"{row.predicted_bytes / 2**20:9.1f}  {row.peer + ', ' + self.peer_dtype:40}{row.peer_seconds * 1e3:10.1f}"
            f"{row.ratio:9.1f}x  {off}"
        )


HEADER = (
    f"{'backend':15}{'dtype':9}{'sees':8}{'ms':>10}{'GF/s':>8}{'peak MiB':>9}{'by law':>9}  "
    f"{'peer':40}{'ms':>10}{'ratio':>10}  off by"
)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def word(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


def inputs(tokens: int, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v (tokens, H, D), standard normal, q and k times scale."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(tokens, HEADS, WIDTH, generator=generator) for _ in range(3))
    return (q * scale).to(dtype), (k * scale).to(dtype), v.to(dtype)


def fastest(peer: Peer, tokens: int, causal: bool) -> tuple[Call, torch.dtype]:
    """The peer warmed up in the dtype in which it is fastest, of those it can do."""
    calls: list[tuple[float, Call, torch.dtype]] = []
    for dtype in DTYPES:
        call = peer(*inputs(tokens, dtype), causal)
        try:
            first = seconds(call)
        except RuntimeError as error:
            print(f"  {dtype} left out: {str(error).splitlines()[0]}")
            continue
        calls.append((seconds(call) if first < LONG or peer in COMPILED else first, call, dtype))
    _, call, dtype = min(calls, key=lambda entry: entry[0])
    return call, dtype


def off_by(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference; theirs (1, H, T, D), or (B, H, T / B, D), or (1, T, H D), to ours (T, H, D)."""
    theirs = theirs.transpose(1, 2) if theirs.dim() == 4 else theirs
    return float((ours.float() - theirs.reshape(ours.shape).float()).abs().amax())


def hold(contest: Contest, dtype: torch.dtype, tokens: int) -> Iterator[Seen]:
    """Both sides of a contest, peer by peer, interleaved."""
    backend = build(contest.backend, contest.options, HeadShape(HEADS, HEADS, WIDTH, dtype))
    q, k, v = inputs(tokens, dtype)
    ours = partial(backend.attend, q, k, v, Segments((tokens,)), causal=contest.causal)
    answer, cost = ours(), backend.cost(tokens, tokens, causal=contest.causal)
    peak = peak_bytes(ours)
    for name, peer in contest.peers.items():
        try:
            call, peer_dtype = fastest(peer, tokens, contest.causal)
        except ImportError as error:
            print(f"  {name} left out: {error}")
            continue
        rounds = [(seconds(ours), seconds(call)) for _ in range(REPEATS)]
        mine, theirs = (statistics.median(side) for side in zip(*rounds, strict=True))
        what = contest.backend, backend.impl, word(dtype), contest.causal, tokens
        row = Row(*what, mine, peak, cost.workspace_bytes, name, theirs, theirs / mine)
        same = contest.same and "dense" not in name
        yield Seen(row, cost.flops, word(peer_dtype), off_by(answer, call()) if same else None)


def growth(contest: Contest, lengths: Sequence[int]) -> tuple[float, float]:
    """Exponent b of seconds = a tokens^b, least squares on logarithms of medians: into memory that stands, and into fresh.

    glibc maps an answer of more than 32 MB anew each time, and its page faults then stand beside the longest length only.
    """
    backend = build(contest.backend, contest.options, HeadShape(HEADS, HEADS, WIDTH, torch.bfloat16))
    calls: list[Callable[[], object]] = []
    for count in lengths:
        q, k, v = inputs(count, torch.bfloat16)
        out = torch.zeros_like(q)
        calls.append(partial(lambda *given: finish(backend.attend_sequence(*given)), q, k, v, contest.causal, out))
        calls.append(partial(backend.attend, q, k, v, Segments((count,)), causal=contest.causal))
    for call in calls:
        call()
    rounds = [[seconds(call) for call in calls] for _ in range(GROWTH_REPEATS)]
    x = [math.log(count) for count in lengths]
    y = [math.log(statistics.median(side)) for side in zip(*rounds, strict=True)]
    return statistics.linear_regression(x, y[::2]).slope, statistics.linear_regression(x, y[1::2]).slope


def decode_step(backend: AttentionBackend, past: int, sequences: int, together: bool = True) -> float:
    """Median seconds of one decode step of one layer for `sequences` sequences with `past` tokens behind them.

    together: in one call; else each sequence in a call of its own.
    """
    pool = backend.new_pool(1, 1 << 40)
    slots = [pool.allocate(past + STEPS) for _ in range(sequences)]
    q, k, v = inputs(sequences, torch.bfloat16)
    ones = (1,) * sequences
    backend.extend(q, k, v, Segments(ones), pool, 0, slots)
    for slot in slots:  # a state as of a long history, without its prefill
        for name, tensor in pool.tensors(slot).items():
            if name in ("k", "v"):
                drawn = torch.randn(tensor.shape[1], HEADS, WIDTH, dtype=torch.bfloat16)
                tensor.copy_(backend.as_kept(drawn, drawn)[0].flatten(1))
            elif name in ("high", "low"):
                tensor.normal_()
        pool.pretend(slot, past)

    def step(at: int) -> None:
        if together:
            backend.extend(q, k, v, Segments(ones, (at,) * sequences), pool, 0, slots)
            return
        for i, slot in enumerate(slots):
            backend.extend(q[i : i + 1], k[i : i + 1], v[i : i + 1], Segments((1,), (at,)), pool, 0, [slot])

    step(past)
    return statistics.median(seconds(partial(step, past + i)) for i in range(1, STEPS))


def show_growth(quick: bool) -> None:
    lengths = (4096, 8192, 16384) if quick else (4096, 16384, 65536)
    print(
        f"\ngrowth: exponent of time over {lengths[0]} to {lengths[-1]} tokens (bf16); then with a fresh answer's page faults"
    )
    for contest in CONTESTS:
        if contest.backend != "dense":
            kept, fresh = growth(contest, lengths)
            print(f"  {contest.backend:15} {'causal' if contest.causal else 'both':7} {kept:.2f}  {fresh:.2f}")


def show_decode() -> None:
    print("\ndecode: microseconds of a step of one layer (bf16)")
    print(f"  {'':15} {'1k':>8} {'64k':>8}    {'32 at 1k':>8} {'one by one':>10}")
    options: dict[str, dict[str, int]] = {"dense": {}, "sliding_window": {"window": 512}, "chunked": {"chunk": 512}}
    options |= {"topk": {}, "distinct": {}, "bigbird": {}, "performer": {}, "linear": {}}
    shape = HeadShape(HEADS, HEADS, WIDTH, torch.bfloat16)
    built = {name: build(name, chosen, shape) for name, chosen in options.items()}
    for name in ("dense", "topk"):
        built[f"{name}, kv int8"] = build(name, {}, replace(shape, kv=torch.int8))
    for name, backend in built.items():
        cases = ((1023, 1), (65535, 1), (1023, 32), (1023, 32, False))
        short, long, many, each = (decode_step(backend, *case) * 1e6 for case in cases)
        print(f"  {name:15} {short:8.0f} {long:8.0f}    {many:8.0f} {each:10.0f}  ({each / many:.1f}x)")


def show_limits() -> None:
    """What the machine does when nothing else is done: torch's products of 2048 x 2048 matrices, and a large sum."""
    square = [torch.randn(2048, 2048).to(dtype) for dtype in (torch.bfloat16, torch.float32)]
    narrow, single = (2 * 2048**3 / 1e9 / statistics.median(seconds(lambda: x @ x) for _ in range(20)) for x in square)  # noqa: B023
    large = torch.ones(1 << 27)  # 512 MB, sixteen times the caches
    read = large.nbytes / 1e9 / statistics.median(seconds(large.sum) for _ in range(10))
    print(f"\nlimits: products {narrow:.0f} GF/s in bf16 and {single:.0f} in fp32, memory read at {read:.0f} GB/s")


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    info = Path("/proc/cpuinfo")
    models = (
        [line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    )
    return {
        "cpu": models[0] if models else platform.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


@torch.inference_mode()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and print it."""
    parser = argparse.ArgumentParser(
        prog="python -m attention.benchmark", description=__doc__.splitlines()[0] if __doc__ else None
    )
    parser.add_argument("--quick", action="store_true", help="4,096 tokens, bf16 only: within three minutes")
    parser.add_argument("--only", help="one backend")
    chosen = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")
    tokens = 4096 if chosen.quick else 16384
    print(f"{tokens} tokens, {HEADS} heads of {WIDTH}, medians of {REPEATS}, {machine()}\n{HEADER}")
    seen: list[Seen] = []
    for contest in CONTESTS:
        if chosen.only in (None, contest.backend):
            for dtype in contest.dtypes[:1] if chosen.quick else contest.dtypes:
                for one in hold(contest, dtype, tokens):
                    seen.append(one)
                    print(one.line(), flush=True)
    if chosen.only is None:
        show_growth(chosen.quick)
        show_decode()
        show_limits()
    print(json.dumps({"machine": machine(), "rows": [asdict(one.row) for one in seen]}))


if __name__ == "__main__":
    main()
