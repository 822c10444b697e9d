"""Two lanes of one device on virtual clocks: nothing is lost between them, nobody has more or less than its share."""

from dataclasses import replace

import pytest
from story import Story

from headway.bench import storm
from headway.core import event as ev
from headway.core.cost import CostFit, Price
from headway.core.division import Divider, Paces, Situation
from headway.core.request import SLO, Request
from headway.core.roofline import Anatomy, Power, Roofline, Split
from headway.core.settings import MAIN, TOKENS, Lanes, SchedulerSettings
from headway.core.ticket import Step
from headway.core.work import Segment, Work
from headway.placement.simulate import Device, FakeSimulation, Simulation, priced

# reading the weights takes 20 ms, a token 1 ms of all arithmetic; one unit has half of that, and all of the memory
ANATOMY = Anatomy(1.0, 20.0, 0.0, 0.0, 0.0, 0.0)
ROOFLINE = Roofline(ANATOMY, {1: Power(500.0, 1.0, 1000.0), 2: Power(1000.0, 1.0, 1000.0)})
FIT = CostFit(step_s=0.020, token_s=0.001)
SETTINGS = SchedulerSettings(max_model_len=4096, tile_s=0.005, refuse_unattainable=False, lanes="split")


def arrives(
    now: float,
    name: str,
    num_tokens: int,
    max_tokens: int = 1,
    ttft_s: float | None = None,
    tpot_s: float | None = None,
) -> tuple[float, ev.Event]:
    prompt = tuple((7 * place + len(name)) % 997 for place in range(num_tokens))
    return now, ev.Arrived(Request(name, prompt, max_tokens, now, SLO(ttft_s=ttft_s, tpot_s=tpot_s)))


def simulated(settings: SchedulerSettings, *letters: tuple[float, ev.Event], num_pages: int = 4096) -> Simulation:
    device = Device(fit=FIT, tile_s=0.005, num_pages=num_pages, roofline=ROOFLINE)
    simulation = priced(settings, device, gather_s=0.0)
    for at, letter in letters:
        simulation.mailbox.put(at, letter)
    return simulation


@pytest.mark.parametrize("lanes", ["split", "auto", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_a_storm_loses_nobody_and_no_page(lanes: Lanes, seed: int) -> None:
    """Bursts, leavers, deaths and a memory too small for all, in both lanes."""
    settings = replace(storm.SETTINGS, lanes=lanes)
    survived = storm.survive(seed, 600, settings, ROOFLINE)
    assert survived.counters["recomputes"] > 0
    assert {ending.partition(" ")[0] for ending in survived.endings} == {"finished", "refused", "cancelled", "failed"}


def test_tokens_come_beside_a_long_prompt() -> None:
    """A reader gets its tokens, 21 ms each alone, while 2,000 tokens of another's prompt are read."""
    simulation = simulated(SETTINGS, arrives(0.0, "reader", 10, max_tokens=40), arrives(0.1, "long", 2000))
    simulation.run()
    reader, long = (simulation.ended[name][0] for name in ("reader", "long"))
    assert reader.num_output_tokens == 40
    assert reader.longest_gap_s < 0.06
    assert long.num_preemptions == 0, "its lane is its own"
    assert reader.last_token is not None
    assert long.first_token is not None
    assert reader.last_token < long.first_token


def test_both_lanes_begin_on_their_shares_at_once() -> None:
    """When a token is due the prompt beside it goes on with half of the device from that instant, not from its next
    tile on: until then both would want the same cores."""
    simulation = simulated(
        replace(SETTINGS, lanes="auto"),
        arrives(0.0, "reader", 10, max_tokens=40, tpot_s=0.1),
        arrives(0.1, "long", 2000, ttft_s=3.0),
    )
    driver = simulation.driver
    driver.scheduler.sharing.divider.split = Split(1, 1)
    main, beside = list[tuple[float, int]](), list[float]()

    def devote(lane: str, units: int) -> None:
        if lane == MAIN:
            main.append((driver.clock.now(), units))
        else:
            beside.append(driver.clock.now())

    driver._devote = devote
    simulation.run()
    assert len(beside) > 5
    for instant in beside:
        assert [units for at, units in main if at <= instant][-1] == 1


def test_prompts_are_left_what_they_have_with_tokens_always_beside_them() -> None:
    """However slow tokens are found to be beside them: what is left is divided by."""
    sharing = simulated(replace(SETTINGS, lanes="auto")).driver.scheduler.sharing
    sharing.divider.split = Split(1, 1)
    sharing._paces_of_late = (2.0, 2.6)
    assert sharing.left_to_prompts(0.1) == pytest.approx(0.87)
    assert sharing.left_to_prompts(0.8) == 0.5


def test_where_nobody_decodes_prompts_are_promised_the_whole_device() -> None:
    """With a fixed split, too: the lane for tokens has nothing to do."""
    sharing = simulated(replace(SETTINGS, lanes="split")).driver.scheduler.sharing
    sharing._paces_of_late = (2.0, 1.5)
    assert (sharing.left_to_prompts(0.0), sharing.left_to_prompts(0.1)) == (1.0, 0.5)


def lane_step(number: int, *, decoding: bool, seconds: float) -> Step:
    segment = Segment(f"r{number}", (1,) * (1 if decoding else 100), 0, 0, (0,), (0,))
    work = Work(number, "language", (segment,))
    return Step(work, [], Price(seconds, is_arithmetic=True), seconds, decoding=decoding)


def test_what_remains_of_a_prompt_goes_at_its_mean_pace() -> None:
    """Beside tokens that come and go it is slowed down some of the time; when nobody decodes any more, never again. A
    step for tokens that has outlived its division, however long it is, says nothing of what follows."""
    scheduler = simulated(replace(SETTINGS, lanes="auto")).driver.scheduler
    sharing, steps = scheduler.sharing, scheduler._steps
    sharing.divider.split = sharing._last_split = Split(1, 1)
    prompt, tokens = lane_step(1, decoding=False, seconds=1.0), lane_step(2, decoding=True, seconds=0.04)
    steps.on = {MAIN: prompt, TOKENS: tokens}
    sharing.set_paces(steps, 0.0, decoding=True)
    assert 1.0 < prompt.mean_pace < prompt.pace
    mean = prompt.mean_pace
    steps.on = {MAIN: prompt}
    sharing.set_paces(steps, 0.1, decoding=True)
    assert (prompt.pace, prompt.mean_pace) == (1.0, mean)
    sharing.set_paces(steps, 0.2, decoding=False)
    assert prompt.mean_pace == 1.0
    sharing.divider.split = None
    steps.on = {MAIN: prompt, TOKENS: lane_step(3, decoding=True, seconds=9.0)}
    sharing.set_paces(steps, 0.3, decoding=True)
    assert prompt.pace > prompt.mean_pace == 1.0


def test_what_was_learnt_side_by_side_is_let_go_when_it_has_long_not_been_used() -> None:
    """A correction that says never to divide would else never be found wrong."""
    sharing = simulated(replace(SETTINGS, lanes="auto")).driver.scheduler.sharing
    sharing.correction[MAIN] = 3.0
    for instant in (0.0, 60.0, 119.0):
        sharing._forget(instant)
        assert sharing.correction[MAIN] == 3.0
    sharing._forget(120.0)
    assert sharing.correction == {MAIN: 1.0, TOKENS: 1.0}
    sharing.correction[MAIN], sharing.divider.split = 3.0, Split(1, 1)
    for instant in (300.0, 500.0):
        sharing._forget(instant)
    assert sharing.correction[MAIN] == 3.0, "while it is divided it is put right by what steps take"


def test_a_long_prompt_that_would_give_way_is_no_reason_to_divide() -> None:
    """Twenty seconds without a target are on the device, a token is due now and then, and a short prompt comes that is
    in time if it goes first: it does, and nobody would be late."""
    simulation = simulated(
        replace(SETTINGS, lanes="auto"),
        arrives(0.0, "reader", 10, max_tokens=100, tpot_s=0.3),
        arrives(0.1, "long", 5000),
        arrives(0.5, "short", 20, ttft_s=0.4),
    )
    simulation.run()
    assert simulation.scheduler.counters["repartitions"] == 0
    assert not simulation.ended["short"][0].missed


def situations(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, Situation]]:
    """What the divider is asked from here on, and when."""
    seen: list[tuple[float, Situation]] = []
    decide = Divider.decide

    def note(self: Divider, situation: Situation, paces: Paces, now: float) -> Split | None:
        seen.append((now, situation))
        return decide(self, situation, paces, now)

    monkeypatch.setattr(Divider, "decide", note)
    return seen


READERS = tuple(arrives(0.0, f"reader{n}", 4, max_tokens=40, tpot_s=0.05) for n in range(8))


def test_what_tokens_ride_along_in_is_no_reason_to_divide(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens of eight readers ride along with a prompt, and somebody without a target comes meanwhile: nothing is in
    the prompt's way, and nobody else is due."""
    seen = situations(monkeypatch)
    simulation = simulated(
        replace(SETTINGS, lanes="auto"),
        *READERS,
        arrives(0.4, "prompt", 40, ttft_s=0.1),
        arrives(0.43, "no hurry", 64),
    )
    simulation.run()
    assert next(situation.due_s for now, situation in seen if now >= 0.43) == float("inf")
    assert simulation.scheduler.counters["repartitions"] == 0
    assert not simulation.ended["prompt"][0].missed


def test_what_tokens_ride_along_in_goes_before_whoever_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that nobody hurries takes 59 ms with the tokens of eight readers. Another comes meanwhile: it is due so
    much sooner as that still takes, and its own work is all that is ahead of it."""
    seen = situations(monkeypatch)
    simulation = simulated(
        replace(SETTINGS, lanes="auto"),
        *READERS,
        arrives(0.4, "no hurry", 31),
        arrives(0.43, "prompt", 60, ttft_s=0.5),
    )
    simulation.run()
    first = next(situation for now, situation in seen if now >= 0.43)
    assert first.prompt_s == pytest.approx(0.020 + 0.060)
    assert 0.5 - 0.059 < first.due_s < 0.5 - 0.005


def test_who_is_late_anyhow_is_no_reason_to_divide_and_in_nobodys_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half a second of a prompt that was wanted in a tenth of one has begun: it gives way to who can be in time, whose
    own work is all that counts."""
    seen = situations(monkeypatch)
    simulation = simulated(
        replace(SETTINGS, lanes="auto"),
        *READERS[:2],
        arrives(0.4, "hopeless", 480, ttft_s=0.1),
        arrives(0.6, "prompt", 60, ttft_s=0.3),
    )
    simulation.run()
    assert next(situation.due_s for now, situation in seen if 0.41 <= now < 0.6) == float("inf")
    first = next(situation for now, situation in seen if now >= 0.6)
    assert first.prompt_s == pytest.approx(0.020 + 0.060)
    assert 0.2 < first.due_s <= 0.3, "less a part of the other that tokens ride along in"


def test_a_lane_alone_has_the_whole_device() -> None:
    """Nobody decodes: the prompt is as fast as without lanes. Nobody waits: tokens are."""
    alone = simulated(replace(SETTINGS, lanes="turns"), arrives(0.0, "one", 500, max_tokens=50))
    divided = simulated(SETTINGS, arrives(0.0, "one", 500, max_tokens=50))
    for simulation in (alone, divided):
        simulation.run()
    first, second = (simulation.ended["one"][0] for simulation in (alone, divided))
    assert second.first_token == first.first_token
    assert second.last_token == pytest.approx(first.last_token)


def test_units_follow_who_is_busy() -> None:
    """Each lane has a half while both are busy, all of it otherwise; whoever runs is told at the next tile."""
    letters = [arrives(0.0, "reader", 10, max_tokens=30), arrives(0.015, "long", 300)]
    simulation = FakeSimulation(letters, SETTINGS, num_pages=200, roofline=ROOFLINE)
    given: list[tuple[str, int]] = []
    simulation.driver._devote = lambda lane, units: given.append((lane, units))
    simulation.run()
    assert {(MAIN, 2), (TOKENS, 2), (MAIN, 1), (TOKENS, 1)} == set(given)
    both = [units for lane, units in given if lane == MAIN]
    assert both[0] == 2, "the first prompt is alone"
    answer = simulation.delivered["reader"]
    assert answer == storm.expected_answer(letters[0][1].request, 30)  # type: ignore[union-attr]


def test_a_step_beside_another_takes_as_long_as_is_predicted() -> None:
    """The scheduler's roofline is the true one here, so nothing is left to correct."""
    simulation = simulated(
        SETTINGS, arrives(0.0, "reader", 10, max_tokens=200), *(arrives(0.1 * n, f"p{n}", 100) for n in range(1, 9))
    )
    simulation.run()
    sharing = simulation.scheduler.sharing
    assert all(value == pytest.approx(1.0, abs=0.1) for value in sharing.correction.values())


def test_a_wrong_roofline_is_corrected_by_what_steps_take() -> None:
    """Side by side both really take half as long again as is believed."""
    rough = replace(ROOFLINE, friction={Split(1, 1): (1.5, 1.5)})
    device = Device(fit=FIT, tile_s=0.005, roofline=rough, believed_roofline=ROOFLINE)
    simulation = priced(SETTINGS, device, gather_s=0.0)
    for number in range(60):
        simulation.mailbox.put(*arrives(0.25 * number, f"r{number}", 100, max_tokens=30))
    simulation.run()
    assert simulation.scheduler.sharing.correction[TOKENS] == pytest.approx(1.5, abs=0.15)


def test_a_prompt_that_tokens_come_beside_now_and_then_corrects_it_too() -> None:
    """As with `auto`: no prompt has one pace all the time, and its lane really is half as slow again."""
    rough = replace(ROOFLINE, friction={Split(1, 1): (1.5, 1.0)})
    device = Device(fit=FIT, tile_s=0.001, roofline=rough, believed_roofline=ROOFLINE)
    simulation = priced(replace(SETTINGS, tile_s=0.001, prefix_caching=False), device, gather_s=0.0)
    sharing = simulation.scheduler.sharing
    sharing.divider.lanes, sharing.decide = "auto", lambda *situation: None  # type: ignore[method-assign]
    for number in range(30):
        simulation.mailbox.put(*arrives(0.5 * number, f"r{number}", 300, max_tokens=30, tpot_s=0.08))
    simulation.run()
    assert sharing.correction[MAIN] == pytest.approx(1.5, abs=0.2)


def test_neither_a_suspension_nor_the_end_counts_as_time_beside_another() -> None:
    """Half a second beside tokens at half of its speed, a minute suspended, half a second alone."""
    work = Work(1, "language", ())
    step = Step(work, [], Price(1.0, is_arithmetic=True), 1.0, decoding=False)
    step.keep_pace(2.0, 2.0, 10.0, beside=True)
    step.stop(10.5)
    step.keep_pace(1.0, 1.0, 70.5, beside=False)
    step.stop(71.0)
    assert (step.beside_s, step.done_beside_s, step.num_partings) == (0.5, 0.25, 0)
    step.keep_pace(2.0, 2.0, 71.0, beside=True)
    step.keep_pace(1.0, 1.0, 71.2, beside=False)
    assert step.num_partings == 1, "it went on alone"


@pytest.mark.parametrize("moment", [0.11, 0.15, 0.2, 0.25, 0.3])
def test_who_leaves_one_lane_does_not_disturb_the_other(moment: float) -> None:
    """The long prompt's caller goes while tokens are made beside it, and the other way round."""
    for leaver, stayer in (("long", "reader"), ("reader", "long")):
        letters = [
            arrives(0.0, "reader", 10, max_tokens=30),
            arrives(0.1, "long", 200, max_tokens=3),
            (moment, ev.Cancelled(leaver)),
        ]
        simulation = FakeSimulation(letters, SETTINGS, num_pages=200, roofline=ROOFLINE)
        simulation.run()
        assert simulation.ended[leaver][0].kind in ("cancelled", "finished")
        assert simulation.ended[stayer][0].kind == "finished"
        request = next(
            letter.request for _, letter in letters if isinstance(letter, ev.Arrived) and letter.request.id == stayer
        )
        assert simulation.delivered[stayer] == storm.expected_answer(request, request.max_tokens)
        assert simulation.scheduler.pages.num_available == 200


def test_it_is_divided_for_a_deadline_and_not_without() -> None:
    """By turns the tokens of eight readers take 28 ms of each 60, and a prompt nearly twice what it takes alone. One
    unit of four is enough for them, since they wait for memory; the other three read it in 4/3 of that time."""
    powers = {units: Power(250.0 * units, 1.0, 1000.0) for units in range(1, 5)}
    device = Device(fit=FIT, tile_s=0.005, roofline=Roofline(ANATOMY, powers))
    readers = [arrives(0.0, f"reader{n}", 10, max_tokens=60, tpot_s=0.06) for n in range(8)]

    def met(lanes: Lanes, ttft_s: float | None) -> tuple[bool, int]:
        simulation = priced(replace(SETTINGS, lanes=lanes), device, gather_s=0.0)
        for at, letter in (*readers, arrives(0.5, "long", 600, ttft_s=ttft_s)):
            simulation.mailbox.put(at, letter)
        simulation.run()
        long = simulation.ended["long"][0]
        assert long.first_token is not None
        served = [simulation.ended[f"reader{n}"][0] for n in range(8)]
        longest_s = max(reader.longest_gap_s for reader in served)
        assert lanes == "turns" or longest_s <= 2 * 0.065, "no longer, however far ahead of its pace"
        paces = [reader.tpot_s or 0.0 for reader in served]
        in_time = long.first_token - 0.5 <= 1.5 * 0.62 and max(paces) <= 0.06
        return in_time, simulation.scheduler.counters["repartitions"]

    assert met("turns", 1.5 * 0.62) == (False, 0)
    assert met("auto", 1.5 * 0.62) == (True, 1)
    assert met("auto", None)[1] == 0


def test_a_newcomer_is_told_how_long_it_takes_beside_tokens() -> None:
    """Divided, a prompt has half of the arithmetic, whatever tokens wish for: it is expected twice as late as alone,
    not later still, and comes then."""
    simulation = simulated(SETTINGS, arrives(0.0, "reader", 10, max_tokens=60), arrives(0.1, "prompt", 500))
    simulation.run()
    record = simulation.ended["prompt"][0]
    assert record.first_token is not None
    assert record.predicted_ttft_s == pytest.approx(1.04, rel=0.1)
    assert record.first_token - 0.1 == pytest.approx(record.predicted_ttft_s, rel=0.15)


def test_twice_the_demand_that_memory_allows_is_finished() -> None:
    """Forty answers want twice the pages there are: each is finished, and nobody's work is thrown away for ever."""
    letters = [arrives(0.01 * n, f"r{n}", 40 + n, max_tokens=40) for n in range(40)]
    wanted = sum(-(-(80 + n) // 4) for n in range(40))
    settings = replace(SETTINGS, max_model_len=200, max_num_seqs=40, pack_tokens=64)
    for lanes in ("turns", "mixed", "split", "auto"):
        simulation = FakeSimulation(
            letters,
            replace(settings, lanes=lanes),
            num_pages=wanted // 2,
            roofline=ROOFLINE,  # type: ignore[arg-type]
        )
        simulation.run()
        assert {records[0].kind for records in simulation.ended.values()} == {"finished"}
        recomputed = sum(records[0].num_recomputes for records in simulation.ended.values())
        assert recomputed <= 40, "more than one recomputation for each is thrashing"
        for n in range(40):
            request = letters[n][1].request  # type: ignore[union-attr]
            assert simulation.delivered[f"r{n}"] == storm.expected_answer(request, 40)


def test_tokens_ride_along_with_as_much_of_a_prompt_as_leaves_them_in_time() -> None:
    """A token of its own costs 21 ms, in the step of a prompt 1 ms, and is wanted every 200. A short prompt is read
    whole with it, a long one in pieces: never is a token late, and none is made alone while there is a prompt."""
    for length in (20, 400):
        simulation = simulated(
            replace(SETTINGS, lanes="mixed"),
            arrives(0.0, "reader", 10, max_tokens=8, tpot_s=0.2),
            arrives(0.05, "first", 80),
            arrives(0.06, "second", length),
        )
        simulation.run()
        spans = simulation.driver.spans.take()
        assert "mixed" in [span.kind for span in spans]
        reader = simulation.ended["reader"][0]
        assert reader.longest_gap_s <= 2 * 0.2, "where it is ahead of its pace"
        assert reader.tpot_s is not None
        assert reader.tpot_s <= 0.2
        assert simulation.ended["second"][0].kind == "finished"


@pytest.mark.parametrize(
    ("ttft_s", "step"), [(1.0, {"reader": 1, "b": 13}), (0.06, {"reader": 1, "b": 25}), (0.05, {"b": 25})]
)
def test_a_prompt_that_cannot_wait_for_its_parts_rides_along_whole(ttft_s: float, step: dict[str, int]) -> None:
    """A step costs 20 ms and a token one, and the reader wants its next one within 40. With time the prompt of 25 is
    read in parts; with less, which would be late in parts, whole, and the token comes 46 ms after the last one: by
    itself it would cost that more. One that cannot spare the reader's millisecond is read alone."""
    story = Story(lanes="mixed")
    story.scheduler.cost.fit = CostFit(step_s=0.02, token_s=0.001)
    story.arrives("reader", 4, slo=SLO(tpot_s=0.04))
    work = story.plan()
    story.passes(0.024)
    story.done(work, 0.024, reader=7)
    story.arrives("b", 25, max_tokens=1, slo=SLO(ttft_s=ttft_s))
    work = story.plan()
    assert work is not None
    assert {segment.request_id: len(segment.tokens) for segment in work.segments} == step
