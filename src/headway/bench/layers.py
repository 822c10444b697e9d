"""What it gains to run a layer of few rows in one call: `python -m headway.bench.layers`.

Steps of the real stage, tokens behind contexts and short prompts, with whole layers and operator by operator, in turn.
Both must come to the same bits before either is timed. A case whose layers take longer than a tile may is left out.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.calm import Calm
from headway.bench.exactness import RecordingSampler
from headway.bench.kernels import PAGE_TOKENS, Case
from headway.config import EngineSettings
from headway.core.request import Request, Sampling
from headway.core.work import Segment, Work
from headway.placement.engine import Engine, build_engine

COMMAND = "python -m headway.bench.layers"
MODELS: tuple[str | None, ...] = ("random:smollm2-135m", "random:qwen2.5-0.5b")
CASES = (*(Case(num, 1, 512) for num in (1, 4, 8, 16)), Case(1, 32), Case(1, 128))


class Timed(NamedTuple):
    """Seconds of a step, pair by pair."""

    whole_s: list[float]
    cut_s: list[float]

    @property
    def gains(self) -> list[float]:
        return [cut_s / whole_s for whole_s, cut_s in zip(self.whole_s, self.cut_s, strict=True)]

    @property
    def told(self) -> str:
        whole, cut = (f"{1e3 * statistics.median(each):.2f}" for each in self)
        gains = sorted(self.gains)
        spread = f"{gains[len(gains) // 4]:.2f} … {gains[-len(gains) // 4]:.2f}"
        return f"{cut} / {whole} = {statistics.median(gains):.2f} ({spread})"


class Steps:
    """Of one engine, by hand."""

    def __init__(self, engine: Engine) -> None:
        self.stage = engine.stage
        self.sampler = self.stage.sampler = RecordingSampler(self.stage.model.config.vocab_size)
        self._layers = self.stage.layers
        self._num_works = 0

    def seconds(self, case: Case, *, whole: bool) -> float:
        self._num_works += 1
        self.stage.layers = self._layers if whole else None
        self.sampler.logits.clear()
        work = Work(self._num_works, "language", self._open(case))
        begun = time.perf_counter()
        for _ in self.stage.run(work):
            pass
        return time.perf_counter() - begun

    def is_whole(self, case: Case) -> bool:
        """Whether such a step's layers are short enough."""
        self._num_works += 1
        self.stage.layers = self._layers
        tiles = list(self.stage.run(Work(self._num_works, "language", self._open(case))))
        return any(tile.operator == "layer" for tile in tiles)

    def check(self, case: Case) -> None:
        """Raises RuntimeError if the two ways differ in a bit."""
        found = []
        for whole in (True, False):
            self.seconds(case, whole=whole)
            found.append([row for rows in self.sampler.logits.values() for row in rows])
        if not all(torch.equal(*pair) for pair in zip(*found, strict=True)):
            raise RuntimeError("A whole layer and its operators differ: run `make test-native`.")

    def _open(self, case: Case) -> tuple[Segment, ...]:
        segments = []
        for number in range(case.num_requests):
            name, pages = f"r{number}", range(number * case.pages_each, (number + 1) * case.pages_each)
            tokens = tuple(5 + (number + place) % 100 for place in range(case.num_tokens))
            prompt = (1,) * case.context + tokens
            self.stage.open(Request(name, prompt, 100, 0.0, sampling=Sampling(temperature=0.0)))
            at = (case.num_tokens - 1,)
            segments.append(Segment(name, tokens, case.context, case.context, tuple(pages), at))
        return tuple(segments)


def measure(engine: Engine, num_pairs: int, calm: Calm) -> dict[Case, Timed]:
    """Of each case whose layers are whole."""
    steps, found = Steps(engine), {}
    for case in track(CASES, description=engine.facts.model_name):
        if not steps.is_whole(case):
            continue
        steps.check(case)
        timed = Timed([], [])
        for number in range(num_pairs):
            ways = [(True, timed.whole_s), (False, timed.cut_s)]
            for whole, taken in ways[:: 1 if number % 2 == 0 else -1]:
                taken.append(calm.measure(partial(steps.seconds, case, whole=whole)))
        found[case] = timed
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--pairs", type=int, default=40, help="measurements of each case")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    calm = Calm()
    columns: dict[str, dict[Case, Timed]] = {}
    means = ""
    with torch.inference_mode():
        for model in options.models:
            for quantization in ("none", "int8"):
                settings = EngineSettings(
                    model=model, quantization=quantization, max_model_len=1024, enable_prefix_caching=False
                )
                engine = build_engine(settings)
                assert engine.facts.page_tokens == PAGE_TOKENS
                if engine.stage.layers is None:
                    raise SystemExit("Here operators are not the compiled ones: there is nothing to compare.")
                name = engine.facts.model_name + (", int8" if quantization == "int8" else "")
                columns[name] = measure(engine, options.pairs, calm)
                means = engine.facts.operators
                engine.pool.close()
    cases = [case for case in CASES if any(case in found for found in columns.values())]
    rows = [[str(case), *(found[case].told if case in found else "" for found in columns.values())] for case in cases]
    body = (
        f"Milliseconds of a step, its operators {means}: one by one / whole layers = gain (its middle half), medians "
        f"of {options.pairs} pairs.\n\n{report.table(['step', *columns], rows)}\n\n"
        f"{calm.num_discarded} disturbed measurements were thrown away, {calm.num_kept_disturbed} stayed disturbed. "
        f"Empty: a layer of it takes longer than a tile may, and is cut."
    )
    title = "Layers of few rows, in one call"
    report.write("layers", title, report.command(COMMAND, arguments), body, options.folder)


if __name__ == "__main__":
    main()
