"""What a request holds from begin to end, in bytes, by the laws of cost: known before it runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from service.engine.allowlist import Lane
from service.engine.grammar import GRAMMAR_BYTES
from service.engine.request import Request
from service.engine.sampling import bytes_per_logit

# Of Python objects, measured with tracemalloc and rounded up, see tests/engine/test_answer.py:
LOGPROB_BYTES = 256  # per token with log-probability and per alternative, of prompt and answer
TOKEN_BYTES = 128  # per token of an answer that waits to be read: its id, and text of up to 24 characters at four bytes
ECHO_BYTES = 64  # per token of a prompt that is given back with an answer, copies on the way included
NUMBER_BYTES = 96  # per number of an embedding: in a list, and as JSON
GUESS_BYTES = 16  # per token of a text in which the last ones are looked for
SCORE_BYTES = 64 * 12  # per entry of the vocabulary while an echoed prompt is scored, 64 rows at a time


@dataclass(frozen=True)
class Need:
    """Bytes a request holds from begin to end, by term."""

    terms: Mapping[str, int]

    @cached_property
    def total(self) -> int:
        return sum(self.terms.values())


def need(request: Request, lane: Lane, prompt_tokens: int | None = None) -> Need:
    """Bytes the request holds under a backend; of a prompt of another length when `prompt_tokens` is given."""
    sampling, prompt = request.sampling, len(request.tokens) if prompt_tokens is None else prompt_tokens
    if request.is_pooled:
        vectors = 1 if request.late_chunks is None else -(-prompt // request.late_chunks)
        answer = vectors * lane.course.vector_width * NUMBER_BYTES
        return Need({"state": lane.state_bytes(prompt), "step": lane.course.prefill_bytes(prompt), "answer": answer})
    total = prompt + sampling.max_tokens
    guessed = max(0, min(lane.most_guessed(sampling), sampling.max_tokens - 2))  # each step draws one, the prompt's too
    is_scored = sampling.echo and sampling.logprobs is not None
    scored = request.n * sampling.max_tokens + (prompt if is_scored else 0)
    terms = {
        "state": request.n * lane.state_bytes(total),
        "step": max(lane.course.prefill_bytes(total), request.n * (1 + guessed) * lane.course.step_bytes(total - 1, total)),
        "logits": lane.course.vocab_size
        * max(request.n * (1 + guessed) * bytes_per_logit(sampling), SCORE_BYTES if is_scored else 0),
        "answer": request.n * (sampling.max_tokens * TOKEN_BYTES + (prompt * ECHO_BYTES if sampling.echo else 0)),
        "logprobs": 0 if sampling.logprobs is None else scored * LOGPROB_BYTES * (1 + sampling.logprobs),
        "grammar": 0 if sampling.grammar is None else (1 + request.n + (guessed > 0)) * GRAMMAR_BYTES,
        "guess": request.n * (lane.undo_bytes(total, guessed) + total * GUESS_BYTES if guessed else 0),
    }
    return Need(terms)


def longest_tokens(request: Request, lane: Lane, budget: int, max_length: int) -> int:
    """The longest total, prompt and max_tokens, that the budget holds under a backend; 0 when none does."""
    answer = request.total_tokens - len(request.tokens)
    low, high = 0, max(0, max_length - answer)  # prompt lengths: low fits (or is 0), above high is not asked
    while low < high:
        middle = (low + high + 1) // 2
        if need(request, lane, middle).total <= budget:
            low = middle
        else:
            high = middle - 1
    return low + answer if low else 0


def fitting(request: Request, lanes: Iterable[Lane], budget: int) -> tuple[str, ...]:
    """Names of the backends under which the request fits the whole budget."""
    return tuple(lane.name for lane in lanes if need(request, lane).total <= budget)
