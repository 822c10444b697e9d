"""The simulated device: jumping over tiles in which nothing happens changes nothing; several devices; company.

What a real device does tile by tile is the measure, so each story is run twice: once jumping, once stepping.
"""

import random

import pytest

from headway.core import event as ev
from headway.core.cost import CostFit
from headway.core.request import SLO, Request
from headway.core.settings import Lane, Preempt, SchedulerSettings
from headway.core.work import Work
from headway.placement.priced import PricedStage
from headway.placement.simulate import Device, Fleet, Simulation, fleet, priced

FIT = CostFit(step_s=0.02, token_s=0.0011, segment_s=0.0003, pair_s=3e-7)
DEVICE = Device(fit=FIT, tile_s=0.0037, num_layers=7, num_pages=400, page_tokens=4, spread=0.3)

Letters = list[tuple[float, ev.Event]]


def settings(**changes: object) -> SchedulerSettings:
    plain = {"max_model_len": 600, "max_num_seqs": 12, "pack_tokens": 90, "tile_s": 0.005, "max_num_parked": 3}
    return SchedulerSettings(**(plain | changes))  # type: ignore[arg-type]


def requests(seed: int, num_requests: int, pace_s: float = 0.05) -> list[Request]:
    """Short and long prompts of two tenants, with and without targets, at random instants."""
    rng = random.Random(seed)
    now, sent = 0.0, []
    for number in range(num_requests):
        now += rng.expovariate(1 / pace_s)
        prompt = tuple(rng.randrange(1000) for _ in range(rng.choice((5, 20, 60, 300))))
        slo = SLO(rng.choice((None, 0.1, 0.5, 3.0)), rng.choice((None, 0.03, 0.2)), rng.choice((None, None, 4.0)))
        tenant, priority = rng.choice(("", "a")), rng.choice((0, 0, 0, -1))
        sent.append(Request(f"r{number}", prompt, rng.choice((1, 3, 20)), now, slo, tenant=tenant, priority=priority))
    return sent


def load(seed: int, num_requests: int) -> Letters:
    """The same, and every fifth caller goes away again, some in the middle of a step."""
    rng = random.Random(seed)
    letters: Letters = []
    for request in requests(seed, num_requests):
        letters.append((request.arrival, ev.Arrived(request)))
        if rng.random() < 0.2:
            letters.append((request.arrival + rng.expovariate(5.0), ev.Cancelled(request.id)))
    return sorted(letters, key=lambda letter: letter[0])


class Decided:
    """What was asked of a scheduler, and what it said, with the instants."""

    def __init__(self, engine: Simulation) -> None:
        self.events: list[tuple[float, str]] = []
        self.works: list[tuple[float, Work | None]] = []
        handle, plan = engine.scheduler.handle, engine.scheduler.plan

        def noted_handle(event: ev.Event, now: float) -> list[ev.Effect]:
            self.events.append((now, type(event).__name__))
            return handle(event, now)

        def noted_plan(now: float, lane: Lane) -> Work | None:
            work = plan(now, lane)
            self.works.append((now, work))
            return work

        engine.scheduler.handle = noted_handle  # type: ignore[method-assign]
        engine.scheduler.plan = noted_plan  # type: ignore[method-assign]


def simulate(letters: Letters, chosen: SchedulerSettings, *, stepping: bool) -> tuple[Simulation, Decided]:
    engine = priced(chosen, DEVICE, seed=5)
    stage = engine.driver.stages["language"]
    assert isinstance(stage, PricedStage)
    if stepping:
        stage.horizon = lambda: 0.0  # something may happen in every tile
    decided = Decided(engine)
    for at, letter in letters:
        engine.mailbox.put(at, letter)
    engine.run()
    return engine, decided


@pytest.mark.parametrize("preempt", ["operator", "layer", "none", "chunk"])
@pytest.mark.parametrize("seed", range(6))
def test_jumping_decides_as_stepping_does(seed: int, preempt: Preempt) -> None:
    """The same load, cancels and dropped members among it: the same events, the same Works and the same accounts at
    the same instants; but far fewer tiles."""
    letters, chosen = load(seed, 150), settings(preempt=preempt, chunk_tokens=64)
    stepped, step_by_step = simulate(letters, chosen, stepping=True)
    jumped, in_jumps = simulate(letters, chosen, stepping=False)
    assert [name for _, name in in_jumps.events] == [name for _, name in step_by_step.events]
    assert [at for at, _ in in_jumps.events] == pytest.approx([at for at, _ in step_by_step.events], abs=1e-9)
    assert [work for _, work in in_jumps.works] == [work for _, work in step_by_step.works]
    assert [at for at, _ in in_jumps.works] == pytest.approx([at for at, _ in step_by_step.works], abs=1e-9)
    assert jumped.scheduler.counters == stepped.scheduler.counters
    for request_id, (record,) in jumped.ended.items():
        (other,) = stepped.ended[request_id]
        assert (record.kind, record.reason, record.missed) == (other.kind, other.reason, other.missed)
        assert record.ended == pytest.approx(other.ended, abs=1e-9)
        assert record.ttft_s == pytest.approx(other.ttft_s, abs=1e-9)
        assert record.tpot_s == pytest.approx(other.tpot_s, abs=1e-9)
        assert record.parked_s == pytest.approx(other.parked_s, abs=1e-9)
    assert jumped.driver.num_tiles < 0.7 * stepped.driver.num_tiles
    assert {name for _, name in in_jumps.events} >= {"Arrived", "Cancelled", "StepDone"}
    assert ("Left" in {name for _, name in in_jumps.events}) or preempt in ("none", "chunk") or seed


def test_a_member_leaves_at_the_next_layer_while_jumping() -> None:
    """Two prompts are one step of seven layers. One caller goes in the middle of the second layer, nothing else will
    happen: it has left when that layer ends, not when the step does."""
    pair = [Request(name, (number,) * 40, 1, 0.0) for number, name in enumerate("ab")]
    letters: Letters = [(0.0, ev.Arrived(request)) for request in pair]
    whole, _ = simulate(letters, settings(), stepping=False)
    step_s = whole.ended["a"][0].ended or 0.0
    engine, _ = simulate([*letters, (step_s * 1.5 / 7, ev.Cancelled("a"))], settings(), stepping=False)
    assert engine.ended["a"][0].kind == "cancelled"
    assert step_s * 1.5 / 7 < (engine.ended["a"][0].ended or 0.0) <= step_s * 2 / 7 + DEVICE.tile_s
    assert engine.ended["b"][0].ended == pytest.approx(step_s, abs=0.002)


# Several devices


def served(num_devices: int, sent: list[Request], gather_s: float = 0.0) -> Fleet:
    return fleet(sent, [priced(settings(), DEVICE, seed, gather_s) for seed in range(num_devices)])


@pytest.mark.parametrize("num_devices", [1, 2, 5])
def test_every_request_ends_once_in_a_fleet(num_devices: int) -> None:
    """However many devices there are, each request is sent to one of them and ends there, once."""
    sent = requests(1, 300, pace_s=0.02)
    result = served(num_devices, sent)
    assert sorted(result.records) == sorted(request.id for request in sent)
    ended = [request_id for engine in result.engines for request_id, records in engine.ended.items() for _ in records]
    assert sorted(ended) == sorted(result.records)
    for engine in result.engines:
        assert engine.ended
        assert engine.scheduler.num_open == 0
        assert engine.scheduler.pages.num_available == DEVICE.num_pages


@pytest.mark.parametrize("seed", range(5))
def test_a_letter_that_is_put_in_time_is_as_good_as_one_that_was_there_before(seed: int) -> None:
    """A device that is run up to each arrival and then gets it decides as one that had all letters from the start: the
    arrival is seen at the end of the tile under way."""
    letters = [letter for letter in load(seed, 150) if isinstance(letter[1], ev.Arrived)]
    engine, at_once = (priced(settings(), DEVICE, seed=5, gather_s=0.0) for _ in range(2))
    for at, letter in letters:
        engine.run_until(at)
        assert at <= engine.clock.now() <= at + DEVICE.tile_s
        engine.mailbox.put(at, letter)
        at_once.mailbox.put(at, letter)
    engine.mailbox.known_until = float("inf")
    engine.run()
    at_once.run()
    assert sorted(engine.ended) == sorted(at_once.ended)
    for request_id, (record,) in engine.ended.items():
        (other,) = at_once.ended[request_id]
        assert (record.kind, record.missed) == (other.kind, other.missed)
        assert record.first_scheduled == pytest.approx(other.first_scheduled, abs=1e-9)
        assert record.ended == pytest.approx(other.ended, abs=1e-9)


def test_two_devices_serve_more_than_one() -> None:
    """A load that one device cannot carry: with a second one, and each request sent to the one with less to do, more
    targets are met and nobody waits as long."""
    sent = requests(3, 400, pace_s=0.04)
    attained = []
    for num_devices in (1, 2, 4):
        records = served(num_devices, sent).records.values()
        attained.append(sum(record.kind == "finished" and not record.missed for record in records))
    assert attained == sorted(attained)
    assert attained[1] > 1.15 * attained[0]


def test_the_next_one_goes_to_whoever_has_less_to_do() -> None:
    """The first device has a long prompt; the second request and the third, which is as short, go to the other one;
    the fourth, which comes when both are idle again, to the first."""
    sent = [
        Request("long", (1,) * 500, 1, 0.0),
        Request("second", (2,) * 20, 1, 0.01),
        Request("third", (3,) * 20, 1, 0.02),
        Request("fourth", (4,) * 20, 1, 9.0),
    ]
    first, second = served(2, sent).engines
    assert (list(first.ended), list(second.ended)) == (["long", "fourth"], ["second", "third"])


# What comes together


@pytest.mark.parametrize("gather_s", [0.0, 0.001])
def test_what_comes_within_a_millisecond_on_an_idle_device_is_read_together(gather_s: float) -> None:
    """Three prompts come within 0.8 ms. An idle driver that waits for a millisecond decides once, and reads them in one
    step; one that does not wait begins with the first and has to read the others after it."""
    sent = [Request(f"r{number}", (number,) * 10, 1, 1.0 + 0.0004 * number) for number in range(3)]
    engine = priced(settings(), DEVICE, gather_s=gather_s)
    decided = Decided(engine)
    fleet(sent, [engine])
    packs = [[segment.request_id for segment in work.segments] for _, work in decided.works if work is not None]
    assert packs[0] == (["r0", "r1", "r2"] if gather_s else ["r0"])
    assert decided.works[0][0] == pytest.approx(1.0 + gather_s)
    assert len(decided.works) == 2 or not gather_s


def test_nobody_waits_for_company_longer_than_that() -> None:
    """A prompt that stays alone begins a millisecond after it came; on a busy device nothing is added at all."""
    engine = priced(settings(), DEVICE, gather_s=0.001)
    sent = [Request("alone", (1,) * 400, 1, 1.0), Request("urgent", (2,) * 10, 1, 1.1, SLO(ttft_s=0.08))]
    records = fleet(sent, [engine]).records
    assert records["alone"].first_scheduled == pytest.approx(1.001)
    waited_s = (records["urgent"].first_scheduled or 0.0) - 1.1
    assert 0 <= waited_s <= DEVICE.tile_s
