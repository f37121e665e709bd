"""Answers of a given form: which tokens may come next under a JSON schema, a regular expression or a choice.

llguidance parses beside the model (Earley over lexemes made of regular-expression derivatives): microseconds a token, some
milliseconds when a form is met for the first time. Its limits, and ours, bound what the worst form may take: the beginning,
which takes longest, is looked at where a form is made, beside the model, and a sample whose form goes on to take long is ended.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from service.engine.request import Constraint, InvalidRequest
from service.model.tokenizer import Tokenizer

MOST_STATES = 1 << 13
BYTES_PER_STATE = 2048  # the library's own figure

MOST_MULTIPLE = 20_000
"""Least common multiple of all that a schema asks for: each remainder is a state, and no limit of the library holds. A tenth of
a second; a million takes 16, and one call in them keeps all others waiting. A power of ten is told by its last digits."""

MOST_EXPRESSIONS = 1 << 17
"""Regular expressions that a form may begin with, and all that a text forced by it has: more take seconds."""

MOST_FORCED = 4096
"""Bytes of the one text that a form may begin with. Each step of its sample looks at all of it again: 4 milliseconds."""

MOST_ALTERNATIVES = 128
"""Arrays, objects and what may be either of all anyOf, oneOf and lists of types of a schema together. Where a text may be many
of them at once, as arrays of arrays may, a byte takes their square and more: of 128 a tenth of a second, of 500 three."""

GRACE_SECONDS, TOKEN_SECONDS = 0.25, 0.005
"""What a sample's form may take of the model's thread: so much for each token, and so much more at a time."""

WHITESPACE = r"(\n[ \t]{0,24}| )?"
"""Between the parts of JSON: none, a space, or a line break and what indents. Unbounded, a model might write nothing else."""

GRAMMAR_BYTES = MOST_STATES * BYTES_PER_STATE
"""Most that the parser of one sample takes."""


class Grammar:
    """The text of one sample so far, and what may follow. For one thread at a time."""

    def __init__(self, matcher: LLMatcher, vocab_size: int, source: str) -> None:
        self.source = source  # the caller's name for the form
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._seconds_left = GRACE_SECONDS  # of this thread; below 0: it has taken too long

    def copy(self) -> Grammar:
        """The same text, to go on from by itself."""
        return Grammar(self._matcher.deep_copy(), self._vocab_size, self.source)

    def allowed(self) -> NDArray[np.bool_]:
        """For each id of the model's vocabulary whether it may come next (V,); where the parser has failed, all may."""
        start = time.thread_time()
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._seconds_left >= 0:
            self._seconds_left = min(GRACE_SECONDS, self._seconds_left + TOKEN_SECONDS) - (time.thread_time() - start)
        return np.unpackbits(bits, bitorder="little", count=self._vocab_size).view(np.bool_)

    def take(self, token: int) -> None:
        """Go on by a token that was allowed."""
        self._matcher.consume_token(token)

    @property
    def is_complete(self) -> bool:
        """Whether nothing more may come."""
        return bool(self._matcher.is_stopped())

    @property
    def fault(self) -> str | None:
        """Why the parser has failed: by one of its limits, or where no text goes on that the form would have."""
        if not self._matcher.is_error():
            return None if self._seconds_left >= 0 else "it takes too long"
        told = str(self._matcher.get_error()).partition("\n")[0]  # behind it the library's own notes
        return "no text keeps to it" if told.startswith("NoExtension") else told or "it is too complex"


class Grammars:
    """Makes grammars over one model's tokens."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Collection[int]) -> None:
        """`vocab_size`: of the model's logits. `eos_token_ids`: tokens that end an answer."""
        self._source = tokenizer
        self._vocab_size = vocab_size
        self._eos_token_ids = sorted(eos_token_ids)
        self._lock = threading.Lock()

    def of(self, form: Constraint) -> Grammar:
        """The grammar of a form, at its beginning. Takes milliseconds, the first time up to seconds; from any thread.

        Raises InvalidRequest for a form that is none, or is beyond the limits.
        """
        try:
            text = _grammar(form)
        except ValueError as error:
            _refuse(form, str(error))
        with self._lock:  # one at a time: compiling lets go of Python's lock
            matcher = LLMatcher(self._tokenizer, text, log_level=0, limits=_limits())
            if matcher.is_error():
                _refuse(form, matcher.get_error())
            matcher.compute_bitmask()  # which takes longest at the beginning; the model's thread finds it done
        grammar = Grammar(matcher, self._vocab_size, form.source)
        if (fault := grammar.fault) is not None:
            _refuse(form, fault)
        if (forced := len(matcher.compute_ff_bytes())) > MOST_FORCED:
            _refuse(form, f"it begins with {forced} bytes that are always the same, at most {MOST_FORCED} may be")
        return grammar

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        return LLTokenizer(
            TokenizerWrapper(_Tokens(self._source, self._vocab_size, self._eos_token_ids)),
            eos_token=self._eos_token_ids or None,
            slices=LLTokenizer.json_slices(),
        )


class _Tokens:
    """The tokens as the library wants to see them; ids without text, and those that end an answer, are none."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        ids, controls = set(tokenizer.ids), tokenizer.controls
        self.tokens = [
            tokenizer.token_bytes(i) if i in ids and i not in controls and i not in eos_token_ids else b""
            for i in range(vocab_size)
        ]
        self.eos_token_id = eos_token_ids[0] if eos_token_ids else vocab_size - 1
        self.bos_token_id = None
        self.special_token_ids = [i for i, text in enumerate(self.tokens) if not text]
        self._ids = {text: i for i, text in enumerate(self.tokens) if text}
        self._most_bytes = max(map(len, self._ids))

    def __call__(self, text: bytes | str) -> list[int]:
        """Tokens of a text that must come next: the model's own way to write it, where that spells it to the byte."""
        raw = text.encode() if isinstance(text, str) else text
        ids = self._tokenizer.encode(raw.decode(errors="replace"))
        return ids if b"".join(self.tokens[i] for i in ids) == raw else self._longest(raw)

    def _longest(self, raw: bytes) -> list[int]:
        """Of the tokens that fit the longest, again and again; what no token begins stays out."""
        ids: list[int] = []
        while raw:
            fitting = [raw[:count] for count in range(min(len(raw), self._most_bytes), 0, -1) if raw[:count] in self._ids]
            if not fitting:
                break
            ids.append(self._ids[fitting[0]])
            raw = raw[len(fitting[0]) :]
        return ids


def _limits() -> LLParserLimits:
    return LLParserLimits(max_lexer_states=MOST_STATES, initial_lexer_fuel=MOST_EXPRESSIONS, verbose_errors=False)


def _grammar(form: Constraint) -> str:
    """In the library's own terms. Raises ValueError."""
    if form.kind == "regex":
        return str(LLMatcher.grammar_from_regex(form.text))
    if form.kind == "choice":
        return str(LLMatcher.grammar_from_lark("start: " + " | ".join(json.dumps(each) for each in json.loads(form.text))))
    grammar = str(LLMatcher.grammar_from_json_schema(form.text, overrides={"whitespace_pattern": WHITESPACE}))
    schema = json.loads(form.text)
    _check_multiples(schema)
    _check_alternatives(schema)
    return grammar


def _check_multiples(schema: Any) -> None:
    """Raise ValueError for a schema whose numbers would take too long to compile."""
    common = Fraction(1)
    for each in _multiples(schema):
        common = Fraction(math.lcm(common.numerator, each.numerator), math.gcd(common.denominator, each.denominator))
        if common > MOST_MULTIPLE and str(common).strip("0") != "1":
            raise ValueError(
                f"all multipleOf together, their least common multiple, may come to {MOST_MULTIPLE} or a power of ten"
            )


def _multiples(schema: Any) -> Iterator[Fraction]:
    """Every multipleOf within a schema, none of them 0."""
    for multiple in filter(None, _found(schema, ("multipleOf",), int | float)):
        yield abs(Fraction(str(float(multiple)) if isinstance(multiple, float) else multiple))


def _check_alternatives(schema: Any) -> None:
    """Raise ValueError for a schema with more alternatives than can be told apart in time."""
    listed = [each for those in _found(schema, ("anyOf", "oneOf"), list) for each in those]
    count = sum(map(_may_nest, listed)) + sum(_may_nest({"type": kinds}) for kinds in _found(schema, ("type",), list))
    if count > MOST_ALTERNATIVES:
        told = "arrays, objects and references in all anyOf, oneOf and lists of types together"
        raise ValueError(f"{told} may be {MOST_ALTERNATIVES}, received {count}")


def _may_nest(schema: Any) -> bool:
    """Whether what a schema describes may have other values within it."""
    if not isinstance(schema, dict) or "const" in schema or "enum" in schema:
        return isinstance(schema, bool)
    kinds = schema.get("type", "object")
    return bool({"array", "object"}.intersection(kinds if isinstance(kinds, list) else [kinds]))


def _found(schema: Any, keywords: Sequence[str], kind: Any) -> Iterator[Any]:
    """What stands under some keywords anywhere within a schema, as far as it is of a kind."""
    if isinstance(schema, dict):
        yield from (schema[each] for each in keywords if isinstance(schema.get(each), kind))
    for each in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from _found(each, keywords, kind)


def _refuse(form: Constraint, why: str) -> NoReturn:
    told = " ".join(why.split())
    raise InvalidRequest(f"{form.source} is no form that can be kept to: {told:.300}", param=form.source)
