"""The simulator is the engine: for the same events and costs the same is decided.

Shown twice. A real engine reads real prompts on the real clock, suspends and packs them as it must; everything that its
scheduler was told is told again to one that has nothing but a virtual clock's word for it. And the real stage, on its
real pages, is driven at the costs of a simulated device: whatever is run, suspended and drawn when, the simulation,
which jumps over its tiles, has it at the same instants.
"""

from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from headway.bench import replay as replays
from headway.config import EngineSettings
from headway.core import event as ev
from headway.core.clock import VirtualClock
from headway.core.cost import CostFit, CostModel, Share, shares_of
from headway.core.pages import PageTable
from headway.core.request import SLO, Request, Sampling
from headway.core.scheduler import Scheduler
from headway.core.settings import Lane, Preempt, SchedulerSettings
from headway.core.work import Boundary, Tile, Work
from headway.placement.engine import Engine, build_engine
from headway.placement.simulate import Device, Schedule, Simulation, priced
from headway.stages.stage import Running, Stage

Told = tuple[ev.Event, float] | tuple[Lane, float]
Answer = list[ev.Effect] | tuple[Work | None, float | None]


class Witness(Scheduler):
    """A scheduler that writes down what it was told and what it said."""

    heard: list[tuple[Told, Answer]]

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        effects = super().handle(event, now)
        self.heard.append(((event, now), effects))
        return effects

    def plan(self, now: float, lane: Lane) -> Work | None:
        work = super().plan(now, lane)
        self.heard.append(((lane, now), (work, self.next_due())))
        return work


def load(rate: float, short_s: float) -> list[Request]:
    """Long prompts without hurry, and short ones that must interrupt them."""
    requests = []
    for number in range(40):
        long = number % 4 == 0
        prompt = tuple((7 * number + place) % 120 + 3 for place in range(400 if long else 12))
        slo = SLO(ttft_s=30.0) if long else SLO(ttft_s=short_s)
        sampling = Sampling(temperature=0.0)
        requests.append(Request(f"r{number}", prompt, 1 + number % 3, number / rate, slo=slo, sampling=sampling))
    return requests


@pytest.mark.parametrize("preempt", ["operator", "layer", "chunk", "none"])
def test_what_a_real_engine_decided_is_decided_again(
    tiny_folder: object, monkeypatch: pytest.MonkeyPatch, preempt: Preempt
) -> None:
    """Same effects, same Works, same timers, call by call, however the engine may suspend."""
    folder: Path = tiny_folder("llama2", num_hidden_layers=16)  # type: ignore[operator]
    settings = EngineSettings(
        model=str(folder), dtype="float32", preempt=preempt, chunk_tokens=64, max_tile_ms=0.1, refuse_unattainable=False
    )
    engine = build_engine(settings)
    heard: list[tuple[Told, Answer]] = []
    Witness.heard = heard
    monkeypatch.setattr(replays, "Scheduler", Witness)
    short_s, long_s = engine.scheduler.cost.prefill(12), engine.scheduler.cost.prefill(400)
    requests = load(rate=4 / long_s, short_s=short_s + long_s / 3)
    run = replays.replay(engine, requests, engine.scheduler.settings)
    assert len(run.records) == 40
    if preempt == "operator":
        assert run.counters["preemptions"] > 0, "nothing was ever suspended: this shows little"

    shape = engine.pool.shape
    cost = CostModel(engine.scheduler.cost.fit)
    second = Scheduler(engine.scheduler.settings, cost, PageTable(shape.num_pages, shape.page_tokens))
    for (told, now), answer in heard:
        if isinstance(told, Lane):
            assert (second.plan(now, told), second.next_due()) == answer
        else:
            effects = second.handle(told, now)
            assert [_stated(effect) for effect in effects] == [_stated(effect) for effect in answer]
    second.check_integrity()
    assert second.num_open == 0


def _stated(effect: ev.Effect) -> object:
    """An effect without what the driver's caller has changed since."""
    return effect if not isinstance(effect, ev.End) else (effect.record.request_id, effect.record.kind, effect.record)


# The real stage at a simulated device's costs

FIT = CostFit(step_s=2e-3, token_s=1e-3, segment_s=1e-4, pair_s=1e-6)
TILE_S, NUM_LAYERS = 5e-3, 4


class AtPrices:
    """A real stage that takes the seconds that a price says: as many equal tiles as the price has, in each of them the
    real ones that fall into it."""

    def __init__(self, stage: Stage, clock: VirtualClock) -> None:
        self.stage = stage
        self.clock = clock
        self.open = stage.open
        self.close = stage.close
        self.drop = stage.drop
        self.num_real_suspensions = 0

    def run(self, work: Work) -> Running:
        seconds = FIT.seconds(shares_of(work.segments))
        num_tiles = max(1, ceil(seconds / TILE_S))
        running = self.stage.run(work)
        real = Tile(-1, 1, "")
        try:
            for number in range(num_tiles - 1):
                while (real.number + 1) * num_tiles < (number + 1) * real.of:
                    real = next(running)
                self.clock.advance(seconds / num_tiles)
                before = self.clock.now()
                ends_layer = (number + 1) * NUM_LAYERS // num_tiles > number * NUM_LAYERS // num_tiles
                yield Tile(number, num_tiles, "real", (), Boundary.LAYER if ends_layer else Boundary.OPERATOR)
                self.num_real_suspensions += self.clock.now() > before
            while True:
                try:
                    next(running)
                except StopIteration as stop:
                    self.clock.advance(seconds / num_tiles)
                    yield Tile(num_tiles - 1, num_tiles, "real", (), Boundary.LAYER)
                    return stop.value
        finally:
            running.close()


class Chosen(NamedTuple):
    """A Work without what its tokens are: a simulated device draws zeros."""

    at: float
    work_id: int | None
    parts: tuple[tuple[str, int, int, tuple[int, ...]], ...]


def told(simulation: Simulation, requests: list[Request]) -> list[Chosen]:
    """Everything that was chosen, with its instant."""
    plan, found = simulation.scheduler.plan, []

    def noted(now: float, lane: Lane) -> Work | None:
        work = plan(now, lane)
        segments = () if work is None else work.segments
        parts = tuple((s.request_id, len(s.tokens), s.first_position, s.pages) for s in segments)
        found.append(Chosen(now, None if work is None else work.id, parts))
        return work

    simulation.scheduler.plan = noted  # type: ignore[method-assign]
    for request in requests:
        simulation.mailbox.put(request.arrival, ev.Arrived(request))
    simulation.run()
    return found


def real_at_prices(engine: Engine, settings: SchedulerSettings) -> Simulation:
    clock, shape = VirtualClock(), engine.pool.shape
    scheduler = Scheduler(settings, CostModel(FIT), PageTable(shape.num_pages, shape.page_tokens))
    return Simulation(clock, Schedule(clock), scheduler, AtPrices(engine.stage, clock))


@pytest.mark.parametrize("preempt", ["operator", "layer", "chunk", "none"])
def test_a_simulation_has_every_instant_of_the_real_stage_at_its_costs(tiny_folder: object, preempt: Preempt) -> None:
    """The same Works on the same pages at the same instants, the same tokens late by as much, the same accounts."""
    folder: Path = tiny_folder("llama2", num_hidden_layers=16)  # type: ignore[operator]
    engine = build_engine(
        EngineSettings(
            model=str(folder), dtype="float32", preempt=preempt, chunk_tokens=64, max_tile_ms=0.1,
            refuse_unattainable=False, enable_prefix_caching=False,
        )
    )  # fmt: skip
    settings = replace(engine.scheduler.settings, tile_s=TILE_S, pack_tokens=60)
    long_s = CostModel(FIT).prefill(400)
    requests = load(rate=4 / long_s, short_s=FIT.seconds([Share(12, 0)]) + long_s / 3)
    shape = engine.pool.shape
    device = Device(fit=FIT, tile_s=TILE_S, num_layers=NUM_LAYERS, num_pages=shape.num_pages,
                    page_tokens=shape.page_tokens)  # fmt: skip
    simulated = priced(settings, device)
    expected = told(simulated, requests)
    with torch.inference_mode():
        real = real_at_prices(engine, settings)
        found = told(real, requests)

    assert [chosen[1:] for chosen in found] == [chosen[1:] for chosen in expected]
    assert [chosen.at for chosen in found] == pytest.approx([chosen.at for chosen in expected], abs=1e-9)
    assert real.scheduler.counters == simulated.scheduler.counters
    assert set(real.ended) == set(simulated.ended) == {request.id for request in requests}
    for request_id, (record,) in real.ended.items():
        (other,) = simulated.ended[request_id]
        assert (record.kind, record.reason, record.missed) == (other.kind, other.reason, other.missed)
        assert record.ttft_s == pytest.approx(other.ttft_s, abs=1e-9)
        assert record.ended == pytest.approx(other.ended, abs=1e-9)
    assert {name: len(tokens) for name, tokens in real.delivered.items()} == {
        name: len(tokens) for name, tokens in simulated.delivered.items()
    }
    assert any(token for tokens in real.delivered.values() for token in tokens), "the real stage drew nothing"
    stage = real.driver.stages["language"]
    assert isinstance(stage, AtPrices)
    if preempt in ("operator", "layer"):
        assert stage.num_real_suspensions > 0, "no real step was ever suspended: this shows little"
