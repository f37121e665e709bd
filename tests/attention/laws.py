"""The laws every backend is held to. A backend's test class inherits them and names its options and its edges."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from attention import AttentionBackend, HeadShape, PoolExhausted, Segments, StateTensor, backend_class, build, reference
from attention.backends.chunked import Chunked
from attention.backends.distinct import Distinct
from attention.backends.performer import Performer
from attention.kernels.features import native as features
from attention.kernels.softmax import native as softmax
from attention.parts import finish
from attention.truth import BOUNDS, check

HEADS = ((2, 2), (4, 2), (3, 1))  # query heads, key-value heads


def tokens(shape: HeadShape, count: int, seed: int = 0, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q (times scale), k, v of `count` tokens."""
    generator = torch.Generator().manual_seed(seed)
    heads = (shape.query_heads, shape.key_value_heads, shape.key_value_heads)
    q, k, v = (torch.randn(count, n, shape.head_width, generator=generator) for n in heads)
    return (q * scale).to(shape.dtype), k.to(shape.dtype), v.to(shape.dtype)


def need_native(shape: HeadShape) -> None:
    """Skip the test where this machine, or this install, is without the kernels in C for heads of a shape."""
    if reason := softmax.obstacle(shape):
        pytest.skip(reason)


def largest(difference: Tensor) -> float:
    return float(difference.abs().amax())


def extend_in(backend: AttentionBackend, q: Tensor, k: Tensor, v: Tensor, chunks: Sequence[int]) -> Tensor:
    """One sequence through `extend`, chunk by chunk, in the second of two layers."""
    pool = backend.new_pool(2, 2 * backend.state_bytes(len(q)))
    slot, past, answers = pool.allocate(len(q)), 0, []
    for count in chunks:
        part = slice(past, past + count)
        answers.append(backend.extend(q[part], k[part], v[part], Segments((count,), (past,)), pool, 1, [slot]))
        past += count
    assert past == len(q)
    return torch.cat(answers)


def entries(backend: AttentionBackend, name: str, total: int) -> int | None:
    """How many entries of a tensor of a state are of the first `total` tokens of a sequence; None: all of them."""
    if name not in ("k", "v"):
        return total // backend.options.block if name in ("high", "low") else None
    if isinstance(backend, Distinct):
        return backend._held(total - 1) + 1
    return backend.ring.place(total - 1) + 1 if isinstance(backend, Chunked | Performer) else total


class Laws:
    """Inherit as `class TestX(Laws)` and set the first two class variables.

    They run as on a CPU without AVX-512, so that `impl: auto` leaves all to torch.
    """

    name: ClassVar[str]
    variants: ClassVar[tuple[dict[str, Any], ...]]  # options, small enough that short sequences cross every edge
    width: ClassVar[int] = 32  # the kernels in C take it where they can run
    impl: ClassVar[str] = "torch"
    kv: ClassVar[torch.dtype | None] = None
    pauses: ClassVar[int] = 3  # of a prefill of 700 tokens, at least

    @pytest.fixture(autouse=True)
    def machine(self, without_avx512: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        for kernel in (softmax.KERNEL, features.KERNEL):
            monkeypatch.setattr(kernel, "home", without_avx512 / "attention")

    def backends(self, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 2)) -> list[AttentionBackend]:
        built = [build(self.name, options, HeadShape(*heads, self.width, dtype, kv=self.kv)) for options in self.variants]
        assert {backend.impl for backend in built} == {self.impl}
        return built

    def causal_backends(self, dtype: torch.dtype = torch.float32, heads: tuple[int, int] = (4, 2)) -> list[AttentionBackend]:
        causal = [backend for backend in self.backends(dtype, heads) if True in backend.directions]
        if not causal:
            pytest.skip(f"{self.name} has no causal form")
        return causal

    def lengths(self, backend: AttentionBackend) -> tuple[int, ...]:
        """Both sides of the pattern's edge and of the kernels' block of 128 rows, several blocks, no multiple of anything."""
        edge = min(backend.edge, 400)
        return tuple(sorted({1, 2, edge, edge + 1, 127, 128, 129, edge + 131, edge + 667}))

    @pytest.mark.parametrize("heads", HEADS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    def test_the_answer_equals_the_reference(self, dtype: torch.dtype, heads: tuple[int, int]) -> None:
        for backend in self.backends(dtype, heads):
            segments = Segments(self.lengths(backend))
            q, k, v = tokens(backend.shape, segments.total)
            for causal in backend.directions:
                answer = backend.attend(q, k, v, segments, causal=causal)
                for a, b, _ in segments.spans():
                    wanted = reference.answer(backend, q[a:b], k[a:b], v[a:b], causal=causal)
                    assert largest(answer[a:b].double() - wanted) <= BOUNDS[dtype], (backend.options, causal, b - a)

    def test_scores_far_beyond_the_range_of_exp_are_still_answered_right(self) -> None:
        # scores up to +-10 x 16 / 4 x 4: exp of them is infinite in float32. Rounding errors grow with the scores.
        for backend in self.backends():
            q, k, v = tokens(backend.shape, 300, scale=60.0)
            for causal in backend.directions:
                answer = backend.attend(q, k, v, Segments((300,)), causal=causal)
                wanted = reference.answer(backend, q, k, v, causal=causal)
                assert largest(answer.double() - wanted) <= 100 * BOUNDS[torch.float32]

    @pytest.mark.parametrize("seed", range(6))
    def test_extending_in_any_chunking_equals_attending(self, seed: int) -> None:
        draw = random.Random(seed)
        for backend in self.causal_backends():
            count = draw.choice(self.lengths(backend))
            chunks: list[int] = []
            while left := count - sum(chunks):
                chunks.append(left if len(chunks) == 6 else draw.choice((1, draw.randint(1, left))))
            q, k, v = tokens(backend.shape, count)
            whole = backend.attend(q, k, v, Segments((count,)), causal=True)
            assert largest(extend_in(backend, q, k, v, chunks) - whole) <= BOUNDS[torch.float32], chunks

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_token_after_another_equals_attending(self, dtype: torch.dtype) -> None:
        for backend in self.causal_backends(dtype):
            count = min(backend.edge, 400) + 40
            q, k, v = tokens(backend.shape, count)
            whole = backend.attend(q, k, v, Segments((count,)), causal=True)
            assert largest(extend_in(backend, q, k, v, [1] * count) - whole) <= BOUNDS[dtype]

    @pytest.mark.parametrize("poison", [1.0, float("nan"), float("inf")])
    def test_a_sequence_never_feels_its_batch_neighbours(self, poison: float) -> None:
        for backend in self.backends():
            q, k, v = tokens(backend.shape, 140 + 33 + 140)
            for causal in backend.directions:
                alone = backend.attend(q[140:173], k[140:173], v[140:173], Segments((33,)), causal=causal)
                for x in (q, k, v):
                    x[:140] *= poison
                    x[173:] *= poison
                together = backend.attend(q, k, v, Segments((140, 33, 140)), causal=causal)
                assert torch.equal(together[140:173], alone)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_steps_are_the_same_to_the_bit_alone_and_in_a_batch(self, dtype: torch.dtype) -> None:
        steps = 10
        for backend in self.causal_backends(dtype):
            past = (5, 129, 250, 64, 700, 1100)  # steps of several sizes, one of which grows on the way
            pool = backend.new_pool(1, 1 << 30)
            slots, copies = [], []
            for count in past:
                slots.append(pool.allocate(count + steps))
                backend.extend(*tokens(backend.shape, count), Segments((count,)), pool, 0, [slots[-1]])
                copies.append(pool.copy(slots[-1]))
            for step in range(steps):
                q, k, v = tokens(backend.shape, len(past), scale=1 + step / 10)
                at = tuple(count + step for count in past)
                together = backend.extend(q, k, v, Segments((1,) * len(past), at), pool, 0, slots)
                for n, slot in enumerate(copies):
                    one = slice(n, n + 1)
                    alone = backend.extend(q[one], k[one], v[one], Segments((1,), (at[n],)), pool, 0, [slot])
                    assert torch.equal(alone[0], together[n]), (backend.options, at[n])

    def test_an_extend_that_is_paused_for_steps_is_the_same_to_the_bit(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 700)
            pool = backend.new_pool(1, 1 << 30)
            slot, copy, other = pool.allocate(700), pool.allocate(700), pool.allocate(700)
            whole = backend.extend(q, k, v, Segments((700,)), pool, 0, [slot])
            paused = torch.empty_like(whole)
            pauses = 0
            for at, _ in enumerate(backend.extending(q, k, v, Segments((700,)), pool, 0, [copy], paused)):
                one = slice(at, at + 1)
                backend.extend(q[one], k[one], v[one], Segments((1,), (at,)), pool, 0, [other])
                pauses += 1
            assert torch.equal(paused, whole) and pauses >= self.pauses

    def test_poison_in_one_slot_never_reaches_another(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 2)
            pool = backend.new_pool(1, 1 << 30)
            slots = [pool.allocate(4), pool.allocate(4)]
            k[0, 0, 0], v[0] = float("nan"), float("inf")
            answer = backend.extend(q, k, v, Segments((1, 1)), pool, 0, slots)
            assert answer[1].isfinite().all()
            _, told = reference.told(backend, k, v)
            assert largest(answer[1] - told[1].repeat_interleave(backend.shape.group, 0)) <= BOUNDS[torch.float32]

    def test_later_tokens_never_change_earlier_causal_answers(self) -> None:
        for backend in self.causal_backends():
            count = min(backend.edge, 400) + 140
            q, k, v = tokens(backend.shape, count)
            before = backend.attend(q, k, v, Segments((count,)), causal=True)
            for first in (1, 60, count - 70, count - 1):
                for scale in (2.0, 30.0, 1000.0):
                    later_q, later_k, later_v = q.clone(), k.clone(), v.clone()
                    later_q[first:] *= -scale
                    later_k[first:] *= scale
                    later_v[first:] += scale
                    after = backend.attend(later_q, later_k, later_v, Segments((count,)), causal=True)
                    assert torch.equal(after[:first], before[:first]), (backend.options, first, scale)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
    def test_a_token_that_is_no_number_reaches_no_row_that_does_not_see_it(self, dtype: torch.dtype, poison: float) -> None:
        for backend in self.backends(dtype):
            count = min(backend.edge, 400) + 300
            for causal in backend.directions:
                if not (causal or backend.exact):
                    continue  # all rows see all keys
                for at in (2, 150, count - 70, count - 2):
                    q, k, v = tokens(backend.shape, count)
                    before = backend.attend(q, k, v, Segments((count,)), causal=causal)
                    seen = reference.visible(backend, torch.arange(count), count, causal)[:, at]
                    for n in range(3):  # its query, its key, its value
                        poisoned = [q.clone(), k.clone(), v.clone()]
                        poisoned[n][at] = poison
                        after = backend.attend(*poisoned, Segments((count,)), causal=causal)
                        assert torch.equal(after[~seen], before[~seen]), (backend.options, causal, at)
                        assert after[at].isnan().all() or not math.isnan(poison)

    def test_a_later_token_that_is_no_number_leaves_the_rows_of_its_chunk_alone(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 400)
            before = extend_in(backend, q, k, v, [230, 170])
            k[390], v[391] = float("nan"), float("inf")
            after = extend_in(backend, q, k, v, [230, 170])
            assert torch.equal(after[:390], before[:390])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_sequence_of_one_token_beside_a_longer_one_is_the_same_to_the_bit_alone(self, dtype: torch.dtype) -> None:
        for backend in self.causal_backends(dtype):
            pool = backend.new_pool(1, 1 << 30)
            past, lengths = (300, 40, 700), (1, 90, 1)
            slots = [pool.allocate(count + 90) for count in past]
            for slot, count in zip(slots, past, strict=True):
                backend.extend(*tokens(backend.shape, count), Segments((count,)), pool, 0, [slot])
            copies = [pool.copy(slot) for slot in slots]
            q, k, v = tokens(backend.shape, 92)
            together = backend.extend(q, k, v, Segments(lengths, past), pool, 0, slots)
            for n, (a, b, _) in enumerate(Segments(lengths).spans()):
                step = Segments(lengths[n : n + 1], past[n : n + 1])
                assert torch.equal(backend.extend(q[a:b], k[a:b], v[a:b], step, pool, 0, [copies[n]]), together[a:b])

    def test_the_inputs_are_left_as_they_were(self) -> None:
        for backend in self.backends():
            for count in (1, 150):
                given_ = tokens(backend.shape, count)
                kept = [x.clone() for x in given_]
                for causal in backend.directions:
                    backend.attend(*given_, Segments((count,)), causal=causal)
                if True in backend.directions:
                    extend_in(backend, *given_, [count])
                assert all(torch.equal(x, y) for x, y in zip(given_, kept, strict=True))

    def test_strided_inputs_are_answered_like_contiguous_ones(self) -> None:
        for backend in self.backends():
            shape = backend.shape
            heads = shape.query_heads + 2 * shape.key_value_heads
            packed = torch.randn(150, heads, shape.head_width, generator=torch.Generator().manual_seed(1))
            q, k, v = packed.split([shape.query_heads, shape.key_value_heads, shape.key_value_heads], 1)
            for causal in backend.directions:
                strided = backend.attend(q, k, v, Segments((150,)), causal=causal)
                tight = backend.attend(q.contiguous(), k.contiguous(), v.contiguous(), Segments((150,)), causal=causal)
                assert largest(strided - tight) <= BOUNDS[torch.float32]

    def test_pool_bytes_follow_the_law_and_release_gives_all_back(self) -> None:
        for backend in self.causal_backends(torch.bfloat16):
            pool = backend.new_pool(3, 1 << 30)
            for count in self.lengths(backend):
                slot = pool.allocate(count)
                real = sum(tensor.untyped_storage().nbytes() for tensor in pool.tensors(slot).values())
                assert real == pool.bytes_in_use == 3 * backend.cost(1, count, causal=True).state_bytes
                copy = pool.copy(slot)
                assert pool.bytes_in_use == 2 * real
                pool.release(slot)
                pool.release(copy)
                assert pool.bytes_in_use == 0 and len(pool) == 0

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_state_carried_into_slots_of_other_sizes_goes_on_to_the_same_bits(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fresh = StateTensor.new

        def poisoned(spec: StateTensor, *where: Any) -> Tensor:
            no_number = -1 if spec.dtype == torch.int8 else float("nan")  # a scale whose bytes are all -1 is NaN
            return fresh(spec, *where) if spec.fill is not None else fresh(spec, *where).fill_(no_number)

        monkeypatch.setattr(StateTensor, "new", poisoned)
        for backend in self.causal_backends(dtype):
            for count in (1, 60, 256, 300, min(backend.edge, 400), min(backend.edge, 400) + 131):
                pool, kept = backend.new_pool(1, 1 << 30), backend.new_pool(1, 1 << 30)
                ahead = 90 if backend.keeps_all else 0  # then the state of a longer text has that of its beginning
                q, k, v = tokens(backend.shape, count + 133)
                slot, longer, total = pool.allocate(count + 133), pool.allocate(count + ahead), count + ahead
                for each, end in ((slot, count), (longer, total)):
                    backend.extend(q[:end], k[:end], v[:end], Segments((end,)), pool, 0, [each])
                other = pool.adopt(kept, kept.adopt(pool, longer, total, total), count, count + 133)
                for past, end in ((count, count + 1), (count + 1, count + 132), (count + 132, count + 133)):
                    part, step = slice(past, end), Segments((end - past,), (past,))
                    wanted, found = (backend.extend(q[part], k[part], v[part], step, pool, 0, [s]) for s in (slot, other))
                    assert torch.equal(found, wanted), (backend.options, count, past)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_steps_that_are_taken_back_leave_answers_and_state_as_steps_that_never_were(
        self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fresh = StateTensor.new
        zeros = lambda spec, *where: fresh(spec, *where).fill_(spec.fill or 0.0)  # noqa: E731
        monkeypatch.setattr(StateTensor, "new", zeros)  # what no token has written can be compared, too
        for backend in self.causal_backends(dtype):
            edges = {1, 60, 253, 300, max(backend.edge - 2, 1), backend.edge + 1, 2 * backend.edge + 131}
            for past in sorted(min(edge, 900) for edge in edges):
                for width, kept in ((5, 1), (5, 3), (5, 5), (2, 1)):
                    self.check_taking_back(backend, past, min(width, backend.runway(past)), kept)

    def check_taking_back(self, backend: AttentionBackend, past: int, width: int, kept: int) -> None:
        """Steps of several tokens of one sequence beside another, all but `kept` of them taken back, then further ones."""
        kept, pool = min(kept, width), backend.new_pool(1, 1 << 30)
        slots = [pool.allocate(past + 40) for _ in range(4)]
        for slot, seed in zip(slots, (0, 0, 1, 1), strict=True):
            backend.extend(*tokens(backend.shape, past, seed), Segments((past,)), pool, 0, [slot])
        (one, plain, other, other_plain), text = slots, tokens(backend.shape, width + 12, seed=2)

        def steps(slot: int, start: int, count: int) -> list[Tensor]:
            rows = range(start - past, start - past + count)
            return [backend.extend(*(x[i : i + 1] for x in text), Segments((1,), (past + i,)), pool, 0, [slot]) for i in rows]

        q, k, v = (torch.cat((x[:width], x[:1])) for x in text)
        out, batch = torch.empty_like(q), Segments((width, 1), (past, past))
        finish(backend.extending(q, k, v, batch, pool, 0, [one, other], out, by_steps=True))
        pool.take_back(one, past + kept)
        assert torch.equal(out[:kept], torch.cat(steps(plain, past, kept))), (backend.options, past, width, kept)
        assert torch.equal(out[width:], steps(other_plain, past, 1)[0])
        for found, wanted in ((one, plain), (other, other_plain)):
            total = past + (kept if found == one else 1)
            for name, tensor in pool.tensors(found).items():
                count = entries(backend, name, total)
                assert torch.equal(tensor[0, :count], pool.tensors(wanted)[name][0, :count]), (backend.options, name, past)
        again = [torch.cat(steps(slot, past + kept, 8)) for slot in (one, plain)]
        assert torch.equal(*again), (backend.options, past, width, kept)

    def test_tokens_are_taken_back_only_as_far_as_single_steps_brought_them(self) -> None:
        for backend in self.causal_backends():
            pool = backend.new_pool(2, 1 << 30)
            slot, width = pool.allocate(60), min(4, backend.runway(20))
            for layer in range(2):
                backend.extend(*tokens(backend.shape, 20), Segments((20,)), pool, layer, [slot])
            q, k, v = tokens(backend.shape, width)
            batch, out = Segments((width,), (20,)), torch.empty_like(q)
            for tokens_ in (19, 21):
                with pytest.raises(ValueError, match="cannot be taken back"):
                    pool.take_back(slot, tokens_)
            for layer in range(2):
                finish(backend.extending(q, k, v, batch, pool, layer, [slot], out, by_steps=True))
            with pytest.raises(ValueError, match="cannot be taken back"):
                pool.take_back(slot, 20)  # what came first was no guess
            pool.take_back(slot, 21)
            pool.take_back(slot, 21)  # nothing is left to be taken back
            if (runway := backend.runway(21)) < 30:
                with pytest.raises(ValueError, match="fewer single steps"):
                    long = tokens(backend.shape, runway + 1)
                    batch, out = Segments((runway + 1,), (21,)), torch.empty_like(long[0])
                    finish(backend.extending(*long, batch, pool, 0, [slot], out, by_steps=True))
            backend.extend(*tokens(backend.shape, 1), Segments((1,), (21,)), pool, 0, [slot])

    def test_what_is_kept_of_tokens_that_may_be_taken_back_follows_the_law(self) -> None:
        for backend in self.causal_backends(torch.bfloat16):
            for past in (30, min(backend.edge + 70, 900)):
                pool, width = backend.new_pool(1, 1 << 30), min(4, backend.runway(past))
                slot = pool.allocate(past + width)
                backend.extend(*tokens(backend.shape, past), Segments((past,)), pool, 0, [slot])
                q, k, v = tokens(backend.shape, width)
                batch, out = Segments((width,), (past,)), torch.empty_like(q)
                finish(backend.extending(q, k, v, batch, pool, 0, [slot], out, by_steps=True))
                (undo,) = pool.undo([slot], 0)
                assert undo.nbytes <= pool.undo_bytes(past + width, width - 1), (backend.options, past)

    def test_a_slot_is_taken_over_for_no_tokens_but_those_it_holds(self) -> None:
        for backend in self.causal_backends():
            pool, stranger = backend.new_pool(1, 1 << 30), build("dense", None, backend.shape).new_pool(1, 1 << 30)
            slot = pool.allocate(40)
            backend.extend(*tokens(backend.shape, 8), Segments((8,)), pool, 0, [slot])
            for count, most in ((9, 20), (0, 20), (8, 7), *(() if backend.keeps_all else ((7, 20),))):
                with pytest.raises(ValueError, match=str(count)):
                    pool.adopt(pool, slot, count, most)
            with pytest.raises(ValueError, match="of the same backends only"):
                stranger.adopt(pool, slot, 8, 20)
            assert len(pool) == 1 and len(stranger) == 0

    def test_a_full_pool_refuses_and_keeps_its_count(self) -> None:
        for backend in self.causal_backends():
            pool = backend.new_pool(2, 2 * backend.state_bytes(50))
            slot = pool.allocate(50)
            for take, what in ((pool.allocate, 50), (pool.copy, slot)):
                with pytest.raises(PoolExhausted) as refusal:
                    take(what)
                assert refusal.value.needed_bytes == pool.bytes_in_use and refusal.value.free_bytes == 0
            pool.release(slot)
            with pytest.raises(KeyError):
                pool.release(slot)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_the_served_truth_holds(self, dtype: torch.dtype) -> None:
        for backend in self.backends(dtype):
            truth = check(backend)
            assert truth.passed, truth

    def test_wrong_input_is_refused_with_what_was_wanted_and_what_came(self) -> None:
        for backend in self.backends():
            q, k, v = tokens(backend.shape, 8)
            causal = backend.directions[0]
            good, d = Segments((8,)), self.width
            for wrong_q, wrong_k, segments, message in (
                (q[:7], k, good, rf"q must have shape \(8, 4, {d}\), received \(7, 4, {d}\)"),
                (q, k[:, :1], good, rf"k must have shape \(8, 2, {d}\), received \(8, 1, {d}\)"),
                (q[..., :8], k, good, r"q must have shape"),
                (q.double(), k, good, r"q must be torch.float32 on cpu, received torch.float64 on cpu"),
                (q.repeat(1, 1, 2)[..., ::2], k, good, r"the elements of a head of q must lie side by side, received strides"),
                (q, k.mT.contiguous().mT, good, r"the elements of a head of k must lie side by side, received strides"),
                (q, k, Segments((8,), (3,)), r"attend takes whole sequences, received past \(3,\)"),
            ):
                with pytest.raises(ValueError, match=message):
                    backend.attend(wrong_q, wrong_k, v, segments, causal=causal)

    def test_a_tensor_that_asks_for_gradients_is_refused_unless_none_are_taken(self) -> None:
        for backend in self.backends():
            causal = backend.directions[0]
            with torch.inference_mode(False):
                q, k, v = tokens(backend.shape, 8)
                k.requires_grad_()
                with pytest.raises(ValueError, match="attention here has no gradients, and k asks for them"):
                    backend.attend(q, k, v, Segments((8,)), causal=causal)
                with torch.no_grad():
                    assert backend.attend(q, k, v, Segments((8,)), causal=causal).isfinite().all()

    def test_a_pool_that_is_not_the_backends_own_is_refused(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 8)
            shape = HeadShape(2, 1, self.width)
            others = [build("dense", None, backend.shape), build(self.name, backend.options, shape)]
            for other in [*others, build(self.name, backend.options, HeadShape(4, 2, self.width, torch.bfloat16))]:
                pool = other.new_pool(1, 1 << 30)
                with pytest.raises(ValueError, match="the pool must be of this backend"):
                    backend.extend(q, k, v, Segments((8,)), pool, 0, [pool.allocate(8)])

    def test_a_past_that_is_not_what_the_slot_holds_at_that_layer_is_refused(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 8)
            pool = backend.new_pool(2, 1 << 30)
            slot = pool.allocate(600)
            backend.extend(q, k, v, Segments((8,)), pool, 0, [slot])
            for layer, past, held in ((0, 0, 8), (0, 7, 8), (0, 500, 8), (1, 8, 0)):
                with pytest.raises(
                    ValueError, match=f"past of slot {slot} must be the {held} tokens .* layer {layer}, .* {past}"
                ):
                    backend.extend(q, k, v, Segments((8,), (past,)), pool, layer, [slot])
            copy = pool.copy(slot)
            assert torch.equal(
                backend.extend(q, k, v, Segments((8,), (8,)), pool, 0, [slot]),
                backend.extend(q, k, v, Segments((8,), (8,)), pool, 0, [copy]),
            )
            for layer in (-1, 2):
                with pytest.raises(ValueError, match=f"the pool has layers 0 to 1, received {layer}"):
                    backend.extend(q, k, v, Segments((8,), (16,)), pool, layer, [slot])
            pool.release(slot)
            with pytest.raises(ValueError, match=f"slot {slot} is not in use"):
                backend.extend(q, k, v, Segments((8,), (16,)), pool, 0, [slot])

    def test_an_extend_that_was_given_up_leaves_a_slot_that_is_refused(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 700)
            pool = backend.new_pool(1, 1 << 30)
            slot = pool.allocate(1400)
            for _ in backend.extending(q, k, v, Segments((700,)), pool, 0, [slot], torch.empty_like(q)):
                break
            for past in (0, 700):
                with pytest.raises(ValueError, match=f"slot {slot} is being extended .* its state is undefined"):
                    backend.extend(q, k, v, Segments((700,), (past,)), pool, 0, [slot])

    def test_an_answer_is_written_into_nothing_that_does_not_fit_it(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 8)
            pool = backend.new_pool(1, 1 << 30)
            for wrong in (q[:7], q.double(), torch.empty(8, 4, 2 * self.width)[..., : self.width], q[:1].expand(8, -1, -1)):
                with pytest.raises(ValueError, match="out must be tight"):
                    next(backend.extending(q, k, v, Segments((8,)), pool, 0, [pool.allocate(8)], wrong))

    @pytest.mark.parametrize("count", [-5, 0, 1 << 63])
    def test_a_slot_or_a_cost_of_no_tokens_or_of_more_than_there_can_be_is_refused(self, count: int) -> None:
        for backend in self.backends():
            causal = backend.directions[0]
            with pytest.raises(ValueError, match=f"received {count}"):
                backend.new_pool(1, 1 << 30).allocate(count)
            for queries, keys in ((count, 5), (3, count)):
                with pytest.raises(ValueError, match=f"received {queries} of {keys}"):
                    backend.cost(queries, keys, causal=causal)

    @pytest.mark.parametrize("number", [1 << 63, 1 << 70])
    def test_a_number_that_no_machine_word_holds_is_refused_by_the_name_of_its_option(self, number: int) -> None:
        for name, field in backend_class(self.name).Options.model_fields.items():
            if field.annotation is int:
                with pytest.raises(ValueError, match=name):
                    build(self.name, {name: number - number % 2 + 1}, HeadShape(2, 2, self.width))

    def test_a_direction_without_a_definition_is_refused(self) -> None:
        for backend in self.backends():
            q, k, v = tokens(backend.shape, 8)
            for causal in {True, False} - set(backend.directions):
                with pytest.raises(ValueError, match=f"received causal={causal}"):
                    backend.attend(q, k, v, Segments((8,)), causal=causal)
            if True not in backend.directions:
                pool = backend.new_pool(1, 1 << 20)
                with pytest.raises(ValueError, match="no causal form"):
                    backend.extend(q, k, v, Segments((8,)), pool, 0, [pool.allocate(8)])

    def test_a_slot_refuses_more_tokens_than_it_was_taken_for(self) -> None:
        for backend in self.causal_backends():
            q, k, v = tokens(backend.shape, 8)
            pool = backend.new_pool(1, 1 << 30)
            slot = pool.allocate(7)
            with pytest.raises(ValueError, match=r"holds at most 7 tokens, received 8"):
                backend.extend(q, k, v, Segments((8,)), pool, 0, [slot])
            with pytest.raises(ValueError, match="slots must name 2 slots"):
                backend.extend(q, k, v, Segments((4, 4)), pool, 0, [slot])
            with pytest.raises(ValueError, match="slots must name 2 slots"):
                backend.extend(q[:2], k[:2], v[:2], Segments((1, 1)), pool, 0, [slot, slot])

    def test_an_unknown_option_is_refused_by_name(self) -> None:
        with pytest.raises(ValueError, match="no_such_option"):
            build(self.name, {"no_such_option": 1}, HeadShape(2, 2, self.width))
