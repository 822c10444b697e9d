"""Chunked prefill, for comparison: steps that are kept short instead of being suspended.

Every step holds so many tokens at most: one of everybody who decodes, and of the prompts, in the policy's order, what
still fits.
"""

from typing import get_args

import pytest
from story import Story

from headway.bench.storm import MAX_MODEL_LEN, survive
from headway.core import event as ev
from headway.core.policy import Order
from headway.core.request import SLO, Request
from headway.core.settings import SchedulerSettings
from headway.core.work import Segment, Work
from headway.placement.simulate import FakeSimulation

Letters = list[tuple[float, ev.Event]]


def shape(work: Work | None) -> list[tuple[str, int, int, bool]]:
    """Of each segment: whose, how many tokens after how many, and whether a token is drawn after the last."""
    assert work is not None
    return [(s.request_id, len(s.tokens), s.context_tokens, bool(s.logits_at)) for s in work.segments]


def test_a_long_prompt_is_read_in_pieces_and_the_last_one_draws() -> None:
    """Forty tokens in steps of 16: 16, 16, 8; logits are asked for with the last piece alone."""
    story = Story(preempt="chunk", chunk_tokens=16)
    request = story.arrives("a", 40, max_tokens=2)
    pieces = []
    for _ in range(3):
        work = story.plan()
        assert work is not None
        pieces.append(work.segments[0])
        story.passes(work.num_tokens * 0.01)
        if work.segments[0].logits_at:
            story.done(work, a=7)
        else:
            assert story.done(work) == []
    pages = tuple(range(10))
    assert pieces == [
        Segment("a", request.prompt[:16], 0, 0, pages, ()),
        Segment("a", request.prompt[16:32], 16, 16, pages, ()),
        Segment("a", request.prompt[32:], 32, 32, pages, (7,)),
    ]
    assert shape(story.plan()) == [("a", 1, 40, True)]


def test_who_decodes_is_in_every_step() -> None:
    """Two chats write while a prompt is read: each step has a token of both, and 14 of the prompt."""
    story = Story(preempt="chunk", chunk_tokens=16)
    story.arrives("a", 4)
    story.arrives("b", 4)
    story.done(story.plan(), a=1, b=1)
    story.arrives("long", 30)
    first = story.plan()
    assert shape(first) == [("a", 1, 4, True), ("b", 1, 4, True), ("long", 14, 0, False)]
    story.done(first, a=2, b=2)
    second = story.plan()
    assert shape(second) == [("a", 1, 5, True), ("b", 1, 5, True), ("long", 14, 14, False)]
    story.done(second, a=3, b=3)
    assert shape(story.plan()) == [("a", 1, 6, True), ("b", 1, 6, True), ("long", 2, 28, True)]


def test_the_more_urgent_prompt_goes_on_first() -> None:
    """A patient prompt has been read in part when an urgent one comes: the next pieces are the urgent one's, then both
    share a step, and the patient one goes on where it was."""
    story = Story(preempt="chunk", chunk_tokens=16)
    story.arrives("patient", 40, slo=SLO(ttft_s=9.0))
    story.done(story.plan())
    story.arrives("urgent", 20, max_tokens=1, slo=SLO(ttft_s=0.5))
    work = story.plan()
    assert shape(work) == [("urgent", 16, 0, False)]
    story.done(work)
    work = story.plan()
    assert shape(work) == [("urgent", 4, 16, True), ("patient", 12, 16, False)]
    story.done(work, urgent=1)
    assert shape(story.plan()) == [("patient", 12, 28, True)]


def test_without_packs_a_step_has_tokens_and_one_prompt() -> None:
    story = Story(preempt="chunk", chunk_tokens=16, pack=False)
    story.arrives("a", 4)
    story.arrives("b", 4)
    work = story.plan()
    assert shape(work) == [("a", 4, 0, True)]
    story.done(work, a=1)
    assert shape(story.plan()) == [("a", 1, 4, True), ("b", 4, 0, True)]


def test_what_is_read_in_part_has_a_place() -> None:
    """Two places, one taken by a prompt in the middle: of two newcomers who are more urgent one may begin, and the
    other waits until a place is free."""
    story = Story(preempt="chunk", chunk_tokens=16, max_num_seqs=2)
    story.arrives("patient", 40)
    story.done(story.plan())
    for name in ("b", "c"):
        story.arrives(name, 8, max_tokens=1, slo=SLO(ttft_s=0.5))
    work = story.plan()
    assert shape(work) == [("b", 8, 0, True), ("patient", 8, 16, False)]
    story.done(work, b=1)
    assert shape(story.plan()) == [("c", 8, 0, True), ("patient", 8, 24, False)]


@pytest.mark.parametrize("changes", [{"pack": False}, {"max_num_seqs": 2}, {}], ids=["alone", "two places", "packs"])
def test_what_holds_pages_gets_on_although_others_are_in_front(changes: dict[str, int | bool]) -> None:
    """A prompt that is read in part holds most pages. Three more urgent ones come and find too few: it is read to its
    end behind them, for nobody else can give them pages."""
    story = Story(num_pages=30, preempt="chunk", chunk_tokens=16, **changes)
    story.arrives("patient", 80, max_tokens=1)
    story.done(story.plan())
    for name in ("b", "c", "d"):
        story.arrives(name, 80, max_tokens=1, slo=SLO(ttft_s=2.0))
    for context_tokens in (16, 32, 48, 64):
        work = story.plan()
        assert shape(work) == [("patient", 16, context_tokens, context_tokens == 64)]
        story.done(work, patient=1) if context_tokens == 64 else story.done(work)
    assert shape(story.plan()) == [("b", 16, 0, False)]


def test_what_has_begun_is_written_to_its_end() -> None:
    """The whole answer was due when half of the prompt was read: it is not taken from the queue any more."""
    story = Story(preempt="chunk", chunk_tokens=16)
    story.arrives("a", 40, slo=SLO(total_s=0.2))
    story.arrives("b", 40, slo=SLO(total_s=0.2))
    story.done(story.plan())
    story.passes(0.3)
    (end,) = story.tell(ev.Due())
    assert isinstance(end, ev.End)
    assert (end.record.request_id, end.record.reason) == ("b", "deadline_expired")
    assert shape(story.plan()) == [("a", 16, 16, False)]


# Whole runs


def run(letters: Letters, **changes: object) -> tuple[FakeSimulation, list[Work]]:
    chosen = {"max_model_len": 400, "prefix_caching": False, "refuse_unattainable": False} | changes
    simulation = FakeSimulation(letters, SchedulerSettings(**chosen), num_pages=400)  # type: ignore[arg-type]
    works: list[Work] = []
    run_stage = simulation.stage.run

    def noted(work: Work) -> object:
        works.append(work)
        return run_stage(work)

    simulation.stage.run = noted  # type: ignore[method-assign,assignment]
    simulation.run()
    return simulation, works


@pytest.mark.parametrize("chunk_tokens", [13, 32, 1000])
@pytest.mark.parametrize("order", get_args(Order))
def test_chunks_answer_as_whole_prompts_do(order: Order, chunk_tokens: int) -> None:
    """Twelve requests, some of whose prompts are many chunks long: no step is larger than allowed, everybody who
    decodes has a token in every step, and all tokens are those of the unchunked run."""
    letters: Letters = []
    for number in range(12):
        prompt = tuple(range(number, number + (5, 40, 150)[number % 3]))
        slo = SLO(ttft_s=(None, 0.3, 2.0)[number % 3])
        letters.append((0.03 * number, ev.Arrived(Request(f"r{number}", prompt, 12, 0.03 * number, slo))))
    whole, _ = run(letters)
    chunked, works = run(letters, preempt="chunk", chunk_tokens=chunk_tokens, order=order)
    assert chunked.delivered == whole.delivered
    assert max(work.num_tokens for work in works) <= chunk_tokens
    left_to_write: dict[str, int] = {}
    for work in works:
        members = {segment.request_id for segment in work.segments}
        assert members >= left_to_write.keys()
        for segment in work.segments:
            if segment.logits_at:
                left_to_write[segment.request_id] = left_to_write.get(segment.request_id, 12) - 1
        left_to_write = {name: number for name, number in left_to_write.items() if number}
    assert left_to_write == {}


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("order", get_args(Order))
def test_a_storm_of_chunks(order: Order, pack: bool) -> None:
    """Too many requests for memory and time, in chunks, under each order: nobody is lost, nobody gets another's tokens,
    no page leaks, and it comes to an end."""
    for seed in range(3):
        settings = SchedulerSettings(
            max_model_len=MAX_MODEL_LEN,
            max_num_seqs=12,
            max_num_queued=60,
            tile_s=0.002,
            preempt="chunk",
            chunk_tokens=16,
            order=order,
            pack=pack,
        )
        survived = survive(seed, 400, settings)
        assert survived.counters["preemptions"] == 0
        assert {ending.partition(" ")[0] for ending in survived.endings} >= {"finished", "cancelled", "failed"}
