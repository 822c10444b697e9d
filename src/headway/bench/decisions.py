"""What a decision costs, however many wait: `python -m headway.bench.decisions`. No model is needed.

A scheduler with so many requests in its queue, from the Qwen-shaped load with its targets, is told of arrivals, steps
that have ended and callers that leave, and plans after each, as the driver would. Times are those of `handle` and
`plan` together. Beside it: how many simulated requests of that load a minute of wall time holds.
"""

import argparse
import gc
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import track

from headway.bench import report
from headway.bench.load import prompts, targets
from headway.bench.named import named
from headway.bench.policies import EXAMPLE_FIT, requests_of, simulate
from headway.bench.score import quantile
from headway.core import event as ev
from headway.core.cost import CostModel, Share
from headway.core.pages import PageTable
from headway.core.request import Request
from headway.core.scheduler import Scheduler
from headway.core.settings import Lane, SchedulerSettings
from headway.core.work import Commit, Outcome, Work
from headway.placement.simulate import Device

SETTINGS = SchedulerSettings(
    max_model_len=4096, max_num_queued=1 << 20, pack_tokens=250, prefix_caching=False, refuse_unattainable=False
)
WANTED_S = 300e-6
QUEUES = (0, 10, 100, 1000, 5000)
TENANTS = (1, 8, 64)
NUM_DECISIONS = 2000


def stream(num_tenants: int, seed: int) -> Iterator[Request]:
    """Requests of the Qwen-shaped load without end."""
    load = named("qwen", num_requests=2000, seed=seed).scaled(1 / 16).answering(1)
    slos = targets(load, EXAMPLE_FIT.seconds((Share(70, 0),)), 20.0)
    pool = requests_of(load, prompts(load, 32_000, seed), slos)
    rng = random.Random(seed)
    number = 0
    while True:
        request = pool[number % len(pool)]
        tenant = f"t{rng.randrange(num_tenants)}" if num_tenants > 1 else ""
        yield replace(request, id=str(number), tenant=tenant)
        number += 1


def decisions_s(num_queued: int, num_tenants: int, seed: int = 1) -> list[float]:
    """Seconds of each decision while about `num_queued` wait: as many come as leave."""
    scheduler = Scheduler(SETTINGS, CostModel(EXAMPLE_FIT), PageTable(40_000, 16))
    coming, rng = stream(num_tenants, seed), random.Random(seed)
    now, open_ids, taken = 0.0, [], []
    for _ in range(num_queued):
        request = replace(next(coming), arrival=now)
        scheduler.handle(ev.Arrived(request), now)
        open_ids.append(request.id)
        now += 1e-3
    work = scheduler.plan(now, Lane())
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        for _ in range(NUM_DECISIONS):
            now += rng.expovariate(20.0)
            event = _event(scheduler, work, coming, open_ids, num_queued, now, rng)
            begun = time.perf_counter()
            scheduler.handle(event, now)
            work = scheduler.plan(now, Lane(progress=rng.random()))
            taken.append(time.perf_counter() - begun)
    finally:
        gc.enable()
        gc.unfreeze()
    return taken


def _event(
    scheduler: Scheduler,
    work: Work | None,
    coming: Iterator[Request],
    open_ids: list[str],
    num_queued: int,
    now: float,
    rng: random.Random,
) -> ev.Event:
    """The queue keeps its size: an arrival if it is short, else the step ends, or somebody leaves."""
    if work is None or scheduler.loads()[1] < num_queued or (num_queued == 0 and rng.random() < 0.5):
        request = replace(next(coming), arrival=now)
        open_ids.append(request.id)
        return ev.Arrived(request)
    if rng.random() < 0.1:
        return ev.Cancelled(open_ids.pop(rng.randrange(len(open_ids))))
    commits = tuple(Commit(segment.request_id, (0,)) for segment in work.segments)
    seconds = EXAMPLE_FIT.seconds([Share(len(s.tokens), 0) for s in work.segments]) * rng.lognormvariate(0.0, 0.1)
    return ev.StepDone(work.id, Outcome(commits), seconds)


def simulated_per_minute(num_requests: int) -> float:
    """Requests of the Qwen-shaped load at a sixteenth of its lengths, at a rate near the knee."""
    load = named("qwen", num_requests=num_requests, seed=1).scaled(1 / 16).answering(1).at_rate(2.5)
    slos = targets(load, EXAMPLE_FIT.seconds((Share(70, 0),)), 2.0)
    texts = prompts(load, 32_000, 1)
    settings = replace(SETTINGS, refuse_unattainable=True)
    begun = time.perf_counter()
    simulate(load, texts, slos, settings, Device(fit=EXAMPLE_FIT, tile_s=0.006, num_pages=20_000))
    return 60 * num_requests / (time.perf_counter() - begun)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headway.bench.decisions", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--num-simulated", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    rows, at_thousand = [], 0.0
    for queued, tenants in track([(q, t) for q in QUEUES for t in TENANTS], description="decisions"):
        taken = decisions_s(queued, tenants)
        p50, p99 = quantile(taken, 0.5), quantile(taken, 0.99)
        rows.append([queued, tenants, f"{1e6 * p50:.0f}", f"{1e6 * p99:.0f}", f"{1e6 * max(taken):.0f}"])
        if (queued, tenants) == (1000, 1):
            at_thousand = p99
    per_minute = simulated_per_minute(options.num_simulated)
    reached = "reached" if at_thousand <= WANTED_S else "not reached"
    report.write(
        "decisions",
        "What a decision costs",
        "python -m headway.bench.decisions",
        f"{NUM_DECISIONS} decisions each.\n\n"
        f"{report.table(['queued', 'tenants', 'p50 µs', 'p99 µs', 'longest µs'], rows)}\n\n"
        f"With 1,000 queued of one tenant p99 is {1e6 * at_thousand:.0f} µs, against 300: {reached}. Every tenant with "
        f"requests open is looked at in each decision.\n\n{per_minute:,.0f} simulated requests per minute of wall time "
        f"({options.num_simulated:,} were), against 100,000: "
        f"{'reached' if per_minute >= 100_000 else 'not reached'}.",
        options.folder,
    )


if __name__ == "__main__":
    main()
