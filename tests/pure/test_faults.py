"""Faults that were found by reading, each with the story that shows it: none may come back."""

from dataclasses import replace
from itertools import pairwise

import pytest
from story import TOKEN_S, Story, ending, prompt_of

from headway.core import event as ev
from headway.core.cost import CostFit
from headway.core.ledger import Record, settle
from headway.core.lifecycle import State
from headway.core.policy import STARVED_SHARE
from headway.core.request import SLO, Request
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import Device, fleet, priced


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


def test_a_neighbour_that_has_gone_refuses_for_ever() -> None:
    """A neighbour made steps take three times their price and has left. Prices are learnt from steps: as long as every
    prompt is refused none is, so the idle device would refuse the next one too, and the next."""
    story = Story(refuse_unattainable=True)
    for number in range(40):
        story.arrives(f"slow{number}", 20, max_tokens=1)
        story.passes(0.6)
        story.done(story.plan(), 0.6, **{f"slow{number}": 7})
    assert ending(story.tell(ev.Arrived(story.request("a", 50, slo=SLO(ttft_s=0.6))))).reason == "slo_unattainable"
    story.passes(9.0)
    assert ending(story.tell(ev.Arrived(story.request("b", 50, slo=SLO(ttft_s=0.6))))).reason == "slo_unattainable"
    story.passes(2.0)
    story.arrives("c", 50, max_tokens=1, slo=SLO(ttft_s=0.6))
    assert ending(story.tell(ev.Arrived(story.request("d", 50, slo=SLO(ttft_s=0.6))))).reason == "slo_unattainable"
    story.passes(0.5)
    assert ending(story.done(story.plan(), 0.5, c=7)).missed == {}


def test_one_that_proves_nothing_lets_in_all_that_come_after_it() -> None:
    """Let in to show a price it goes away again before it is read: the next one is judged by its forecast, and so is
    one that finds no place."""
    story = Story(refuse_unattainable=True, max_num_seqs=1)
    asks = {"slo": SLO(ttft_s=0.1)}
    assert ending(story.tell(ev.Arrived(story.request("a", 50, **asks)))).reason == "slo_unattainable"
    story.passes(11.0)
    story.arrives("b", 50, max_tokens=1, **asks)
    story.tell(ev.Cancelled("b"))
    assert ending(story.tell(ev.Arrived(story.request("c", 50, **asks)))).reason == "slo_unattainable"
    story.begins("reader", 4, max_tokens=300)
    story.passes(20.0)
    assert ending(story.tell(ev.Arrived(story.request("d", 50, **asks)))).reason == "slo_unattainable"


def test_a_reader_that_lost_its_pages_goes_behind_every_newcomer() -> None:
    """It had its answer's beginning, its pages went to another, and reading it all again takes longer than a token may:
    it was thought late for good, and whoever had a target went before it for a quarter of a minute."""
    story = Story(num_pages=12, max_model_len=48, prefix_caching=False)
    story.begins("first", 16, slo=SLO(tpot_s=0.05))
    story.begins("reader", 20, slo=SLO(tpot_s=0.05))
    while story.scheduler.counters["recomputes"] == 0:
        work = story.plan()
        assert work is not None
        story.passes(0.02)
        story.done(work, **{segment.request_id: 1 for segment in work.segments})
    story.tell(ev.Cancelled("first"))
    story.arrives("urgent", 8, max_tokens=1, slo=SLO(ttft_s=1.0))
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "reader"


def test_what_came_to_be_cached_is_priced_as_if_it_were_not() -> None:
    """Three prompts share a hundred tokens and come at once. When the first is read the others take a tenth of what
    they would have: whoever comes then has little before it, and was refused for seconds of work that nobody has."""
    shared = tuple(range(100))
    story = Story(num_pages=400, refuse_unattainable=True, pack=False)
    for name in "abc":
        story.arrives(name, (*shared, *prompt_of(name, 10)), max_tokens=1, slo=SLO(ttft_s=9.0))
    work = story.plan()
    story.passes(1.1)
    story.done(work, a=7)
    story.plan()
    story.arrives("newcomer", 20, slo=SLO(ttft_s=0.6), priority=1)


def test_a_step_that_has_run_since_it_was_last_seen_is_thought_late() -> None:
    """A prompt of two seconds is due in time and has half of them behind it. Somebody comes who goes behind it: the
    scheduler looked at how far it had come before that, took it for late, and promised the newcomer its place."""
    story = Story(refuse_unattainable=True)
    story.arrives("long", 200, slo=SLO(ttft_s=2.2))
    story.plan()
    story.passes(1.5)
    (effect,) = story.tell(ev.Arrived(story.request("b", 100, slo=SLO(ttft_s=1.2))))
    assert isinstance(effect, ev.End), "half a second goes first, and its own second: that is not within 1.2"
    assert effect.record.predicted_ttft_s is not None
    assert abs(effect.record.predicted_ttft_s - 1.5) < 1e-6


def test_nobody_notices_that_a_prompt_starves() -> None:
    """A prompt of a minute has the device and can still be in time; one without a target waits behind it. When that has
    waited too long it goes before everything, but no event comes: a timer must ring."""
    story = Story(num_pages=2000, max_model_len=7000)
    story.arrives("long", 6000, slo=SLO(ttft_s=100.0))
    story.plan()
    story.passes(0.1)
    story.arrives("short", 5, max_tokens=1)
    story.plan(progress=0.1 / 60)
    for _ in range(3):
        instant = story.scheduler.next_due()
        assert instant is not None, "nothing would happen for a minute"
        story.now = instant
        story.tell(ev.Due())
        work = story.plan(progress=story.now / 60)
        assert work is not None
        if work.segments[0].request_id == "short":
            break
    assert work.segments[0].request_id == "short"
    assert 12.0 < story.now < 13.0


def test_a_switch_between_suspended_steps_parks_more_than_there_is_room_for() -> None:
    """A short step has been suspended for too long and may take the place of a long one, which keeps four times as
    much: where that would be beyond the bound, it goes on when the long one has ended."""
    for most_parked, goes_on in ((400, "c"), (800, "a")):
        story = Story(num_pages=400, max_parked_tokens=most_parked, max_parked_s=1.0)
        story.arrives("a", 100, max_tokens=1)
        story.plan()
        story.arrives("b", 300, max_tokens=1, priority=-1, slo=SLO(ttft_s=3.1))
        story.plan(progress=0.5)
        story.arrives("c", 390, max_tokens=1, priority=-2, slo=SLO(ttft_s=4.0))
        work = story.plan(progress=0.5)
        assert work is not None
        assert work.segments[0].request_id == "c"
        story.passes(2.0)
        story.tell(ev.Due())
        work = story.plan(progress=0.5)
        assert work is not None
        assert work.segments[0].request_id == goes_on


def test_a_suspended_token_waits_for_room_that_it_does_not_need() -> None:
    """A prompt has taken the place of a token's step, and a large one is parked. That step keeps next to nothing: it
    goes on whatever the bound on what is suspended says."""
    story = Story(num_pages=400, max_parked_tokens=400, lanes="turns")
    story.begins("reader", 4, slo=SLO(tpot_s=0.1))
    story.arrives("large", 300, max_tokens=1)
    large = story.plan()
    story.now = story.scheduler.next_due() or 0.0
    story.tell(ev.Due())
    token = story.plan(progress=0.02)
    assert token is not None
    assert [segment.request_id for segment in token.segments] == ["reader"]
    steps = story.scheduler._steps
    running = replace(steps[large.id], work=replace(large, segments=large.segments * 2))  # type: ignore[union-attr]
    assert steps.may_swap(running, steps[token.id], 400)
    assert not steps.may_swap(running, steps[large.id], 400)  # type: ignore[union-attr]


def test_a_prompt_that_is_read_in_pieces_was_never_queued_behind_anybody() -> None:
    """It was begun at once, and others were served between its pieces for five seconds: that is why it was late, not
    the hundredth of a second that one of its steps took beyond its price."""
    record = Record("a", 0.0, SLO(ttft_s=3.0), 100, first_scheduled=0.01, first_token=6.0, last_token=6.0)
    record.num_output_tokens, record.predicted_prefill_s, record.overrun_s = 1, 1.0, 0.02
    settle(record, State.FINISHED, "length", 6.0)
    assert record.missed == {"ttft": "queued_behind"}


def test_who_asks_for_the_impossible_is_told_to_come_back() -> None:
    """Everything was to be there in 5 ms and the way to the engine took them; the prompt alone takes half a second."""
    story = Story(refuse_unattainable=True)
    request = story.request("a", 50, slo=SLO(total_s=0.005))
    story.passes(0.01)
    record = ending(story.tell(ev.Arrived(request)))
    assert (record.reason, record.retry_after_s) == ("deadline_expired", None)
    assert "takes 500 ms by itself" in record.message


def test_a_flood_without_targets_keeps_out_who_could_be_in_time() -> None:
    """Two hundred prompts of half a second without targets come at once, and every second a chat of 20 ms that wants
    its token within 0.7 s. Once the flood has starved it has a share of the time, not all of it: chats go on to be
    served, and so does the flood."""
    device = Device(fit=CostFit(token_s=0.001), tile_s=0.005, num_pages=20_000)
    settings = SchedulerSettings(max_model_len=1000, pack_tokens=0, prefix_caching=False)
    flood = [Request(f"flood {n}", prompt_of(f"flood {n}", 500), 1, 0.001 * n) for n in range(200)]
    chats = [Request(f"chat {n}", prompt_of(f"chat {n}", 20), 1, 1.0 + n, SLO(ttft_s=0.7)) for n in range(90)]
    sent = sorted([*flood, *chats], key=lambda request: request.arrival)
    records = fleet(sent, [priced(settings, device)]).records
    met = [records[chat.id].kind == "finished" and not records[chat.id].missed for chat in chats]
    assert sum(met) >= 0.9 * len(chats)
    last = max(records[request.id].ended or 0.0 for request in flood)
    assert last == pytest.approx(101.8, abs=0.5), "and the device was never idle"


def test_the_starved_have_their_share_however_urgent_others_are() -> None:
    """Prompts that can just be in time never stop coming; three without targets have waited too long. One goes first,
    the next when others have had the rest of the time, and whoever comes in between is told of both."""
    story = Story(num_pages=400, pack_tokens=0)
    for number in range(3):
        request = Request(f"old {number}", prompt_of(f"old {number}", 10), 1, -100.0 + number)
        story.tell(ev.Arrived(request))
    started, number = [], 0
    while story.now < 2.5:
        story.arrives(f"new {number}", 10, max_tokens=1, slo=SLO(ttft_s=0.25))
        work = story.plan()
        assert work is not None
        started.append((story.now, [segment.request_id for segment in work.segments]))
        story.passes(work.num_tokens * 0.01)
        story.done(work, **{segment.request_id: 1 for segment in work.segments})
        number += 1
    old = [(at, ids) for at, ids in started if any(name.startswith("old") for name in ids)]
    assert [name for _, ids in old for name in ids if name.startswith("old")] == ["old 0", "old 1", "old 2"]
    gaps = [later - sooner for (sooner, _), (later, _) in pairwise(old)]
    assert len(gaps) == 2
    assert all(gap == pytest.approx(0.1 / STARVED_SHARE, abs=0.25) for gap in gaps)


def test_the_starved_are_not_read_in_packs_while_somebody_can_be_in_time() -> None:
    """Twenty prompts without targets have waited too long, and one comes that needs its token within 0.4 s: one of them
    goes first, for 0.1 s, not all of them for two seconds. When nobody is in a hurry they are read together."""
    story = Story(num_pages=400)
    for number in range(20):
        story.tell(ev.Arrived(Request(f"old {number}", prompt_of(f"old {number}", 10), 1, -100.0 + number)))
    story.arrives("new", 10, max_tokens=1, slo=SLO(ttft_s=0.4))
    first = story.plan()
    assert first is not None
    names = [segment.request_id for segment in first.segments]
    assert [name for name in names if name != "new"] == ["old 0"]
    story.passes(first.num_tokens * TOKEN_S)
    story.done(first, **dict.fromkeys(names, 1))
    while "new" not in names:
        work = story.plan()
        assert work is not None
        names = [segment.request_id for segment in work.segments]
        story.passes(work.num_tokens * TOKEN_S)
        story.done(work, **dict.fromkeys(names, 1))
    assert story.now <= 0.4
    together = story.plan()
    assert together is not None
    assert len(together.segments) > 2


@pytest.mark.parametrize("wish", [{"ttft_s": 0.47}, {"total_s": 0.94}])
def test_who_is_predicted_to_be_a_little_late_is_not_made_later(wish: dict[str, float]) -> None:
    """Its token will come a little after its target, and counts as in time: no pack that makes it come later still,
    and no long prompt before it."""
    story = Story(num_pages=400)
    story.begins("busy", 20, max_tokens=1, token=7)
    running = story.arrives("running", 30, max_tokens=1)
    work = story.plan()
    for number in range(3):
        story.arrives(f"idle {number}", 100, max_tokens=1)
    story.arrives("hurried", 50 - 30, max_tokens=1, slo=SLO(**wish))
    assert work is not None
    story.passes(0.3)
    story.done(work, **{running.id: 1})
    next_one = story.plan()
    assert next_one is not None
    assert [segment.request_id for segment in next_one.segments] == ["hurried"]


def test_a_target_between_tokens_that_nobody_could_meet_is_refused() -> None:
    """A token takes 10 ms by itself: one a microsecond would only take the device from others; and so would ten within
    a tenth of a second whatever happens."""
    story = Story(refuse_unattainable=True)
    for slo, wishes in ((SLO(tpot_s=1e-6), {}), (SLO(total_s=0.15), {"min_tokens": 10})):
        record = ending(story.tell(ev.Arrived(story.request("a", 10, max_tokens=20, slo=slo, **wishes))))
        assert (record.kind, record.reason, record.retry_after_s) == ("refused", "slo_unattainable", None)
        assert "10 ms by itself" in record.message or "by themselves" in record.message
    story.arrives("b", 10, max_tokens=1, slo=SLO(tpot_s=1e-6))
    story.arrives("c", 10, max_tokens=20, slo=SLO(tpot_s=0.02, total_s=0.3))


def test_tokens_take_pages_from_a_prompt_that_is_read_in_part() -> None:
    """In chunks of four a long prompt is read in part when the chat needs a page more than there is: the prompt is read
    anew later, the chat is not."""
    story = Story(num_pages=13, preempt="chunk", chunk_tokens=5, prefix_caching=False)
    story.begins("chat", 4, max_tokens=20)
    story.arrives("long", 40, max_tokens=1)
    for token in range(12):
        work = story.plan()
        assert work is not None
        drawn = {"chat": token, "long": 1} if any(s.request_id == "long" and s.logits_at for s in work.segments) else {}
        story.done(work, **(drawn or {"chat": token}))
        if story.scheduler.counters["recomputes"]:
            break
    assert story.scheduler.counters["recomputes"] == 1
    assert story.scheduler.loads()[0] >= 1
    assert story.scheduler._tickets["long"].record.num_recomputes == 1
    assert story.scheduler._tickets["chat"].record.num_recomputes == 0
