"""Who runs next: the laws of overtaking, of sharing time, and of waiting for bytes, without a model call."""

from __future__ import annotations

import itertools
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attention import whole
from service.config import EngineConfig
from service.engine.admission import Ledger, Offer
from service.engine.ahead import together
from service.engine.allowlist import Lane
from service.engine.answer import Answer
from service.engine.forecast import Attending, Course, Pace, Ramp
from service.engine.job import Job
from service.engine.need import Need
from service.engine.prefixes import Prefixes
from service.engine.request import Request, Sampling
from service.engine.scheduler import ENCODED, Scheduler
from service.engine.work import Work
from tests.engine import world

MODEL = world.make_model()
TOKENIZER = world.make_tokenizer()
DENSE = world.make_backends(MODEL).by_name["dense"]
LINE = Ramp(0.0, 1e-9)
PACE = Pace(2, Ramp(0.001, 1e-5), Ramp(0.001, 1e-5), {DENSE: Attending(LINE, LINE, LINE)}, DENSE)
BUDGET = 10_000


CHUNK = 128
COURSE = Course(MODEL, PACE, world.MAX_LENGTH, CHUNK)
LANE = Lane("dense", DENSE, COURSE, DENSE.new_pool(2, BUDGET))


def make_scheduler(can_pack: bool = False, **config: object) -> Scheduler:
    ledger = Ledger(BUDGET)
    return Scheduler(EngineConfig(chunk_tokens=CHUNK, **config), ledger, can_pack, Prefixes(ledger, CHUNK, 0.1, False))


def make_job(length: int, arrival: float = 0.0, needed: int = 100, max_tokens: int = 4, kind: str = "completion") -> Job:
    request = Request("r", kind, [1] * length, sampling=Sampling(max_tokens=max_tokens), arrival=arrival)  # type: ignore[arg-type]
    offer = Offer(LANE, "default", Need({"state": needed}), array("i", request.tokens))
    return Job.create(request, offer, Answer(lambda: None), TOKENIZER)


def finish(work: Work, scheduler: Scheduler) -> list[Job]:
    """What the engine does with a finished step, as far as a scheduler sees it. Returns the jobs that are done."""
    done = []
    for member in work.members:
        sequence, job = member.sequence, member.sequence.job
        sequence.past, sequence.is_held = member.end, False
        if sequence.past == sequence.length:
            sequence.output.append(1)
        if (job.is_pooled and sequence.past == len(job.prompt)) or len(sequence.output) > job.request.sampling.max_tokens:
            sequence.is_done = True
            scheduler.remove(job)
            done.append(job)
    return done


def prefill_order(scheduler: Scheduler, now: float) -> list[int]:
    """Prompt lengths in the order in which prefills end, time standing still."""
    order = []
    while (work := scheduler.next(now)) is not None:
        order += [len(job.prompt) for job in finish(work, scheduler)]
    return order


def test_what_is_ahead_by_call_is_together_what_is_in_front() -> None:
    """A call of several prompts is one, and so are all that have no ticket."""
    scheduler = make_scheduler()
    scheduler.waiting = [make_job(length, max_tokens=length) for length in (1500, 20, 300, 40)]
    for job, ticket in zip(scheduler.waiting, ("a", "b", "a", ""), strict=True):
        job.request.ticket = ticket
    long, short, third, other = (job.ahead for job in scheduler.waiting)
    assert scheduler.ahead() == {"a": (long.prefill + third.prefill, long.decode), "b": short, "": other}
    assert together(scheduler.ahead().values()).seconds == pytest.approx(scheduler.seconds_in_front())


def test_a_short_prompt_that_comes_later_overtakes_a_long_one() -> None:
    scheduler = make_scheduler()
    scheduler.waiting = [make_job(1500, arrival=0, max_tokens=0), make_job(20, arrival=0.01, max_tokens=0)]
    assert prefill_order(scheduler, now=0.02) == [20, 1500]


def test_a_long_prompt_that_has_waited_in_proportion_is_not_overtaken() -> None:
    scheduler = make_scheduler()
    long, short = make_job(1500, arrival=0, max_tokens=0), make_job(20, arrival=1000, max_tokens=0)
    scheduler.waiting = [short, long]
    assert prefill_order(scheduler, now=1000 + short.service_seconds) == [1500, 20]


def test_a_long_prefill_gives_way_at_its_next_chunk() -> None:
    scheduler = make_scheduler()
    scheduler.waiting = [make_job(1500)]
    first = scheduler.next(0.01)
    assert first is not None and first.tokens <= CHUNK
    finish(first, scheduler)
    scheduler.waiting = [make_job(20, arrival=0.01)]
    second = scheduler.next(0.02)
    assert second is not None and second.tokens == 20


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 1500), st.floats(0, 5)), min_size=1, max_size=5), st.integers(100, 400))
def test_under_a_flood_of_short_prompts_none_waits_for_ever(jobs: list[tuple[int, float]], flood: int) -> None:
    """Short prompts come as fast as they can be served. Shortest first would never serve the long ones."""
    scheduler, now = make_scheduler(), 5.0
    scheduler.waiting = [make_job(length, arrival, max_tokens=0) for length, arrival in jobs]
    originals, ends = list(scheduler.waiting), {}
    short, total = make_job(flood).service_seconds, sum(job.service_seconds for job in originals)
    arrivals = itertools.count(5.0, short)
    next_arrival = next(arrivals)
    while not all(job in ends for job in originals):
        while next_arrival <= now:
            scheduler.waiting.append(make_job(flood, next_arrival, max_tokens=0))
            next_arrival = next(arrivals)
        work = scheduler.next(now)
        assert work is not None
        now += work.predicted_seconds
        ends |= dict.fromkeys(finish(work, scheduler), now)
    for job in originals:
        # While the originals take `total`, total / short newcomers pile up and reach as high a ratio; the job's own ratio
        # passes it when it has waited so many times its length. Twice that, since newcomers come whole.
        assert ends[job] - 5.0 <= 2 * (total + short) * (2 + job.service_seconds / short)


def test_streams_get_their_share_of_the_time_behind_a_slice_of_prefill() -> None:
    scheduler = make_scheduler(decode_share=0.5)
    stream = make_job(10, max_tokens=100_000)
    scheduler.waiting = [stream]
    finish(scheduler.next(0.0), scheduler)  # type: ignore[arg-type]
    scheduler.waiting = [make_job(2000, kind="embedding")]
    spent = {"decode": 0.0, "embed": 0.0}
    while scheduler.waiting or len(scheduler.running) == 2:
        work = scheduler.next(0.0)
        assert work is not None
        spent[work.kind] += work.predicted_seconds
        scheduler.account(work, work.predicted_seconds)
        finish(work, scheduler)
    assert 0.45 < spent["decode"] / (spent["decode"] + spent["embed"]) < 0.6  # whole steps round the share up


def test_a_decode_step_that_has_paused_keeps_the_share_of_the_streams() -> None:
    scheduler = make_scheduler(decode_share=0.5)
    scheduler.waiting = [make_job(10, max_tokens=100)]
    finish(scheduler.next(0.0), scheduler)  # type: ignore[arg-type]
    paused = scheduler.next(0.0)
    assert paused is not None and paused.kind == "decode"
    scheduler.account(paused, 0.01)
    scheduler.pause(paused)
    scheduler.waiting = [make_job(100, kind="embedding") for _ in range(40)]
    before = 0
    while (work := scheduler.next(1.0)) is not paused:
        assert work is not None
        scheduler.account(work, work.predicted_seconds)
        finish(work, scheduler)
        before += 1
    assert before == 1


def test_a_paused_decode_step_takes_turns_with_the_streams_of_other_backends() -> None:
    scheduler = make_scheduler()
    other = Lane("other", DENSE, COURSE, LANE.pool)
    scheduler.waiting = [make_job(10), make_job(10)]
    scheduler.waiting[1].lane = other
    for _ in range(2):
        finish(scheduler.next(0.0), scheduler)  # type: ignore[arg-type]
    served = []
    paused = scheduler.next(0.0)
    assert paused is not None
    for _ in range(6):
        scheduler.pause(paused)
        work = scheduler.next(0.0)
        assert work is not None
        served.append(work.lane.name)
        if work is not paused:
            for member in work.members:  # as a step that ends, of a stream that never does
                member.sequence.is_held = False
            scheduler.paused.remove(paused)
    assert sorted(served[:2]) == sorted(served[2:4]) == sorted(served[4:]) == ["dense", "other"]


def test_all_streams_of_a_backend_decode_in_one_step() -> None:
    scheduler = make_scheduler()
    scheduler.waiting = [make_job(10 + i, max_tokens=9) for i in range(5)]
    for _ in range(5):
        finish(scheduler.next(0.0), scheduler)  # type: ignore[arg-type]
    work = scheduler.next(0.0)
    assert work is not None and work.kind == "decode" and len(work.members) == 5


def test_short_prompts_share_a_step_when_they_may() -> None:
    for can_pack, expected in ((True, 3), (False, 1)):
        scheduler = make_scheduler(can_pack)
        scheduler.waiting = [make_job(10) for _ in range(3)]
        work = scheduler.next(0.0)
        assert work is not None and len(work.members) == expected


def test_an_encoder_reads_more_texts_in_a_step_than_a_decoder_embeds() -> None:
    members = list[int]()
    for lane in (LANE, Lane("dense", DENSE, COURSE, whole(DENSE).new_pool(2, BUDGET))):
        scheduler = make_scheduler()
        scheduler.waiting = [make_job(CHUNK // 2, kind="embedding") for _ in range(3 * ENCODED)]
        for job in scheduler.waiting:
            job.lane = lane
        work = scheduler.next(0.0)
        assert work is not None
        members.append(len(work.members))
    assert members == [2, 2 * ENCODED]


def test_a_step_of_texts_is_patient_until_somebody_comes_who_will_stream() -> None:
    scheduler = make_scheduler()
    scheduler.waiting = [make_job(10, kind="embedding"), make_job(10, kind="embedding")]
    work = scheduler.next(0.0)
    assert work is not None and scheduler.is_patient(work)
    scheduler.waiting.append(make_job(10))
    assert not scheduler.is_patient(work)


def test_nobody_enters_but_those_whose_step_comes() -> None:
    scheduler = make_scheduler(can_pack=True)
    first, mate, other_kind, too_much = make_job(60), make_job(20), make_job(10, kind="embedding"), make_job(100)
    jobs = [first, mate, other_kind, too_much]
    for place, job in enumerate(jobs):
        job.request.arrival, job.service_seconds = float(place), 1.0  # the most urgent first
    scheduler.waiting = list(jobs)
    work = scheduler.next(10.0)
    assert work is not None and [member.job for member in work.members] == scheduler.running == [first, mate]


def test_prompts_of_two_kinds_never_share_a_step() -> None:
    scheduler = make_scheduler(can_pack=True)
    scheduler.waiting = [make_job(10), make_job(10, kind="embedding")]
    work = scheduler.next(0.0)
    assert work is not None and len(work.members) == 1


def test_a_job_enters_only_when_its_bytes_are_free() -> None:
    scheduler = make_scheduler()
    scheduler.waiting = [make_job(30, arrival=-1, needed=6000), make_job(30, needed=6000), make_job(1500, needed=4000)]
    while (work := scheduler.next(0.0)) is not None and work.kind == "prefill":
        assert sum(job.need.total for job in scheduler.running) <= BUDGET
        finish(work, scheduler)
    assert [job.need.total for job in scheduler.running] == [6000, 4000]


def test_a_big_job_is_passed_by_small_ones_until_its_patience_ends() -> None:
    def scene(now: float) -> Scheduler:
        scheduler = make_scheduler(patience=4)
        holder, big, small = make_job(10, needed=5000), make_job(1000, needed=9000), make_job(10, arrival=now, needed=100)
        scheduler.waiting = [holder]
        finish(scheduler.next(0.0), scheduler)  # type: ignore[arg-type]
        scheduler.waiting = [big, small]
        finish(scheduler.next(now), scheduler)  # type: ignore[arg-type]
        return scheduler

    service = make_job(1000).service_seconds
    assert len(scene(now=3.9 * service).running) == 2
    assert len(scene(now=4.1 * service).running) == 1


def test_a_job_that_has_entered_goes_on_before_one_that_waits_too_long_for_its_bytes() -> None:
    scheduler = make_scheduler(patience=4)
    big = make_job(10, needed=9000)
    entered = make_job(1000, arrival=99.0, needed=5000)
    scheduler.waiting = [entered]
    finish(scheduler.next(99.0), scheduler)  # type: ignore[arg-type]
    scheduler.waiting = [big]
    work = scheduler.next(99.0)
    assert work is not None and [member.sequence.job for member in work.members] == [entered]


def test_no_more_sequences_hold_state_than_allowed() -> None:
    scheduler = make_scheduler(max_sequences=3)
    scheduler.waiting = [make_job(10) for _ in range(5)]
    while (work := scheduler.next(0.0)) is not None and work.kind == "prefill":
        finish(work, scheduler)
    assert (len(scheduler.running), len(scheduler.waiting)) == (3, 2)


@given(st.integers(1, world.MAX_LENGTH))
def test_the_forecast_of_a_prefill_is_the_sum_of_its_chunks(length: int) -> None:
    seconds, largest, past = 0.0, 0, 0
    while past < length:
        end = min(length, COURSE.next_end(past))
        seconds += COURSE.step_seconds(past, end)
        largest = max(largest, COURSE.step_bytes(past, end))
        past = end
    assert abs(COURSE.seconds(length) - seconds) < 1e-9
    assert COURSE.prefill_bytes(length) == largest
