"""Thousands of random arrivals, cancels, expiries and engine losses on a virtual clock: nothing is lost or leaked."""

import pytest

from headway.bench.storm import storm, survive
from headway.core import event as ev
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import FakeSimulation


@pytest.mark.parametrize("seed", range(10))
def test_every_request_ends_once_and_no_page_leaks(seed: int) -> None:
    """1,000 requests a seed, too many for memory and time: each ends exactly once, with the tokens that are its own."""
    survived = survive(seed, 1000)
    assert {ending.partition(" ")[0] for ending in survived.endings} == {"finished", "refused", "cancelled", "failed"}
    for happened in ("preemptions", "recomputes", "prefix_hits"):
        assert survived.counters[happened] > 0, f"the storm was too mild: no {happened}"


def test_one_plan_for_each_drained_batch_of_events() -> None:
    """However many tiles run, the scheduler is asked only when something has happened."""
    letters, _ = storm(seed=3, num_requests=300)
    settings = SchedulerSettings(max_model_len=120, max_num_seqs=12, pack_tokens=40, tile_s=0.002)
    simulation = FakeSimulation(letters, settings, num_pages=48, num_layers=24, tiles_per_layer=40, tile_s=1e-6)
    batches = 0
    handle, plan = simulation.scheduler.handle, simulation.scheduler.plan
    seen: list[ev.Event] = []

    def counted_handle(event: ev.Event, now: float) -> list[ev.Effect]:
        seen.append(event)
        return handle(event, now)

    def counted_plan(now: float, lane: object) -> object:
        nonlocal batches
        assert seen, "a plan without an event"
        seen.clear()
        batches += 1
        return plan(now, lane)  # type: ignore[arg-type]

    simulation.scheduler.handle = counted_handle  # type: ignore[method-assign]
    simulation.scheduler.plan = counted_plan  # type: ignore[method-assign,assignment]
    simulation.run()
    counters = simulation.scheduler.counters
    assert counters["plans"] == batches <= counters["events"]
    assert simulation.driver.num_tiles > 20 * counters["plans"]
