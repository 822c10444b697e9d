"""`headway simulate`: a load on devices that exist as prices only, under one scheduler or several.

The scheduler and the driver are the engine's own; only time and the model's arithmetic are missing. What it says is as
good as its prices: `docs/results/goodput.md` shows it beside measurements. Imports no torch.
"""

import argparse
import json
import shlex
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console
from rich.progress import track

from headway.bench import load as loads
from headway.bench.flags import Parser, count, positive
from headway.bench.load import Load
from headway.bench.named import TRACES, named
from headway.bench.policies import CHUNKS, policies, simulate
from headway.bench.score import Score
from headway.bench.search import Found, Search, every_class, every_class_ttft
from headway.bench.traces import read
from headway.core.cost import CostFit, Share
from headway.core.request import SLO
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import Device

DESCRIPTION = """\
Run a load on simulated devices: the engine's own scheduler and driver on a virtual clock, with steps that only cost
what they are priced at. Without --rates the highest rate is searched at which 90% of each class meet their targets.
"""
EXAMPLES = """\
examples:
  headway simulate qwen --length-scale 0.0625                  goodput of this scheduler
  headway simulate qwen --policies operator fcfs "chunk 64"    beside two others
  headway simulate azure-conv --devices 4 --rates 8 16 24
  headway simulate mooncake --costs ~/.cache/headway/costs/KEY.json
"""
# half a billion parameters in bfloat16 on two cores, as an engine measured it at its start
EXAMPLE_FIT = CostFit(step_s=0.070, token_s=1.93e-3, segment_s=1e-3, pair_s=6.7e-7)
TILE_SHARE = 0.6  # of the bound: what a tile is planned to take
VOCABULARY = 32_000
COLUMNS = ("scheduler", "goodput, req/s", "all in one, req/s", "preemptions/request", "refused", "parked tokens, most")


class Run(NamedTuple):
    """One load at one rate, simulated; `wall_s` is how long that took us."""

    rate: float
    score: Score
    counters: dict[str, int]
    wall_s: float


def parser() -> Parser:
    found = Parser(
        prog="headway simulate",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=112),
    )
    found.add_argument("load", metavar="LOAD", help=f"{', '.join(TRACES)}, or a trace's file")
    found.add_argument("--out", type=Path, metavar="FOLDER", help="for result.json, chart.png and report.html")
    load = found.add_argument_group("load")
    load.add_argument("--num-requests", type=count, default=1000, metavar="N", help="in each run (default: 1000)")
    load.add_argument("--length-scale", type=positive, default=1.0, metavar="X", help="lengths times X (default: 1)")
    load.add_argument("--max-tokens", type=count, metavar="N", help="length of every answer; 1 is TTFT only")
    load.add_argument("--rates", type=positive, nargs="+", metavar="R", help="requests/s (default: search)")
    load.add_argument("--slo-k", type=positive, default=2.0, metavar="K", help="TTFT target over isolated (default: 2)")
    load.add_argument("--seed", type=int, default=0, metavar="N", help="of lengths, arrivals and noise (default: 0)")
    device = found.add_argument_group("devices")
    device.add_argument("--devices", type=count, default=1, metavar="N", help="each with a scheduler (default: 1)")
    device.add_argument("--costs", type=Path, metavar="FILE", help="prices: an engine's own file, or the four as JSON")
    device.add_argument("--max-tile-ms", type=positive, default=10.0, metavar="MS", help="the bound B (default: 10)")
    device.add_argument("--num-pages", type=count, default=16384, metavar="N", help="of 16 tokens (default: 16384)")
    device.add_argument("--spread", type=float, default=0.0, metavar="X", help="of a step's log seconds (default: 0)")
    device.add_argument("--misprediction", type=positive, default=1.0, metavar="X", help="believed over true prices")
    scheduler = found.add_argument_group("scheduler")
    scheduler.add_argument("--policies", nargs="+", default=["operator"], metavar="NAME", help="see the list below")
    scheduler.add_argument("--prefix-caching", action="store_true", help="share equal beginnings, as engines do")
    names = ", ".join(policies(SchedulerSettings(max_model_len=1)))
    found.epilog = f"{EXAMPLES}\npolicies: {names}"
    return found


class Priced(msgspec.Struct, frozen=True):
    """The part of an engine's file that is needed here."""

    fit: CostFit


class Kept(msgspec.Struct, frozen=True):
    prices: Priced


class Plain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The prices by themselves, seconds each."""

    step_s: float
    token_s: float
    segment_s: float = 0.0
    pair_s: float = 0.0


def fit_of(path: Path | None) -> CostFit:
    """Raises ValueError with one sentence."""
    if path is None:
        return EXAMPLE_FIT
    try:
        content = path.expanduser().read_bytes()
        try:
            fit = msgspec.json.decode(content, type=Kept).prices.fit
        except msgspec.ValidationError:
            plain = msgspec.json.decode(content, type=Plain)
            fit = CostFit(plain.step_s, plain.token_s, plain.segment_s, plain.pair_s)
    except OSError as error:
        raise ValueError(f"--costs {path} cannot be read: {error.strerror}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--costs {path} holds no prices ({str(error)[:120]}): give an engine's file or "
            '{"step_s": …, "token_s": …, "segment_s": …, "pair_s": …}.'
        ) from error
    if not (fit.step_s >= 0 and fit.token_s > 0 and fit.segment_s >= 0 and fit.pair_s >= 0):
        raise ValueError(f"--costs {path}: prices must not be negative, and a token must cost something.")
    return fit


def load_of(options: argparse.Namespace) -> Load:
    path = Path(options.load)
    if options.load in TRACES or not path.exists():
        load = named(options.load, num_requests=options.num_requests, seed=options.seed)
    else:
        load = Load.of(
            path.name, f"trace {path.name}", read(path, seed=options.seed), options.num_requests, options.seed
        )
    if not load.timed:
        load = load.arriving("poisson", 1.0, options.seed)
    load = load.scaled(options.length_scale)
    return load if options.max_tokens is None else load.answering(options.max_tokens)


class Simulator:
    """One invocation: a load, its targets, a kind of device."""

    def __init__(self, options: argparse.Namespace) -> None:
        fit = fit_of(options.costs)
        self.options = options
        self.load = load_of(options)
        believed = CostFit(*(options.misprediction * price for price in msgspec.structs.astuple(_plain(fit))))
        self.device = Device(
            fit=fit,
            tile_s=TILE_SHARE * options.max_tile_ms / 1e3,
            num_pages=options.num_pages,
            spread=options.spread,
            believed=believed,
        )
        longest = max(asked.num_prompt + asked.num_output for asked in self.load.requests) + 1
        saturation = max(16, int(7 * fit.step_s / fit.token_s))
        base = SchedulerSettings(
            max_model_len=longest,
            max_num_queued=max(1024, options.num_requests),
            pack_tokens=saturation,
            tile_s=options.max_tile_ms / 1e3,
            prefix_caching=options.prefix_caching,
        )
        known = policies(base, CHUNKS)
        unknown = [name for name in options.policies if name not in known]
        if unknown:
            raise ValueError(f"--policies {unknown[0]!r} is unknown: choose from {', '.join(known)}.")
        self.settings = {name: known[name] for name in options.policies}
        self.prompts = loads.prompts(self.load, VOCABULARY, options.seed)
        alone = Share(loads.p90_prompt(self.load, loads.base_kind(self.load)), 0)
        self.slos: dict[str, SLO] = loads.targets(self.load, fit.seconds((alone,)), options.slo_k)
        self.start = 0.5 * options.devices / self._mean_s(fit)

    def _mean_s(self, fit: CostFit) -> float:
        alone = [fit.seconds((Share(asked.num_prompt, 0),)) for asked in self.load.requests]
        return sum(alone) / len(alone)

    def attain(self, name: str, rate: float) -> Run:
        begun = time.perf_counter()
        found = simulate(
            self.load.at_rate(rate),
            self.prompts,
            self.slos,
            self.settings[name],
            self.device,
            self.options.devices,
            self.options.seed,
        )
        return Run(rate, found.score, found.counters, time.perf_counter() - begun)

    def find(self, name: str) -> Found[Run]:
        """Goodput, or what came of the rates that were asked for."""

        def attain(rate: float) -> Run:
            return self.attain(name, rate)

        judge = every_class_ttft if self.options.max_tokens == 1 else every_class
        search: Search[Run] = Search(attain, lambda run: judge(run.score), tolerance=0.03, repeats=1, max_points=24)
        if self.options.rates is None:
            return search.run(self.start)
        points = tuple(search.visit(rate) for rate in sorted(self.options.rates))
        passed = [point.rate for point in points if point.passed]
        failed = [point.rate for point in points if not point.passed]
        return Found(max(passed, default=0.0), min(failed, default=float("inf")), points)


def _plain(fit: CostFit) -> Plain:
    return Plain(fit.step_s, fit.token_s, fit.segment_s, fit.pair_s)


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code. Raises ValueError with one sentence."""
    options = parser().parse_args(list(words))
    simulator = Simulator(options)
    print(f"{simulator.load.name}: {len(simulator.load.requests)} requests; {simulator.load.source}")
    targets = ", ".join(f"{kind} {1e3 * (slo.ttft_s or 0.0):.0f} ms" for kind, slo in simulator.slos.items())
    print(f"TTFT targets: {targets}; {options.devices} device(s), {simulator.device.fit}")
    quiet = len(options.policies) * len(simulator.load.requests) < 2000
    console = Console(stderr=True)
    found = {
        name: simulator.find(name)
        for name in track(options.policies, "policies", console=console, disable=quiet, transient=True)
    }
    lines = [_line(simulator, name, one) for name, one in found.items()]
    for cells in (COLUMNS, *lines):
        print("  ".join(f"{cell:<20}" for cell in cells).rstrip())
    for name, one in found.items():
        for point in one.points:
            shares = "  ".join(f"{kind} {share:.1%}" for kind, share in point.shares.items())
            print(f"{name:<20}{point.rate:9.3f}/s  {shares}")
    runs = [run for one in found.values() for point in one.points for run in point.runs]
    simulated = len(runs) * len(simulator.load.requests) / max(1e-9, sum(run.wall_s for run in runs))
    print(f"{60 * simulated:,.0f} simulated requests per minute of wall time.")
    if options.out is not None:
        _write(simulator, found, lines, shlex.join(["headway", "simulate", *words]))
    return 0


def _line(simulator: Simulator, name: str, found: Found[Run]) -> list[str]:
    near = min(found.points, key=lambda point: abs(point.rate - found.rate)).runs[-1]
    overall = [p.rate for p in found.points if p.runs[-1].score.meets_overall(ttft_only=True)]
    return [
        name,
        f"{found.rate:.3g}",
        f"{max(overall, default=0.0):.3g}",
        f"{near.counters.get('preemptions', 0) / len(simulator.load.requests):.2f}",
        f"{near.counters.get('refused', 0)}",
        f"{near.counters.get('most_parked_tokens', 0)}",
    ]


def _write(simulator: Simulator, found: dict[str, Found[Run]], lines: list[list[str]], command: str) -> None:
    try:
        from headway.bench.chart import Curve, Mark, Panel, png
        from headway.bench.page import Page, Table, html
        from headway.bench.result import plain
    except ImportError as error:
        raise ValueError("`--out` needs an extra: pip install 'headway[bench]'.") from error
    folder: Path = simulator.options.out
    folder.mkdir(parents=True, exist_ok=True)

    def panel(title: str, shown: str) -> Panel:
        curves = [
            Curve(name, [p.rate for p in one.points], [p.shares.get(shown, min(p.shares.values())) for p in one.points])
            for name, one in found.items()
        ]
        return Panel(title, "requests/s", "share", curves, [Mark("y", 0.9)], y_range=(-0.02, 1.04))

    panels = [panel("Worst class", ""), *(panel(f"Class {kind}", kind) for kind in simulator.load.kinds)]
    document = {
        "format": 1,
        "command": command,
        "at": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "load": {"name": simulator.load.name, "source": simulator.load.source},
        "device": plain(simulator.device),
        "targets": plain(simulator.slos),
        "policies": {
            name: {"goodput": one.rate, "points": [plain(point) for point in one.points]} for name, one in found.items()
        },
    }
    (folder / "result.json").write_text(json.dumps(plain(document), indent=1) + "\n", encoding="utf8")
    png(panels, folder / "chart.png")
    page = Page(
        "Simulated goodput",
        simulator.load.source,
        {name: f"{one.rate:.3g} req/s" for name, one in found.items()},
        panels,
        [Table("Schedulers", COLUMNS, lines)],
        {"command": command, "prices": str(simulator.device.fit)},
    )
    (folder / "report.html").write_text(html(page), encoding="utf8")
    print(f"Written: {folder / 'report.html'}, {folder / 'chart.png'} and {folder / 'result.json'}")
