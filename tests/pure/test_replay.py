"""What the scheduler decides follows from what it is told: from events, instants and prices, and from nothing else.

The engine and the simulation run the same driver and the same scheduler; all that differs is who tells the time and
what a tile does. So a run that was written down can be decided again without any driver or stage.
"""

import pytest

from headway.bench.storm import storm
from headway.core import event as ev
from headway.core.cost import CostModel
from headway.core.pages import PageTable
from headway.core.scheduler import Scheduler
from headway.core.settings import Lane, SchedulerSettings
from headway.core.work import Work
from headway.placement.simulate import FakeSimulation

SETTINGS = SchedulerSettings(max_model_len=120, max_num_seqs=12, max_num_queued=60, pack_tokens=40, tile_s=0.002)


@pytest.mark.parametrize("seed", range(3))
def test_the_same_events_at_the_same_instants_are_decided_alike(seed: int) -> None:
    """A storm is driven once, every call of the scheduler and its answer written down. A second scheduler is told the
    same, call by call: same effects, same Works, same timers."""
    simulation = FakeSimulation(storm(seed, 300)[0], SETTINGS, num_pages=48, page_tokens=4)
    scheduler = simulation.scheduler
    second = Scheduler(SETTINGS, CostModel(scheduler.cost.fit), PageTable(48, 4))
    handle, plan = scheduler.handle, scheduler.plan
    differences: list[str] = []
    num_works = 0

    def handle_twice(event: ev.Event, now: float) -> list[ev.Effect]:
        effects = handle(event, now)
        if effects != second.handle(event, now):
            differences.append(f"{now}: {event}")
        return effects

    def plan_twice(now: float, lane: Lane) -> Work | None:
        nonlocal num_works
        work = plan(now, lane)
        if work != second.plan(now, lane) or scheduler.next_due() != second.next_due():
            differences.append(f"{now}: {lane}")
        num_works += work is not None
        return work

    scheduler.handle = handle_twice  # type: ignore[method-assign]
    scheduler.plan = plan_twice  # type: ignore[method-assign]
    simulation.run()
    assert differences == []
    assert num_works > 300
    assert second.num_open == 0
    assert second.counters == scheduler.counters
