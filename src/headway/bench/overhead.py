"""What control costs: `python -m headway.bench.overhead`.

Two parts. A simulated load with a thousand tiles a step counts how often the scheduler is asked. And a language stage
whose operators are left out, driven by the real driver and clock, shows what one yield costs in Python: making the
tile, leaving two generators and coming back, looking for mail and at the clock.
"""

import statistics
import time
from collections.abc import Iterator

import torch

from headway.bench import report
from headway.bench.exactness import USUAL, small_config
from headway.bench.storm import storm
from headway.core import event as ev
from headway.core.cost import CostFit, CostModel
from headway.core.pages import PageTable
from headway.core.request import Request, Sampling
from headway.core.scheduler import Scheduler
from headway.core.settings import SchedulerSettings
from headway.core.work import Commit, Tile
from headway.kv.pool import KVPool, PoolShape
from headway.models import weights
from headway.models.decoder import Layer
from headway.placement.driver import DeviceLane, Driver
from headway.placement.engine import MonotonicClock
from headway.placement.mailbox import Letters
from headway.placement.simulate import FakeSimulation
from headway.stages.language import LanguageStage
from headway.stages.sample import Sampler
from headway.stages.step import Step
from headway.stages.tiling import Tiling

TILES_PER_LAYER = 50_000


class WithoutOperators(LanguageStage):
    """The stage's own loop, tiles and launch-ahead, with nothing computed between two yields."""

    def _layer(self, step: Step, number: int, layer: Layer) -> Iterator[Tile]:
        for _ in range(TILES_PER_LAYER):
            yield step.tile("nothing")

    def _head(self, step: Step, drawn: list[Commit]) -> Iterator[Tile]:
        drawn.append(Commit(step.batch.asked_by[0], (0,)))
        yield step.tile("nothing")


def yield_cost_s() -> float:
    """Seconds per tile of a step of 100,000 empty tiles, driven as in the engine."""
    model = weights.random_decoder(small_config(), 0, torch.float32)
    config = model.config
    pool = KVPool(PoolShape(8, config.num_layers, 16, config.num_kv_heads, config.head_size, torch.float32))
    stage = WithoutOperators(model, pool, Tiling(USUAL, 0.010), Sampler(config.vocab_size))
    scheduler = Scheduler(SchedulerSettings(max_model_len=100), CostModel(CostFit()), PageTable(8, 16))
    letters = Letters()
    driver = Driver(scheduler, {"language": stage}, MonotonicClock(), letters, lambda effect: None)
    letters.put(ev.Arrived(Request("r", (1, 2, 3), 1, 0.0, sampling=Sampling(temperature=0.0))))
    with torch.inference_mode():
        begun = time.perf_counter()
        while driver.turn():
            pass
        taken_s = time.perf_counter() - begun
    assert scheduler.num_open == 0
    return taken_s / driver.num_tiles


def main() -> None:
    letters, _ = storm(seed=3, num_requests=1000)
    settings = SchedulerSettings(max_model_len=120, max_num_seqs=12, pack_tokens=40, tile_s=0.002)
    simulation = FakeSimulation(letters, settings, num_pages=48, num_layers=24, tiles_per_layer=40, tile_s=1e-6)
    num_fed = num_batches = 0
    handle, account = simulation.scheduler.handle, simulation.driver._account

    def counted_handle(event: ev.Event, now: float) -> list[ev.Effect]:
        nonlocal num_fed
        num_fed += 1
        return handle(event, now)

    def counted_account(lane: DeviceLane) -> bool:
        nonlocal num_batches
        any_event = account(lane)
        num_batches += any_event
        return any_event

    simulation.scheduler.handle = counted_handle  # type: ignore[method-assign]
    simulation.driver._account = counted_account  # type: ignore[method-assign]
    simulation.run()
    counters = simulation.scheduler.counters
    counts = report.table(
        ["events", "handled", "drained batches", "plans", "tiles", "tiles per plan"],
        [[num_fed, counters["events"], num_batches, counters["plans"], simulation.driver.num_tiles,
          f"{simulation.driver.num_tiles / counters['plans']:.0f}"]],
    )  # fmt: skip
    costs = [yield_cost_s() * 1e9 for _ in range(9)]
    report.write(
        "overhead",
        "What control costs",
        report.command("python -m headway.bench.overhead", None),
        f"A simulated load of 1000 requests: every event was handled once, and the scheduler planned once per drained "
        f"batch of events, never per tile.\n\n{counts}\n\nOne yield, everything that Python does for it included: "
        f"median {statistics.median(costs):.0f} ns ({min(costs):.0f} … {max(costs):.0f} in 9 runs of "
        f"{2 * TILES_PER_LAYER} tiles).",
    )


if __name__ == "__main__":
    main()
