"""The moments of a request's life, as its caller may read them afterwards: in order, bounded, and its own alone."""

import re

import pytest
from story import Story, ending

from headway.bench.storm import SETTINGS, storm
from headway.core import event as ev
from headway.core.ledger import MAX_MOMENTS, Moment
from headway.core.request import SLO
from headway.placement.simulate import FakeSimulation

WORDS = {"arrived", "admitted", "scheduled", "parked", "resumed", "recomputed", "first_token"}
ENDINGS = {"finished", "refused", "cancelled", "failed"}


def test_the_life_of_one_that_was_suspended() -> None:
    """It comes, begins, gives way to a more urgent one when a tenth of it is done, goes on, and is there."""
    story = Story()
    story.arrives("long", 100, max_tokens=1)
    work = story.plan()
    story.passes(0.1)
    story.arrives("urgent", 10, max_tokens=1, slo=SLO(ttft_s=0.15))
    urgent = story.plan(progress=0.1)
    story.passes(0.1)
    story.done(urgent, urgent=5)
    assert story.plan() is work
    story.passes(0.9)
    record = ending(story.done(work, long=6))
    assert record.timeline == [
        Moment(0.0, "arrived", "100 tokens"),
        Moment(0.0, "admitted", "first token expected after 1000 ms"),
        Moment(0.0, "scheduled", "100 tokens of 1 requests in the step"),
        Moment(pytest.approx(0.1), "parked", "10% of the step done"),  # type: ignore[arg-type]
        Moment(pytest.approx(0.2), "resumed"),  # type: ignore[arg-type]
        Moment(pytest.approx(1.1), "first_token"),  # type: ignore[arg-type]
        Moment(pytest.approx(1.1), "finished", "length"),  # type: ignore[arg-type]
    ]


def test_the_life_of_one_that_was_refused() -> None:
    """It came, and that was that."""
    story = Story(refuse_unattainable=True)
    record = ending(story.tell(ev.Arrived(story.request("r", 50, slo=SLO(ttft_s=0.1)))))
    assert record.timeline == [Moment(0.0, "arrived", "50 tokens"), Moment(0.0, "refused", "slo_unattainable")]


def test_the_life_of_one_that_lost_its_pages() -> None:
    """Two write and memory ends: the later one gives its pages up and is read again when there is room."""
    story = Story(num_pages=4)
    story.arrives("a", 7, max_tokens=3)
    story.arrives("b", 7, max_tokens=3)
    story.done(story.plan(), a=1, b=1)
    story.passes(0.1)
    story.done(story.plan(), a=2, b=2)
    ending(story.done(story.plan(), a=3))
    record = ending(story.done(story.plan(), b=3))
    assert [moment.what for moment in record.timeline] == [
        "arrived",
        "admitted",
        "scheduled",
        "first_token",
        "recomputed",
        "scheduled",
        "finished",
    ]


def test_a_life_of_many_moments_is_cut_short_but_its_end_is_told() -> None:
    """A prompt of 100 pieces is scheduled a hundred times: the first moments are kept, and the last."""
    story = Story(preempt="chunk", chunk_tokens=4)
    story.arrives("a", 400 - 1, max_tokens=1)
    while not (work := story.plan()).segments[0].logits_at:  # type: ignore[union-attr]
        story.done(work)
    record = ending(story.done(work, a=1))
    assert len(record.timeline) <= MAX_MOMENTS + 2
    assert record.timeline[-1].what == "finished"
    assert "first_token" in [moment.what for moment in record.timeline]


@pytest.mark.parametrize("seed", range(3))
def test_moments_in_a_storm(seed: int) -> None:
    """Of every life: the words are known, the first is its coming and the last its end, time never goes back, nothing
    is told twice in a row that cannot be, and no detail names another request."""
    letters, requests = storm(seed, 400)
    simulation = FakeSimulation(letters, SETTINGS, num_pages=48, page_tokens=4)
    simulation.run()
    seen: set[str] = set()
    for request_id, (record,) in simulation.ended.items():
        words = [moment.what for moment in record.timeline]
        seen |= set(words)
        assert set(words) <= WORDS | ENDINGS
        assert (words[0], words[-1]) == ("arrived", record.kind)
        assert sum(word in ENDINGS for word in words) == 1
        instants = [moment.at for moment in record.timeline]
        assert instants == sorted(instants)
        assert len(words) <= MAX_MOMENTS + 1
        assert words.count("parked") - words.count("resumed") in (0, 1)
        for moment in record.timeline:
            assert not re.search(r"\br\d+\b", moment.detail), "requests are named r0, r1, …"
        assert requests[request_id].arrival == instants[0]
    assert seen >= WORDS
