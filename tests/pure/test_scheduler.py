"""The scheduler as stories: an event goes in, a list of effects comes out, then a plan; both are compared by equality.

How a request lives and ends: lengths, stops, callers that go away, refusals, failures. Prices are those of `story`.
"""

import pytest
from story import Story, ending, prefill

from headway.core import event as ev
from headway.core.request import SLO
from headway.core.work import Commit, Failure, Outcome, Segment, Work

# A life without trouble


def test_a_request_from_arrival_to_its_last_token() -> None:
    """A prompt of six tokens, three to be written: it is let in, read whole, written one by one, and ends by length."""
    story = Story()
    request = story.arrives("a", 6, max_tokens=3)
    work = story.plan()
    assert work == prefill(1, ("a", request.prompt, (0, 1)))

    story.passes(0.06)
    assert story.done(work, a=70) == [ev.Deliver(Commit("a", (70,)))]
    assert story.plan() == Work(2, "language", (Segment("a", (70,), 6, 6, (0, 1), (0,)),))

    story.passes(0.01)
    assert story.done(story.plan(), a=71) == [ev.Deliver(Commit("a", (71,)))]
    assert story.plan() == Work(3, "language", (Segment("a", (71,), 7, 7, (0, 1), (0,)),))

    story.passes(0.02)
    deliver, end = story.done(story.plan(), a=72)
    assert deliver == ev.Deliver(Commit("a", (72,)))
    record = ending([end])
    assert (record.kind, record.reason, record.num_output_tokens) == ("finished", "length", 3)
    assert (record.first_scheduled, record.first_token, record.last_token) == (0.0, 0.06, pytest.approx(0.09))
    assert record.longest_gap_s == pytest.approx(0.02)
    assert record.missed == {}
    assert story.plan() is None
    assert story.num_free == 200


def test_steps_are_counted_by_their_tokens() -> None:
    """A prompt of six, which is more than four and at most eight, then a single token; who has left counts no more."""
    story = Story(pack_tokens=16)
    story.begins("a", 6, max_tokens=3)
    story.done(story.plan(), a=8)
    assert story.scheduler.step_sizes == {3: 1, 0: 1}
    assert story.scheduler.counters["step_tokens"] == 7
    story.tell(ev.Cancelled("a"))
    story.arrives("b", 8)
    story.arrives("c", 3)
    work = story.plan()
    assert work is not None
    assert work.num_tokens == 11
    story.tell(ev.Cancelled("b"))
    story.tell(ev.Left(work.id, ("b",)))
    story.done(work, c=9)
    assert story.scheduler.step_sizes == {3: 1, 0: 1, 2: 1}
    assert story.scheduler.counters["step_tokens"] == 10


def test_planning_twice_changes_nothing() -> None:
    """Asked again while a Work is on the device and nothing else wants it, the answer is that very Work."""
    story = Story()
    story.arrives("a", 6)
    work = story.plan()
    assert story.plan(progress=0.5) is work


def test_an_answer_grows_into_a_new_page() -> None:
    """The prompt fills its page to the last place: the next token takes a second one."""
    story = Story()
    story.begins("a", 4)
    assert story.plan() == Work(2, "language", (Segment("a", (7,), 4, 4, (0, 1), (0,)),))


def test_short_prompts_are_read_together() -> None:
    """Three prompts wait when the device comes free: one step reads all of them, and one step writes for all."""
    story = Story()
    prompts = {name: story.arrives(name, 3).prompt for name in ("a", "b", "c")}
    pack = story.plan()
    assert pack == prefill(1, ("a", prompts["a"], (0,)), ("b", prompts["b"], (1,)), ("c", prompts["c"], (2,)))
    story.passes(0.09)
    story.done(pack, a=1, b=2, c=3)
    step = story.plan()
    assert step is not None
    assert [(segment.request_id, segment.tokens) for segment in step.segments] == [
        ("a", (1,)),
        ("b", (2,)),
        ("c", (3,)),
    ]


def test_a_pack_ends_where_it_stops_being_useful() -> None:
    """Beyond `pack_tokens` more prompts in a step only make each other wait."""
    story = Story(pack_tokens=10)
    for name in ("a", "b", "c"):
        story.arrives(name, 5)
    pack = story.plan()
    assert pack is not None
    assert [segment.request_id for segment in pack.segments] == ["a", "b"]


def test_no_more_at_once_than_there_are_places() -> None:
    """Two places: the third request waits until one of the two has ended, and the other two write on."""
    story = Story(max_num_seqs=2)
    for name in ("a", "b", "c"):
        story.arrives(name, 3, max_tokens=2)
    pack = story.plan()
    assert pack is not None
    assert [segment.request_id for segment in pack.segments] == ["a", "b"]
    story.done(pack, a=1, b=2)
    tokens = story.plan()
    assert tokens is not None
    assert [segment.request_id for segment in tokens.segments] == ["a", "b"]
    story.done(tokens, a=1, b=2)
    third = story.plan()
    assert third is not None
    assert [segment.request_id for segment in third.segments] == ["c"]


# How an answer ends


def test_a_stop_id_ends_the_answer_and_is_delivered() -> None:
    """The model draws its end-of-text token: the door gets it, to know why, and the answer is finished."""
    story = Story()
    story.arrives("a", 6, stop_ids=(2,))
    deliver, end = story.done(story.plan(), a=2)
    assert deliver == ev.Deliver(Commit("a", (2,)))
    record = ending([end])
    assert (record.kind, record.reason, record.stop_id) == ("finished", "stop", 2)


def test_stop_ids_do_not_count_before_min_tokens() -> None:
    """At least two tokens were asked for: the first two may be stop ids, the third one ends it."""
    story = Story()
    story.arrives("a", 6, stop_ids=(2,), min_tokens=2)
    for _ in range(2):
        assert story.done(story.plan(), a=2) == [ev.Deliver(Commit("a", (2,)))]
    assert ending(story.done(story.plan(), a=2)).num_output_tokens == 3


def test_an_answer_ends_where_the_context_does() -> None:
    """A thousand tokens were asked for, but the model has eight positions and six are the prompt's."""
    story = Story(max_model_len=8)
    story.arrives("a", 6, max_tokens=1000)
    story.done(story.plan(), a=1)
    record = ending(story.done(story.plan(), a=1))
    assert (record.reason, record.num_output_tokens) == ("length", 2)


def test_a_stop_string_finishes_a_request() -> None:
    """The door has seen a stop string in the text: that is an ending, not a cancellation."""
    story = Story()
    story.begins("a", 6)
    record = ending(story.tell(ev.Stopped("a")))
    assert (record.kind, record.reason) == ("finished", "stop")
    assert story.num_free == 200


def test_a_step_that_commits_several_tokens_is_cut_at_its_stop() -> None:
    """Three tokens in one step, the second of which is a stop id: the third was never said."""
    story = Story()
    story.arrives("a", 6, stop_ids=(2,))
    work = story.plan()
    assert work is not None
    deliver, end = story.tell(ev.StepDone(work.id, Outcome((Commit("a", (5, 2, 6)),)), 0.06))
    assert deliver == ev.Deliver(Commit("a", (5, 2)))
    assert ending([end]).num_output_tokens == 2


# Callers that go away


def test_cancelled_in_the_queue() -> None:
    """Nothing was begun, so nothing needs to be stopped."""
    story = Story()
    story.arrives("a", 6)
    record = ending(story.tell(ev.Cancelled("a")))
    assert (record.kind, record.reason, record.first_scheduled) == ("cancelled", "cancelled", None)
    assert story.plan() is None


def test_cancelled_while_its_prompt_is_read() -> None:
    """Nobody else is in the step: it is abandoned, and its pages are free in the same moment."""
    story = Story()
    story.arrives("a", 6)
    story.plan()
    assert story.num_free == 198
    abandon, end = story.tell(ev.Cancelled("a"))
    assert abandon == ev.Abandon(1)
    assert ending([end]).kind == "cancelled"
    assert story.num_free == 200
    assert story.plan() is None


def test_cancelled_while_suspended() -> None:
    """A parked prefill whose caller goes away gives its pages back without ever being resumed."""
    story = Story()
    story.arrives("long", 100)
    story.plan()
    story.passes(0.1)
    story.arrives("urgent", 10, slo=SLO(ttft_s=0.15))
    urgent = story.plan(progress=0.1)
    assert story.scheduler.pages.counts()["parked"] == 25
    abandon, end = story.tell(ev.Cancelled("long"))
    assert abandon == ev.Abandon(1)
    assert ending([end]).request_id == "long"
    assert story.num_free == 200 - 3
    assert story.plan(progress=0.5) is urgent


def test_a_member_of_a_pack_leaves_at_the_next_layer() -> None:
    """Two prompts in one step, one caller goes: the other's step is not disturbed, and the pages come back only when
    the stage has said that it touches them no more."""
    story = Story()
    story.arrives("a", 6)
    story.arrives("b", 6)
    pack = story.plan()
    assert story.tell(ev.Cancelled("a")) == [ev.Drop(1, "a")]
    assert story.num_free == 196
    assert story.plan(progress=0.3) is pack
    assert ending(story.tell(ev.Left(1, ("a",)))).kind == "cancelled"
    assert story.num_free == 198
    assert story.done(pack, b=5) == [ev.Deliver(Commit("b", (5,)))]


def test_a_member_that_leaves_too_late_is_gone_with_the_step() -> None:
    """The last layer boundary had passed when the caller went: its token is drawn, and delivered to nobody."""
    story = Story()
    story.arrives("a", 6)
    story.arrives("b", 6)
    pack = story.plan()
    assert story.tell(ev.Cancelled("a")) == [ev.Drop(1, "a")]
    end, deliver = story.done(pack, a=4, b=5)
    assert ending([end]).request_id == "a"
    assert deliver == ev.Deliver(Commit("b", (5,)))


def test_when_all_members_go_the_step_is_abandoned() -> None:
    """The second caller goes before the first one's member has left: nobody waits for this step any more."""
    story = Story()
    story.arrives("a", 6)
    story.arrives("b", 6)
    story.plan()
    story.tell(ev.Cancelled("a"))
    abandon, *ends = story.tell(ev.Cancelled("b"))
    assert abandon == ev.Abandon(1)
    assert sorted(ending([end]).request_id for end in ends) == ["a", "b"]
    assert story.num_free == 200


def test_cancelled_while_it_decodes_with_others() -> None:
    """In a step with others it leaves at a layer boundary; between two steps it is gone at once."""
    story = Story()
    story.arrives("a", 6)
    story.arrives("b", 6)
    story.done(story.plan(), a=1, b=1)
    step = story.plan()
    assert story.tell(ev.Cancelled("a")) == [ev.Drop(2, "a")]
    assert ending(story.tell(ev.Left(2, ("a",)))).num_output_tokens == 1
    story.done(step, b=2)
    assert ending(story.tell(ev.Cancelled("b"))).num_output_tokens == 2
    assert story.num_free == 200


def test_the_second_goodbye_is_not_heard() -> None:
    """A caller cancels twice, and somebody cancels what never was or has ended: nothing happens, nothing breaks."""
    story = Story()
    story.arrives("a", 6)
    story.arrives("b", 6)
    story.plan()
    assert story.tell(ev.Cancelled("a")) == [ev.Drop(1, "a")]
    assert story.tell(ev.Cancelled("a")) == []
    assert story.tell(ev.Stopped("a")) == []
    story.tell(ev.Left(1, ("a",)))
    assert story.tell(ev.Cancelled("a")) == []
    assert story.tell(ev.Cancelled("nobody")) == []


# Who is not let in


@pytest.mark.parametrize(
    ("num_tokens", "reason", "advice"),
    [
        (0, "empty_prompt", "give at least one token"),
        (400, "context_length_exceeded", "maximum context length is 400 tokens"),
        (399, "out_of_pages", "does not fit the key-value memory"),
    ],
)
def test_what_can_never_be_served_is_refused_without_a_hint(num_tokens: int, reason: str, advice: str) -> None:
    """No prompt, one longer than the context, one longer than the memory: to try again will not help."""
    story = Story(num_pages=50)
    record = ending(story.tell(ev.Arrived(story.request("a", num_tokens))))
    assert (record.kind, record.reason, record.retry_after_s) == ("refused", reason, None)
    assert advice in record.message
    assert story.scheduler.num_open == 0


def test_a_full_queue_says_when_to_come_back() -> None:
    """Two prompts of four seconds each wait: the third caller hears that in eight seconds there will be room."""
    story = Story(max_num_queued=2)
    story.arrives("a", 399)
    story.arrives("b", 399)
    record = ending(story.tell(ev.Arrived(story.request("c", 5, slo=SLO(ttft_s=1.0)))))
    assert (record.kind, record.reason) == ("refused", "queue_full")
    assert record.retry_after_s == pytest.approx(7.98)
    assert record.missed == {"ttft": "refused"}


def test_draining_finishes_what_is_open_and_admits_nothing() -> None:
    """The server is asked to stop: the one who waits and the one who decodes are served, a newcomer is sent away."""
    story = Story()
    story.begins("a", 6, max_tokens=2)
    story.arrives("b", 6, max_tokens=1)
    assert story.tell(ev.Draining()) == []
    record = ending(story.tell(ev.Arrived(story.request("c", 6))))
    assert (record.reason, record.retry_after_s) == ("draining", 1.0)
    assert ending(story.done(story.plan(), b=1)).kind == "finished"
    assert ending(story.done(story.plan(), a=1)).kind == "finished"
    assert story.plan() is None
    assert story.scheduler.num_open == 0


def test_who_waits_past_its_last_instant_is_refused() -> None:
    """The whole answer was due within half a second, and the device is taken for a second: no prefill is spent."""
    story = Story()
    story.arrives("long", 100, priority=-1, slo=SLO(ttft_s=1.0))
    work = story.plan()
    story.arrives("late", 30, slo=SLO(total_s=0.5))
    assert story.plan() is work
    story.passes(0.3)
    assert story.plan(progress=0.3) is work
    assert story.scheduler.next_due() == 0.5
    story.passes(0.2)
    record = ending(story.tell(ev.Due()))
    assert (record.request_id, record.kind, record.reason) == ("late", "refused", "deadline_expired")
    assert record.missed == {"total": "queued_behind"}


def test_a_deadline_for_the_whole_answer_does_not_cut_it_short() -> None:
    """What has begun is written to its end, late or not: the account says that it was late."""
    story = Story()
    story.begins("a", 40, max_tokens=2, slo=SLO(total_s=0.405))
    story.plan()
    story.passes(0.01)
    assert story.tell(ev.Due()) == []
    record = ending(story.done(story.plan(), a=1))
    assert record.kind == "finished"
    assert set(record.missed) == {"total"}


# Trouble


def test_a_step_that_fails_takes_only_its_members() -> None:
    """The stage raised in the pack of a and b: both end as failed with the cause, and c is served."""
    story = Story(pack_tokens=12)
    for name in ("a", "b", "c"):
        story.arrives(name, 6)
    story.plan()
    ends = story.tell(ev.StepFailed(1, "RuntimeError: out of luck"))
    records = [ending([end]) for end in ends]
    assert [(r.request_id, r.kind, r.reason, r.message) for r in records] == [
        (name, "failed", "step_failed", "RuntimeError: out of luck") for name in ("a", "b")
    ]
    work = story.plan()
    assert work is not None
    assert [segment.request_id for segment in work.segments] == ["c"]


def test_a_member_without_a_token_fails_alone() -> None:
    """Three prompts are read together, the middle one's logits are not finite. It ends as failed, the others go on; its
    pages are not to be found by the next one with the same prompt."""
    story = Story()
    prompts = {name: story.arrives(name, 9).prompt for name in ("a", "b", "c")}
    pack = story.plan()
    assert pack is not None
    commits = (Commit("a", (5,)), Commit("b", (), failure=Failure("not_finite", "Not finite.")), Commit("c", (6,)))
    first, end, third = story.tell(ev.StepDone(pack.id, Outcome(commits), 0.27))
    assert (first, third) == (ev.Deliver(Commit("a", (5,))), ev.Deliver(Commit("c", (6,))))
    record = ending([end])
    assert (record.request_id, record.kind, record.reason) == ("b", "failed", "not_finite")
    assert record.message == "Not finite."
    step = story.plan()
    assert step is not None
    assert [segment.request_id for segment in step.segments] == ["a", "c"]
    story.done(step, a=1, c=1)
    story.arrives("again", prompts["b"], slo=SLO(ttft_s=0.001))
    story.arrives("shared", prompts["a"], slo=SLO(ttft_s=0.001))
    story.plan()
    found = {ticket.request.id: ticket.record.num_cached_tokens for ticket in story.scheduler._tickets.values()}
    assert (found["again"], found["shared"]) == (0, 8)


def test_a_member_that_was_leaving_has_its_own_ending() -> None:
    """Its caller had gone when its logits turned out to be broken: cancelled, not failed."""
    story = Story()
    story.arrives("a", 6)
    story.arrives("b", 6)
    pack = story.plan()
    assert pack is not None
    story.tell(ev.Cancelled("a"))
    commits = (Commit("a", (), failure=Failure("not_finite", "Not finite.")), Commit("b", (5,)))
    end, deliver = story.tell(ev.StepDone(pack.id, Outcome(commits), 0.12))
    assert ending([end]).kind == "cancelled"
    assert deliver == ev.Deliver(Commit("b", (5,)))


def test_a_lost_engine_loses_everything_and_the_next_request_is_served() -> None:
    """One is queued, one suspended, one read, one decoding when the engine dies. All end as failed, no page is missing,
    and whoever comes afterwards is let in as if nothing had happened."""
    story = Story(max_num_seqs=3)
    story.begins("writing", 6, slo=SLO(tpot_s=5.0, ttft_s=1.0))
    story.arrives("long", 100)
    story.plan()
    story.arrives("urgent", 10, slo=SLO(ttft_s=0.15))
    story.plan()
    story.arrives("waiting", 6)
    effects = story.tell(ev.EngineLost("The engine process was killed by signal 9."))
    assert effects[:2] == [ev.Abandon(2), ev.Abandon(3)]
    records = [ending([end]) for end in effects[2:]]
    assert sorted(record.request_id for record in records) == ["long", "urgent", "waiting", "writing"]
    assert {(record.kind, record.reason) for record in records} == {("failed", "engine_lost")}
    missed = {record.request_id: record.missed for record in records}
    assert missed["writing"] == dict.fromkeys(("ttft", "tpot"), "engine_lost"), "an answer that broke off is none"
    assert missed["urgent"] == {"ttft": "engine_lost"}
    assert missed["waiting"] == {}
    assert story.num_free == 200
    story.begins("next", 6)
