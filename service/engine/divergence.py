"""How far what a backend would say next is from what a reference would, behind the same tokens.

Both read the text once, as a prompt is read, one after the other; then their next-token distributions are compared at some
of its places: KL(reference || served) (Kullback and Leibler 1951), and whether the likeliest token is the same. Distributions
are the model's own, before temperature and filters. In parts, on the model thread. Cost: two prefills, and the logits of the
places.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from attention import Segments
from service.engine.allowlist import Lane
from service.engine.runner import Runner

ROWS = 8  # places whose logits exist at one time
LOGIT_BYTES = 50  # peak of temporaries per entry of such a row, see `test_what_a_pass_holds_is_within_what_is_lent`


@dataclass(frozen=True)
class Divergence:
    """What was found at some places of a text."""

    nats: tuple[float, ...]  # KL(reference || served) at each
    agreed: int  # places at which both find the same token likeliest


def kl(reference: Tensor, served: Tensor) -> Tensor:
    """KL(reference || served) in nats between rows of logits (N, V): float64 (N,).

    An entry that is -inf in the reference counts nothing; what rounding takes below zero is zero.
    """
    p, q = reference.double().log_softmax(-1), served.double().log_softmax(-1)
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum(-1).clamp_min(0)


@torch.inference_mode()
def diverging(
    runner: Runner, reference: Lane, served: Lane, tokens: array[int], places: Sequence[int], total: int
) -> Generator[None, None, Divergence]:
    """What two lanes would say behind each of some places of a text, compared.

    places: ascending indices into the tokens. total: tokens that the text might have come to.
    """
    theirs = yield from _hidden(runner, reference, tokens, places, total)
    ours = yield from _hidden(runner, served, tokens, places, total)
    nats, agreed = list[float](), 0
    for a in range(0, len(places), ROWS):
        wanted = runner.logits(theirs[a : a + ROWS])
        yield
        found = runner.logits(ours[a : a + ROWS])
        yield
        nats += kl(wanted, found).tolist()
        agreed += int((wanted.argmax(-1) == found.argmax(-1)).sum())
        yield
    return Divergence(tuple(nats), agreed)


def _hidden(runner: Runner, lane: Lane, tokens: array[int], places: Sequence[int], total: int) -> Generator[None, None, Tensor]:
    """Hidden states (N, C) at the places of a text, read in a prompt's chunks into a state that goes with the reading."""
    lane = lane.apart()
    slots, past, found = [lane.allocate(len(tokens))], 0, list[Tensor]()
    while past < len(tokens):
        end = min(len(tokens), lane.course.next_end(past))
        segments = Segments((end - past,), (past,))
        hidden = yield from runner.hidden(
            tokens[past:end],
            segments,
            lambda layer, question, segments, out: lane.answering(layer, question, segments, slots, out),
            [total],
        )
        found.append(hidden[[place - past for place in places if past <= place < end]])
        past = end
    return torch.cat(found)


def reading_bytes(reference: Lane, served: Lane, length: int, places: int, width: int) -> int:
    """Most bytes that `diverging` holds: of the two readings the larger, hidden states of `width` bytes, and logits."""
    reading = max(lane.state_bytes(length) + lane.course.prefill_bytes(length) for lane in (reference, served))
    logits = min(places, ROWS) * reference.course.vocab_size * LOGIT_BYTES
    ids = 16 * reference.course.next_end(0)  # and positions, of a chunk
    return max(reading + ids, logits) + 3 * places * width
