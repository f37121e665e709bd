"""What a user would install instead of a backend, each set up for the same work: the other side of `benchmark`.

The libraries are the extra `bench`, imported when a peer is made. Layouts that they want are made before the clock runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from attention import HeadShape, build
from attention.backends.distinct import Distinct
from attention.backends.topk import TopK

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

HEADS, WIDTH = 8, 64
WINDOW, GLOBALS, BLOCK, CHUNK, FEATURES = 256, 64, 64, 512, 256
MASK = 128  # rows and columns of a block of flex_attention's masks
Call = Callable[[], Tensor]
Peer = Callable[[Tensor, Tensor, Tensor, bool], Call]  # (T, H, D) three times and causal, to a call that answers
COMPILED = set[Peer]()  # those whose first run compiles


def compiles(peer: Peer) -> Peer:
    """Marks a peer whose first run compiles."""
    COMPILED.add(peer)
    return peer


def batched(x: Tensor) -> Tensor:
    """(T, H, D) to (1, H, T, D), tight: the layout that the peers want, made before the clock runs."""
    return x.transpose(0, 1)[None].contiguous()


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    q, k, v = batched(q), batched(k), batched(v)
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def sdpa_by_chunk(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    q, k, v = (x.view(-1, CHUNK, HEADS, WIDTH).transpose(1, 2).contiguous() for x in (q, k, v))
    return lambda: functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask) -> Call:
    """flex_attention, compiled, under a mask that is made before the clock runs."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled = torch.compile(flex_attention)
    q, k, v = batched(q), batched(k), batched(v)
    return lambda: compiled(q, k, v, block_mask=mask)


@compiles
def flex(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    from torch.nn.attention.flex_attention import create_block_mask

    def near(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (i - j).abs() <= WINDOW

    return masked(q, k, v, create_block_mask(near, None, None, len(q), len(q), device="cpu"))


@compiles
def flex_chosen(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """The keys that `topk` sees at its defaults, as a mask. What makes it, as what chooses, is left out."""
    from torch.nn.attention.flex_attention import BlockMask

    backend = build("topk", {}, HeadShape(HEADS, HEADS, WIDTH, q.dtype))
    assert isinstance(backend, TopK)
    options, tokens = backend.options, len(q)
    table = backend.choices(q, k).long().transpose(0, 1)  # (H, T, blocks)
    chosen = torch.zeros(HEADS, tokens, tokens // options.block + 1, dtype=torch.bool)
    chosen.scatter_(-1, table.where(table >= 0, chosen.shape[-1] - 1), True)
    chosen[..., -1] = False  # where those fell that are none

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        by_place = (i - j <= options.window) | (j < options.sinks)
        return (j <= i) & (by_place | chosen[head, i, j // options.block])

    at = torch.arange(0, tokens, MASK)
    by_place = (at[:, None] >= at) & ((at[:, None] - at < options.window + MASK) | (at < options.sinks))
    wide = chosen[..., :-1].view(HEADS, len(at), MASK, len(at), -1).any(-1).any(2) | by_place  # (H, rows, columns) of the mask
    indices = wide.int().argsort(dim=-1, descending=True, stable=True).int()
    return masked(
        *(q, k, v),
        BlockMask.from_kv_blocks(wide.sum(-1, dtype=torch.int32)[None], indices[None], BLOCK_SIZE=MASK, mask_mod=seen),
    )


@compiles
def flex_kept(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    """The keys that `distinct` sees at its defaults, judged in bfloat16, as a mask. Making it and judging are left out."""
    from torch.nn.attention.flex_attention import create_block_mask

    backend = build("distinct", {}, HeadShape(HEADS, HEADS, WIDTH, torch.bfloat16))
    assert isinstance(backend, Distinct)
    block, window, tokens = backend.options.block, backend.window, len(q)
    until = torch.full((tokens,), -1)  # the last start of the window at which a token is kept; behind it, it is seen anyway
    for start, kept in backend.keeping(k.bfloat16(), v.bfloat16(), tokens - 1):
        until[kept] = start

    def seen(batch: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        start = i - i % block - window
        return (j <= i) & ((j >= start) | (until[j] >= start))

    return masked(q, k, v, create_block_mask(seen, None, None, tokens, tokens, device="cpu"))


def local_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    from local_attention import LocalAttention

    module = LocalAttention(WINDOW, causal=causal, exact_windowsize=True, use_rotary_pos_emb=False, autopad=True)
    everywhere = torch.ones(1, len(q), dtype=torch.bool)  # without a mask its padding is attended to
    q, k, v = batched(q), batched(k), batched(v)
    return lambda: module(q, k, v, mask=everywhere)


class Given(nn.Module):
    """Stands in for a projection: answers with what it holds (a copy, for callers that scale in place)."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, _: Tensor) -> Tensor:
        return self.x.clone()


def transformers_longformer(q: Tensor, k: Tensor, v: Tensor, causal: bool, global_tokens: int = 0) -> Call:
    from transformers.models.longformer.modeling_longformer import LongformerConfig, LongformerSelfAttention

    width = HEADS * WIDTH
    config = LongformerConfig(hidden_size=width, num_attention_heads=HEADS, attention_window=[2 * WINDOW])
    module = LongformerSelfAttention(config, 0).eval()
    for name, x in (("query", q), ("key", k), ("value", v)):
        projected = x.reshape(len(x), 1, width)
        setattr(module, name, Given(projected))
        setattr(module, f"{name}_global", Given(projected[:global_tokens] if name == "query" else projected))
    hidden = q.reshape(1, len(q), width)
    mask = torch.zeros(1, len(q), dtype=q.dtype)
    mask[:, :global_tokens] = 1
    flags = {"is_index_masked": mask < 0, "is_index_global_attn": mask > 0, "is_global_attn": global_tokens > 0}
    return lambda: module(hidden, attention_mask=mask, **flags)[0]


def transformers_bigbird(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    from transformers.models.big_bird.modeling_big_bird import BigBirdBlockSparseAttention, BigBirdConfig, BigBirdModel

    width = HEADS * WIDTH
    config = BigBirdConfig(hidden_size=width, num_attention_heads=HEADS, block_size=BLOCK, num_random_blocks=3)
    module = BigBirdBlockSparseAttention(config).eval()
    for name, x in (("query", q), ("key", k), ("value", v)):
        setattr(module, name, Given(x.reshape(1, len(x), width)))
    hidden = q.reshape(1, len(q), width)
    masks = BigBirdModel.create_masks_for_block_sparse_attn(torch.ones(1, len(q), dtype=q.dtype), BLOCK)
    blocked, band, rows, columns = masks
    given = {"from_blocked_mask": blocked, "to_blocked_mask": blocked, "band_mask": band, "from_mask": rows, "to_mask": columns}
    return lambda: module(hidden, **given)[0]


def performer_pytorch(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    from performer_pytorch import FastAttention

    module = FastAttention(WIDTH, FEATURES, causal=causal).to(q.dtype).eval()
    q, k, v = batched(q), batched(k), batched(v)
    return lambda: module(q, k, v)


def linear_attention_transformer(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    from linear_attention_transformer.linear_attention_transformer import causal_linear_attn, linear_attn

    q, k, v = batched(q), batched(k), batched(v)
    return (lambda: causal_linear_attn(q, k, v, bucket_size=64)) if causal else (lambda: linear_attn(q, k, v))
