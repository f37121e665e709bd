"""A decode step in operators of torch: one token of each of many sequences over its history.

A step reads every key once for a handful of products, so it is as fast as memory is read. One product serves all heads
of a sequence: each query stands at its own group's place in a row of zeros, (G D), and meets whole rows of the history
as they lie in memory. The zeros' products cost nothing beside the reading.

It looks at a multiple of `history.STEP` keys, for each count is a shape that oneDNN compiles a kernel for (4 ms).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from attention.history import rounded
from attention.kernels import LOG2_E
from attention.kernels.int8 import dequantize, told_bytes
from attention.kernels.softmax import Runs
from attention.kernels.softmax.streaming import Room
from attention.parts import spread
from attention.shapes import SCALE_BYTES, HeadShape

STACKED_BYTES = 4 << 20  # of keys: so many histories that step together are stacked for one product, in memory that stays warm
_own = threading.local()  # of each thread: the memory in which its steps stack histories


def step(
    q: Tensor,
    states: Sequence[dict[str, Tensor]],
    counts: Sequence[int],
    groups: int,
    out: Tensor,
    log_total: Tensor | None = None,
    runs: Sequence[Runs] | None = None,
) -> None:
    """`Softmax.step`."""
    count, heads, width = q.shape
    place, own = _places(heads, groups, q.dtype, q.device)
    rows = torch.mul(q[:, :, None], place).view(count, heads, -1)  # (B, H, G D)
    if runs is None:
        runs = [((0, rounded(seen, len(state["k"]))),) for state, seen in zip(states, counts, strict=True)]
    sizes = [sum(last - first for first, last in each) for each in runs]
    together = _together(sizes, groups * width * q.itemsize) if count > 1 else [[0]]
    if len(together) == 1:
        found = _step(rows, states, counts, runs, sizes[0], width, log_total)
    else:
        found = torch.empty_like(rows)
        for some in together:
            logs = None if log_total is None else log_total.new_empty(len(some), heads, 1)
            those, seen, at = [states[i] for i in some], [counts[i] for i in some], [runs[i] for i in some]
            found[some] = _step(rows[some], those, seen, at, sizes[some[0]], width, logs)
            if log_total is not None and logs is not None:
                log_total[some] = logs
    torch.index_select(found.view(count, heads * groups, width), 1, own, out=out)


def _together(sizes: Sequence[int], row_bytes: int) -> list[list[int]]:
    """The indices of histories in groups of one size each, none of more than STACKED_BYTES of keys."""
    found = []
    for size in set(sizes):
        these = [i for i, other in enumerate(sizes) if other == size]
        most = max(1, STACKED_BYTES // (size * row_bytes))
        found += [these[first:last] for first, last in spread(0, len(these), most)]
    return found


@lru_cache(maxsize=64)
def _places(heads: int, groups: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Each query head's group, as a one-hot column (H, G, 1) and as an index into the heads' groups laid flat, (H,)."""
    head = torch.arange(heads)
    group = head // (heads // groups)
    one_hot = torch.nn.functional.one_hot(group, groups)[:, :, None]
    return one_hot.to(device, dtype), (head * groups + group).to(device)


def _step(
    rows: Tensor,
    states: Sequence[dict[str, Tensor]],
    counts: Sequence[int],
    runs: Sequence[Runs],
    size: int,
    width: int,
    log_total: Tensor | None,
) -> Tensor:
    """Softmax of rows (b, H, G D) over the `size` keys in each state's runs, those behind `counts` left out: (b, H, G D)."""
    keys = _histories(states, "k", runs, size, rows)
    weights = rows.new_empty(len(rows), rows.shape[1], size)
    torch.baddbmm(weights, rows, keys.transpose(1, 2), beta=0, alpha=1 / math.sqrt(width), out=weights)
    if len(counts) == 1 and counts[0] < size:
        weights[..., counts[0] :].fill_(-math.inf)
    elif min(counts) < size:
        weights.masked_fill_(_behind(tuple(counts), size, rows.device), -math.inf)
    if log_total is not None:
        torch.mul(weights.to(log_total.dtype).logsumexp(-1, keepdim=True), LOG2_E, out=log_total)
    return torch.bmm(weights.softmax(-1), _histories(states, "v", runs, size, rows))


def _histories(states: Sequence[dict[str, Tensor]], name: str, runs: Sequence[Runs], size: int, rows: Tensor) -> Tensor:
    """The `size` keys or values in each state's runs as (b, size, G D), as rows (b, H, G D) are; in the dtype of those: a view,
    or gone with this thread's next call.
    """
    found = [state[name][first:last] for state, own in zip(states, runs, strict=True) for first, last in own]
    if found[0].dtype == torch.int8:
        groups = (found[0].shape[1] - rows.shape[2]) // SCALE_BYTES
        found = [dequantize(kept.unflatten(1, (groups, -1)), rows.dtype).flatten(1) for kept in found]
    if len(found) == 1:
        return found[0][None]
    stack = _stack(found[0], len(states) * size)
    torch.cat(found, out=stack)
    return stack.view(len(states), size, -1)


def _stack(like: Tensor, count: int) -> Tensor:
    """Uninitialised (count, G D) for as many rows like these. On CPU it is this thread's, one step after the other:

    fresh memory costs a fault per page, and 4 MB of them take longer than all else that a step does with a layer.
    """
    if like.device.type != "cpu":
        return like.new_empty(count, like.shape[1])
    rooms: dict[torch.dtype, Room] = _own.__dict__.setdefault("rooms", {})
    with torch.inference_mode(False):  # memory that was taken in inference mode can be used nowhere else
        return rooms.setdefault(like.dtype, Room(torch.empty(0, dtype=like.dtype))).take("stack", count, like.shape[1])


@lru_cache(maxsize=8)
def _behind(counts: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """Bool (b, 1, size): True at and behind each sequence's count; the layers of a step ask for the same."""
    return (torch.arange(size) >= torch.tensor(counts)[:, None])[:, None].to(device)


def step_bytes(shape: HeadShape, keys: int, runs: int = 1, logs: bool = False) -> int:
    """`Softmax.step_bytes`."""
    heads, size, width = shape.query_heads, shape.itemsize, shape.key_value_heads * shape.head_width
    scores = heads * keys * (2 * size + (8 if logs else 0))
    stack = keys * width * size if runs > 1 else 0
    scratch = 0 if size >= 4 else max(100 * width, min(256 * keys, 3 << 16))  # oneDNN's, about
    return heads * (2 * width + shape.head_width) * size + scores + stack + scratch + told_bytes(shape, keys)
