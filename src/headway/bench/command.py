"""`headway bench`: flags to servers and a load, measure, write what came of it. Imports no torch."""

import argparse
import asyncio
import json
import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from headway.bench import flags
from headway.bench.load import Load
from headway.core.request import SLO

FEWEST = 64  # a search goes no lower than where it began, divided by this: slower runs would take hours

if TYPE_CHECKING:
    from headway.bench.client import Server
    from headway.bench.measure import Alone, Run
    from headway.bench.page import Page
    from headway.bench.search import Found


def main(words: Sequence[str]) -> int:
    """Run the command; returns the exit code. Raises ValueError with one sentence."""
    found = flags.parser()
    options = found.parse_args(list(words))
    sides = flags.sides(options, found)
    flags.fill(options, found)
    flags.check(options, found)
    _needs_extra()
    flags.make_folder(options.out or Path())
    if options.token_seed is None:
        options.token_seed = secrets.randbits(31)
    command = shlex.join(["headway", "bench", *_without_key(words)])
    with _progress() as progress:
        bench = _Command(options, sides, command, progress)
        return bench.one() if len(sides) == 1 else bench.two()


def _needs_extra() -> None:
    try:
        import aiohttp  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError("`headway bench` needs its extra: pip install 'headway[bench]'.") from error


def _without_key(words: Sequence[str]) -> list[str]:
    """The command as it may be kept in a result."""
    kept = list(words)
    for place, word in enumerate(kept):
        if word == "--api-key" and place + 1 < len(kept):
            kept[place + 1] = "KEY"
        elif word.startswith("--api-key="):
            kept[place] = "--api-key=KEY"
    return kept


def _progress() -> Progress:
    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(stderr=True), transient=True)


class _Command:
    """One invocation."""

    def __init__(
        self, options: argparse.Namespace, sides: tuple[flags.Side, ...], command: str, progress: Progress
    ) -> None:
        from headway.bench.measure import Bench

        self._options = options
        self._command = command
        self._progress = progress
        self._labels = tuple(side.label for side in sides)
        self._servers = [self._meet(side.url) for side in sides]
        contexts = [options.context or server.context for server in self._servers]
        self._load = flags.load_of(options, min((c for c in contexts if c is not None), default=None))
        options.rates = flags.rates_of(options, self._load)
        self._bench = Bench(self._load, options.vocab_size, options.token_seed, self._steps)
        self._say(f"{self._load.name}: {len(self._load.requests)} requests; {self._load.source}")

    def one(self) -> int:
        """Measure one server."""
        from headway.bench import telling
        from headway.bench.result import of_point, panels

        server, options = self._servers[0], self._options
        alone, targets = self._alone_and_targets(server)
        found = self._find(server, alone, targets)
        runs = [run for point in found.points for run in point.runs]
        document = self._document(alone, targets, runs) | {
            "server": self._who(server),
            "share": options.share,
            "goodput": {"rate": found.rate, "failed_at": found.failed_at},
            "points": [of_point(point) for point in found.points],
        }
        told = telling.lines(found, options.share, ttft_only=options.ttft_only)
        self._tell([*told, *self._load.cautions()])
        page = telling.page_of(found, self._load, alone, targets, document)
        at = telling.shown_point(found)
        shown = panels(found.points, at, targets, options.share, ttft_only=options.ttft_only)
        return self._write(document, page, shown)

    def two(self) -> int:
        """Compare two."""
        from headway.bench import telling
        from headway.bench.compare import compare
        from headway.bench.result import of_ratios, of_run

        options = self._options
        a, b = self._servers
        labels = (self._labels[0], self._labels[1])
        alone, targets = self._alone_and_targets(a)
        self._bench.alone(b)  # warm as well, and it must answer
        turns = self._bench.in_turns(a, b, options.rates[0], targets, options.blocks)
        ratios = compare(turns.blocks, targets, options.seed, ttft_only=options.ttft_only)
        document = self._document(alone, targets, [run for _, run in turns.runs]) | {
            "servers": {label: self._who(server) for label, server in zip(labels, (a, b), strict=True)},
            "rate": options.rates[0],
            "ratios": of_ratios(ratios),
            "runs": [{"server": labels["AB".index(side)]} | of_run(run) for side, run in turns.runs],
        }
        self._tell(telling.comparison_lines(ratios, labels, options.blocks))
        for side, label in zip("AB", labels, strict=True):
            found = telling.warnings([run for which, run in turns.runs if which == side])
            self._tell([f"{label}: {line}" for line in found])
        page = telling.comparison_page(turns, ratios, labels, targets, document)
        return self._write(document, page, page.panels)

    def _find(self, server: "Server", alone: "Alone", targets: Mapping[str, SLO]) -> "Found[Run]":
        from headway.bench.measure import by_every_class, by_every_class_ttft, one_request
        from headway.bench.search import Search

        options = self._options
        judge = by_every_class_ttft if options.ttft_only else by_every_class
        if options.rates is not None:
            return self._bench.at_each(server, options.rates, targets, judge, options.share)

        flags.check_reachable(options, self._load, targets, alone.ttft_s, alone.tpot_s)

        def attain(rate: float) -> "Run":
            return self._bench.at(server, rate, targets)

        start = options.start or self._bench.capacity(alone)
        look = Search(
            attain,
            judge,
            one_request,
            share=options.share,
            tolerance=options.tolerance,
            repeats=options.repeats,
            lowest=max(Search.lowest, start / FEWEST),
        )
        return look.run(start)

    def _alone_and_targets(self, server: "Server") -> tuple["Alone", dict[str, SLO]]:
        alone = self._bench.alone(server)
        targets = flags.targets_of(self._options, self._load, alone.ttft_s, alone.tpot_s)
        for kind, slo in targets.items():
            tpot = "" if slo.tpot_s is None else f", TPOT {slo.tpot_s * 1000:.1f} ms"
            self._say(
                f"{kind}: {alone.num_prompt[kind]} tokens alone in {alone.ttft_s[kind] * 1000:.1f} ms; "
                f"target TTFT {(slo.ttft_s or 0) * 1000:.1f} ms{tpot}"
            )
        return alone, targets

    def _meet(self, url: str) -> "Server":
        from headway.bench.client import Server, meet

        options = self._options
        server = Server(
            url,
            options.model,
            as_text=options.text or options.chat,
            chat=options.chat,
            send_slo=not options.no_slo_headers,
            send_class=options.slo_class_header,
            api_key=options.api_key or os.environ.get("HEADWAY_BENCH_API_KEY", ""),
            timeout_s=options.timeout,
        )
        return asyncio.run(meet(server))

    def _document(self, alone: "Alone", targets: Mapping[str, SLO], runs: Sequence["Run"]) -> dict[str, Any]:
        from headway.bench.result import plain, provenance

        load: Load = self._load
        return {
            "format": 1,
            "provenance": provenance(self._command),
            "load": {"name": load.name, "source": load.source, "num_requests": len(load.requests)},
            "seeds": {"load": self._options.seed, "tokens": self._options.token_seed},
            "ttft_only": self._options.ttft_only,
            "alone": plain(alone),
            "targets": plain(targets),
            "late_ms": [run.late_ms for run in runs],
        }

    def _who(self, server: "Server") -> dict[str, Any]:
        return {
            "url": server.url,
            "model": server.model,
            "context": server.context,
            "as_text": server.as_text,
            "chat": server.chat,
            "slo_headers": server.send_slo,
        }

    def _write(self, document: Mapping[str, Any], page: "Page", panels: Sequence[Any]) -> int:
        from headway.bench.chart import png
        from headway.bench.page import html
        from headway.bench.result import plain

        folder: Path = self._options.out or Path(f"bench-{datetime.now(UTC):%Y%m%d-%H%M%S}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "result.json").write_text(json.dumps(plain(document), indent=1) + "\n", encoding="utf8")
            png(panels, folder / "chart.png")
            (folder / "report.html").write_text(html(page), encoding="utf8")
        except OSError as error:
            raise ValueError(f"The result cannot be written to {folder}: {error.strerror}.") from error
        print(f"Written: {folder / 'report.html'}, {folder / 'chart.png'} and {folder / 'result.json'}")
        return 0

    def _say(self, line: str) -> None:
        """On the way: above the progress bar, on stderr."""
        self._progress.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _tell(self, lines: Sequence[str]) -> None:
        """What was asked for: on stdout, when all is done."""
        self._progress.stop()
        for line in lines:
            print(line)

    def _steps(self, what: str, total: int) -> Callable[[], None]:
        for task in self._progress.task_ids:
            self._progress.remove_task(task)
        task = self._progress.add_task(what, total=total)
        return lambda: self._progress.advance(task)
