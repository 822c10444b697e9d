"""Every missed target has a cause: one story for each, and how an account is closed."""

import pytest
from story import Story, ending

from headway.core import event as ev
from headway.core.ledger import Record, settle
from headway.core.lifecycle import State
from headway.core.request import SLO


def test_what_is_in_time_has_no_cause() -> None:
    """First token, pace and end are all within their targets: nothing is noted."""
    story = Story()
    story.begins("a", 10, max_tokens=2, slo=SLO(ttft_s=0.2, tpot_s=0.05, total_s=1.0))
    story.passes(0.01)
    assert ending(story.done(story.plan(), a=1)).missed == {}


def test_queued_behind() -> None:
    """The device was busy with somebody who had a target too, and was there first."""
    story = Story()
    story.arrives("first", 100, slo=SLO(ttft_s=1.05))
    work = story.plan()
    story.arrives("second", 20, max_tokens=1, slo=SLO(ttft_s=0.5))
    assert story.plan(progress=0.01) is work
    story.passes(1.0)
    story.done(work, first=1)
    work = story.plan()
    story.passes(0.2)
    assert ending(story.done(work, second=1)).missed == {"ttft": "queued_behind"}


def test_parked() -> None:
    """It would have been in time, but somebody with a better priority took the device in the middle."""
    story = Story()
    story.arrives("a", 100, max_tokens=1, slo=SLO(ttft_s=1.1))
    work = story.plan()
    story.passes(0.5)
    story.arrives("vip", 50, max_tokens=1, priority=-1, slo=SLO(ttft_s=0.6))
    other = story.plan(progress=0.5)
    assert other is not work
    story.passes(0.5)
    story.done(other, vip=1)
    assert story.plan() is work
    story.passes(0.5)
    assert ending(story.done(work, a=1)).missed == {"ttft": "parked"}


def test_starved_of_pages() -> None:
    """The device was idle enough, but somebody's answer filled the memory."""
    story = Story(num_pages=6)
    story.begins("hog", 18, max_tokens=4)
    story.arrives("a", 8, max_tokens=1, slo=SLO(ttft_s=0.5))
    for _ in range(3):
        step = story.plan()
        assert step is not None
        assert step.segments[0].request_id == "hog"
        story.passes(0.3)
        story.done(step, hog=1)
    work = story.plan()
    story.passes(0.08)
    record = ending(story.done(work, a=1))
    assert record.missed == {"ttft": "starved_of_pages"}
    assert record.starved_s == pytest.approx(0.9)


def test_infeasible() -> None:
    """Half a second was asked for what takes a second by itself: nobody else is to blame."""
    story = Story()
    story.arrives("a", 100, max_tokens=1, slo=SLO(ttft_s=0.5))
    story.passes(1.0)
    assert ending(story.done(story.plan(), a=1)).missed == {"ttft": "infeasible"}


def test_predicted_wrong() -> None:
    """Alone on the device, priced at a second, and it took two."""
    story = Story()
    story.arrives("a", 100, max_tokens=1, slo=SLO(ttft_s=1.5))
    work = story.plan()
    story.passes(2.0)
    assert ending(story.done(work, busy_s=2.0, a=1)).missed == {"ttft": "predicted_wrong"}


def answers(story: Story, *seconds: float) -> Record:
    """It is alone and gets its tokens after so long each; its account."""
    effects: list[ev.Effect] = []
    for each in seconds:
        step = story.plan()
        story.passes(each)
        effects = story.done(step, busy_s=each, a=1)
    return ending(effects)


def test_a_pace_that_the_device_cannot_keep() -> None:
    """A token takes 10 ms by itself, and 5 ms were asked for: nobody was in front, whatever the first one waited."""
    story = Story()
    story.begins("a", 10, max_tokens=3, slo=SLO(tpot_s=0.005))
    assert answers(story, 0.01, 0.01).missed == {"tpot": "infeasible"}


def test_a_pace_that_was_predicted_wrong() -> None:
    """Nobody else is there, and the steps take four times their price."""
    story = Story()
    story.begins("a", 10, max_tokens=3, slo=SLO(tpot_s=0.03, total_s=0.15))
    assert answers(story, 0.04, 0.04).missed == {"tpot": "predicted_wrong", "total": "predicted_wrong"}


def test_a_pace_that_others_took() -> None:
    """Its tokens take what they were to take, but a prompt of somebody's comes first, whose priority is better."""
    story = Story()
    story.begins("a", 10, max_tokens=2, slo=SLO(tpot_s=0.1, total_s=0.5))
    story.arrives("vip", 50, max_tokens=1, priority=-1, slo=SLO(ttft_s=0.5))
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "vip"
    story.passes(0.5)
    story.done(work, vip=1)
    assert answers(story, 0.01).missed == {"tpot": "queued_behind", "total": "queued_behind"}


def test_an_answer_that_is_too_long_for_its_time() -> None:
    """A hundred tokens of 10 ms each do not fit into half a second."""
    story = Story()
    story.begins("a", 10, max_tokens=100, slo=SLO(total_s=0.5))
    assert answers(story, *[0.01] * 99).missed == {"total": "infeasible"}


def test_targets_of_those_who_did_not_finish() -> None:
    """A caller that goes away, an engine that dies, a step that raises: what was promised is missed, and says why."""
    slo = SLO(ttft_s=9.0, tpot_s=9.0, total_s=9.0)
    for event, cause in (
        (ev.Cancelled("a"), "cancelled"),
        (ev.EngineLost("gone"), "engine_lost"),
        (ev.StepFailed(1, "RuntimeError"), "step_failed"),
    ):
        story = Story()
        story.arrives("a", 10, slo=slo)
        story.plan()
        assert ending(story.tell(event)).missed == dict.fromkeys(("ttft", "tpot", "total"), cause)


def test_who_was_cancelled_after_its_first_token_had_that_in_time() -> None:
    """The first token had come when the caller went: that target was met, whatever happened later."""
    story = Story()
    story.begins("a", 10, slo=SLO(ttft_s=0.2, total_s=9.0))
    assert ending(story.tell(ev.Cancelled("a"))).missed == {"total": "cancelled"}


def test_an_answer_that_broke_off_met_nothing() -> None:
    """Its first token came in time, then the step of its second raised."""
    story = Story()
    story.begins("a", 10, slo=SLO(ttft_s=9.0, tpot_s=9.0))
    work = story.plan()
    assert work is not None
    record = ending(story.tell(ev.StepFailed(work.id, "RuntimeError")))
    assert record.ttft_s is not None
    assert record.missed == {"ttft": "step_failed", "tpot": "step_failed"}


def test_one_token_has_no_gaps() -> None:
    """An answer of a single token cannot miss a target between tokens."""
    record = Record("a", 0.0, SLO(tpot_s=0.001), 5, first_token=1.0, last_token=1.0, num_output_tokens=1)
    settle(record, State.FINISHED, "length", 1.0)
    assert record.tpot_s is None
    assert record.missed == {}


def test_the_pace_is_the_mean_over_the_gaps() -> None:
    """Three tokens have two gaps: 0.4 s from the first to the last are 0.2 s per token."""
    record = Record("a", 1.0, SLO(tpot_s=0.15), 5, first_token=2.0, last_token=2.4, num_output_tokens=3)
    settle(record, State.FINISHED, "length", 2.5)
    assert (record.ttft_s, record.tpot_s) == (1.0, pytest.approx(0.2))
    assert set(record.missed) == {"tpot"}
