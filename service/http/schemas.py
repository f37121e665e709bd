"""What all bodies that callers send have in common, in OpenAI's shapes. Our one field more is `attention`.

A field we do not know is passed over, as OpenAI's clients expect; one that is a letter off a field of ours is refused as the
slip it is. A field whose meaning we know and cannot honour is refused unless its value changes nothing: no answer differs in
silence from what was asked.

The bodies themselves: `drawn_schemas` (tokens are drawn), `read_schemas` (texts are read), `plan_schemas` (what comes before).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from service.engine.request import quoted
from service.http.fields import Name, fault
from service.http.length import Side

MOST_FIELDS = 128
"""Fields of one body, known or not."""

MOST_PREFERRED = 16
"""Backends of one wish."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "suffix": (None, ""),
    "top_a": (None, 0),
    "max_new_tokens": (None,),
    "store": (None, False),
    "typical_p": (None, 1),
    "use_beam_search": (None, False),
    "length_penalty": (None, 1),
    "bad_words": (None, []),
    "truncate_prompt_tokens": (None,),
    "prompt_logprobs": (None,),
    "guided_grammar": (None,),
    "dimensions": (None,),
}
"""Fields of OpenAI's and other servers' that are not offered here, with the values that ask for nothing."""


class Body(BaseModel):
    """Base of all bodies: no value is converted, fields we do not know are passed over."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = NEUTRAL
    """Known fields that are not offered, with the values that ask for nothing."""

    model: str | None = Field(default=None, description="A model id, or id@backend; left out: the one model served here.")

    @model_validator(mode="before")
    @classmethod
    def _asks_only_for_what_is_offered(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if len(value) > MOST_FIELDS:
            raise ValueError(f"the body may have {MOST_FIELDS} fields, received {len(value)}")
        for name in value.keys() - cls.model_fields.keys():
            if name in cls.neutral:
                check_neutral(name, value[name], cls.neutral[name])
            elif meant := _meant(name, (*cls.model_fields, *cls.neutral)):
                raise fault(name, f"{quoted(name)} is no field, did you mean {meant}?")
        return value


def check_neutral(name: str, value: Any, neutral: Sequence[Any]) -> None:
    """Raise a fault unless the value of a field that is not offered asks for nothing."""
    if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in neutral):
        allowed = " or ".join(json.dumps(each) for each in neutral if each is not None) or "null"
        raise fault(name, f"{name} is not offered: leave it out or send {allowed}, received {quoted(value)}")


def _meant(name: str, known: Iterable[str]) -> str | None:
    """The known field of which a name is a slip: other case or hyphens, or one letter added, lost, changed or swapped."""
    return next((each for each in known if _is_slip(_plain(name), _plain(each))), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _is_slip(name: str, known: str) -> bool:
    if name == known or min(len(name), len(known)) < 3 or abs(len(name) - len(known)) > 1:
        return name == known
    if len(name) != len(known):
        longer, shorter = sorted((name, known), key=len, reverse=True)
        return any(longer[:i] + longer[i + 1 :] == shorter for i in range(len(longer)))
    wrong = [i for i, (a, b) in enumerate(zip(name, known, strict=True)) if a != b]
    first, last = wrong[0], wrong[-1]
    return first == last or (last == first + 1 and name[first : last + 1] == known[last] + known[first])


class Worded(Body):
    """A body with text that becomes tokens."""

    add_special_tokens: bool | None = Field(
        default=None, description="Whether text gets the tokenizer's special tokens; token ids never do. Left out: true."
    )

    @property
    def with_special_tokens(self) -> bool:
        """Whether text gets begin-of-text and what else the tokenizer's file puts around it."""
        return self.add_special_tokens is not False


class AutoHints(BaseModel):
    """What a caller asks of auto, in place of the config's own rules."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    max_seconds: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Predicted, queue included: who takes longer is passed over."
    )
    prefer: list[Name] | None = Field(
        default=None, min_length=1, max_length=MOST_PREFERRED, description="Backends, the best first; no other is picked."
    )


class AutoWish(BaseModel):
    """Auto, with hints."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    auto: AutoHints


NAMED, HINTED = "a name", "auto with hints"
"""Tags of what `attention` may be; no field has such a name."""

Wish = Annotated[
    Annotated[Name, Tag(NAMED)] | Annotated[AutoWish, Tag(HINTED)],
    Discriminator(lambda value: HINTED if isinstance(value, dict | AutoWish) else NAMED),
]


class Attended(Body):
    """A body that is answered by attending."""

    attention: Wish | None = Field(
        default=None, description="The backend, or auto; left out: the default of the config in force."
    )


class Cut(Attended):
    """A body whose input may be cut to the model's context."""

    truncate: Side | None = Field(
        default=None,
        description="Where to leave tokens out of too long an input; the receipt says how many. Left out: it is refused.",
    )
