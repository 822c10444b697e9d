"""`headway simulate`: a load on devices that exist as prices only, under one scheduler or several.

The scheduler and the driver are the engine's own; only time and the model's arithmetic are missing. Everything but how
long it took follows from the flags. Imports no torch.
"""

import argparse
import shlex
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from rich.console import Console
from rich.progress import Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from headway.bench import load as loads
from headway.bench import simulated_flags as flags
from headway.bench import simulated_telling as telling
from headway.bench.flags import make_folder, rates_of
from headway.bench.load import Load
from headway.bench.policies import simulate
from headway.bench.score import Score
from headway.bench.search import Found, Point, Search, every_class, everybody
from headway.core.cost import Share
from headway.core.request import SLO
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import Simulation

VOCABULARY = 32_000
MAX_POINTS = 24
PATIENCE_S = 2.0  # before progress is shown

Judge = Callable[[Score], Mapping[str, float]]


class Run(NamedTuple):
    """One load at one rate under one scheduler; `wall_s` is how long that took us."""

    rate: float
    score: Score
    counters: dict[str, int]
    wall_s: float


@dataclass
class Tried:
    """What came of one scheduler: the highest rate for every class and for all in one, and every run by its rate."""

    settings: SchedulerSettings
    runs: dict[float, Run] = field(default_factory=dict)
    every_class: Found[Run] = field(default_factory=lambda: Found(0.0, 0.0, ()))
    all_in_one: Found[Run] = field(default_factory=lambda: Found(0.0, 0.0, ()))

    @property
    def by_rate(self) -> list[Run]:
        return [self.runs[rate] for rate in sorted(self.runs)]


class Result(NamedTuple):
    """A whole invocation. `shown_rates` are those at which the schedulers are told side by side."""

    tried: dict[str, Tried]
    shown_rates: list[float]
    wall_s: float

    @property
    def num_simulated(self) -> int:
        """Requests, over all runs."""
        return sum(run.score.overall.num for one in self.tried.values() for run in one.runs.values())


Watch = Callable[[str, list[Simulation]], None]


class Simulator:
    """A load, its targets and a kind of device. `watch` gets the engines of each run before it begins."""

    def __init__(self, options: argparse.Namespace, watch: Watch = lambda what, engines: None) -> None:
        self._begun = time.perf_counter()
        self.options = options
        self.plan = flags.plan_of(options)
        self.load: Load = self.plan.load
        options.rates = rates_of(options, self.load)
        self.prompts = (
            loads.prompts(self.load, VOCABULARY, options.seed) if options.prefix_caching else blank_prompts(self.load)
        )
        self.num_alone = loads.p90_prompt(self.load, loads.base_kind(self.load))
        self.alone_s = self.plan.fit.seconds((Share(self.num_alone, 0),))
        token_s = None if options.tpot_k is None else self.plan.fit.seconds((Share(1, self.num_alone),))
        self.slos: dict[str, SLO] = loads.targets(self.load, self.alone_s, options.slo_k, token_s, options.tpot_k)
        self._watch = watch

    def run(self) -> Result:
        """Search, or go through the given rates; at the rates that are shown every scheduler has a run."""
        tried = {name: self.find(name) for name in self.plan.schedulers}
        first = next(iter(tried.values()))
        shown = sorted(set(self.options.rates or [first.every_class.rate or min(first.runs)]))
        for name, one in tried.items():
            for rate in shown:
                self.attain(name, rate, one)
        return Result(tried, shown, time.perf_counter() - self._begun)

    def find(self, name: str) -> Tried:
        """How far one scheduler gets."""
        one = Tried(self.plan.schedulers[name])
        one.every_class = self._find(name, one, every_class, self._start())
        lowest = one.every_class.points[0].rate
        one.all_in_one = self._find(name, one, everybody, one.every_class.rate or lowest)
        return one

    def attain(self, name: str, rate: float, one: Tried) -> Run:
        """The whole load once, unless that has been done."""
        if rate not in one.runs:
            begun = time.perf_counter()
            found = simulate(
                self.load.at_rate(rate),
                self.prompts,
                self.slos,
                one.settings,
                self.plan.device,
                self.plan.num_devices,
                self.options.seed,
                lambda engines: self._watch(f"{name} at {rate:.4g}/s", engines),
            )
            one.runs[rate] = Run(rate, found.score, found.counters, time.perf_counter() - begun)
        return one.runs[rate]

    def _find(self, name: str, one: Tried, judge: Judge, start: float) -> Found[Run]:
        search: Search[Run] = Search(
            lambda rate: self.attain(name, rate, one),
            lambda run: judge(run.score),
            share=self.options.share,
            tolerance=self.options.tolerance,
            repeats=1,  # a second run would be the same
            max_points=MAX_POINTS,
        )
        if self.options.rates is None:
            return search.run(min(max(start, search.lowest), search.highest))
        points: list[Point[Run]] = [search.visit(rate) for rate in sorted(set(self.options.rates))]
        failed_at = min((point.rate for point in points if not point.passed), default=float("inf"))
        # one that passed above one that failed was lucky
        passed = [point.rate for point in points if point.passed and point.rate < failed_at]
        return Found(max(passed, default=0.0), failed_at, tuple(points))

    def _start(self) -> float:
        """Half of what the devices would do one prompt after the other."""
        alone_s = [self.plan.fit.seconds((Share(asked.num_prompt, 0),)) for asked in self.load.requests]
        return 0.5 * self.plan.num_devices * len(alone_s) / sum(alone_s)


def blank_prompts(load: Load) -> list[tuple[int, ...]]:
    """As long as they are asked for, all of one token: nobody looks at tokens when no beginnings are shared. Those of
    a length are the same object, or the tokens of a large load would not fit into memory."""
    of_length = {num: (0,) * num for num in {asked.num_prompt for asked in load.requests}}
    return [of_length[asked.num_prompt] for asked in load.requests]


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code. Raises ValueError with one sentence."""
    options = flags.parse(words)
    if options.out is not None:
        _prepare(options)
    with _progress(options.num_requests) as watch:
        simulator = Simulator(options, watch)
        result = simulator.run()
    print(f"{telling.opening(simulator)}\n{telling.told(simulator, result)}")
    if options.out is not None:
        from headway.bench.simulated_page import write

        print(write(simulator, result, shlex.join(["headway", "simulate", *words])))
    return 0


def _prepare(options: argparse.Namespace) -> None:
    """Whatever would keep the result from being written is found out before it is made."""
    try:
        import aiohttp  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("`headway simulate --out` needs an extra: pip install 'headway[bench]'.") from error
    make_folder(options.out)


# Progress


class _Answered(ProgressColumn):
    """How many requests of the run have ended: looked up when drawn, so that it costs the simulation nothing."""

    def render(self, task: Task) -> Text:
        engines: list[Simulation] = task.fields["engines"]
        num_sent = task.fields["num_requests"]
        return Text(f"{sum(len(engine.ended) for engine in engines):,} of {num_sent:,}" if engines else "")


@contextmanager
def _progress(num_requests: int) -> Iterator[Watch]:
    """Shown on a terminal once it has taken PATIENCE_S."""
    console = Console(stderr=True)
    columns = (SpinnerColumn(), TextColumn("{task.description:<28}"), _Answered(), TimeElapsedColumn())
    progress = Progress(*columns, console=console, transient=True, redirect_stdout=False)
    task = progress.add_task("making the load", engines=[], num_requests=num_requests)

    def watch(what: str, engines: list[Simulation]) -> None:
        progress.update(task, description=what, engines=engines)

    if not console.is_interactive:
        yield watch
        return
    later = threading.Timer(PATIENCE_S, progress.start)
    later.daemon = True
    later.start()
    try:
        yield watch
    finally:
        later.cancel()
        later.join()
        progress.stop()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
