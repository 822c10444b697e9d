"""Pages as stories: beginnings that are shared, memory that runs out, and who waits for whom.

A page holds four tokens; prices are those of `story`.
"""

import pytest
from story import Story, ending, prefill

from headway.core import event as ev
from headway.core.request import SLO, Request
from headway.core.settings import SchedulerSettings
from headway.core.work import Segment, Work
from headway.placement.simulate import FakeSimulation
from headway.stages.stage import FakeStage

PREAMBLE = tuple(range(500, 508))  # two full pages

# Shared beginnings


def test_the_second_prompt_with_the_same_beginning_is_shorter() -> None:
    """Two chats begin with the same system prompt of two pages: the second one reads only what is its own."""
    story = Story()
    story.begins("a", (*PREAMBLE, 1, 2))
    story.tell(ev.Cancelled("a"))
    story.arrives("b", (*PREAMBLE, 3, 4, 5))
    work = story.plan()
    assert work == Work(2, "language", (Segment("b", (3, 4, 5), 8, 8, (0, 1, 2), (2,)),))
    story.done(work, b=9)
    record = ending(story.tell(ev.Cancelled("b")))
    assert record.num_cached_tokens == 8
    assert record.predicted_prefill_s == pytest.approx(0.03)


def test_pages_are_shared_while_both_live() -> None:
    """The first chat is still writing when the second begins: they hold the same two pages, nothing is copied."""
    story = Story()
    story.begins("a", (*PREAMBLE, 1, 2))
    story.arrives("b", (*PREAMBLE, 3, 4))
    work = story.plan()
    assert work == Work(2, "language", (Segment("b", (3, 4), 8, 8, (0, 1, 3), (1,)),))
    story.done(work, b=9)
    story.tell(ev.Cancelled("a"))
    counts = story.scheduler.pages.counts()
    assert (counts["held"], counts["cached"]) == (3, 0)


def test_a_prompt_that_is_known_whole_still_computes_its_last_page() -> None:
    """The very same prompt again: its first page is a hit, its second is not used, for a first token needs a row."""
    story = Story()
    story.begins("a", PREAMBLE)
    story.tell(ev.Cancelled("a"))
    story.arrives("b", PREAMBLE)
    work = story.plan()
    assert work is not None
    (segment,) = work.segments
    assert (segment.tokens, segment.first_position) == (PREAMBLE[4:], 4)


def test_an_answer_is_a_beginning_too() -> None:
    """The second turn of a chat repeats the first prompt and its answer: all of it that fills pages is a hit."""
    story = Story()
    story.begins("turn1", (1, 2, 3, 4, 5, 6), token=7, max_tokens=4)
    for token in (8, 9, 10):
        story.done(story.plan(), turn1=token)
    story.arrives("turn2", (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11))
    work = story.plan()
    assert work is not None
    (segment,) = work.segments
    assert (segment.tokens, segment.first_position) == ((9, 10, 11), 8), "token 10 was drawn but never computed"


@pytest.mark.parametrize("wishes", [{"tenant": "other"}, {"adapter": "other"}])
def test_another_tenant_or_adapter_shares_nothing(wishes: dict[str, str]) -> None:
    """Equal words, but of somebody else, or with other weights."""
    story = Story()
    story.begins("a", (*PREAMBLE, 1))
    story.arrives("b", (*PREAMBLE, 1), **wishes)
    work = story.plan()
    assert work is not None
    assert work.segments[0].first_position == 0


def test_sharing_can_be_switched_off() -> None:
    """Without prefix caching every prompt is read whole, and pages that come back are simply free."""
    story = Story(prefix_caching=False)
    story.begins("a", (*PREAMBLE, 1))
    story.tell(ev.Cancelled("a"))
    assert story.scheduler.pages.counts()["cached"] == 0
    story.arrives("b", (*PREAMBLE, 1))
    assert story.plan() == prefill(2, ("b", (*PREAMBLE, 1), (0, 1, 2)))


def test_a_prompt_that_was_cancelled_half_way_leaves_no_hits() -> None:
    """Its pages are half written: nobody may ever find them."""
    story = Story()
    story.arrives("a", (*PREAMBLE, 1))
    story.plan()
    story.tell(ev.Cancelled("a"))
    assert story.scheduler.pages.counts() == {"free": 200, "held": 0, "parked": 0, "cached": 0}


# Memory that runs out


def test_a_prompt_waits_until_there_are_pages() -> None:
    """Six pages, four taken: a prompt of three pages waits, and gets them when they come back."""
    story = Story(num_pages=6)
    story.begins("a", 14)
    story.arrives("b", 12, slo=SLO(ttft_s=0.05))
    step = story.plan()
    assert step is not None
    assert [segment.request_id for segment in step.segments] == ["a"], "there is no room for b, so a goes on"
    story.passes(0.5)
    story.tell(ev.Cancelled("a"))
    work = story.plan()
    assert work is not None
    assert [segment.request_id for segment in work.segments] == ["b"]
    story.passes(0.12)
    story.done(work, b=1)
    record = ending(story.tell(ev.Cancelled("b")))
    assert record.starved_s == pytest.approx(0.5)


def test_the_latest_comer_gives_its_pages_to_those_who_write() -> None:
    """Two answers grow until memory is full. The one who came last goes back to the queue; what it has written is kept,
    and read again as if it had been part of its prompt."""
    story = Story(num_pages=4, max_num_seqs=2, prefix_caching=False)
    story.arrives("first", 7)
    story.arrives("last", 7)
    story.done(story.plan(), first=1, last=1)
    story.done(story.plan(), first=2, last=2)  # eight tokens are in two pages each, the ninth needs a third
    step = story.plan()
    assert step is not None
    assert [segment.request_id for segment in step.segments] == ["first"]
    assert story.scheduler.loads() == (1, 1, 0)
    for token in (3, 4, 5):
        story.done(story.plan(), first=token)
    story.tell(ev.Cancelled("first"))
    again = story.plan()
    assert again is not None
    (segment,) = again.segments
    assert (segment.request_id, segment.first_position, segment.tokens[-2:]) == ("last", 0, (1, 2))
    assert len(segment.tokens) == 9
    story.done(again, last=3)
    record = ending(story.tell(ev.Cancelled("last")))
    assert (record.num_recomputes, record.num_output_tokens) == (1, 3)


def test_priority_decides_whose_pages_are_taken() -> None:
    """The one who came first matters less: it is sent back, although it was there before."""
    story = Story(num_pages=4, prefix_caching=False)
    story.arrives("background", 7, priority=1)
    story.arrives("chat", 7)
    story.done(story.plan(), background=1, chat=1)
    story.done(story.plan(), background=2, chat=2)
    step = story.plan()
    assert step is not None
    assert [segment.request_id for segment in step.segments] == ["chat"]


def test_a_new_prompt_leaves_a_page_to_each_who_writes() -> None:
    """Three pages are free and one answer is growing: a prompt of three pages would soon throw somebody out, so it
    waits; one of two pages is let in."""
    story = Story(num_pages=6)
    story.begins("a", 12, slo=SLO(tpot_s=5.0))
    story.arrives("three", 12)
    step = story.plan()
    assert step is not None
    assert step.segments[0].request_id == "a"
    story.tell(ev.Cancelled("three"))
    story.done(step, a=1)
    story.arrives("one", 4)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "one"


def test_a_prompt_that_starves_for_pages_is_not_overtaken_for_ever() -> None:
    """A large prompt waits for five pages while small ones come and go in the two that are free. After its patience is
    over, nobody new is let in before it, so that the pages which come back add up."""
    story = Story(num_pages=6)
    story.begins("writing", 14, max_tokens=3)
    story.arrives("large", 20)
    story.arrives("small1", 3, max_tokens=1)
    early = story.plan()
    assert early is not None
    assert early.segments[0].request_id == "small1"
    story.done(early, small1=1)

    story.passes(2.0 + 10.0)  # the patience of best effort, and as much again as makes it starved
    story.arrives("small2", 3, max_tokens=1)
    step = story.plan()
    assert step is not None
    assert step.segments[0].request_id == "writing", "small2 would fit, but has to stand behind large"
    story.done(step, writing=1)
    story.done(story.plan(), writing=2)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "large"


def test_many_answers_in_little_memory_are_all_right() -> None:
    """Eight answers of thirty tokens in memory for three of them: they are sent back and read again many times, and
    each answer is exactly what it would have been alone."""
    letters: list[tuple[float, ev.Event]] = [
        (0.001 * number, ev.Arrived(Request(f"r{number}", tuple(range(number, number + 9)), 30, 0.001 * number)))
        for number in range(8)
    ]
    settings = SchedulerSettings(max_model_len=60, pack_tokens=40, tile_s=0.002)
    simulation = FakeSimulation(letters, settings, num_pages=30, page_tokens=4)
    simulation.run()
    assert simulation.scheduler.counters["recomputes"] > 0
    for name, (record,) in simulation.ended.items():
        assert (record.kind, record.reason) == ("finished", "length")
        tokens = list(range(int(name[1:]), int(name[1:]) + 9))
        for _ in range(30):
            tokens.append(FakeStage.next_token(tuple(tokens)))
        assert simulation.delivered[name] == tokens[9:]
    assert simulation.ended["r0"][0].num_recomputes == 0, "who came first is never sent back"
    assert simulation.scheduler.pages.num_available == 30
