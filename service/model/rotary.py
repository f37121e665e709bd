"""Rotary positions (RoFormer, arXiv 2104.09864): how a config states them, and by which angles they turn.

Kinds: `default`; `linear` (arXiv 2306.15595); `llama3`, as in Llama 3.1's reference code; `yarn` (arXiv 2309.00071); `longrope`
(arXiv 2402.13753), whose short factors hold for texts up to the trained length and whose long ones for all positions of longer
texts; `none` turns nothing. The numbers are those of transformers' `modeling_rope_utils`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from service.model.config import Fields, Rope

NONE: Rope = (("rope_type", "none"),)
_ALWAYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
}
_ALLOWED = {
    "llama3": {"original_max_position_embeddings"},
    "yarn": {
        *("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"),
        *("mscale", "mscale_all_dim", "truncate"),
    },
    "longrope": {"original_max_position_embeddings", "attention_factor", "factor"},
}
_NEVER_NULL = {"rope_theta", "truncate"}


def read(fields: Fields, theta: float, longest: int, **family: Any) -> Rope:
    """A config's rotary positions, in any of the forms that files have.

    Where both are there, `rope_scaling` counts and `rope_parameters` does not, as in transformers.

    Args:
        theta: the family's `rope_theta` where the file has none. longest: the file's max_position_embeddings.
        family: what `normal` takes beside these.

    Raises:
        ValueError: a kind or a field that is not computed here, or two statements that cannot both hold.
    """
    scaling, parameters = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    base = fields.get("rope_theta")
    if scaling and parameters and base is None and "rope_theta" not in scaling and "rope_theta" in parameters:
        raise ValueError(
            "rope_scaling takes the place of rope_parameters, which alone says rope_theta here: say it in rope_scaling, too"
        )
    given = {"rope_theta": theta if base is None else base} | (scaling or parameters)
    given = {"partial_rotary_factor": fields.get("partial_rotary_factor")} | given
    return normal(given, longest, **family)


def of_kind(parameters: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """What `rope_parameters` say of one kind of layer. Raises ValueError where that is no object."""
    stated = parameters.get(kind) or {}
    if not isinstance(stated, dict):
        raise ValueError(f"rope_parameters must hold an object for {kind}, the checkpoint says {stated!r}")
    return stated


def normal(
    given: Mapping[str, Any],
    longest: int,
    renamed: Mapping[str, str] | None = None,
    trained: int | None = None,
    is_partial: bool = False,
) -> Rope:
    """One statement of rotary positions, checked, with what it leaves out filled in.

    Args:
        longest: the file's max_position_embeddings. trained: the trained length, where the family says it elsewhere.
        renamed: kinds that the family calls otherwise. is_partial: whether the family lays out heads that turn in part.

    Raises:
        ValueError: a kind or a field that is not computed here.
    """
    if not is_partial and given.get("partial_rotary_factor") not in (None, 1):
        raise ValueError(f"partial_rotary_factor must be 1 here, the checkpoint says {given['partial_rotary_factor']!r}")
    kind = str(given.get("rope_type") or given.get("type") or "default")
    kind = (renamed or {}).get(kind, kind)
    if kind not in _NEEDED:
        raise ValueError(f"rope_type must be one of {tuple(_NEEDED)}, the checkpoint says {kind!r}")
    known = _ALWAYS | set(_NEEDED[kind]) | _ALLOWED.get(kind, set())
    if strange := sorted(name for name in given.keys() - known if given[name] is not None):
        raise ValueError(f"rotary positions of kind {kind} have fields this service does not know: {', '.join(strange)}")
    if missing := [name for name in _NEEDED[kind] if given.get(name) is None]:
        raise ValueError(f"rotary positions of kind {kind} need {', '.join(missing)}, the checkpoint has none")
    for name in (known - {"rope_type", "type"}) & given.keys():
        if given[name] is not None or name in _NEVER_NULL:
            _check(name, given[name])
    rope = {name: _frozen(value) for name, value in given.items() if name != "type" and value is not None} | {"rope_type": kind}
    if kind in _ALLOWED:
        stated = rope.get("original_max_position_embeddings", longest)
        rope["original_max_position_embeddings"] = stated if trained is None else trained
    if kind == "longrope":
        rope.setdefault("factor", longest / rope["original_max_position_embeddings"])
    return tuple(sorted(rope.items()))


def _check(name: str, value: Any) -> None:
    """Raise ValueError for a value that a field cannot have."""
    least = 1 if name == "rope_theta" else 0  # by a base of 1 all pairs would turn alike
    if name in ("short_factor", "long_factor"):
        wanted, is_right = "a list of numbers above 0", isinstance(value, list) and all(_is_above(0, each) for each in value)
    elif name == "truncate":
        wanted, is_right = "true or false", isinstance(value, bool)
    else:  # no mscale is 0
        wanted, is_right = f"a number above {least}", _is_above(least, value) or (name.startswith("mscale") and value == 0)
    if not is_right:
        raise ValueError(f"{name} must be {wanted}, the checkpoint says {str(value)[:200]}")


def _is_above(least: float, value: Any) -> bool:
    return type(value) in (int, float) and least < value < math.inf


def check_heads(rope: Rope, head_dim: int) -> None:
    """Raise ValueError for positions that do not go with heads of a width."""
    stated = dict(rope)
    if stated["rope_type"] == "none":
        return
    width = turned_width(rope, head_dim)
    if width % 2 or not 0 < width <= head_dim:
        raise ValueError(f"head_dim {head_dim} has {width} coordinates that turn: they must be pairs within it")
    for name in ("short_factor", "long_factor"):
        if name in stated and len(stated[name]) != width // 2:
            raise ValueError(f"{name} must be a list of {width // 2} numbers, the checkpoint has {len(stated[name])}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def turned_width(rope: Rope, head_dim: int) -> int:
    """How many of a head's coordinates turn."""
    return int(head_dim * dict(rope).get("partial_rotary_factor", 1.0))


def frequencies(rope: Rope, head_dim: int, longest: int) -> Tensor:
    """Radians per position of each pair of coordinates, float32 (D / 2,): zero where a pair does not turn.

    longest: tokens that the text may come to.
    """
    stated, whole = dict(rope), torch.zeros(head_dim // 2)
    if stated["rope_type"] == "none":
        return whole
    width = turned_width(rope, head_dim)
    powers: Tensor = float(stated["rope_theta"]) ** (torch.arange(0, width, 2, dtype=torch.float32) / width)
    whole[: width // 2] = _SCALED[stated["rope_type"]](powers, stated, longest)
    return whole


def attention_factor(rope: Rope) -> float:
    """What cosines and sines are multiplied by, so that scores keep their temperature in longer texts."""
    stated = dict(rope)
    if stated["rope_type"] not in ("yarn", "longrope"):
        return 1.0
    if stated.get("attention_factor") is not None:
        return float(stated["attention_factor"])
    factor = stated["factor"]
    if stated["rope_type"] == "longrope":
        trained = stated["original_max_position_embeddings"]
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(trained))
    over, under = stated.get("mscale"), stated.get("mscale_all_dim")
    return _mscale(factor, over) / _mscale(factor, under) if over and under else _mscale(factor, 1)


def border(rope: Rope, longest: int) -> int | None:
    """The length up to which texts have LongRoPE's short factors, where up to `longest` tokens are served and longer ones have
    others; None: all texts turn alike."""
    stated = dict(rope)
    trained = int(stated.get("original_max_position_embeddings", longest))
    return trained if stated["rope_type"] == "longrope" and longest > trained else None


def _mscale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


# Each in the order in which transformers computes it: the last bit of a frequency of 1 turns position 131,072 by 0.008.


def _linear(powers: Tensor, stated: Mapping[str, Any], longest: int) -> Tensor:
    return 1.0 / powers / float(stated["factor"])


def _llama3(powers: Tensor, stated: Mapping[str, Any], longest: int) -> Tensor:
    inverse = 1.0 / powers
    wavelength = 2 * torch.pi / inverse
    low, high, old = stated["low_freq_factor"], stated["high_freq_factor"], stated["original_max_position_embeddings"]
    smooth: Tensor = ((old / wavelength - low) / (high - low)).clamp(0, 1)
    return (1 - smooth) * inverse / float(stated["factor"]) + smooth * inverse


def _yarn(powers: Tensor, stated: Mapping[str, Any], longest: int) -> Tensor:
    width, old, theta = 2 * len(powers), stated["original_max_position_embeddings"], stated["rope_theta"]

    def pair(rotations: float) -> float:
        """The pair of coordinates that turns so often within the trained length."""
        return width * math.log(old / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = pair(stated.get("beta_fast") or 32), pair(stated.get("beta_slow") or 1)
    if stated.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = (torch.arange(len(powers), dtype=torch.float32) - low) / ((high - low) or 0.001)
    kept: Tensor = 1 - ramp.clamp(0, 1)
    return 1.0 / (float(stated["factor"]) * powers) * (1 - kept) + 1.0 / powers * kept


def _longrope(powers: Tensor, stated: Mapping[str, Any], longest: int) -> Tensor:
    is_long = longest > stated["original_max_position_embeddings"]
    factors = stated["long_factor" if is_long else "short_factor"]
    return 1.0 / (torch.tensor(factors, dtype=torch.float32) * powers)


def _default(powers: Tensor, stated: Mapping[str, Any], longest: int) -> Tensor:
    return 1.0 / powers


_SCALED = {"default": _default, "linear": _linear, "llama3": _llama3, "yarn": _yarn, "longrope": _longrope}
