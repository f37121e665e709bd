"""The decoder that is served: Qwen3's architecture over packed tokens, with the attention handed in from outside.

RMSNorm (arXiv 1910.07467), rotary positions (2104.09864), grouped-query attention (2305.13245), per-head QK-norm,
SwiGLU (2002.05202), tied embeddings or not. One configuration covers the Qwen3, Qwen2, Llama and Mistral families: the
last three differ by biases and by having no QK-norm. Loading is `checkpoint.py`; how to attend is `attention`.

The forward knows no batch axis and no mask: tokens of all sequences stand one behind the other, and the `Attend` it is
given knows where each begins. Letters as in `attention.interface`; C model width, F feed-forward width, V vocabulary.
Cost per token: 2 flops for every weight but the embedding's, and what attention costs.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import HeadShape
from service.model import native

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, q (T, H, D), k (T, G, D), v (T, G, D)) -> (T, H, D)."""
Stages = Generator[tuple[int, Tensor, Tensor, Tensor] | None, Tensor | None, Tensor]
"""A forward that asks for each layer's attention, as an `Attend` is asked, and returns the hidden states.

Behind each layer it yields None: there, too, is a good place to pause.
"""

FAMILIES = ("qwen3", "qwen2", "llama", "mistral")
TIED_COPY_BYTES = 16 << 20  # of embeddings: beyond, what a packed copy saves is small beside reading it
ROPE_TYPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class ModelConfig:
    """The parts of a Hugging Face `config.json` that this architecture reads."""

    model_type: str
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # D
    max_position_embeddings: int
    rms_norm_eps: float
    rope: tuple[tuple[str, Any], ...]  # sorted items of rope_parameters, hashable
    tie_word_embeddings: bool
    attention_bias: bool  # on q, k, v
    output_bias: bool  # on the projection behind attention
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]
    sliding_window: int | None  # the window the weights were trained with, in the file's own counting

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"

    @property
    def eos_token_id(self) -> int | None:
        """The first end-of-text token, None when the checkpoint names none."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> ModelConfig:
        """Read a `config.json`.

        Raises:
            ValueError: a family, activation or rotary scaling that this architecture does not compute.
        """
        family = raw.get("model_type")
        if family not in FAMILIES:
            raise ValueError(f"model_type must be one of {FAMILIES}, the checkpoint says {family!r}")
        if raw.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act must be 'silu', the checkpoint says {raw['hidden_act']!r}")
        rope = _rope_parameters(raw)
        heads = raw["num_attention_heads"]
        eos = raw.get("eos_token_id")
        bias = bool(raw.get("attention_bias", False))
        return cls(
            model_type=family,
            vocab_size=raw["vocab_size"],
            hidden_size=raw["hidden_size"],
            intermediate_size=raw["intermediate_size"],
            num_hidden_layers=raw["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
            max_position_embeddings=raw["max_position_embeddings"],
            rms_norm_eps=raw["rms_norm_eps"],
            rope=tuple(sorted(rope.items())),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            attention_bias=bias or family == "qwen2",
            output_bias=bias and family != "qwen2",
            mlp_bias=bool(raw.get("mlp_bias", False)),
            eos_token_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
            sliding_window=raw.get("sliding_window") if raw.get("use_sliding_window", family == "mistral") else None,
        )

    def head_shape(self, dtype: torch.dtype, device: torch.device | str) -> HeadShape:
        """The heads an attention backend is built for."""
        return HeadShape(self.num_attention_heads, self.num_key_value_heads, self.head_dim, dtype, torch.device(device))


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in the newer files' form, from either form."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    if rope["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"rope_type must be one of {ROPE_TYPES}, the checkpoint says {rope['rope_type']!r}")
    return rope


def rotary_frequencies(rope: Mapping[str, Any], head_dim: int) -> Tensor:
    """Radians per position of each pair of coordinates, float32 (D / 2,). `llama3` as in Llama 3.1's reference code."""
    inverse: Tensor = 1.0 / rope["rope_theta"] ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if rope["rope_type"] == "linear":
        inverse = inverse / rope["factor"]
    if rope["rope_type"] == "llama3":
        wavelength = 2 * torch.pi / inverse
        low, high, old = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
        smooth = ((old / wavelength - low) / (high - low)).clamp(0, 1)
        inverse = inverse * (smooth + (1 - smooth) / rope["factor"])
    return inverse


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate coordinate pairs (i, i + D/2) of x (T, heads, D) by the angles of `Transformer.rotation`, each (T, 1, D)."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


class Projection(nn.Linear):
    """A linear layer whose matrix may lie in the order in which oneDNN multiplies it."""

    def pack(self) -> None:
        """Lay the matrix out for serving on CPU: no call has to look for an order or make one, the products stay the same.

        For one token a call takes 14 microseconds instead of 21, for 512 it is a few percent faster. The operators are
        those that torch.compile's frozen graphs use; they are not in the public reference, so where they are missing the
        matrix stays as it is. Other dtypes are multiplied by MKL.
        """
        if can_pack(self.weight):
            self.weight = nn.Parameter(packed(self.weight), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight, self.bias)

    __call__ = forward  # without nn.Module's look for hooks, which takes a tenth of a small product


def can_pack(weight: Tensor) -> bool:
    """Whether oneDNN multiplies this matrix, bfloat16 on CPU, and this build of torch has the two operators."""
    if weight.dtype != torch.bfloat16 or weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))


def packed(weight: Tensor) -> Tensor:
    """A bfloat16 matrix in oneDNN's own order: an opaque tensor, of which `to_dense` is the inverse."""
    return cast(Tensor, torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight' + bias for a weight that is packed or not."""
    if weight.is_mkldnn:
        return cast(Tensor, torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], ""))
    return F.linear(x, weight, bias)


class Layer(nn.Module):
    """One decoder layer: attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, heads, groups, depth = (
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        self.config = config
        self.attention_norm = nn.Parameter(torch.ones(width))
        self.qkv = Projection(width, (heads + 2 * groups) * depth, bias=config.attention_bias)
        self.out = Projection(heads * depth, width, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(depth))
            self.k_norm = nn.Parameter(torch.ones(depth))
        self.mlp_norm = nn.Parameter(torch.ones(width))
        self.gate_up = Projection(width, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Projection(config.intermediate_size, width, bias=config.mlp_bias)
        self._qk_scales: Tensor | None = None  # once they can change no more
        self.is_native = False  # what stands between products is computed by `native`

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """RMSNorm of x (T, C)."""
        if self.is_native:
            return native.norm(x, weight, self.config.rms_norm_eps)
        return F.rms_norm(x, (x.shape[-1],), weight, self.config.rms_norm_eps)

    def turned(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries and keys of projected x (T, (H + 2 G) D), normed where the family does that, rotated: (T, H + G, D)."""
        heads, depth = self.config.num_attention_heads + self.config.num_key_value_heads, self.config.head_dim
        epsilon, scales = self.config.rms_norm_eps, None
        if self.config.qk_norm:
            scales = self.qk_scales() if self._qk_scales is None else self._qk_scales
        if self.is_native:
            return native.turn(x, scales, heads, depth, epsilon, cos, sin)
        qk = x[:, : heads * depth].unflatten(1, (heads, depth))
        return rotate(qk if scales is None else F.rms_norm(qk, (depth,), None, epsilon) * scales, cos, sin)

    def qk_scales(self) -> Tensor:
        """The QK-norm's weights of all query and key heads, (H + G, D)."""
        heads, groups, depth = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        return torch.cat((self.q_norm.expand(heads, depth), self.k_norm.expand(groups, depth)))

    def question(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What the layer asks of attention: q (T, H, D), k and v (T, G, D), of x (T, C)."""
        heads, groups, depth = self.config.num_attention_heads, self.config.num_key_value_heads, self.config.head_dim
        x = self.qkv(self.norm(x, self.attention_norm))
        q, k = self.turned(x, cos, sin).split((heads, groups), dim=1)
        return q, k, x[:, (heads + groups) * depth :].unflatten(1, (groups, depth))

    def output(self, x: Tensor, answer: Tensor) -> Tensor:
        """What the layer hands on, (T, C), from its input and attention's answer (T, H, D)."""
        x = x + self.out(answer.flatten(1))
        return x + self.mlp(self.norm(x, self.mlp_norm))

    def mlp(self, x: Tensor) -> Tensor:  # (T, C) -> (T, C)
        x = self.gate_up(x)
        if self.is_native:
            return self.down(native.gate(x))
        gate, up = x.chunk(2, dim=-1)  # (T, F) each
        return self.down(F.silu(gate) * up)


class Transformer(nn.Module):
    """Tokens in, hidden states and logits out. Parameters have the model's dtype; logits are float32."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.final_norm = nn.Parameter(torch.ones(config.hidden_size))
        if not config.tie_word_embeddings:
            self.head = Projection(config.hidden_size, config.vocab_size, bias=False)
        self._packed_head: Tensor | None = None  # of tied weights, see `pack`
        self._turns: Tensor | None = None  # see `rotation`

    @property
    def decoder(self) -> list[Layer]:
        """The layers in order, as what they are."""
        return cast(list[Layer], list(self.layers))

    @property
    def dtype(self) -> torch.dtype:
        return self.final_norm.dtype

    @property
    def device(self) -> torch.device:
        return self.final_norm.device

    def head_shape(self) -> HeadShape:
        """The heads an attention backend for this model is built for."""
        return self.config.head_shape(self.dtype, self.device)

    def hidden(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Last hidden states, after the final norm.

        Args:
            tokens: int64 (T,), each below the vocabulary's size. positions: int64 (T,), each in its own sequence.
            attend: answers each layer's queries.

        Returns:
            (T, C) in the model's dtype.
        """
        cos, sin = self.rotation(positions)
        x = self.embed(tokens)
        for index, layer in enumerate(self.decoder):
            x = layer.output(x, attend(index, *layer.question(x, cos, sin)))
        return F.rms_norm(x, (x.shape[-1],), self.final_norm, self.config.rms_norm_eps)

    def stages(self, tokens: Tensor, positions: Tensor) -> Stages:
        """`hidden` turned inside out: who drives it answers each layer's question, and may pause at any."""
        cos, sin = self.rotation(positions)
        x = self.embed(tokens)
        for index, layer in enumerate(self.decoder):
            answer = yield index, *layer.question(x, cos, sin)
            assert answer is not None, "a question was left without an answer"
            x = layer.output(x, answer)
            del answer
            yield None
        return F.rms_norm(x, (x.shape[-1],), self.final_norm, self.config.rms_norm_eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits of hidden states (N, C): float32 (N, V)."""
        if not self.config.tie_word_embeddings:
            return self.head(hidden).float()
        return product(hidden, self.embed.weight if self._packed_head is None else self._packed_head).float()

    def pack(self) -> None:
        """Lay the weights out for serving, see `Projection.pack`; they cannot be trained any more.

        Tied embeddings are read row by row and must stay, so their packed copy is made only where it is small.
        """
        config = self.config
        widths = config.hidden_size, config.intermediate_size, config.head_dim
        is_native = native.suits(self.dtype, self.device, *widths)
        for module in self.modules():
            if isinstance(module, Projection):
                module.pack()
            if isinstance(module, Layer):
                module._qk_scales = module.qk_scales() if self.config.qk_norm else None
                module.is_native = is_native
        tied = self.embed.weight
        if self.config.tie_word_embeddings and tied.nbytes <= TIED_COPY_BYTES and can_pack(tied):
            self._packed_head = packed(tied)

    def height(self, rows: int) -> int:
        """How many rows a product of `rows` rows is padded to where oneDNN computes it: 26 heights up to 512.

        For each height it compiles kernels anew and keeps a thousand of them: 0.5 ms and 0.6 MiB for each of the embedded
        model's matrices. Prompts of all lengths would fill hundreds of MiB with them; at most 32 more rows cost less.
        """
        if not self.decoder[0].qkv.weight.is_mkldnn:
            return rows
        step = min(32, max(1, (1 << (rows - 1).bit_length()) >> 2))
        return -(-rows // step) * step

    @torch.inference_mode()
    def warm_up(self, rows: int, logit_rows: int) -> None:
        """Compute products of every height up to `rows` once: no request waits for a kernel, and memory stays as it is."""
        layer = self.decoder[0]
        for height in sorted({self.height(n) for n in range(1, rows + 1)}):
            x = torch.zeros(height, self.config.hidden_size, dtype=self.dtype, device=self.device)
            q, _, _ = layer.question(x, *self.rotation(torch.zeros(height, dtype=torch.long, device=self.device)))
            layer.output(x, q)
            if height <= self.height(logit_rows):
                self.logits(x)

    def workspace_bytes(self, tokens: int, attention: int) -> int:
        """Peak bytes of temporaries of `hidden` over `tokens` tokens when a layer's attention needs `attention` bytes."""
        config, tokens = self.config, self.height(tokens)
        heads, groups, depth = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        stream = config.hidden_size + 2 * depth  # the residual stream, cos and sin
        qk, qkv = (heads + groups) * depth, (heads + 2 * groups) * depth
        is_native = self.decoder[0].is_native
        # the norm; as projected; in torch normed and in the turn's three parts, natively turned only
        turning = stream + config.hidden_size + qkv + (1 if is_native else 4) * qk
        attending = stream + qkv + qk
        feeding = stream + 2 * config.hidden_size + heads * depth + (3 if is_native else 4) * config.intermediate_size
        width = tokens * self.dtype.itemsize
        return max(width * turning, width * attending + attention, width * feeding)

    def rotation(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos, and sin with the sign that `rotate` needs, of each position's angles, (T, 1, D) in the model's dtype."""
        turns = self._turns
        if turns is None or turns.dtype != self.dtype or turns.device != self.device:
            turns = self._turns = self._table()
        cos, sin = turns[positions].chunk(2, dim=-1)
        return cos, sin

    @torch.inference_mode(False)  # training may use a table that an evaluation made
    def _table(self) -> Tensor:
        """Turns of all positions (P, 1, 2 D). Angles in float32: in bfloat16 they would be wrong by whole turns."""
        positions = torch.arange(self.config.max_position_embeddings, dtype=torch.float32)
        angles = torch.outer(positions, rotary_frequencies(dict(self.config.rope), self.config.head_dim))
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos, -sin, sin), dim=-1)[:, None].to(self.device, self.dtype)
