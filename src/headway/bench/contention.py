"""What a busy neighbour does to tiles, and how soon prices know: `python -m headway.bench.contention`.

A process that never rests is pinned to one of the cores, stopped and let run in turns; beside it the same steps are run
and every tile is timed. An operator that is divided among threads ends with its slowest one, and a thread that shares
its core waits for whole time slices. The cost model is told of each step as the scheduler would be.
"""

import argparse
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.tiles import Case, quantile, timed, work_of
from headway.config import EngineSettings
from headway.core.cost import CostModel, shares_of
from headway.core.request import Request, Sampling
from headway.core.work import Work
from headway.placement.engine import Engine, build_engine

COMMAND = "python -m headway.bench.contention"
CASES = (Case(64), Case(256), Case(1024), Case(1, 512, 16))
MOST = 3.0  # bounds, that the longest of a hundred tiles may take beside the neighbour
NOTICED = 0.15  # the correction is as near as that to what steps take
LEAST_STEPS = 24  # beside the neighbour, before it is said that prices do not know
WITHIN_S = 10.0  # they should by then


@dataclass(slots=True)
class Told:
    """Of one case, alone or beside the neighbour: seconds of every tile and every step."""

    tiles_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)

    def cells(self) -> list[str]:
        return [
            f"{1e3 * statistics.median(self.steps_s):.0f}",
            *(f"{1e3 * quantile(self.tiles_s, share):.1f}" for share in (0.5, 0.99, 1.0)),
        ]


@contextmanager
def neighbour(core: int) -> Iterator[subprocess.Popen[bytes]]:
    """A process that never rests, on this core; stopped until it is let run. It does not outlive this one."""
    restless = (
        f"import os\nos.sched_setaffinity(0, {{{core}}})\nparent = os.getppid()\n"
        "while os.getppid() == parent:\n    for _ in range(1000000): pass"
    )
    process = subprocess.Popen([sys.executable, "-S", "-c", restless])
    process.send_signal(signal.SIGSTOP)
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.wait()


def run(engine: Engine, work: Work, least_s: float, told: Told) -> None:
    """The step again and again, for so long."""
    begun = time.perf_counter()
    while time.perf_counter() - begun < least_s:
        found = timed(engine.stage.run(work))
        told.tiles_s += found.tiles_s
        told.steps_s.append(found.whole_s)


def seconds_to_notice(
    engine: Engine, work: Work, busy: subprocess.Popen[bytes], least_s: float
) -> tuple[float | None, float]:
    """From the neighbour's first moment until prices are right again, None if they are not as long as it is looked at,
    and by how much they were corrected at the end.

    Right is what steps take in the second half of that time.
    """
    cost = CostModel(engine.facts.cost_fit)
    price = cost.fit.price(shares_of(work.segments))
    for _ in range(12):  # what it knows of this step when nothing disturbs it
        cost.observe(price, timed(engine.stage.run(work)).whole_s)
    course: list[tuple[float, float, float]] = []  # since the start, what the step took, what was predicted next
    busy.send_signal(signal.SIGCONT)
    begun = time.perf_counter()
    while time.perf_counter() - begun < least_s or len(course) < LEAST_STEPS:
        taken_s = timed(engine.stage.run(work)).whole_s
        cost.observe(price, taken_s)
        course.append((time.perf_counter() - begun, taken_s, cost.seconds(price)))
    busy.send_signal(signal.SIGSTOP)
    return noticed(course), course[-1][2] / price.fitted_s


def noticed(course: Sequence[tuple[float, float, float]]) -> float | None:
    """The first instant at which what is predicted is near to what such steps then take. `course`: of each step its
    end, what it took, and what was predicted of the next one."""
    right_s = statistics.mean(taken_s for at, taken_s, _ in course if at >= course[-1][0] / 2)
    return next((at for at, _, predicted_s in course if abs(predicted_s / right_s - 1) <= NOTICED), None)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random:qwen2.5-0.5b")
    parser.add_argument("--max-tile-ms", type=float, default=10.0)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each turn, alone and beside the neighbour")
    parser.add_argument("--turns", type=int, default=3, help="of each case")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    engine = build_engine(EngineSettings(model=options.model, max_num_seqs=3, max_tile_ms=options.max_tile_ms))
    engine.pool.fault_in(engine.pool.shape.pool_bytes)
    bound_s = options.max_tile_ms / 1e3
    rows, worst, slowest_s = [], 0.0, 0.0
    with torch.inference_mode(), neighbour(max(os.sched_getaffinity(0))) as busy:
        for case in track(CASES, description="cases"):
            work = work_of(engine, case)
            for segment in work.segments:
                prompt = (1,) * (case.context + case.num_tokens)
                engine.stage.open(Request(segment.request_id, prompt, 1, 0.0, sampling=Sampling(temperature=0.0)))
            timed(engine.stage.run(work))  # warm
            alone, beside = Told(), Told()
            for _ in range(options.turns):
                run(engine, work, options.seconds, alone)
                busy.send_signal(signal.SIGCONT)
                run(engine, work, options.seconds, beside)
                busy.send_signal(signal.SIGSTOP)
            noticed_s, correction = seconds_to_notice(engine, work, busy, 2 * options.seconds)
            for segment in work.segments:
                engine.stage.close(segment.request_id)
            worst = max(worst, quantile(beside.tiles_s, 0.99))
            slowest_s = max(slowest_s, math.inf if noticed_s is None else noticed_s)
            told = "never" if noticed_s is None else f"{noticed_s:.1f}"
            rows.append([case, *alone.cells(), *beside.cells(), told, f"{correction:.2f}"])
    header = ["tokens", "alone: step ms", "tile p50", "p99", "longest", "beside it: step ms", "tile p50", "p99",
              "longest", "noticed after s", "prices then ×"]  # fmt: skip
    verdict = (
        f"p99 of tiles beside the neighbour at most {MOST:g} × B = {1e3 * MOST * bound_s:g} ms: "
        f"{'reached' if worst <= MOST * bound_s else 'not reached'}, {1e3 * worst:.1f} ms. "
        f"Noticed within {WITHIN_S:g} s: {'reached' if slowest_s <= WITHIN_S else 'not reached'}, "
        f"{'never in some case' if slowest_s == math.inf else f'{slowest_s:.1f} s at most'}."
    )
    body = (
        f"{options.model}, {engine.facts.means}, B = {options.max_tile_ms:g} ms. The neighbour computes on one core "
        f"without a pause; {options.turns} turns of {options.seconds:g} s alone and beside it for each case. Noticed: "
        f"a price is within {NOTICED:.0%} of what such a step then takes, looked at for {LEAST_STEPS} steps at least."
        f"\n\n"
        f"{report.table(header, rows)}\n\n{verdict}"
    )
    report.write("contention", "Beside a busy neighbour", report.command(COMMAND, arguments), body, options.folder)


if __name__ == "__main__":
    main()
