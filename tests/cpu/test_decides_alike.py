"""The simulator is the engine: told the same events at the same instants, a scheduler without a device decides alike.

A real engine reads real prompts on the real clock, suspends and packs them as it must. Everything that its scheduler
was told is written down, and told again to one that has nothing but a virtual clock's word for it.
"""

from pathlib import Path

import pytest

from headway.bench import replay as replays
from headway.config import EngineSettings
from headway.core import event as ev
from headway.core.cost import CostModel
from headway.core.pages import PageTable
from headway.core.request import SLO, Request, Sampling
from headway.core.scheduler import Scheduler
from headway.core.settings import Lane, Preempt
from headway.core.work import Work
from headway.placement.engine import build_engine

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
