"""Two hundred callers for ten minutes, some of whom leave, ask nonsense, or see the engine killed:
`python -m headway.bench.soak`.

A server of its own, the embedded model, callers that ask again as soon as an answer is over. Now and then the engine's
process is killed. What is checked: every call ends, once, in one of the ways that it may; the server's own account of
what it began and ended comes out even; nothing is held at the end; and neither process grows.
"""

import argparse
import asyncio
import contextlib
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families
from rich.progress import Progress

from headway.bench import report
from headway.bench.callers import Account, Caller

COMMAND = "python -m headway.bench.soak"
READY_S = 60.0
SAMPLE_S = 2.0
SETTLED = 0.25  # of the time, from which on memory should not grow
LATE = 0.75  # from here on it is seen whether it still does
MOST_GROWTH = 2.0  # MiB a minute, of the door and of any engine that lived long enough
LONG_S = 120.0  # as long as that: a younger one is still meeting its first callers
KILLING = 0.5  # of the time, in which engines are killed; then one of them is let live


@dataclass(slots=True)
class Memory:
    """MiB of a process's own by seconds since the start; one series for the door, one for each engine. What it shares
    does not count: the pool of pages, which has a size, and files that are mapped. Beside it, all that is resident."""

    series: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    resident: dict[str, list[tuple[float, float]]] = field(default_factory=dict)

    def sample(self, at_s: float, door: psutil.Process) -> psutil.Process | None:
        """Note both; returns the engine, if there is one."""
        engine = None
        with contextlib.suppress(psutil.Error):
            self._note("door", at_s, door)
            children = [child for child in door.children() if "headway.placement" in " ".join(child.cmdline())]
            if children:
                engine = children[-1]
                self._note(f"engine {engine.pid}", at_s, engine)
        return engine

    def _note(self, name: str, at_s: float, process: psutil.Process) -> None:
        sizes = process.memory_info()
        self.series.setdefault(name, []).append((at_s, (sizes.rss - sizes.shared) / 2**20))
        self.resident.setdefault(name, []).append((at_s, sizes.rss / 2**20))

    def is_long(self, name: str) -> bool:
        """Whether it lived long enough for its growth to say something."""
        return self.series[name][-1][0] - self.series[name][0][0] >= LONG_S


def growth(series: Sequence[tuple[float, float]], settled: float = SETTLED) -> float | None:
    """MiB a minute by least squares, without that first part of the series' own time."""
    begun, ended = series[0][0], series[-1][0]
    late = [(at, size) for at, size in series if at >= begun + settled * (ended - begun)]
    if len(late) < 5:
        return None
    return 60 * statistics.linear_regression(*zip(*late, strict=True)).slope


async def soak(
    url: str, door: psutil.Process, options: argparse.Namespace
) -> tuple[Account, Memory, int, dict[str, float]]:
    """Everything at once; returns what the server says of itself when it is over."""
    account, memory, num_kills = Account(), Memory(), 0
    begun = time.monotonic()
    until = begun + 60 * options.minutes
    rng = random.Random(options.seed)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        callers = [Caller(session, url, account, options.seed + number) for number in range(options.streams)]
        tasks = [asyncio.ensure_future(caller.run(until)) for caller in callers]
        next_kill, last_kill = begun + options.kill_every, begun + KILLING * 60 * options.minutes
        with Progress(transient=True) as progress:
            bar = progress.add_task(f"{options.streams} callers", total=60 * options.minutes)
            while time.monotonic() < until:
                await asyncio.sleep(min(SAMPLE_S, max(0.01, until - time.monotonic())))
                now = time.monotonic()
                progress.update(bar, completed=now - begun)
                engine = memory.sample(now - begun, door)
                if engine is not None and next_kill <= now < last_kill:
                    with contextlib.suppress(psutil.Error):
                        engine.send_signal(signal.SIGKILL)
                        num_kills += 1
                    next_kill = now + options.kill_every * rng.uniform(0.7, 1.3)
        await asyncio.gather(*tasks)
        said = await _settled(session, url)
        async with session.post(f"{url}/v1/completions", json={"prompt": "Once", "max_tokens": 3}) as response:
            if response.status != 200:
                account.faults.append(f"the request after it all was answered with {response.status}")
    return account, memory, num_kills, said


async def _settled(session: aiohttp.ClientSession, url: str) -> dict[str, float]:
    """What /metrics says when nothing is open any more, or after a while."""
    said: dict[str, float] = {}
    for _ in range(50):
        async with session.get(f"{url}/metrics") as response:
            said = _sums(await response.text())
        if said.get("running", 1) == said.get("waiting", 1) == 0:
            break
        await asyncio.sleep(0.2)
    return said


def _sums(text: str) -> dict[str, float]:
    sums: defaultdict[str, float] = defaultdict(float)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            match sample.name:
                case "headway:requests_ended_total":
                    sums["ended"] += sample.value
                    sums[f"ended {sample.labels['kind']}"] += sample.value
                case "vllm:num_requests_running":
                    sums["running"] += sample.value
                case "vllm:num_requests_waiting":
                    sums["waiting"] += sample.value
                case "headway:pages":
                    sums[f"pages {sample.labels['state']}"] += sample.value
                case "headway:engine_restarts_total":
                    sums["restarts"] += sample.value
    return dict(sums)


def _start(log: IO[bytes]) -> tuple["subprocess.Popen[bytes]", str]:
    """`headway serve` on a free port, and where it is."""
    command = [sys.executable, "-m", "headway", "serve", "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log)
    assert server.stdout is not None
    for line in server.stdout:
        if b"http://" in line:
            url = line.split(b"http://")[1].split()[0].decode().rstrip("/")
            return server, f"http://{url}"
    raise ValueError("The server ended before it was ready: its own words are in the log above.")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--streams", type=int, default=200, help="callers at once")
    parser.add_argument(
        "--kill-every", type=float, default=40.0, help="seconds, about, between two kills of the engine"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryFile() as log:
        server, url = _start(log)
        try:
            account, memory, num_kills, said = asyncio.run(soak(url, psutil.Process(server.pid), options))
        finally:
            server.terminate()
            try:
                code = server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()
                code = -9
        log.seek(0)
        words = log.read().decode(errors="replace")
    faults = Counter(account.faults)
    if code != 0:
        faults[f"the server left with code {code}"] += 1
    if "Traceback" in words:
        faults["a traceback in the server's log"] += 1
    if any(said.get(name) for name in ("running", "waiting", "pages held", "pages parked")):
        faults[f"at the end something is held: {said}"] += 1
    report.write(
        "soak",
        "A soak",
        report.command(COMMAND, arguments),
        told(options, account, memory, num_kills, said, faults),
        options.folder,
    )
    return 1 if faults else 0


def told(
    options: argparse.Namespace,
    account: Account,
    memory: Memory,
    num_kills: int,
    said: dict[str, float],
    faults: Counter[str],
) -> str:
    """The page."""
    growths = {name: growth(series) for name, series in memory.series.items()}
    sizes = [
        [
            name,
            f"{series[-1][0] - series[0][0]:.0f}",
            f"{memory.resident[name][-1][1]:.0f}",
            f"{series[-1][1]:.0f}",
            *(
                "" if slope is None else f"{slope:+.2f}"
                for slope in (growths[name], growth(series, LATE), growth(memory.resident[name]))
            ),
        ]
        for name, series in memory.series.items()
    ]
    telling = [slope for name, slope in growths.items() if name == "door" or memory.is_long(name)]
    worst = max((slope for slope in telling if slope is not None), default=0.0)
    asked = ", ".join(f"{what} {n} times" for what, n in account.asked.most_common())
    endings = ", ".join(f"{name[6:]} {int(n)}" for name, n in sorted(said.items()) if name.startswith("ended "))
    parts = [
        f"{options.streams} callers at once for {options.minutes:g} minutes on the embedded model: six in ten stream "
        f"to the end, one waits for the whole answer, two leave on the way, one asks nonsense; half have a target. "
        f"Asked for were {asked}; vectors come whole, and nobody leaves before. The engine was killed {num_kills} "
        f"times, all in the first {KILLING:.0%} of the time.",
        report.table(["a call ended", "times"], account.endings.most_common()),
        f"{account.num_begun} calls were begun and {account.endings.total()} ended; the longest whole answer took "
        f"{max(account.whole_s, default=0.0):.1f} s. The server's account: {int(said.get('ended', 0))} requests ended "
        f"({endings}), {int(said.get('restarts', 0))} engines started after one died; at the end "
        f"{int(said.get('running', 0))} running, {int(said.get('waiting', 0))} waiting, "
        f"{int(said.get('pages held', 0) + said.get('pages parked', 0))} pages held.",
        report.table(
            [
                "process",
                "lived, s",
                "MiB at the end",
                "of its own",
                "its own, MiB a minute",
                f"after {LATE:.0%} of it",
                "all of it, MiB a minute",
            ],
            sizes,
        ),
        f"Growth at most {MOST_GROWTH:g} MiB a minute after the first {SETTLED:.0%} of a process's time, of the door "
        f"and of engines that lived for {LONG_S:g} s (the pool's pages, which have a limit, are not counted): "
        f"{'reached' if worst <= MOST_GROWTH else 'not reached'}, {worst:+.2f} at most.",
        "No fault was found."
        if not faults
        else f"{faults.total()} faults: " + "; ".join(f"{what} ({n})" for what, n in faults.most_common(20)) + ".",
    ]
    return "\n\n".join(parts)


if __name__ == "__main__":
    sys.exit(main())
