"""How soon the first token is there, and what an engine keeps in memory: `python -m headway.bench.start`.

Processes are started as a person would, with the embedded model, its files in the page cache and prices kept from an
earlier start: `headway generate`, and `headway serve` with one completion as soon as it is ready. Memory is that of a
process which has built an engine and drawn a token, against its weights and the pages of its pool.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.progress import track

from headway.bench import report

COMMAND = "python -m headway.bench.start"
MOST_S = 1.5  # to the first token
MOST_BYTES = 500 << 20  # beside weights and pool
PROMPT = "def fibonacci(n):"
PATIENCE_S = 120.0
MODELS = ("", "random:smollm2-135m", "random:qwen2.5-0.5b")
RESIDENT = """
import json, sys, psutil
from headway.llm import LLM, SamplingParams
llm = LLM(sys.argv[1] or None, max_model_len=2048, max_num_seqs=8)
llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2))
engine = llm._engine
size = engine.stage.model.dtype.itemsize
config = engine.facts
tied = engine.stage.model.config.tie_embeddings
head = engine.stage.matrices.head
print(json.dumps({"rss": psutil.Process().memory_info().rss, "weights": config.num_parameters * size,
                  "again": head.size[0] * head.size[1] * size if tied else 0, "pool": config.pool_bytes}))
"""


def first_letter_s(command: Sequence[str]) -> float:
    """From the command to its first letter."""
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        is_there = bool(process.stdout.read(1))
        taken_s = time.monotonic() - begun
    if not is_there:
        raise SystemExit(f"`{' '.join(command)}` ended without a letter: there is nothing to time.")
    return taken_s


def generated_s() -> float:
    return first_letter_s([sys.executable, "-m", "headway", "generate", PROMPT, "--max-tokens", "1"])


def imported_s() -> float:
    """Until torch is imported, which is what both of them begin with: how fast the machine starts programs today."""
    return first_letter_s([sys.executable, "-c", "import torch; print('.', flush=True)"])


def served_s() -> float:
    """From the command to the first token of a call that was made as soon as the server was ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "headway", "serve", "--port", str(port), "--log-level", "error"]
    begun = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                    break
                except (OSError, urllib.error.HTTPError):
                    if time.monotonic() - begun > PATIENCE_S or process.poll() is not None:
                        raise RuntimeError("The server was not ready: its own words are above.") from None
                    time.sleep(0.005)
            body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
            call = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", body)
            call.add_header("content-type", "application/json")
            urllib.request.urlopen(call, timeout=30).read()
            return time.monotonic() - begun
        finally:
            process.terminate()


def resident(model: str) -> dict[str, int]:
    """Bytes of a process with an engine that has drawn a token."""
    done = subprocess.run([sys.executable, "-c", RESIDENT, model], stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--runs", type=int, default=9, help="of each command; one more before them does not count")
    parser.add_argument("--models", nargs="*", default=MODELS, help="whose memory is measured; '' is the embedded one")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    ours: dict[str, Callable[[], float]] = {"headway generate": generated_s, "headway serve, and a call": served_s}
    ways = {**ours, "python, only to import torch": imported_s}
    with tempfile.TemporaryDirectory() as cache:
        os.environ["HEADWAY_CACHE_DIR"] = cache
        for way in ways.values():
            way()
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in track(range(options.runs), description="starts"):
            for name, way in ways.items():
                taken[name].append(way())
        medians = [statistics.median(taken[name]) for name in ours]
        rows = [
            [name, f"{statistics.median(each):.2f}", f"{min(each):.2f} … {max(each):.2f}"]
            for name, each in taken.items()
        ]
        sizes, others = [], []
        for model in track(options.models, description="memory"):
            found = resident(model)
            others.append(found["rss"] - found["weights"] - found["again"] - found["pool"])
            cells = (found["rss"], found["weights"], found["again"], found["pool"], others[-1])
            sizes.append([model or "embedded", *(f"{each / 2**20:.0f}" for each in cells)])
    header = ["model", "resident", "weights", "a tied head again", "pool", "all else"]
    in_time = "reached" if max(medians) <= MOST_S else "not reached"
    fits = "reached" if max(others, default=0) <= MOST_BYTES else "not reached"
    report.write(
        "start",
        "The first token, and memory",
        report.command(COMMAND, arguments),
        f"Embedded model, files in the page cache, prices kept; all in turn.\n\n"
        f"{report.table(['command', 'first token after, s', 'least … most'], rows)}\n\n"
        f"Within {MOST_S:g} s: {in_time}, {max(medians):.2f} at most (medians of {options.runs}).\n\n"
        f"Memory in MiB, contexts of 2048 tokens and 8 requests; pages of the pool that were never touched are not "
        f"resident, so all else may be below zero.\n\n{report.table(header, sizes)}\n\n"
        f"All else at most {MOST_BYTES >> 20} MiB: {fits}, {max(others, default=0) / 2**20:.0f}.",
        options.folder,
    )


if __name__ == "__main__":
    main()
