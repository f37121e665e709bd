"""Where a decoder's parameters stand in a file: the tensors each is put together from, their shapes, and how they are turned.

q, k, v are held as one matrix, and gate, up likewise: one large product instead of several small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from service.model.config import ModelConfig


@dataclass(frozen=True)
class Part:
    """A tensor of a file: name, shape, and what makes rows of our parameter of it, where it is not that already."""

    name: str
    shape: tuple[int, ...]
    turn: Callable[[Tensor], Tensor] | None = None


Weight = tuple[str, tuple[Part, ...]]
"""(our parameter, the file's tensors that it is the concatenation of)."""

Named = tuple[tuple[str, int], ...]
"""Tensors side by side: name within a layer, rows."""

NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


def decoder(config: ModelConfig, norms: dict[str, str] = NORMS, qkv: Named = (), gate_up: Named = ()) -> Iterator[Weight]:
    """Every parameter of a decoder under the names that Llama and its kin have.

    norms: ours and theirs. qkv, gate_up: the tensors that hold those rows, by default three and two.
    """
    width, vocabulary = config.hidden_size, config.vocab_size
    yield "embed.weight", (Part("model.embed_tokens.weight", (vocabulary, width)),)
    yield "final_norm", (Part("model.norm.weight", (width,)),)
    if not config.tie_word_embeddings:
        yield "head.weight", (Part("lm_head.weight", (vocabulary, width)),)
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    qkv = qkv or (("self_attn.q_proj", queries), ("self_attn.k_proj", keys), ("self_attn.v_proj", keys))
    gate_up = gate_up or (("mlp.gate_proj", config.intermediate_size), ("mlp.up_proj", config.intermediate_size))
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        for name, norm in norms.items():
            yield f"{ours}.{name}", (Part(f"{theirs}.{norm}.weight", (width,)),)
        if config.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield f"{ours}.{name}", (Part(f"{theirs}.self_attn.{name}.weight", (config.head_dim,)),)
        for name, parts, columns, bias in (
            ("qkv", qkv, width, config.attention_bias),
            ("out", (("self_attn.o_proj", width),), queries, config.output_bias),
            ("gate_up", gate_up, width, config.mlp_bias),
            ("down", (("mlp.down_proj", width),), config.intermediate_size, config.mlp_bias),
        ):
            yield f"{ours}.{name}.weight", tuple(Part(f"{theirs}.{part}.weight", (rows, columns)) for part, rows in parts)
            if bias:
                yield f"{ours}.{name}.bias", tuple(Part(f"{theirs}.{part}.bias", (rows,)) for part, rows in parts)
