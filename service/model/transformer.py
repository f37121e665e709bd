"""The model that is served, decoder or encoder: one block over packed tokens, with the attention handed in from outside.

RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245), a gated feed-forward
(2002.05202), tied embeddings or not. What differs between families are the knobs of `ModelConfig`. Loading is `checkpoint.py`;
how to attend is `attention`.

The forward knows no batch axis and no mask: tokens of all sequences stand one behind the other, and the `Attend` it is
given knows where each begins. Letters as in `attention.interface`; C model width, F feed-forward width, V vocabulary.
Cost per token: 2 flops for every weight but the embedding's, and what attention costs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from itertools import pairwise
from typing import Any, Self, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import HeadShape, Passage
from service.model import encoder_layer, native, rotary
from service.model.config import ModelConfig, Rope
from service.model.pooler import Pooler
from service.model.projection import ACTIVATIONS, Projection, Table
from service.model.quantized import Quantized

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (T, H, D), k (T, G, D), v (T, G, D)) -> (T, H, D)."""
Stages = Generator[tuple[int, Tensor, Tensor, Tensor] | None, Tensor | None, Tensor]
"""A forward that asks for each layer's attention, as an `Attend` is asked, and returns the hidden states.

Where it yields None there is nothing to answer: a good place to pause.
"""

Turns = tuple[Tensor, Tensor]
"""cos, and sin with the sign that `rotate` needs, of each token's angles, (T, 1, D) each."""


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate coordinate pairs (i, i + D/2) of x (T, heads, D) by the angles of `Transformer.rotation`, each (T, 1, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def normed(x: Tensor, weight: Tensor, bias: Tensor | None, config: ModelConfig) -> Tensor:
    """The last axis of x, normed as the family does it."""
    widths, epsilon = (x.shape[-1],), config.norm_eps
    if config.norm == "layer":
        return F.layer_norm(x, widths, weight, bias, epsilon)
    if config.norm == "gemma":  # the sum in float32: in bfloat16 it would cost the weight its last bits
        return (F.rms_norm(x.float(), widths, None, epsilon) * (1 + weight.float())).to(x.dtype)
    return F.rms_norm(x, widths, weight, epsilon)


class Layer(nn.Module):
    """One layer: attention and feed-forward, each behind a norm and added to the residual stream; or a norm behind each sum."""

    def __init__(self, config: ModelConfig, is_first: bool) -> None:
        super().__init__()
        width, heads, groups, depth = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.config = config
        _add_norm(self, "attention_norm", config, config.has_first_norm or not is_first)
        _add_norm(self, "mlp_norm", config)
        self.qkv = Projection(width, (heads + 2 * groups) * depth, bias=config.attention_bias)
        self.out = Projection(heads * depth, width, bias=config.output_bias)
        if config.has_global_first:
            self.global_qkv = nn.Linear(width, 3 * heads * depth)
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(depth))
            self.k_norm = nn.Parameter(torch.ones(depth))
        for name in ("attention_end_norm", "mlp_end_norm"):
            _add_norm(self, name, config, config.is_sandwiched)
        self.gate_up = Projection(width, (1 + config.is_gated) * config.intermediate_size, bias=config.mlp_bias)
        self.down = Projection(config.intermediate_size, width, bias=config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]
        self._qk_scales: Tensor | None = None  # once they can change no more
        self.is_native = False  # what stands between products is computed by `native`
        self.packed: native.PackedLayer | encoder_layer.EncoderLayer | None = None  # see `sides`

    def settle(self, is_native: bool, is_turned: bool) -> None:
        """Settle who computes it, its weights being packed.

        is_native: whether the kernel knows the family. is_turned: whether positions turn the layer's queries and keys.
        """
        config, products = self.config, (self.qkv, self.out, self.gate_up, self.down)
        self._qk_scales = self.qk_scales() if config.qk_norm else None
        self.is_native = is_native
        is_plain = is_native and is_turned and not (config.is_post_normed or config.is_sandwiched) and config.query_scale == 1
        is_plain = is_plain and all(each.bias is None for each in products) and config.intermediate_size % native.COLUMNS == 0
        norms = cast(tuple[Tensor, Tensor], (self.attention_norm, self.mlp_norm))
        is_encoder = not is_turned and encoder_layer.suits(config, norms[1].dtype, norms[1].device)
        known = [m for m in (each.matrix() for each in products if is_plain or is_encoder) if m is not None]
        if len(known) < len(products) or norms[0].dtype != torch.bfloat16:
            return
        if is_encoder:
            biases = [cast(Tensor, each.bias) for each in products]
            names = ("attention_norm", "attention_norm_bias", "mlp_norm", "mlp_norm_bias")
            self.packed = encoder_layer.EncoderLayer(
                config, known, biases, [cast(Tensor, getattr(self, name)) for name in names]
            )
        else:
            heads, groups = config.num_attention_heads, config.num_key_value_heads
            shape = config.hidden_size, config.intermediate_size, heads, groups, config.head_dim
            self.packed = native.PackedLayer(norms, self._qk_scales, known, shape, config.norm_eps)

    def sides(self, is_decode: bool) -> Layer | native.PackedLayer | encoder_layer.EncoderLayer:
        """Who computes what stands on either side of its attention: `packed`, or the layer itself."""
        return self.packed if self.packed is not None and (is_decode or self.packed.takes_prompts) else self

    @property
    def kept(self) -> list[Quantized]:
        """Its matrices in fewer bits."""
        return [each.quantized for each in (self.qkv, self.out, self.gate_up, self.down) if each.quantized is not None]

    def norm(self, x: Tensor, name: str) -> Tensor:
        """One of the layer's norms of x (T, C); x itself where it has none of that name."""
        weight = self._parameters[name]
        if weight is None:
            return x
        if self.is_native:
            return native.norm(x, weight, self.config.norm_eps)
        return normed(x, weight, self._parameters.get(f"{name}_bias"), self.config)

    def turned(self, x: Tensor, turns: Turns | None) -> Tensor:
        """Queries and keys of projected x (T, (H + 2 G) D), normed where the family does that, rotated: (T, H + G, D).

        turns: None where positions turn nothing.
        """
        heads, depth = self.config.num_attention_heads + self.config.num_key_value_heads, self.config.head_dim
        epsilon, scales = self.config.norm_eps, None
        if self.config.qk_norm:
            scales = self.qk_scales() if self._qk_scales is None else self._qk_scales
        if self.is_native and turns is not None:
            return native.turn(x, scales, heads, depth, epsilon, *turns)
        qk = x[:, : heads * depth].unflatten(1, (heads, depth))
        qk = qk if scales is None else self._scaled(qk, scales)
        return qk if turns is None else rotate(qk, *turns)

    def _scaled(self, qk: Tensor, scales: Tensor) -> Tensor:
        """The QK-norm of (T, H + G, D)."""
        is_gemma, depth = self.config.norm == "gemma", qk.shape[-1]
        bare = F.rms_norm(qk.float() if is_gemma else qk, (depth,), None, self.config.norm_eps)
        return (bare * (1 + scales.float())).to(qk.dtype) if is_gemma else bare * scales

    def qk_scales(self) -> Tensor:
        """The QK-norm's weights of all query and key heads, (H + G, D)."""
        heads, groups, depth = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        return torch.cat((self.q_norm.expand(heads, depth), self.k_norm.expand(groups, depth)))

    def question(self, x: Tensor, turns: Turns | None) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer asks of attention: q (T, H, D), k and v (T, G, D), of x (T, C)."""
        heads, groups, depth = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        x = self.qkv(x if self.config.is_post_normed else self.norm(x, "attention_norm"))
        q, k = self.turned(x, turns).split((heads, groups), dim=1)
        if self.config.query_scale != 1:
            q = q * self.config.query_scale
        return q, k, x[:, (heads + groups) * depth :].unflatten(1, (groups, depth))

    def answer_first(self, x: Tensor, answer: Tensor, starts: Sequence[int]) -> None:
        """Write the answers of the texts' first tokens, which see all of their text by projections of their own.

        Keys and values are never made: q.(K x) is (K' q).x, and the sum of weighed V x is V of the weighed sum. Of the keys'
        bias, which all scores share, nothing is left.
        """
        heads, depth = self.config.num_attention_heads, self.config.head_dim
        queries, keys, values = self.global_qkv.weight.view(3, heads, depth, -1)
        query_bias, _, value_bias = self.global_qkv.bias.view(3, heads, depth)
        for start, end in pairwise((*starts, len(x))):
            text = x[start:end]
            query = (queries @ text[0] + query_bias) / math.sqrt(depth)  # (H, D)
            scores = text @ torch.einsum("hd,hdc->ch", query, keys)  # (T, H)
            seen = scores.float().softmax(0).to(text.dtype).T @ text  # (H, C)
            answer[start] = torch.einsum("hc,hdc->hd", seen, values) + value_bias

    def output(self, x: Tensor, answer: Tensor) -> Tensor:
        """What the layer hands on, (T, C), from its input and attention's answer (T, H, D)."""
        if self.config.is_post_normed:
            x = self.norm(x + self.out(answer.flatten(1)), "attention_norm")
            return self.norm(x + self.mlp(x), "mlp_norm")
        x = x + self.norm(self.out(answer.flatten(1)), "attention_end_norm")
        return x + self.norm(self.mlp(self.norm(x, "mlp_norm")), "mlp_end_norm")

    def mlp(self, x: Tensor) -> Tensor:  # (T, C) -> (T, C)
        if not self.config.is_gated:
            return self.down(self.gate_up.activated(x, self.config.activation))
        x = self.gate_up(x)
        if self.is_native:
            return self.down(native.gate(x))
        gate, up = x.chunk(2, dim=-1)  # (T, F) each
        return self.down(self.activation(gate) * up)


def _add_norm(module: nn.Module, name: str, config: ModelConfig, is_there: bool = True) -> None:
    """A norm's parameters, None where it is not there; LayerNorm alone has a bias."""
    module.register_parameter(name, nn.Parameter(torch.ones(config.hidden_size)) if is_there else None)
    if is_there and config.norm == "layer" and config.has_norm_bias:
        module.register_parameter(f"{name}_bias", nn.Parameter(torch.zeros(config.hidden_size)))


class Transformer(nn.Module):
    """Tokens in, hidden states and logits out. Parameters have the model's dtype; logits are float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = Table(config.vocab_size, config.hidden_size)
        if config.has_position_table:
            self.positions = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.num_token_types:
            self.types = nn.Embedding(config.num_token_types, config.hidden_size)
        _add_norm(self, "embed_norm", config, config.has_embed_norm)
        self.layers = nn.ModuleList(Layer(config, i == 0) for i in range(config.num_hidden_layers))
        _add_norm(self, "final_norm", config, not config.is_post_normed)
        if not config.tie_word_embeddings:
            self.head = Projection(config.hidden_size, config.vocab_size, bias=False)
        self.pooler = Pooler(config.pooled)
        self._head: native.Packed | Quantized | None = None  # who multiplies with either head, where it lies packed
        self._packed: native.PackedStack | None = None  # who goes through all layers of a decode step, where they are packed
        self._turns: Tensor | None = None  # see `rotation`
        self._ropes = tuple(rope for rope in dict.fromkeys(config.ropes) if rope != rotary.NONE)
        borders = (rotary.border(rope, config.max_length) for rope in self._ropes)
        self.border = min((each for each in borders if each is not None), default=None)
        """The length up to which texts turn by LongRoPE's short factors, longer ones by its long ones; None: all turn alike."""
        self._rope_of = [None if rope == rotary.NONE else self._ropes.index(rope) for rope in config.ropes]

    @property
    def stack(self) -> list[Layer]:
        """The layers in order, as what they are."""
        return cast(list[Layer], list(self.layers))

    @property
    def _first(self) -> Layer:
        """The first layer: all are alike in what they need."""
        return cast(Layer, self.layers[0])

    @property
    def impl(self) -> str:
        """Who computes what stands between a layer's products: native or torch."""
        return "native" if self._first.is_native or self._first.sides(is_decode=False) is not self._first else "torch"

    @property
    def takes_passage(self) -> bool:
        """Whether a decode step goes through all layers in C, each row by itself, where it is given a passage."""
        return self._packed is not None

    @property
    def tells_rows_apart(self) -> bool:
        """Whether a row's logits are the same whatever rows are asked beside it."""
        return self._head is not None and self._head.is_native and self.dtype == torch.bfloat16

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of all weights that are not quantized."""
        return next(self.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def quantized(self) -> list[Quantized]:
        """The matrices in fewer bits than the dtype's."""
        owners = (module for module in self.modules() if isinstance(module, Projection | Table))
        return [each.quantized for each in owners if each.quantized is not None]

    @property
    def num_weights(self) -> int:
        """Parameters, in however many bits."""
        return sum(each.numel() for each in (*self.parameters(), *self._others))

    @property
    def weight_bytes(self) -> int:
        """Memory of all of them."""
        kept = sum(math.prod(each.shape) * each.dtype.itemsize for each in self.parameters())  # of packed ones, too
        return kept + sum(each.nbytes for each in self._others)

    @property
    def _others(self) -> list[native.Packed | Quantized]:
        """The matrices that are no parameters any more."""
        return [*self.quantized, *([] if self.embed.packed is None else [self.embed.packed])]

    def head_shape(self) -> HeadShape:
        """The heads an attention backend for this model is built for."""
        return self.config.head_shape(self.dtype, self.device)

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor,
        attend: Attend,
        types: Tensor | None = None,
        is_decode: bool = False,
        totals: Tensor | None = None,
        passage: Passage | None = None,
    ) -> Tensor:
        """Last hidden states, after the final norm.

        Args:
            tokens: int64 (T,), each below the vocabulary's size. positions: int64 (T,), each in its own sequence.
            attend: answers each layer's queries.
            types: int64 (T,), which of a pair of texts each is of, in models that tell them apart; None: the first.
            is_decode: whether this is a decode step, which `PackedLayer` computes where it can: a sequence's numbers must not
                depend on how many others step beside it.
            totals: int64 (T,), tokens that each one's text may come to; None: `max_length`. See `border`.
            passage: as of `stages`.

        Returns:
            (T, C) in the model's dtype.
        """
        stages = self.stages(tokens, positions, types, is_decode, totals, passage)
        answer = None
        while True:
            try:
                question = stages.send(answer)
            except StopIteration as end:
                return cast(Tensor, end.value)
            answer = None if question is None else attend(*question)
            del question  # the rest of the layer has no use for it

    def stages(
        self,
        tokens: Tensor,
        positions: Tensor,
        types: Tensor | None = None,
        is_decode: bool = False,
        totals: Tensor | None = None,
        passage: Passage | None = None,
    ) -> Stages:
        """`hidden` turned inside out: who drives it answers each layer's question, and may pause at any.

        passage: of a decode step of T sequences: where all layers are packed it answers them, and they ask nothing.
        """
        turns, x = self.turns_by_layer(positions, totals), self._embedded(tokens, positions, types)
        if passage is not None and self._packed is not None:
            yield from self._packed.passing(x, turns, passage)
            return self._final(x)
        starts = (positions == 0).nonzero().flatten().tolist() if self.config.has_global_first else ()
        for index, layer in enumerate(self.stack):
            sides = layer.sides(is_decode)
            answer = yield index, *sides.question(x, turns[index])
            assert answer is not None, "a question was left without an answer"
            if starts:
                layer.answer_first(x, answer, starts)
            x = sides.output(x, answer)
            del answer
            yield None
        return self._final(x)

    def _embedded(self, tokens: Tensor, positions: Tensor, types: Tensor | None) -> Tensor:
        """The residual stream as it begins, (T, C)."""
        x = cast(Tensor, self.embed(tokens))
        if self.config.has_position_table:
            x = x + self.positions(positions)
        if self.config.num_token_types:
            x = x + (self.types.weight[0] if types is None else self.types(types))
        if self.config.embed_scale != 1:
            x = x * torch.tensor(self.config.embed_scale, dtype=x.dtype)  # rounded to the dtype, as the weights were trained
        return self._normed(x, "embed_norm")

    def _final(self, x: Tensor) -> Tensor:
        weight = self._parameters["final_norm"]
        if weight is not None and self._first.is_native:
            return native.norm(x, weight, self.config.norm_eps)
        return self._normed(x, "final_norm")

    def _normed(self, x: Tensor, name: str) -> Tensor:
        weight = self._parameters[name]
        return x if weight is None else normed(x, weight, self._parameters.get(f"{name}_bias"), self.config)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states (N, C): float32 (N, V)."""
        if self._head is not None:
            logits = self._head.logits(hidden)
        elif not self.config.tie_word_embeddings:
            logits = self.head(hidden).float()
        else:
            logits = F.linear(hidden, self.embed.weight).float()
        cap = self.config.logit_cap
        return logits if cap is None else logits.div_(cap).tanh_().mul_(cap)

    def pack(self) -> None:
        """Lay the weights out for serving, see `Projection.pack`, `Table.pack`; they cannot be trained any more."""
        config = self.config
        widths = config.hidden_size, config.intermediate_size, config.head_dim
        is_known = config.norm == "rms" and config.activation == "silu" and config.is_gated  # to the kernel
        is_native = is_known and native.suits(self.dtype, self.device, *widths)
        for module in self.modules():
            if isinstance(module, Projection):
                module.pack()
        for layer, rope in zip(self.stack, self._rope_of, strict=True):
            layer.settle(is_native, rope is not None)
        packed = [layer.packed for layer in self.stack if isinstance(layer.packed, native.PackedLayer)]
        self._packed = native.PackedStack(packed) if len(packed) == len(self.stack) else None
        if config.is_causal and config.tie_word_embeddings:
            self.embed.pack()
            self._head = self.embed.packed or self.embed.quantized
        elif config.is_causal:
            self._head = self.head.quantized or self.head.matrix()

    def height(self, rows: int, is_decode: bool = False) -> int:
        """How many rows a product of `rows` rows is padded to where oneDNN computes it: 26 up to 512, then 16 a doubling.

        For each height it compiles kernels anew and keeps a thousand of them: 0.5 ms and 0.6 MiB for each of the embedded
        model's matrices. Prompts of all lengths would fill hundreds of MiB with them; 32 more rows, or a sixteenth, cost less.
        """
        qkv = self._first.qkv
        is_kept = qkv.quantized is not None or not qkv.weight.is_mkldnn
        if is_kept or all(layer.sides(is_decode) is not layer for layer in self.stack):
            return rows
        above = 1 << (rows - 1).bit_length()
        step = min(32, max(1, above >> 2)) if rows <= 512 else above >> 5
        return -(-rows // step) * step

    @torch.inference_mode()
    def warm_up(self, rows: int, logit_rows: int) -> None:
        """Compute products of every height up to `rows` once: no request waits for a kernel, and memory stays as it is."""
        sides = self._first.sides(is_decode=False)
        is_compiled = not self.quantized and sides is self._first
        heights = {self.height(n) for n in range(1, rows + 1)} if is_compiled else {rows}
        for height in sorted(heights):
            x = torch.zeros(height, self.config.hidden_size, dtype=self.dtype, device=self.device)
            turns = self.turns_by_layer(torch.zeros(height, dtype=torch.long, device=self.device))
            q, _, _ = sides.question(x, turns[0])
            sides.output(x, q)
            if self.config.is_causal and height <= self.height(logit_rows):
                self.logits(x)

    def workspace_bytes(self, tokens: int, attention: int) -> int:
        """Peak bytes of temporaries of `hidden` over `tokens` tokens when a layer's attention needs `attention` bytes."""
        config, tokens, first, dtype = self.config, self.height(tokens), self._first, self.dtype  # asked once: steps ask often
        heads, groups, depth = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        stream = config.hidden_size + 2 * depth * len(self._ropes)  # the residual stream, each cos and sin
        qk, qkv = (heads + groups) * depth, (heads + 2 * groups) * depth
        is_native, is_wide = first.is_native, config.norm == "gemma"  # which norms in float32
        wide = (2 * 4 // dtype.itemsize if is_wide else 0) * config.hidden_size
        # the norm; as projected; in torch normed and in the turn's three parts, natively turned only
        turns = 0 if not self._ropes and not config.qk_norm else 1 if is_native else 4
        turning = stream + config.hidden_size + qkv + turns * qk + (2 * qk if is_wide else 0)
        turning += heads * depth if config.query_scale != 1 else 0
        attending = stream + qkv + (qk if turns else 0) + (heads * depth if config.query_scale != 1 else 0)
        inner = 3 if is_native else 4 if config.is_gated else 2  # gate and up, and what becomes of them
        feeding = stream + 2 * config.hidden_size + heads * depth + inner * config.intermediate_size
        if first.sides(is_decode=False) is first:
            reading = max((each.reading_bytes(tokens, dtype) for each in first.kept), default=0)
        else:
            turning = stream + config.hidden_size + qkv
            feeding = stream + 2 * config.hidden_size + max(config.hidden_size, heads * depth)
            feeding += heads * depth + config.intermediate_size
            reading = 0
        width = tokens * dtype.itemsize
        looking = 9 * tokens * config.hidden_size if self.embed.quantized else 0  # int8, float32, and that scaled
        return max(width * (turning + wide), width * attending + attention, width * (feeding + wide), looking) + reading

    def _apply(self, *args: Any, **more: Any) -> Self:
        """Where `to` and its like come through."""
        self._turns = None
        moved: Self = super()._apply(*args, **more)  # type: ignore[no-untyped-call]
        return moved

    def turns_by_layer(self, positions: Tensor, totals: Tensor | None = None) -> list[Turns | None]:
        """`rotation` of each layer; None where positions turn nothing."""
        turns = self.rotation(positions, totals)
        return [None if rope is None else turns[rope] for rope in self._rope_of]

    def rotation(self, positions: Tensor, totals: Tensor | None = None) -> tuple[Turns, ...]:
        """cos and sin of each position's angles in the model's dtype, for each kind of rotary positions that a layer has.

        totals: as of `hidden`.
        """
        if not self._ropes:
            return ()
        turns = self._turns
        if turns is None:
            turns = self._turns = self._table()
        if totals is not None and self.border is not None:
            positions = torch.where(totals > self.border, positions, self.config.max_length + positions)
        return tuple(cast(Turns, table.index_select(0, positions).chunk(2, dim=-1)) for table in turns)

    @torch.inference_mode(False)  # training may use a table that an evaluation made
    def _table(self) -> Tensor:
        """Turns of all positions, of each kind, (R, P, 1, 2 D), and behind them those of texts up to the border, where there is
        one. In float32: in bfloat16 angles would be whole turns off.
        """
        lengths = [self.config.max_length, *([] if self.border is None else [self.border])]
        made = [[_turns(rope, self.config.head_dim, length) for length in lengths] for rope in self._ropes]
        return torch.stack([torch.cat(each).to(self.device, self.dtype) for each in made])


def _turns(rope: Rope, depth: int, longest: int) -> Tensor:
    """Turns of all positions of a text, float32 (P, 1, 2 D). A pair that does not turn is left as it is."""
    inverse, factor = rotary.frequencies(rope, depth, longest), rotary.attention_factor(rope)
    angles = torch.outer(torch.arange(longest, dtype=torch.float32), inverse)
    scale = torch.where(inverse > 0, factor, 1.0)
    cos, sin = angles.cos() * scale, angles.sin() * scale
    return torch.cat((cos, cos, -sin, sin), dim=-1)[:, None]
