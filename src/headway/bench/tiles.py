"""How long a tile is, and what cutting costs: `python -m headway.bench.tiles`.

Prompts of 16 … 8192 tokens on a real shape with random weights, tokens of sixteen requests at once, and a chunk behind
a long context. Every tile of every step is timed. Beside it the same step is run with operators uncut (one yield per
operator; attention is still computed in blocks, for memory's sake), in turn with the cut one: the ratio of the two is
the price of the bound. Few rows go layer by layer where operators are cut, which is faster than one by one.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.calm import Calm
from headway.config import EngineSettings
from headway.core.request import Request, Sampling
from headway.core.work import Segment, Work
from headway.placement.engine import Engine, build_engine
from headway.stages.language import LanguageStage
from headway.stages.stage import Running
from headway.stages.tiling import Rates, Tiling

UNCUT = Rates(1e30, 1e30, 1e30, 1e30, 1e30, 1e30, 1e30)


class Case(NamedTuple):
    """`num_requests` requests, each with `num_tokens` new tokens behind `context` that stand in pages already."""

    num_tokens: int
    context: int = 0
    num_requests: int = 1

    def __str__(self) -> str:
        if not self.context:
            return f"a prompt of {self.num_tokens}"
        what = f"a chunk of {self.num_tokens}" if self.num_tokens > 1 else f"{self.num_requests} × one token"
        return f"{what} behind {self.context}"


PROMPTS = tuple(Case(length) for length in (16, 64, 256, 1024, 2048, 4096, 8192))
OTHERS = (Case(1, 512, 16), Case(1, 4096, 16), Case(64, 8192))


class Timed(NamedTuple):
    """Seconds of a whole step and of each of its tiles."""

    whole_s: float
    tiles_s: list[float]


class Measured(NamedTuple):
    """The undisturbed cut steps of one case, and cut over uncut of each pair."""

    steps: list[Timed]
    ratios: list[float]


def timed(running: Running) -> Timed:
    """Run a step, and look at the clock at every yield and at the end."""
    tiles = []
    begun = last = time.perf_counter()
    for _ in running:
        now = time.perf_counter()
        tiles.append(now - last)
        last = now
    end = time.perf_counter()
    tiles.append(end - last)
    return Timed(end - begun, tiles)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def measure(engine: Engine, case: Case, num_pairs: int, calm: Calm) -> Measured:
    """Cut and uncut steps of one case in turn, A B B A …"""
    cut = engine.stage
    uncut = LanguageStage(cut.model, cut.pool, Tiling(UNCUT, 1.0), cut.sampler, cut.matrices)
    uncut.layers = None  # operators, whole: of few rows the other runs whole layers
    work = work_of(engine, case)
    for segment in work.segments:
        prompt = (1,) * (case.context + case.num_tokens)
        cut.open(Request(segment.request_id, prompt, 1, 0.0, sampling=Sampling(temperature=0.0)))
    steps: list[Timed] = []

    def run_cut() -> float:
        steps.append(timed(cut.run(work)))
        return steps[-1].whole_s

    def run_uncut() -> float:
        return timed(uncut.run(work)).whole_s

    undisturbed, ratios = [], []
    timed(cut.run(work))  # warm
    for number in range(num_pairs):
        if number % 2 == 0:
            cut_s = calm.measure(run_cut)
            undisturbed.append(steps[-1])
            uncut_s = calm.measure(run_uncut)
        else:
            uncut_s = calm.measure(run_uncut)
            cut_s = calm.measure(run_cut)
            undisturbed.append(steps[-1])
        ratios.append(cut_s / uncut_s)
    for segment in work.segments:
        cut.close(segment.request_id)
    return Measured(undisturbed, ratios)


def work_of(engine: Engine, case: Case) -> Work:
    """Requests on pages of their own, in no order. What stands in the pages does not matter to time."""
    pool, vocabulary = engine.pool.shape, engine.stage.model.config.vocab_size
    pages_each = -(-(case.context + case.num_tokens) // pool.page_tokens)
    assert case.num_requests * pages_each <= pool.num_pages, "the pool is too small for this case"
    shuffled = torch.randperm(pool.num_pages, generator=torch.Generator().manual_seed(0)).tolist()
    tokens = tuple((7 * place) % vocabulary for place in range(case.num_tokens))
    segments = [
        Segment(
            request_id=f"bench{number}",
            tokens=tokens,
            first_position=case.context,
            context_tokens=case.context,
            pages=tuple(shuffled[number * pages_each : (number + 1) * pages_each]),
            logits_at=(case.num_tokens - 1,),
        )
        for number in range(case.num_requests)
    ]
    return Work(1, "language", tuple(segments))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:qwen2.5-0.5b")
    parser.add_argument("--max-tile-ms", type=float, default=10.0)
    parser.add_argument("--longest", type=int, default=8192, help="skip cases with longer prompts or contexts")
    parser.add_argument("--pairs", type=int, default=5, help="of cut and uncut runs, for prompts up to 1024 tokens")
    arguments = parser.parse_args()
    engine = build_engine(
        EngineSettings(
            model=arguments.model, max_num_seqs=3, max_tile_ms=arguments.max_tile_ms
        )  # three contexts' pages
    )
    engine.pool.fault_in(engine.pool.shape.pool_bytes)
    limit_s = 1.5 * arguments.max_tile_ms / 1e3
    cases = [case for case in (*PROMPTS, *OTHERS) if max(case.num_tokens, case.context) <= arguments.longest]
    rows, every_tile, late = [], [], []
    with torch.inference_mode():
        calm = Calm()
        for case in track(cases, description="cases"):
            num_pairs = max(2, min(arguments.pairs, arguments.pairs * 1024 // max(case.num_tokens, 1)))
            steps, ratios = measure(engine, case, num_pairs, calm)
            tiles = [tile for step in steps for tile in step.tiles_s]
            every_tile += tiles
            if quantile(tiles, 0.999) > limit_s:
                late.append(str(case))
            rows.append(
                [
                    case,
                    len(steps[0].tiles_s),
                    f"{statistics.median(step.whole_s for step in steps) * 1e3:.0f}",
                    *(f"{quantile(tiles, share) * 1e3:.1f}" for share in (0.5, 0.99, 0.999)),
                    f"{max(tiles) * 1e3:.1f}",
                    f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})",
                ]
            )
    header = ["tokens", "tiles", "step ms", "tile p50 ms", "p99 ms", "p99.9 ms", "longest ms", "cut / uncut (range)"]
    kept = sum(tile <= limit_s for tile in every_tile) / len(every_tile)
    verdict = (
        f"The limit is 1.5 × B = {limit_s * 1e3:g} ms; {100 * kept:.3f} % of {len(every_tile)} tiles keep it, and "
        + (f"p99.9 does not for {', '.join(late)}" if late else "p99.9 does in every case")
        + f". All tiles together: p99.9 {quantile(every_tile, 0.999) * 1e3:.1f} ms. {calm.verdict()}"
    )
    facts = engine.facts
    report.write(
        "tiles",
        "Longest tile, and the price of cutting",
        report.command("python -m headway.bench.tiles", None),
        f"{arguments.model}, {facts.means}, B = {arguments.max_tile_ms:g} ms.\n\n"
        f"{report.table(header, rows)}\n\n{verdict}",
    )


if __name__ == "__main__":
    main()
