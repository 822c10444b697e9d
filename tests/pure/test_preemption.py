"""Who gives way to whom, and when: suspended prompts, tokens that become due, bounds on what is parked.

First by hand, on the scheduler alone; at the end whole runs on a virtual clock, where time passes tile by tile.
"""

import pytest
from story import Story, ending, prefill

from headway.core import event as ev
from headway.core.request import SLO, Request
from headway.core.settings import SchedulerSettings
from headway.core.work import Commit, Segment, Work
from headway.placement.simulate import FakeSimulation

# A prompt in a hurry


def test_an_urgent_arrival_parks_a_long_prompt_which_later_goes_on_as_it_was() -> None:
    """A prompt of a second has had the device for a tenth when somebody comes who wants an answer in 0.15 s. The long
    one is suspended, the urgent one is read, and then the very same Work goes on."""
    story = Story()
    long = story.arrives("long", 100)
    work = story.plan()
    assert work == prefill(1, ("long", long.prompt, tuple(range(25))))

    story.passes(0.1)
    urgent = story.arrives("urgent", 10, max_tokens=1, slo=SLO(ttft_s=0.15))
    assert story.plan(progress=0.1) == prefill(2, ("urgent", urgent.prompt, (25, 26, 27)))
    assert story.scheduler.loads() == (1, 0, 1)
    assert story.scheduler.pages.counts()["parked"] == 25

    story.passes(0.1)
    deliver, end = story.done(story.plan(), urgent=5)
    assert deliver == ev.Deliver(Commit("urgent", (5,)))
    assert ending([end]).missed == {}
    assert story.plan() is work
    assert story.scheduler.pages.counts()["parked"] == 0

    story.passes(0.9)
    assert story.done(work, long=6) == [ev.Deliver(Commit("long", (6,)))]
    record = ending(story.tell(ev.Cancelled("long")))
    assert (record.num_preemptions, record.parked_s) == (1, pytest.approx(0.1))


def test_a_step_that_tokens_ride_along_in_is_not_suspended_for_being_late() -> None:
    """A reader's token rides along with part of a long prompt, and the device is slower than was thought: the token is
    late. Somebody comes who would be on time if the step were suspended: but then the reader would wait for whoever is
    on time, one after another, since it is late anyway."""
    story = Story(lanes="mixed")
    story.begins("reader", 4, slo=SLO(tpot_s=0.3))
    story.arrives("long", 100, slo=SLO(ttft_s=10.0))
    work = story.plan()
    assert work is not None
    assert [segment.request_id for segment in work.segments] == ["reader", "long"]

    story.passes(0.45)
    story.arrives("urgent", 5, max_tokens=1, slo=SLO(ttft_s=0.06))
    assert story.plan(progress=0.8) is work


def test_prompts_keep_a_part_of_the_time_however_far_steps_are_off() -> None:
    """Twenty answers are behind their pace, and steps are known to take up to a half longer than predicted: a step of
    tokens still takes something of the prompt along, a quarter of its own time."""
    story = Story(lanes="mixed")
    for number in range(20):
        story.arrives(f"r{number}", 4, slo=SLO(tpot_s=0.1))
    work = story.plan()
    story.passes(0.8)
    story.done(work, **{f"r{number}": 7 for number in range(20)})
    story.scheduler.cost._upper = 1.5
    story.passes(2.0)
    story.arrives("long", 200, slo=SLO(ttft_s=30.0))
    work = story.plan()
    assert work is not None
    assert {segment.request_id: len(segment.tokens) for segment in work.segments}["long"] in (4, 5)


def test_who_can_wait_does_not_interrupt() -> None:
    """The newcomer has a target too, but the running prompt ends long before that is in danger."""
    story = Story()
    story.arrives("long", 100)
    work = story.plan()
    story.arrives("patient", 10, slo=SLO(ttft_s=3.0))
    assert story.plan(progress=0.1) is work


def test_a_prompt_that_is_nearly_read_is_not_interrupted() -> None:
    """Half a token's worth of work is left: the urgent one waits for that, which is less than a tile."""
    story = Story()
    story.arrives("long", 100)
    work = story.plan()
    story.arrives("urgent", 10, slo=SLO(ttft_s=0.11))
    assert story.plan(progress=0.995) is work


def test_twins_do_not_trade_the_device() -> None:
    """Two prompts alike in everything but their name, one reads and one waits; thirty things happen in between, and the
    one that has begun keeps the device throughout."""
    story = Story(pack_tokens=100)
    story.arrives("first", 100, slo=SLO(ttft_s=1.5))
    work = story.plan()
    story.arrives("second", 100, slo=SLO(ttft_s=1.5))
    for number in range(30):
        story.passes(0.03)
        story.arrives(f"other{number}", 1, slo=SLO(ttft_s=30.0))
        assert story.plan(progress=0.03 * (number + 1)) is work
    assert story.scheduler.counters["preemptions"] == 0


def test_a_chain_of_ever_more_urgent_prompts_unwinds_from_the_last() -> None:
    """Each newcomer is more urgent than the one before and parks it; when they are done, the most urgent of the parked
    goes on first."""
    story = Story()
    for name, num_tokens, ttft_s in (("a", 200, 9.0), ("b", 100, 2.5), ("c", 20, 0.3)):
        story.arrives(name, num_tokens, max_tokens=1, slo=SLO(ttft_s=ttft_s))
        story.plan()
        story.passes(0.01)
    assert story.scheduler.loads() == (1, 0, 2)
    order = []
    while (work := story.plan()) is not None:
        name = work.segments[0].request_id
        order.append(name)
        story.passes(work.num_tokens * 0.01)
        assert ending(story.done(work, **{name: 1})).missed == {}
    assert order == ["c", "b", "a"]


# The next token


def test_a_token_that_becomes_due_interrupts_a_prompt() -> None:
    """A chat wants a token every 100 ms. A long prompt has the device; 20 ms before the next token would be late (its
    own 10 ms, and 10 ms for a tile) the timer rings, the token is written, and the prompt goes on."""
    story = Story()
    story.begins("chat", 4, slo=SLO(tpot_s=0.1))
    assert story.now == 0.04
    story.arrives("long", 100)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "long"
    assert story.scheduler.next_due() == pytest.approx(0.04 + 0.1 - 0.01 - 0.01)

    story.now = story.scheduler.next_due() or 0.0
    assert story.tell(ev.Due()) == []
    token = story.plan(progress=0.08)
    assert token == Work(3, "language", (Segment("chat", (7,), 4, 4, (0, 26), (0,)),))

    story.passes(0.01)
    story.done(token, chat=8)
    assert story.plan() is work
    assert story.scheduler.next_due() == pytest.approx(0.13 + 0.1 - 0.01 - 0.01)


def test_the_next_token_waits_for_its_time_while_prompts_are_there() -> None:
    """Nothing is gained by writing a token long before it is due: prompts that wait are read first, and several tokens
    become one step."""
    story = Story()
    story.begins("chat", 4, slo=SLO(tpot_s=0.5))
    story.arrives("prompt", 6)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "prompt"
    story.passes(0.06)
    story.done(work, prompt=9)
    both = story.plan()
    assert both is not None
    assert [segment.request_id for segment in both.segments] == ["chat", "prompt"]


def test_an_idle_device_does_not_wait_for_a_token_to_become_due() -> None:
    """Nobody else wants the device: the token is written at once, not at the last moment."""
    story = Story()
    story.begins("chat", 4, slo=SLO(tpot_s=9.0))
    token = story.plan()
    assert token is not None
    assert token.segments == (Segment("chat", (7,), 4, 4, (0, 1), (0,)),)


def test_without_a_target_tokens_still_come_steadily() -> None:
    """The chat asked for nothing; while a prompt of four seconds is read it still gets a token every 0.2 s."""
    story = Story()
    story.begins("chat", 4)
    story.arrives("long", 399)
    story.plan()
    assert story.scheduler.next_due() == pytest.approx(0.04 + 0.2 - 0.01 - 0.01)


def test_a_target_that_the_device_cannot_meet_leaves_half_of_it_to_prompts() -> None:
    """A token every millisecond is asked of a device that needs ten for one: it is written every 30 ms (twice its own
    price and a tile), so that prompts still get on."""
    story = Story()
    story.begins("chat", 4, slo=SLO(tpot_s=0.001))
    story.arrives("long", 100)
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "long"
    assert story.scheduler.next_due() == pytest.approx(0.04 + 0.03 - 0.01 - 0.01)


# Bounds


def test_no_more_is_parked_than_allowed() -> None:
    """One suspended prompt is the limit: the third, however urgent, waits for the second."""
    story = Story(max_num_parked=1)
    story.arrives("a", 200)
    story.plan()
    story.arrives("b", 100, slo=SLO(ttft_s=1.5))
    second = story.plan()
    assert second is not None
    assert second.segments[0].request_id == "b"
    story.arrives("c", 10, slo=SLO(ttft_s=0.15))
    assert story.plan() is second
    assert story.scheduler.loads() == (1, 1, 1)


def test_tokens_park_no_more_than_is_allowed() -> None:
    """One suspended prompt is the limit, and it gave way to a token. When that is made the next prompt waits for it,
    though due first: it would have to give way to the next token too, and so would all after it."""
    story = Story(max_num_parked=1)
    story.begins("reader", 4, max_tokens=50, slo=SLO(tpot_s=0.1))
    story.arrives("a", 200)
    first = story.plan()
    story.passes(0.085)
    token = story.plan(progress=0.04)
    assert token is not None
    assert [segment.request_id for segment in token.segments] == ["reader"]
    story.arrives("b", 100, slo=SLO(ttft_s=5.0))
    story.passes(0.01)
    story.done(token, reader=8)
    assert story.plan() is first
    assert story.scheduler.loads() == (2, 1, 0)


def test_no_more_tokens_are_parked_than_memory_was_planned_for() -> None:
    """A suspended step keeps activations for each of its tokens. 200 are parked and 450 are allowed: a step of 100 may
    join them, one of 300 goes on, urgent arrival or not."""
    for second_tokens, gives_way in ((100, True), (300, False)):
        story = Story(max_parked_tokens=450)
        story.arrives("a", 200)
        story.plan()
        story.arrives("b", second_tokens, slo=SLO(ttft_s=1.15 * second_tokens * 0.01))
        second = story.plan()
        assert second is not None
        assert second.segments[0].request_id == "b"
        story.arrives("c", 10, slo=SLO(ttft_s=0.15))
        assert (story.plan() is not second) == gives_way


def test_one_prompt_can_always_give_way() -> None:
    """Planned for next to nothing, memory must still hold the longest single prompt that may come."""
    story = Story(max_parked_tokens=1)
    story.arrives("long", 399)
    story.plan()
    story.arrives("urgent", 10, slo=SLO(ttft_s=0.15))
    work = story.plan()
    assert work is not None
    assert work.segments[0].request_id == "urgent"


def test_the_end_of_patience_is_a_timer() -> None:
    """A prompt is parked behind one that takes long: the driver is told when its patience ends."""
    story = Story(max_parked_s=0.5)
    story.arrives("long", 100)
    work = story.plan()
    story.passes(0.1)
    story.arrives("urgent", 300, slo=SLO(ttft_s=3.2))
    assert story.plan(progress=0.1) is not work
    assert story.scheduler.next_due() == pytest.approx(0.6)
    story.passes(0.5)
    story.tell(ev.Due())
    assert story.plan(progress=0.16) is work


def test_a_forecast_counts_who_has_been_parked_for_too_long() -> None:
    """A prompt is parked behind one that takes long. A newcomer that goes before it is told so while the parked one's
    patience lasts; then that one goes first, and the newcomer is told of its rest as well."""

    def predicted_s(parked_s: float) -> float:
        story = Story(max_parked_s=0.5)
        story.arrives("long", 100)
        story.plan()
        story.passes(0.1)
        story.arrives("urgent", 300, slo=SLO(ttft_s=3.2))
        story.plan(progress=0.1)
        story.passes(parked_s)
        (admitted,) = story.tell(ev.Arrived(story.request("newcomer", 10, slo=SLO(ttft_s=1.0))))
        assert isinstance(admitted, ev.Admit)
        return admitted.predicted_ttft_s

    assert predicted_s(0.55) - predicted_s(0.45) == pytest.approx(0.9, abs=0.2)


# Whole runs


def arrival(
    now: float, request_id: str, num_tokens: int, max_tokens: int, slo: SLO | None = None
) -> tuple[float, ev.Event]:
    prompt = tuple(range(len(request_id) * 10, len(request_id) * 10 + num_tokens))
    return now, ev.Arrived(Request(request_id, prompt, max_tokens, now, slo=slo or SLO()))


@pytest.mark.parametrize("num_long", [1, 4])
def test_no_token_is_late_because_a_long_prompt_is_read(num_long: int) -> None:
    """Three chats want a token every 40 ms; prompts of a second each come in between. A tile takes 4 ms, a token step
    at most 7 ms: no gap ever exceeds the target."""
    slo = SLO(ttft_s=0.2, tpot_s=0.04)
    letters = [arrival(0.0, f"chat{number}", 4, 40, slo) for number in range(3)]
    letters += [arrival(0.05 + 0.3 * number, f"the long one {number}", 1000, 2) for number in range(num_long)]
    settings = SchedulerSettings(max_model_len=1100, pack_tokens=1100, tile_s=0.005)
    simulation = FakeSimulation(letters, settings, num_pages=2000, num_layers=50, tiles_per_layer=5, tile_s=1e-6)
    simulation.run()
    for name, (record,) in simulation.ended.items():
        assert record.kind == "finished"
        assert record.missed == {}
        if name.startswith("chat"):
            assert record.longest_gap_s <= 0.04
    assert sum(record.num_preemptions for (record,) in simulation.ended.values()) > 10


def test_an_urgent_prompt_waits_for_one_tile_at_most() -> None:
    """A prompt of four seconds is cut into tiles of 16 ms. Whenever an urgent one comes, it has the device one tile
    later."""
    for instant in (0.101, 0.777, 1.9, 3.5):
        letters = [arrival(0.0, "long", 4000, 1), arrival(instant, "urgent", 10, 1, SLO(ttft_s=0.05))]
        settings = SchedulerSettings(max_model_len=4100, tile_s=0.016)
        simulation = FakeSimulation(letters, settings, num_pages=2000, num_layers=50, tiles_per_layer=5, tile_s=1e-6)
        simulation.run()
        (record,) = simulation.ended["urgent"]
        assert record.first_scheduled is not None
        assert record.first_scheduled - record.arrival <= 0.016
        assert record.missed == {}


def test_the_suspended_get_on_although_urgent_ones_never_stop_coming() -> None:
    """Urgent prompts alone keep the device busy for half a minute. The long one, which promised nothing, is suspended
    again and again, but never for longer than allowed, and is read while they are still coming."""
    slo = SLO(ttft_s=0.12)
    letters = [arrival(0.0, "long", 400, 1)]
    letters += [arrival(0.01 + 0.09 * number, f"urgent{number:03}", 90, 1, slo) for number in range(350)]
    settings = SchedulerSettings(max_model_len=500, tile_s=0.005, max_parked_s=0.5, prefix_caching=False)
    simulation = FakeSimulation(letters, settings, num_pages=1000, num_layers=50, tiles_per_layer=2)
    simulation.run()
    (record,) = simulation.ended["long"]
    assert record.first_token is not None
    assert record.first_token < 14.0, "its soft deadline is at 4 s, and 10 s later it goes before everything"
    assert record.num_preemptions > 5
    assert record.parked_s <= record.num_preemptions * (0.5 + 0.01)


def test_what_was_suspended_often_answers_as_if_it_never_was() -> None:
    """The same long prompt, alone and in a crowd that interrupts it again and again: the same tokens."""
    long = arrival(0.0, "long", 500, 20)
    crowd = [arrival(0.01 + 0.02 * number, f"urgent{number}", 5, 3, SLO(0.02, 0.01)) for number in range(12)]
    settings = SchedulerSettings(max_model_len=600, tile_s=0.002)
    alone = FakeSimulation([long], settings, num_pages=400, num_layers=50, tile_s=1e-6)
    crowded = FakeSimulation([long, *crowd], settings, num_pages=400, num_layers=50, tile_s=1e-6)
    alone.run()
    crowded.run()
    assert crowded.ended["long"][0].num_preemptions >= 5
    assert crowded.delivered["long"] == alone.delivered["long"]
