"""Faults that were found by reading, each with the story that shows it: none may come back."""

from story import Story, ending, prompt_of

from headway.core import event as ev
from headway.core.ledger import Record, settle
from headway.core.lifecycle import State
from headway.core.request import SLO, Request


def test_an_answer_that_outgrows_the_pool_hangs_for_ever() -> None:
    """Ten tokens of prompt fit the 16 places of the pool, the answer grows past them: sent back, it can never be
    re-read (5 pages of 4), nothing else holds pages, and no event will ever come. It should end by length."""
    story = Story(num_pages=4, max_model_len=100)
    story.begins("a", 10, max_tokens=50)
    while story.scheduler.num_open:
        work = story.plan()
        assert work is not None, "the device is idle, a request is open, and nothing can happen any more"
        story.done(work, a=1)


def test_a_full_car_park_stops_all_tokens() -> None:
    """max_num_parked prompts are parked and one runs: the token of a chat, due every 100 ms, waits for the whole
    running prompt (here a second), because the running step may not be parked even for a token."""
    story = Story(max_num_parked=1)
    story.begins("chat", 4, slo=SLO(tpot_s=0.1))
    story.arrives("a", 200)
    story.plan()
    story.arrives("b", 100, slo=SLO(ttft_s=1.5))
    story.plan()
    story.now = story.scheduler.next_due() or 0.0
    story.tell(ev.Due())
    work = story.plan(progress=0.08)
    assert work is not None
    assert work.segments[0].request_id == "chat"


def test_a_starved_prompt_stops_all_tokens() -> None:
    """A best-effort prompt of three seconds has waited so long that it goes before everything; while it is read, a
    chat that was promised a token every 100 ms gets none for three seconds."""
    story = Story()
    story.begins("chat", 4, slo=SLO(tpot_s=0.1))
    story.tell(ev.Arrived(Request("long", prompt_of("long", 300), 1, -100.0)))
    story.plan()
    story.now = story.scheduler.next_due() or 0.0
    story.tell(ev.Due())
    work = story.plan(progress=0.03)
    assert work is not None
    assert work.segments[0].request_id == "chat"


def test_a_starved_prompt_is_overtaken_by_way_of_a_switch() -> None:
    """`_choose` keeps pages for a starved prompt; `_switch` does not: an urgent small one takes two of the six that are
    free, while a starved one waits for a seventh. A stream of such arrivals keeps it out for ever."""
    story = Story(num_pages=10)
    story.arrives("reading", 16)
    work = story.plan()
    story.tell(ev.Arrived(Request("large", prompt_of("large", 28), 1, -100.0)))
    story.arrives("urgent", 8, slo=SLO(ttft_s=0.1))
    assert story.plan(progress=0.1) is work


def test_the_price_of_the_prompt_is_compared_with_the_target_between_tokens() -> None:
    """Its prompt took a second, which says nothing about a target of 0.1 s between tokens: the answer was late because
    it waited five seconds for pages."""
    record = Record("a", 0.0, SLO(tpot_s=0.1), 100, first_scheduled=0.0, first_token=1.0, last_token=7.0)
    record.num_output_tokens = 10
    record.predicted_prefill_s = 1.0
    record.starved_s = 5.0
    settle(record, State.FINISHED, "length", 7.0)
    assert record.missed == {"tpot": "starved_of_pages"}


def test_a_pack_is_taken_for_a_wrong_prediction() -> None:
    """The step took exactly as long as predicted; it was late because it was read together with others."""
    story = Story()
    story.arrives("a", 30, max_tokens=1, slo=SLO(ttft_s=0.35))
    story.arrives("b", 30, max_tokens=1, slo=SLO(ttft_s=0.35))
    story.arrives("c", 30, max_tokens=1, slo=SLO(ttft_s=0.35))
    story.passes(0.1)
    work = story.plan()
    assert work is not None
    assert len(work.segments) == 3
    story.passes(0.9)
    effects = story.done(work, a=1, b=1, c=1)
    causes = {effect.record.missed["ttft"] for effect in effects if isinstance(effect, ev.End)}
    assert "predicted_wrong" not in causes


def test_a_finished_answer_ends_as_failed() -> None:
    """The door saw the stop string and has the whole text; before the member has left its pack, the step raises."""
    story = Story()
    story.arrives("a", 6)
    story.arrives("b", 6)
    story.done(story.plan(), a=1, b=1)
    story.plan()
    assert story.tell(ev.Stopped("a")) == [ev.Drop(2, "a")]
    records = {e.record.request_id: e.record for e in story.tell(ev.StepFailed(2, "boom")) if isinstance(e, ev.End)}
    assert records["b"].kind == "failed"
    assert (records["a"].kind, records["a"].reason) == ("finished", "stop")


def test_a_pack_that_shrank_teaches_that_tokens_are_cheap() -> None:
    """The large member left at the first layer; the step's short time is compared with the price of the whole pack."""
    story = Story()
    story.arrives("large", 100)
    story.arrives("small", 10)
    work = story.plan()
    assert work is not None
    assert len(work.segments) == 2
    story.tell(ev.Cancelled("large"))
    story.tell(ev.Left(1, ("large",)))
    before = story.scheduler.cost.prefill(100)
    story.done(work, busy_s=0.12, small=1)
    assert story.scheduler.cost.prefill(100) >= before


def test_nobody_looks_again_when_a_step_takes_longer_than_predicted() -> None:
    """An urgent prompt could wait for the running one, which was nearly done by its price. It is not: its predicted end
    passes, the urgent one's last possible start passes, and no timer is set, so that nothing happens until the step
    ends by itself. The latest start of a candidate that waits should be among the instants of `next_due`."""
    story = Story()
    story.arrives("slow", 50)
    story.plan()
    story.arrives("urgent", 10, slo=SLO(ttft_s=1.0))
    story.plan()
    assert story.scheduler.next_due() is not None
    assert (story.scheduler.next_due() or 0.0) <= 0.9


def test_who_expires_in_the_queue_was_queued_behind() -> None:
    """It was let in and waited for others until its last instant had passed: "refused" hides the cause."""
    story = Story()
    story.arrives("long", 100, priority=-1, slo=SLO(ttft_s=1.0))
    story.plan()
    story.arrives("late", 30, slo=SLO(total_s=0.5))
    story.plan()
    story.passes(0.5)
    assert ending(story.tell(ev.Due())).missed == {"total": "queued_behind"}
