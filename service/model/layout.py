"""Where a model's parameters stand in a file: the tensors each is put together from, their shapes, and how they are turned.

q, k, v are held as one matrix, and gate, up likewise: one large product instead of several small ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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


@dataclass(frozen=True)
class Names:
    """How an encoder of BERT's kind names what stands in a layer, and where its layers are."""

    layers: str
    qkv: tuple[str, ...]
    out: str
    attention_norm: str
    up: str
    down: str
    mlp_norm: str


def encoder(config: ModelConfig, body: str, names: Names) -> Iterator[Weight]:
    """Every parameter of an encoder of BERT's kind but those of its pooler.

    body: what stands before all names.
    """
    width, wide, vocabulary = config.hidden_size, config.intermediate_size, config.vocab_size
    first, rows = config.first_position, config.first_position + config.max_position_embeddings
    yield "embed.weight", (Part(f"{body}embeddings.word_embeddings.weight", (vocabulary, width)),)
    table = Part(f"{body}embeddings.position_embeddings.weight", (rows, width), lambda x: x[first:])
    yield "positions.weight", (table,)
    if config.num_token_types:
        yield "types.weight", (Part(f"{body}embeddings.token_type_embeddings.weight", (config.num_token_types, width)),)
    yield from norm("embed_norm", f"{body}embeddings.LayerNorm", width)
    for i in range(config.num_hidden_layers):
        ours, theirs = f"layers.{i}", f"{body}{names.layers}.{i}"
        yield from linear(f"{ours}.qkv", [f"{theirs}.{name}" for name in names.qkv], width, width)
        yield from linear(f"{ours}.out", [f"{theirs}.{names.out}"], width, width)
        yield from norm(f"{ours}.attention_norm", f"{theirs}.{names.attention_norm}", width)
        yield from linear(f"{ours}.gate_up", [f"{theirs}.{names.up}"], wide, width)
        yield from linear(f"{ours}.down", [f"{theirs}.{names.down}"], width, wide)
        yield from norm(f"{ours}.mlp_norm", f"{theirs}.{names.mlp_norm}", width)


def pooler(config: ModelConfig, names: Sequence[str], norms: Mapping[int, str] | None = None) -> Iterator[Weight]:
    """The layers behind the pooled states by their names in the file. norms: of those that have one."""
    for i, (plan, theirs) in enumerate(zip(config.pooled.layers, names, strict=True)):
        yield from linear(f"pooler.layers.{i}", [theirs], plan.rows, plan.columns, plan.has_bias)
        if plan.norm_eps is not None:
            yield f"pooler.layers.{i}.norm", (Part(f"{(norms or {})[i]}.weight", (plan.rows,)),)


def linear(ours: str, theirs: Sequence[str], rows: int, columns: int, bias: bool = True) -> Iterator[Weight]:
    """A product's matrix, and its bias, made of those of several of as many rows."""
    yield f"{ours}.weight", tuple(Part(f"{each}.weight", (rows, columns)) for each in theirs)
    if bias:
        yield f"{ours}.bias", tuple(Part(f"{each}.bias", (rows,)) for each in theirs)


def norm(ours: str, theirs: str, width: int, bias: bool = True) -> Iterator[Weight]:
    """A LayerNorm's weight, and its bias."""
    yield ours, (Part(f"{theirs}.weight", (width,)),)
    if bias:
        yield f"{ours}_bias", (Part(f"{theirs}.bias", (width,)),)
