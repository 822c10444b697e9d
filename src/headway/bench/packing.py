"""What reading prompts together is worth: `python -m headway.bench.packing`.

A batch of prompts of real lengths is read padded to the longest (every row computed at that length, with the same
kernels), padded in sub-batches of eight after sorting by length, one by one, as one pack, and as the scheduler packs
them, up to the count at which a device is saturated. Uniform lengths beside it, where there is nothing to gain.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from rich.progress import track

from headway.bench import packing_memory, report
from headway.bench.calm import Calm
from headway.bench.packing_ways import SCHEDULED, UNIFORM, WAYS, Batch, Taken, draw, packed, populations, take
from headway.config import EngineSettings
from headway.placement.engine import Engine, build_engine

COMMAND = "python -m headway.bench.packing"
JUDGED_BATCH = 16
WANTED = 1.9  # times faster than padded, at JUDGED_BATCH and real lengths
LEAST = 0.98  # times as fast as one by one, always
EVEN = 0.1  # how far from 1 padded over scheduled may be where all lengths are equal


def packing_s(engine: Engine, lengths: Sequence[int]) -> float:
    """Seconds of deciding what goes together, for the whole batch."""
    begun = time.perf_counter()
    for _ in range(20):
        packed(engine, lengths)
    return (time.perf_counter() - begun) / 20


@dataclass
class Case:
    """One load at one batch size: each round read another draw, every way."""

    load: str
    size: int
    batches: list[Batch] = field(default_factory=list)
    taken: dict[str, list[Taken]] = field(default_factory=lambda: {way: [] for way in WAYS})

    def ratios(self, way: str) -> list[float]:
        """Its seconds over the scheduler's, round by round."""
        return [a.seconds / b.seconds for a, b in zip(self.taken[way], self.taken[SCHEDULED], strict=True)]

    def ratio(self, way: str) -> float:
        return statistics.median(self.ratios(way))

    @property
    def num_alike(self) -> int:
        """Prompts whose first token was the same one by one and as the scheduler packed them."""
        pairs = zip(self.taken["one by one"], self.taken[SCHEDULED], strict=True)
        return sum(one.tokens[key] == both.tokens[key] for one, both in pairs for key in one.tokens)

    def computed(self, way: str) -> float:
        """Tokens of a batch, padding included."""
        return statistics.median(sum(m.num_computed for s in batch.steps(way) for m in s) for batch in self.batches)

    def read_round(self, engine: Engine, batch: Batch, calm: Calm) -> None:
        forwards = len(self.batches) % 2 == 0
        self.batches.append(batch)
        for way in WAYS if forwards else WAYS[::-1]:
            found: list[Taken] = []

            def once(way: str = way, found: list[Taken] = found) -> float:
                found.append(take(engine, batch, way))
                return found[-1].seconds

            calm.measure(once)
            self.taken[way].append(found[-1])


def measure(engine: Engine, options: argparse.Namespace, calm: Calm) -> list[Case]:
    vocab_size = engine.stage.model.config.vocab_size
    lengths = populations(options.mean_tokens, options.longest)
    cases = [Case(load, size) for load in lengths for size in options.batches]
    for case in cases[: len(options.batches)]:  # memory that is touched for the first time is slow
        take(engine, draw(lengths[case.load], case.size, vocab_size, 0), "one pack")
    for number in track(range(options.rounds), description="rounds"):
        for case in cases:
            case.read_round(engine, draw(lengths[case.load], case.size, vocab_size, number), calm)
    return cases


# The page


def rows(engine: Engine, cases: Sequence[Case]) -> list[list[str]]:
    made = []
    for case in cases:
        packing = [packing_s(engine, batch.lengths) for batch in case.batches]
        share = statistics.median(s / t.seconds for s, t in zip(packing, case.taken[SCHEDULED], strict=True))
        deciding = statistics.median(taken.deciding for taken in case.taken[SCHEDULED])
        made.append(
            [
                case.load,
                str(case.size),
                *(f"{case.computed(way):.0f}" for way in ("one pack", "sorted, padded", "padded")),
                f"{1e3 * statistics.median(taken.seconds for taken in case.taken[SCHEDULED]):.0f}",
                *(_spread(case.ratios(way)) for way in WAYS if way != SCHEDULED),
                f"{share:.2%} / {deciding:.2%}",
            ]
        )
    return made


def _spread(ratios: Sequence[float]) -> str:
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})"


def reading(cases: Sequence[Case]) -> str:
    """What was wanted, and whether it was reached."""
    real = [case for case in cases if case.load != UNIFORM and case.size == JUDGED_BATCH]
    said = []
    if real:
        found = [f"{_said(case.ratio('padded') >= WANTED)} on {case.load}, {case.ratio('padded'):.2f}" for case in real]
        said.append(f"scheduled {WANTED:g} times as fast as padded at batch {JUDGED_BATCH}: {', '.join(found)}")
    even = [case.ratio("padded") for case in cases if case.load == UNIFORM]
    said.append(
        f"on uniform lengths about as fast: {_said(max(abs(ratio - 1) for ratio in even) <= EVEN)}, "
        f"{min(even):.2f} … {max(even):.2f}"
    )
    slowest = min(cases, key=lambda case: case.ratio("one by one"))
    said.append(
        f"never less than {LEAST:g} times as fast as one by one: {_said(slowest.ratio('one by one') >= LEAST)}, least "
        f"{slowest.ratio('one by one'):.2f} on {slowest.load} at batch {slowest.size}"
    )
    return f"Wanted: {'; '.join(said)}."


def _said(reached: bool) -> str:
    return "reached" if reached else "not reached"


def alike(cases: Sequence[Case]) -> str:
    return f"{sum(case.num_alike for case in cases)} of {sum(case.size * len(case.batches) for case in cases)}"


def in_float32(options: argparse.Namespace) -> str:
    """The first tokens of a batch of each load, one by one and as the scheduler packs them."""
    engine = _engine(options, JUDGED_BATCH, "float32")
    vocab_size, found = engine.stage.model.config.vocab_size, []
    for load, lengths in populations(options.mean_tokens, options.longest).items():
        case = Case(load, JUDGED_BATCH, [draw(lengths, JUDGED_BATCH, vocab_size, 0)])
        for way in ("one by one", SCHEDULED):
            case.taken[way].append(take(engine, case.batches[0], way))
        found.append(case)
    return alike(found)


def _engine(options: argparse.Namespace, most: int, dtype: Literal["auto", "float32"] = "auto") -> Engine:
    length = options.longest + 1
    engine = build_engine(
        EngineSettings(
            model=options.model, dtype=dtype, max_model_len=length, max_num_seqs=most, enable_prefix_caching=False
        )
    )
    engine.pool.fault_in(engine.pool.shape.pool_bytes)
    return engine


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--rounds", type=int, default=5, help="of everything; each reads other draws")
    parser.add_argument("--mean-tokens", type=int, default=64, help="of a prompt, on each of the loads")
    parser.add_argument("--longest", type=int, default=1023, help="tokens; longer prompts are cut")
    parser.add_argument("--quick", action="store_true", help="two rounds of two small batches of short prompts")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    if options.quick:
        options.batches, options.rounds, options.mean_tokens, options.longest = [4, 16], 2, 12, 63
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    engine = _engine(options, max(options.batches))
    calm = Calm()
    with torch.inference_mode():
        cases = measure(engine, options, calm)
        same = in_float32(options)
        memory = packing_memory.section(engine, options.mean_tokens, options.longest, max(options.batches))
    facts = engine.facts
    header = ["lengths", "batch", "tokens", "sorted, padded", "padded", "scheduled ms",
              *(f"{way} / scheduled" for way in WAYS if way != SCHEDULED), "`pack` / all deciding"]  # fmt: skip
    body = (
        f"{options.model}, {facts.means}; packs of up to {facts.pack_tokens} tokens. Real "
        f"lengths are scaled to a mean of {options.mean_tokens} and cut at {options.longest}; uniform ones are all "
        f"{options.mean_tokens}. Medians of {options.rounds} rounds (least … most), each of which read another draw in "
        f"every way, every other one backwards. The last column is the time in which is decided, of the scheduled time."
        f"\n\n{report.table(header, rows(engine, cases))}\n\n{reading(cases)} The first token was the same one by one "
        f"and as scheduled for {same} prompts in float32, for {alike(cases)} in {facts.dtype}, where sums over other "
        f"numbers of rows round otherwise. {calm.verdict()}\n\n{memory}"
    )
    report.write("packing", "Packing", report.command(COMMAND, arguments), body, options.folder)


if __name__ == "__main__":
    main()
