"""What a checkpoint's `config.json` says: `ModelConfig` in this service's words, and `Fields`, through which a family reads it.

Every field of a file is read by its family, or known to change no answer (`HARMLESS`), or refused by name. Null and false
switch a thing off, so an unknown field that says so is passed over.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from attention import NATIVE, HeadShape
from service.model.pooling import MEAN, Pooled, Task

Kv = Literal["auto", "bf16", "int8"]

Rope = tuple[tuple[str, Any], ...]
"""How positions turn queries and keys: sorted items, hashable; see `rotary.py`."""

HARMLESS = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _flash_attn_2_enabled
    _name_or_path _num_labels architectures is_llama_config max_sequence_length
    attention_dropout attention_probs_dropout_prob attn_implementation attn_pdrop bos_token_id chunk_size_feed_forward
    classifier_dropout cls_token_id dropout dtype embedding_dropout hidden_dropout_prob initializer_cutoff_factor mlp_dropout
    qa_dropout seq_classif_dropout embd_pdrop finetuning_task
    gradient_checkpointing hidden_dropout id2label initializer_factor initializer_range is_decoder label2id model_type n_ctx
    name_or_path num_labels output_attentions output_hidden_states pad_token_id prefix pretraining_tp problem_type
    resid_pdrop return_dict sep_token_id summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params tie_encoder_decoder tokenizer_class torch_dtype torchscript transformers_version
    transformers.js_config unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
    cache_implementation diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size length_penalty max_length
    max_new_tokens min_length no_repeat_ngram_size num_beam_groups num_beams num_return_sequences repetition_penalty
    return_dict_in_generate temperature top_k top_p typical_p
    """.split()
)
"""Fields that say how a model was made, kept or is sampled from, not which logits it has."""


@dataclass(frozen=True)
class ModelConfig:
    """A model of any family, decoder or encoder. What differs between them are the knobs from `attention_bias` on."""

    model_type: str
    vocab_size: int  # V
    hidden_size: int  # C
    intermediate_size: int  # F
    num_hidden_layers: int
    num_attention_heads: int  # H
    num_key_value_heads: int  # G
    head_dim: int  # D
    max_position_embeddings: int
    norm_eps: float
    ropes: tuple[Rope, ...]  # of each layer
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    windows: tuple[int | None, ...]  # of each layer: earlier tokens that a token sees, None for all of them
    attention_bias: bool = False  # on q, k, v
    output_bias: bool = False  # on the projection behind attention
    mlp_bias: bool = False
    qk_norm: bool = False
    norm: Literal["rms", "gemma", "layer"] = "rms"  # gemma: times one more than the weight, in float32; layer: with a bias
    has_norm_bias: bool = True  # where the norm is layer
    is_sandwiched: bool = False  # norms behind attention and feed-forward, too
    is_post_normed: bool = False  # norms behind each sum, and none before attention, feed-forward and at the end
    has_first_norm: bool = True  # before attention in the first layer
    has_embed_norm: bool = False  # behind the embeddings
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    is_gated: bool = True  # the activation gates a second projection
    has_position_table: bool = False  # learned positions are added to the embeddings
    first_position: int = 0  # the row of that table which a text's first token has; those before are no positions
    query_scale: float = 1.0  # beside attention's own 1 / sqrt(D)
    embed_scale: float = 1.0
    score_cap: float | None = None  # attention's scores s are weighed as cap tanh(s / cap)
    score_bias: tuple[tuple[float, ...], ...] | None = None  # of each head: added to scores by distance (`attention.relative`)
    blocks: tuple[int, int] | None = None  # BigBird's: tokens of a block, and blocks drawn for each
    logit_cap: float | None = None  # logits x become cap tanh(x / cap)
    is_causal: bool = True  # False: an encoder, whose tokens see both sides and whose texts are computed whole
    has_global_first: bool = False  # a text's first token sees all and is seen by all, by projections of its own
    num_token_types: int = 0  # embeddings that tell the first text of a pair from the second, and are added
    pooled: Pooled = MEAN
    served_length: int | None = None  # tokens of the longest sequence that is served, where that is less than the context
    kv: torch.dtype | None = None  # in which a decoder's keys and values are kept; None: in the model's dtype

    @property
    def max_length(self) -> int:
        """Most tokens a sequence may have, prompt and answer together."""
        return self.served_length or min(self.pooled.length or self.max_position_embeddings, self.max_position_embeddings)

    def up_to(self, length: int | None) -> ModelConfig:
        """The same, serving sequences of up to `length` tokens; None: as many as it says.

        Raises:
            ValueError: more than the context.
        """
        if length is not None and length > self.max_position_embeddings:
            raise ValueError(f"max_length is {length}, the checkpoint's context {self.max_position_embeddings} tokens")
        return self if length is None else replace(self, served_length=length)

    def keeping(self, kv: str) -> ModelConfig:
        """The same, with keys and values kept in `kv`: `int8`, or what the dtype is.

        Raises:
            ValueError: an encoder in `int8`, for it keeps none.
        """
        if kv != "int8":
            return self
        if not self.is_causal:
            raise ValueError("kv: int8 is for decoders; this is an encoder, which keeps no keys and values")
        return replace(self, kv=torch.int8)

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What it can be asked for."""
        if self.pooled.labels:
            return ("classification",)
        return ("completion", "embedding") if self.is_causal else ("embedding",)

    @property
    def native(self) -> dict[str, Any] | None:
        """The options of `native`, the checkpoint's own backend; None where it was trained to attend as `dense` does."""
        own = (self.score_cap, self.score_bias, self.blocks, *self.windows)
        if all(each is None for each in own):
            return None
        others = {
            "score_cap": self.score_cap,
            "score_bias": self.score_bias,
            "blocks": self.blocks,
            "sinks": 1 if self.has_global_first else None,
        }
        return {"windows": list(self.windows)} | {name: value for name, value in others.items() if value is not None}

    def lossy(self, backend: str) -> str | None:
        """Why answers under a backend are not those the checkpoint was trained to give; None: they are, as far as it tells."""
        if backend == NATIVE:
            return None
        if self.native is None:
            is_own = self.is_causal or backend == "dense"
            return None if is_own else f"the encoder was trained to see the whole text, as dense does and {backend} does not"
        own = "windows of its own" if self.score_cap is None else "windows and capped scores of its own"
        own = own if self.score_bias is None else "biases of its own by distance"
        own = own if self.blocks is None else "blocks of its own"
        return f"the checkpoint was trained with {own}, which native keeps and {backend} does not"

    @property
    def eos_token_id(self) -> int | None:
        """The first end-of-text token, None when the checkpoint names none."""
        return self.eos_token_ids[0] if self.eos_token_ids else None

    def head_shape(self, dtype: torch.dtype, device: torch.device | str) -> HeadShape:
        """The heads an attention backend is built for."""
        heads, groups = self.num_attention_heads, self.num_key_value_heads
        return HeadShape(heads, groups, self.head_dim, dtype, torch.device(device), self.kv)


class Fields:
    """A `config.json`, field by field. What was asked for counts as read; `settle` refuses the rest.

    An absent field has the default that transformers gives it, which its family states.
    """

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self._raw = raw
        self._read: set[str] = set()

    def get(self, name: str, default: Any = None) -> Any:
        """A field as it stands, or its default where it is absent."""
        self._read.add(name)
        return self._raw.get(name, default)

    def has(self, name: str) -> bool:
        """Whether it is there and not null."""
        return self.get(name) is not None

    def count(self, name: str, default: int, least: int = 1) -> int:
        """A whole number from `least`, below 2^31; null is the default."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 1 << 31:
            raise ValueError(f"{name} must be a whole number above {least - 1}, the checkpoint says {value!r}")
        return value

    def number(self, name: str, default: float) -> float:
        """A finite number above zero; null is the default."""
        value = self.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a number above 0, the checkpoint says {value!r}")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false; null is false."""
        value = self.get(name, default)
        if value not in (True, False, None):
            raise ValueError(f"{name} must be true or false, the checkpoint says {value!r}")
        return bool(value)

    def mapping(self, name: str) -> dict[str, Any]:
        """An object; null is an empty one."""
        value = self.get(name) or {}
        if not isinstance(value, dict):
            raise ValueError(f"{name} must be an object, the checkpoint says {str(value)[:200]}")
        return value

    def listed(self, name: str, *kinds: type) -> list[Any]:
        """A list of values of such kinds; null is an empty one."""
        value = self.get(name) or []
        if not isinstance(value, list) or not all(type(each) in kinds for each in value):
            named = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"{name} must be a list of {named}, the checkpoint says {str(value)[:200]}")
        return value

    def is_one(self, name: str, *allowed: Any) -> None:
        """Raise ValueError unless a field is absent or has one of the values that this service computes."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            named = " or ".join(repr(each) for each in dict.fromkeys(allowed))
            raise ValueError(f"{name} must be {named}, the checkpoint says {value!r}")

    def settle(self) -> None:
        """Raise ValueError for a field that nobody has read and that may change what the model answers."""
        unread = {name: value for name, value in self._raw.items() if name not in self._read | HARMLESS}
        rest = [name for name, value in unread.items() if not (value is None or value is False or value in ({}, []))]
        if rest:
            told = ", ".join(f"{name}: {str(self._raw[name])[:60]}" for name in rest)
            raise ValueError(f"the checkpoint's config has fields whose meaning this service does not know ({told})")


def eos_token_ids(value: Any) -> tuple[int, ...]:
    """End-of-text tokens as files name them: none, one or a list."""
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise ValueError(f"eos_token_id must be a token id or a list of them, the checkpoint says {value!r}")
    return ids


def windows(fields: Fields, layers: int, window: int | None, kinds: Sequence[str], longest: int) -> tuple[int | None, ...]:
    """Of each layer how many earlier tokens a token sees: one fewer than the file's window, which counts the token itself.

    kinds: `full_attention` or `sliding_attention` of each layer, where the file's `layer_types` does not say it. A window
    that no sequence of up to `longest` tokens outgrows is none.
    """
    kinds = fields.listed("layer_types", str) or kinds
    strange = sorted(set(kinds) - {"full_attention", "sliding_attention"})
    if strange or len(kinds) != layers:
        raise ValueError(f"layer_types must say full_attention or sliding_attention for {layers} layers, received {kinds}")
    if "sliding_attention" not in kinds:
        return (None,) * layers
    if window is None or isinstance(window, bool) or not isinstance(window, int) or window < 2:
        raise ValueError(f"sliding_window must be a whole number above 1 where a layer slides, the checkpoint says {window!r}")
    earlier = None if window >= longest else window - 1
    return tuple(earlier if kind == "sliding_attention" else None for kind in kinds)
