"""How long a tile is, and what cutting costs: `python -m headway.bench.tiles`.

Prompts of 16 … 8192 tokens on a real shape with random weights. Every tile of every step is timed. Beside it the same
step is run with operators uncut (one yield per operator; attention is still computed in blocks, for memory's sake),
in turn with the cut one, and the ratio of the two is the price of the bound.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.calm import Calm
from headway.config import EngineSettings
from headway.core.request import Request, Sampling
from headway.core.work import Segment, Work
from headway.placement.calibrate import measure_rates
from headway.placement.engine import build_engine
from headway.stages.language import LanguageStage
from headway.stages.stage import Running
from headway.stages.tiling import Rates, Tiling

LENGTHS = (16, 64, 256, 1024, 2048, 4096, 8192)
UNCUT = Rates(1e30, 1e30, 1e30, 1e30, 1e30)


class Timed(NamedTuple):
    """Seconds of a whole step and of each of its tiles."""

    whole_s: float
    tiles_s: list[float]


def timed(running: Running) -> Timed:
    """Run a step, and look at the clock at every yield."""
    tiles = []
    begun = last = time.perf_counter()
    for _ in running:
        now = time.perf_counter()
        tiles.append(now - last)
        last = now
    return Timed(last - begun, tiles)


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="random:qwen2.5-0.5b")
    parser.add_argument("--max-tile-ms", type=float, default=10.0)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--pairs", type=int, default=5, help="of cut and uncut runs for prompts up to 1024 tokens")
    arguments = parser.parse_args()
    longest = max(arguments.lengths)
    settings = EngineSettings(
        model=arguments.model, max_model_len=longest + 1, max_num_seqs=1, max_tile_ms=arguments.max_tile_ms
    )
    engine = build_engine(settings)
    engine.pool.fault_in(engine.pool.shape.pool_bytes)
    bound_s = arguments.max_tile_ms / 1e3
    rows, every_tile = [], []
    with torch.inference_mode():
        calm = Calm()
        cut = LanguageStage(
            engine.stage.model, engine.pool, Tiling(measure_rates(engine.stage.model, engine.pool), bound_s),
            engine.stage.sampler,
        )  # fmt: skip
        uncut = LanguageStage(engine.stage.model, engine.pool, Tiling(UNCUT, bound_s), engine.stage.sampler)
        for length in track(arguments.lengths, description="prompts"):
            pairs = max(2, arguments.pairs if length <= 1024 else arguments.pairs * 1024 // length)
            cuts, ratios = _pairs(cut, uncut, length, pairs, calm)
            tiles = [tile for step in cuts for tile in step.tiles_s]
            every_tile += tiles
            rows.append(
                [
                    length,
                    len(cuts[0].tiles_s),
                    f"{statistics.median(step.whole_s for step in cuts) * 1e3:.0f}",
                    *(f"{quantile(tiles, share) * 1e3:.1f}" for share in (0.5, 0.99, 0.999)),
                    f"{max(tiles) * 1e3:.1f}",
                    f"{statistics.median(ratios):.3f} ({min(ratios):.3f} … {max(ratios):.3f})",
                ]
            )
    header = ["prompt tokens", "tiles", "step ms", "tile p50 ms", "p99 ms", "p99.9 ms", "longest ms",
              "cut / uncut, median (range)"]  # fmt: skip
    share = sum(tile <= 1.5 * bound_s for tile in every_tile) / len(every_tile)
    verdict = (
        f"All lengths together: p99.9 of a tile is {quantile(every_tile, 0.999) * 1e3:.1f} ms against a limit of "
        f"{1.5 * bound_s * 1e3:.0f} ms (1.5 × B, B = {bound_s * 1e3:g} ms); {100 * share:.3f} % of "
        f"{len(every_tile)} tiles keep it. {calm.verdict()}"
    )
    facts = engine.facts
    report.write(
        "tiles",
        "Longest tile, and the price of cutting",
        "python -m headway.bench.tiles",
        f"{arguments.model}, {facts.dtype}, {facts.num_threads} threads.\n\n{report.table(header, rows)}\n\n{verdict}",
    )


def _pairs(
    cut: LanguageStage, uncut: LanguageStage, length: int, pairs: int, calm: Calm
) -> tuple[list[Timed], list[float]]:
    """Cut and uncut steps of one prompt in turn, A B B A …: the cut ones, and the ratios of each pair."""
    tokens = tuple((7 * place) % cut.model.config.vocab_size for place in range(length))
    pages = tuple(range(-(-length // cut.pool.shape.page_tokens)))
    segment = Segment("bench", tokens, 0, 0, pages, (length - 1,))
    cut.open(Request("bench", tokens, 1, 0.0, sampling=replace(Sampling(), temperature=0.0)))
    work = Work(1, "language", (segment,))
    cuts: list[Timed] = []

    def run_cut() -> float:
        cuts_now.append(timed(cut.run(work)))
        return cuts_now[-1].whole_s

    def measure_cut() -> float:
        return calm.measure(run_cut)

    def measure_uncut() -> float:
        return calm.measure(lambda: timed(uncut.run(work)).whole_s)

    ratios = []
    timed(cut.run(work))  # warm
    for number in range(pairs):
        cuts_now: list[Timed] = []
        if number % 2 == 0:
            cut_s, uncut_s = measure_cut(), measure_uncut()
        else:
            uncut_s, cut_s = measure_uncut(), measure_cut()
        ratios.append(cut_s / uncut_s)
        cuts.append(cuts_now[-1])  # the undisturbed one
    cut.close("bench")
    return cuts, ratios


if __name__ == "__main__":
    main()
