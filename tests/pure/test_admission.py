"""Who is let in, and what a newcomer is told: forecasts that come true, and refusals that come before any work.

By hand on the scheduler alone, then against whole runs with exact prices and nobody who comes later.
"""

import pytest
from hypothesis import given
from hypothesis import settings as tries
from hypothesis import strategies as st
from story import Story, ending

from headway.core import event as ev
from headway.core.admission import PROVEN_S, Forecast, unattainable
from headway.core.cost import CostFit
from headway.core.ledger import Record
from headway.core.policy import RESCUE_SHARE, Order
from headway.core.request import SLO, Request
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import Device, Simulation, fleet, priced

# Refusals


def refused(story: Story, num_tokens: int, **wishes: object) -> Record:
    """The record of one that was not let in. Nothing was done for it."""
    free = story.num_free
    record = ending(story.tell(ev.Arrived(story.request("refused", num_tokens, **wishes))))  # type: ignore[arg-type]
    assert (record.kind, record.first_scheduled, story.num_free) == ("refused", None, free)
    return record


def busy(**settings: int | float | bool | str) -> Story:
    """A prompt of two seconds has begun, one of a second waits; both have all the time in the world but go first."""
    story = Story(**({"refuse_unattainable": True, "pack_tokens": 50} | settings))  # type: ignore[arg-type]
    story.arrives("running", 200, priority=-1, slo=SLO(ttft_s=60.0))
    story.plan()
    story.arrives("waiting", 100, priority=-1, slo=SLO(ttft_s=60.0))
    return story


def test_what_will_miss_is_refused_at_once() -> None:
    """Three seconds of work go first and its own take half a second more; it was wanted within two. It is told when
    to come back: when what is in front is done."""
    record = refused(busy(), 50, slo=SLO(ttft_s=2.0))
    assert (record.reason, record.missed) == ("slo_unattainable", {"ttft": "refused"})
    assert record.predicted_ttft_s == pytest.approx(3.5)
    assert record.retry_after_s == pytest.approx(3.0 * 1.1 + 0.5 - 2.0)
    assert "within 2e+03 ms" in record.message
    assert "try again in 1.8 s" in record.message


def test_the_whole_answer_counts_as_a_target_too() -> None:
    """Nothing was said of the first token, but everything was to be there in two seconds."""
    assert refused(busy(), 50, slo=SLO(total_s=2.0)).reason == "slo_unattainable"


def test_coming_back_does_not_help_who_takes_longer_than_it_has() -> None:
    """The prompt alone takes half a second and 0.3 were asked for: no hint, for no hour is better than another."""
    for story in (busy(), Story(refuse_unattainable=True)):
        record = refused(story, 50, slo=SLO(ttft_s=0.3))
        assert (record.reason, record.retry_after_s) == ("slo_unattainable", None)
        assert "takes 500 ms by itself" in record.message


def test_coming_back_helps_where_the_device_is_only_slowed_for_now() -> None:
    """A neighbour makes steps take twice their price, which is learnt from them: the same prompt is refused for now."""
    story = Story(refuse_unattainable=True)
    for number in range(30):
        story.arrives(f"slow{number}", (number,) * 20, max_tokens=1)
        story.passes(0.4)
        story.done(story.plan(), 0.4, **{f"slow{number}": 7})
    record = refused(story, 50, slo=SLO(ttft_s=0.6))
    assert (record.reason, record.retry_after_s) == ("slo_unattainable", pytest.approx(1.0 - 0.6, abs=0.01))
    assert refused(story, 50, slo=SLO(ttft_s=0.3)).retry_after_s is None


def test_who_finds_no_place_waits_for_an_answer_to_end() -> None:
    """One may hold pages, and writes 300 tokens, a hundredth of a second each, if it is like half of what is asked. If
    answers are known to end sooner, the newcomer is let in; and so it is if there is another place."""
    for num_places, part, waits_s in ((1, 0.5, 1.49), (1, 0.02, 0.05), (2, 0.5, 0.0)):
        story = Story(max_num_seqs=num_places, refuse_unattainable=True)
        story.begins("reader", 4, max_tokens=300, slo=SLO(tpot_s=0.1))
        story.scheduler._lengths.part = part
        request = story.request("b", 10, slo=SLO(ttft_s=0.5))
        (effect,) = story.tell(ev.Arrived(request))
        if waits_s > 0.5:
            assert isinstance(effect, ev.End)
            assert effect.record.reason == "slo_unattainable"
            assert effect.record.predicted_ttft_s == pytest.approx(waits_s + 0.11, abs=0.02)
        else:
            assert isinstance(effect, ev.Admit)
            assert effect.predicted_ttft_s == pytest.approx(waits_s + 0.11, abs=0.02)


def test_who_finds_no_pages_waits_for_an_answer_to_end() -> None:
    """Fifteen of thirty pages are held, and twenty are needed: until the holder's fifty tokens are written, a half of
    them at a guess."""
    story = Story(num_pages=30, max_model_len=120, refuse_unattainable=True)
    story.begins("reader", 60, max_tokens=50)
    (effect,) = story.tell(ev.Arrived(story.request("b", 80, slo=SLO(ttft_s=5.0))))
    assert isinstance(effect, ev.Admit)
    assert effect.predicted_ttft_s == pytest.approx(24 * 0.01 + 0.8 / (1 - 0.01 / 0.2), abs=0.02)


def test_who_shares_its_beginning_needs_fewer_pages() -> None:
    """The same memory, and the newcomer's first sixty tokens are the holder's: six more pages are there at once."""
    story = Story(num_pages=30, max_model_len=120, refuse_unattainable=True)
    shared = tuple(range(60))
    story.begins("reader", shared, max_tokens=50)
    (effect,) = story.tell(ev.Arrived(story.request("b", (*shared, *range(500, 520)), slo=SLO(ttft_s=5.0))))
    assert isinstance(effect, ev.Admit)
    assert effect.predicted_ttft_s == pytest.approx(0.2 / (1 - 0.01 / 0.2), abs=0.02)


def test_how_long_answers_become_is_learnt_from_those_that_end() -> None:
    story = Story()
    before = story.scheduler._lengths.part
    story.begins("short", 4, max_tokens=100)
    story.tell(ev.Stopped("short"))
    assert story.scheduler._lengths.part == pytest.approx(before + 0.05 * (0.01 - before))


def test_what_a_short_prompt_takes_alone_is_known_however_memory_is_slowed() -> None:
    """Below some tokens a step is bound by memory, which has a correction of its own. A neighbour makes it take three
    times its price: who asks for more than the price is told to come back, whatever arithmetic takes."""
    for memory, arithmetic, target_s, comes_back in ((3.0, 1.0, 0.2, True), (1.0, 3.0, 0.05, False)):
        story = Story(refuse_unattainable=True)
        story.scheduler.cost.fit = CostFit(step_s=0.05, token_s=0.0005)
        story.scheduler.cost._correction = {False: memory, True: arithmetic}
        assert (refused(story, 50, slo=SLO(ttft_s=target_s)).retry_after_s is not None) == comes_back


def three_readers(lengths: tuple[int, ...] = (101, 101, 101), **settings: int | bool) -> Story:
    """Three that are answered, at any pace within a second, half as long as they may be at a guess."""
    story = Story(**({"refuse_unattainable": True, "pack_tokens": 50} | settings))  # type: ignore[arg-type]
    for number, length in enumerate(lengths):
        story.arrives(f"r{number}", 4, max_tokens=length, slo=SLO(tpot_s=1.0))
    story.done(story.plan(), r0=7, r1=7, r2=7)
    return story


def test_whose_tokens_would_come_too_late_beside_others_is_refused() -> None:
    """With a fourth a token takes 40 ms, and a little longer with prompts read now and then. It fits when one has
    ended."""
    record = refused(three_readers((101, 61, 201)), 4, slo=SLO(tpot_s=0.042))
    assert (record.reason, record.missed) == ("slo_unattainable", {"tpot": "refused"})
    assert record.retry_after_s == pytest.approx(0.04 * (0.5 * 61 - 1))
    assert "every 42 ms" in record.message
    assert "every 44 ms: try again in 1.2 s" in record.message


def test_it_is_to_come_back_when_enough_have_ended() -> None:
    """Beside one other a token takes 22 ms: two must go."""
    record = refused(three_readers((101, 61, 201)), 4, slo=SLO(tpot_s=0.025))
    assert record.retry_after_s == pytest.approx(0.04 * (0.5 * 101 - 1))


@pytest.mark.parametrize(
    ("max_tokens", "tpot_s", "settings"),
    [(9, 0.046, {}), (9, None, {}), (1, 0.042, {}), (9, 0.042, {"refuse_unattainable": False})],
)
def test_who_asked_for_no_such_pace_is_let_in(max_tokens: int, tpot_s: float | None, settings: dict[str, bool]) -> None:
    """One who gives them time, has no target, has no second token, or is served late if need be."""
    three_readers(**settings).arrives("b", 4, max_tokens=max_tokens, slo=SLO(tpot_s=tpot_s))


def test_no_more_are_beside_it_than_may_be_answered_at_once() -> None:
    """Three may, and are: the newcomer comes when one of them has ended."""
    three_readers(max_num_seqs=3).arrives("b", 4, slo=SLO(tpot_s=0.042))


def test_who_comes_after_it_is_no_reason_to_refuse_it() -> None:
    """Answers without a pace of their own, and those of a worse priority, do not keep it out."""
    for wishes in ({}, {"slo": SLO(tpot_s=1.0), "priority": 1}):
        story = Story(refuse_unattainable=True, pack_tokens=50)
        for name in ("r0", "r1", "r2"):
            story.arrives(name, 4, **wishes)
        story.done(story.plan(), r0=7, r1=7, r2=7)
        story.arrives("b", 4, slo=SLO(tpot_s=0.02))


def test_those_whose_prompts_are_being_read_will_be_answered_too() -> None:
    """But for one of whom nothing but its first token is asked."""
    for num_tokens, is_refused in ((9, True), (1, False)):
        story = Story(refuse_unattainable=True)
        story.arrives("read", 50, max_tokens=num_tokens, slo=SLO(tpot_s=1.0))
        story.plan()
        (effect,) = story.tell(ev.Arrived(story.request("b", 4, slo=SLO(tpot_s=0.02))))
        assert isinstance(effect, ev.End) == is_refused


def test_of_a_burst_as_many_are_let_in_as_keep_their_pace() -> None:
    """Ten come at once to an idle device: eight of them together take a token every 88 ms. If each is answered before
    the next one's turn, as two tokens are between two prompts of a second, they never meet."""
    for num_tokens, num_answers, num_let_in in ((4, 100, 8), (100, 2, 10)):
        story = Story(refuse_unattainable=True, num_pages=400)
        effects = [
            story.tell(ev.Arrived(story.request(f"r{n}", num_tokens, num_answers, slo=SLO(tpot_s=0.09))))[0]
            for n in range(10)
        ]
        assert sum(isinstance(effect, ev.Admit) for effect in effects) == num_let_in
        waits_s = [effect.record.retry_after_s for effect in effects if isinstance(effect, ev.End)]
        assert waits_s == [pytest.approx(0.5 * num_answers * 0.09)] * (10 - num_let_in), "until one has its answer"


def test_of_those_who_wait_only_the_paced_in_front_count() -> None:
    """Thirty without any target wait behind whoever has one, and a prompt that goes first is being read: of ten that
    come then, as many are let in as without them."""
    story = Story(refuse_unattainable=True, num_pages=400)
    story.arrives("read", 200, max_tokens=1, priority=-1, slo=SLO(ttft_s=60.0))
    story.plan()
    for number in range(30):
        story.arrives(f"batch{number}", 4)
    effects = [
        story.tell(ev.Arrived(story.request(f"r{n}", 4, 100, slo=SLO(ttft_s=5.0, tpot_s=0.09))))[0] for n in range(10)
    ]
    assert sum(isinstance(effect, ev.Admit) for effect in effects) == 8


def test_who_will_have_ended_by_its_turn_is_not_beside_it() -> None:
    """Three are answered, with few tokens to come, and two seconds of prompts go before the newcomer."""
    story = three_readers((9, 9, 9))
    story.arrives("read", 200, max_tokens=1, priority=-1, slo=SLO(ttft_s=60.0))
    story.plan()
    story.arrives("b", 4, slo=SLO(tpot_s=0.042))


def test_a_target_that_no_pace_helps_is_told_so_first() -> None:
    """Its tokens would be too late as well, for now: but it need not come back."""
    for ttft_s, comes_back in ((0.3, False), (None, True)):
        record = refused(three_readers(), 50, slo=SLO(ttft_s=ttft_s, tpot_s=0.042))
        assert (record.retry_after_s is not None) == comes_back


def test_whoever_is_late_twice_is_told_the_longer_wait() -> None:
    """Two seconds of a prompt go first; its answer, beside which tokens would be too late, is soon done, or not."""
    for num_tokens, wait_s in ((9, 2.0 * 1.1 + 0.5 - 2.0), (190, 0.02 * 0.5 * 190)):
        story = Story(refuse_unattainable=True)
        story.arrives("running", 200, max_tokens=num_tokens, priority=-1, slo=SLO(ttft_s=60.0, tpot_s=1.0))
        story.plan()
        record = refused(story, 50, slo=SLO(ttft_s=2.0, tpot_s=0.015))
        assert record.retry_after_s == pytest.approx(wait_s)


def test_a_pace_is_not_tried_against_its_price() -> None:
    """Steps of tokens show what they take all the time: nobody is let in, against the forecast, to show it."""
    story = three_readers()
    story.passes(20 * PROVEN_S)
    assert refused(story, 4, slo=SLO(tpot_s=0.042)).reason == "slo_unattainable"


def test_a_target_that_can_be_met_is_let_in() -> None:
    """The same queue, the same prompt, more time."""
    busy().arrives("patient", 50, slo=SLO(ttft_s=4.0))


def test_the_urgent_are_let_in_where_they_go_first() -> None:
    """Three seconds of work are open, but it goes before what waits and suspends what runs: only a tile is lost."""
    story = Story(refuse_unattainable=True)
    for name in ("running", "waiting"):
        story.arrives(name, 150)
        story.plan()
    (admit,) = story.tell(ev.Arrived(story.request("urgent", 50, slo=SLO(ttft_s=0.6))))
    assert isinstance(admit, ev.Admit)
    assert admit.predicted_ttft_s == pytest.approx(0.51)


def test_best_effort_is_never_refused_for_its_time() -> None:
    """Nothing was asked for, or the answer within five minutes; it will take two, and is let in."""
    story = busy(max_model_len=4000, num_pages=2000)
    for number in range(30):
        story.arrives(f"r{number}", 300, priority=-1, slo=SLO(total_s=300.0) if number % 2 else SLO())
    story.arrives("last", 3999)


def test_refusing_can_be_switched_off() -> None:
    """For comparison: whoever will miss is let in, and misses."""
    busy(refuse_unattainable=False).arrives("hopeless", 50, slo=SLO(ttft_s=0.1))


def test_a_full_queue_says_when_it_will_be_shorter() -> None:
    """One may wait and one does, a second of work: come back in a second."""
    record = refused(busy(max_num_queued=1), 10)
    assert record.reason == "queue_full"
    assert record.retry_after_s == pytest.approx(1.0)
    longer = busy(max_num_queued=2)
    longer.arrives("another", 250)
    assert refused(longer, 10).retry_after_s == pytest.approx(3.5)


def test_a_server_that_shuts_down_lets_nobody_in() -> None:
    story = busy()
    story.tell(ev.Draining())
    record = refused(story, 10)
    assert (record.reason, record.retry_after_s) == ("draining", 1.0)


def test_what_was_due_before_it_came_is_not_let_in() -> None:
    """It was on its way for a second, and was wanted within half of one."""
    story = Story()
    request = Request("late", (1, 2, 3), 9, -1.0, SLO(total_s=0.5))
    record = ending(story.tell(ev.Arrived(request)))
    assert (record.kind, record.reason, record.missed) == ("refused", "deadline_expired", {"total": "queued_behind"})


def test_what_does_not_fit_is_told_so_before_anything_else() -> None:
    """Too long is too long, even if the queue is full and the server shuts down."""
    story = busy(max_num_queued=1)
    story.tell(ev.Draining())
    assert refused(story, 500).reason == "context_length_exceeded"
    assert refused(story, 0).reason == "empty_prompt"
    assert refused(Story(num_pages=10), 100).reason == "out_of_pages"


def test_a_hair_too_late_is_let_in() -> None:
    """A forecast is no promise: a tenth of the target beyond it is still worth trying, more is not."""
    request = Request("r", (1,), 1, 0.0, SLO(ttft_s=1.0))
    for upper_s, let_in in ((1.0 + 0.9 * RESCUE_SHARE, True), (1.0 + 1.1 * RESCUE_SHARE, False)):
        assert (unattainable(request, Forecast(0.9, upper_s, 0.1)) is None) == let_in


def test_a_timer_that_ran_out_while_events_were_handled_still_rings() -> None:
    """The whole answer of one in the queue was due between the handling of an event and the plan after it, a moment
    later on a real clock: the driver is told to come back at once, not never."""
    story = Story()
    story.arrives("running", 100)
    running = story.plan()
    story.arrives("waiting", 50, slo=SLO(total_s=0.5))
    story.now = 0.5001
    assert story.plan(progress=0.5) is running
    assert (story.scheduler.next_due() or 9.0) <= story.now
    assert ending(story.tell(ev.Due())).reason == "deadline_expired"
    story.plan(progress=0.5)
    assert (story.scheduler.next_due() or 9.0) > story.now


# Forecasts that come true

DEVICE = Device(fit=CostFit(step_s=0.01, token_s=0.001), tile_s=0.005)
PACK_TOKENS = 60


def simulate(prompts: list[tuple[int, float, float | None]], **changes: object) -> tuple[Simulation, list[Record]]:
    """Prompts (tokens, seconds after the one before, target) on a device whose prices are exact. The last one's
    forecast is judged: nobody comes after it."""
    chosen = {"prefix_caching": False, "refuse_unattainable": False, "tile_s": DEVICE.tile_s} | changes
    engine = priced(
        SchedulerSettings(max_model_len=1000, pack_tokens=PACK_TOKENS, **chosen),  # type: ignore[arg-type]
        DEVICE,
        gather_s=0.0,
    )
    now, sent = 0.0, []
    for number, (num_tokens, gap_s, target_s) in enumerate(prompts):
        now += gap_s
        sent.append(Request(f"r{number}", (0,) * num_tokens, 1, now, SLO(ttft_s=target_s)))
    records = fleet(sent, [engine]).records
    return engine, [records[request.id] for request in sent]


def error_s(record: Record) -> float:
    """How much later than forecast the first token came."""
    assert record.ttft_s is not None
    assert record.predicted_ttft_s is not None
    return record.ttft_s - record.predicted_ttft_s


crowds = st.lists(
    st.tuples(
        st.sampled_from([5, 20, 60, 300]), st.just(0.0) | st.floats(0.0, 0.15), st.sampled_from([None, 0.5, 3.0, 30.0])
    ),
    min_size=1,
    max_size=14,
)


@pytest.mark.parametrize("order", ["slack", "deadline", "fcfs", "shortest"])
@given(prompts=crowds)
@tries(max_examples=60, deadline=None)
def test_a_forecast_comes_true_to_a_tile(order: Order, prompts: list[tuple[int, float, float | None]]) -> None:
    """Steps run to their ends, prompts one by one: the first token comes when it was said it would."""
    _, records = simulate(prompts, order=order, preempt="none", pack=False)
    if order != "slack" or not any(record.missed for record in records):  # who turns late changes places on the way
        assert abs(error_s(records[-1])) <= DEVICE.tile_s + 1e-6


@given(prompts=crowds)
@tries(max_examples=200, deadline=None)
def test_with_suspensions_a_forecast_is_off_by_a_step_at_most(prompts: list[tuple[int, float, float | None]]) -> None:
    """The same where steps are suspended, if somebody would be late by waiting, or else let to their end: which of the
    two it will be for the step on the device, nobody can know at the arrival. As long as everybody is on time: whoever
    turns late goes behind others."""
    longest_s = DEVICE.fit.step_s + 300 * DEVICE.fit.token_s
    _, records = simulate(prompts, pack=False)
    if not any(record.missed for record in records):
        assert abs(error_s(records[-1])) <= longest_s + 1e-6


@given(prompts=crowds)
@tries(max_examples=100, deadline=None)
def test_packs_keep_a_forecast_to_a_pack(prompts: list[tuple[int, float, float | None]]) -> None:
    """Who is read together with whom is not known before: the forecast shares the fixed part of a step among as many
    tokens as a pack may have. The token comes one such step later than forecast at most, and the one on the device if
    that is not suspended after all; it may come earlier, with somebody more urgent who takes it along, but not where
    all come in turn."""
    pack_s = DEVICE.fit.step_s + DEVICE.fit.token_s * PACK_TOKENS
    longest_s = DEVICE.fit.step_s + 300 * DEVICE.fit.token_s
    _, records = simulate(prompts)
    if not any(record.missed for record in records):
        assert error_s(records[-1]) <= pack_s + longest_s + 1e-6
    _, in_turn = simulate(prompts, order="fcfs", preempt="none")
    assert abs(error_s(in_turn[-1])) <= pack_s


@given(prompts=crowds)
@tries(max_examples=60, deadline=None)
def test_who_was_let_in_with_a_forecast_in_time_is_in_time(prompts: list[tuple[int, float, float | None]]) -> None:
    """With refusals, exact prices and nobody more urgent afterwards, no promise to the last one is broken."""
    _, records = simulate(prompts, refuse_unattainable=True, pack=False, preempt="none")
    last = records[-1]
    if last.kind == "finished" and not any(record.missed for record in records[:-1] if record.kind == "finished"):
        target_s = last.slo.ttft_s or 1e9
        assert last.ttft_s is not None
        assert last.ttft_s <= target_s * (1 + RESCUE_SHARE) + DEVICE.tile_s


def test_tokens_that_are_written_meanwhile_are_in_the_forecast() -> None:
    """A chat wants a token every 50 ms, each of which costs 11: of a second of prefill about 1.28 are to be expected,
    and that is what it takes."""
    engine = priced(SchedulerSettings(max_model_len=1100, prefix_caching=False, tile_s=0.005), DEVICE, gather_s=0.0)
    chat = Request("chat", (0,) * 10, 500, 0.0, SLO(tpot_s=0.05))
    long = Request("long", (1,) * 990, 1, 0.5)
    record = fleet([chat, long], [engine]).records["long"]
    assert record.predicted_ttft_s == pytest.approx(1.0 / (1 - 0.011 / 0.05), rel=0.02)
    assert record.ttft_s == pytest.approx(record.predicted_ttft_s, rel=0.1)


# Several answers to one prompt


def answers(story: Story, prompt: tuple[int, ...], slo: SLO = SLO(), names: str = "abc") -> list[float]:  # noqa: B008
    """So many to one prompt arrive; when each first token is expected."""
    expected = []
    for name in names:
        (admit,) = story.tell(ev.Arrived(Request(name, prompt, 9, story.now, slo)))
        assert isinstance(admit, ev.Admit)
        expected.append(admit.predicted_ttft_s)
    return expected


def read(story: Story) -> list[tuple[str, int]]:
    """Whose prompts are read next, and from where on."""
    work = story.plan()
    assert work is not None
    return [(s.request_id, s.context_tokens) for s in work.segments if len(s.tokens) > 1]


def test_a_prompt_is_read_once_for_all_its_answers_and_expected_so() -> None:
    """Three to a prompt of a second, each wanted within one and a half: the first reads it, the others find it in the
    cache, and all are let in. Another tenant's finds nothing there, and is told so."""
    story = Story(refuse_unattainable=True, pack_tokens=150)
    prompt, slo = tuple(range(100)), SLO(ttft_s=1.5)
    assert answers(story, prompt, slo) == pytest.approx([1.0, 1.04, 1.08])
    assert story.scheduler.backlog_s == pytest.approx(1.08)
    (refused,) = story.tell(ev.Arrived(Request("d", prompt, 9, story.now, slo, tenant="other")))
    assert ending([refused]).reason == "slo_unattainable"
    assert read(story) == [("a", 0)]
    story.passes(1.0)
    story.done(story.plan(1.0), a=7)
    assert read(story) == [("b", 96), ("c", 96)]


def test_who_was_to_read_it_for_the_others_is_gone() -> None:
    """The next one does."""
    story = Story(pack_tokens=150)
    answers(story, tuple(range(100)))
    story.tell(ev.Cancelled("a"))
    assert read(story) == [("b", 0)]


def test_an_equal_prompt_of_another_call_does_not_interrupt_the_first() -> None:
    """It would be cached when its turn comes; it is not yet, and must not suspend what reads it."""
    story = Story(pack_tokens=150)
    prompt = tuple(range(390))
    story.arrives("a", prompt)
    first = story.plan()
    story.passes(0.1)
    story.arrives("b", prompt)
    assert story.plan(0.02) is first


def test_answers_to_a_short_prompt_are_read_together() -> None:
    """Reading it twice costs less than another step, so nobody waits."""
    story = Story(pack_tokens=250)
    answers(story, tuple(range(100)), names="ab")
    assert read(story) == [("a", 0), ("b", 0)]
