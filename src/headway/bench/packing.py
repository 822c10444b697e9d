"""What reading prompts together is worth: `python -m headway.bench.packing`.

A batch of prompts of real lengths is read padded to the longest (every row computed at that length, with the same
kernels), padded in sub-batches of eight after sorting by length, one by one, as one pack, and as the scheduler packs
them, up to the count at which a device is saturated. Uniform lengths beside it, where there is nothing to gain.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.progress import track

from headway.bench import report
from headway.bench.calm import Calm
from headway.bench.load import Load
from headway.bench.named import named
from headway.config import EngineSettings
from headway.core.cost import CostModel, Share
from headway.core.packing import pack
from headway.core.request import Request, Sampling
from headway.core.work import Segment, Work
from headway.placement.engine import Engine, build_engine
from headway.placement.memory import keep_freed_memory

SUB_BATCH = 8
FAR = 1e9  # slack enough for anything


def seconds(engine: Engine, steps: Sequence[Sequence[int]]) -> float:
    """Run steps of fresh prompts of these lengths, one step after the other."""
    stage, page_tokens = engine.stage, engine.pool.shape.page_tokens
    begun = time.perf_counter()
    for number, lengths in enumerate(steps):
        segments, first_page = [], 0
        for index, length in enumerate(lengths):
            num_pages = -(-length // page_tokens)
            tokens = tuple((7 * index + place) % stage.model.config.vocab_size for place in range(length))
            pages = tuple(range(first_page, first_page + num_pages))
            segments.append(Segment(f"{number}.{index}", tokens, 0, 0, pages, (length - 1,)))
            first_page += num_pages
            stage.open(Request(segments[-1].request_id, tokens, 1, 0.0, sampling=Sampling(temperature=0.0)))
        for _ in stage.run(Work(number, "language", tuple(segments))):
            pass
        for segment in segments:
            stage.close(segment.request_id)
    return time.perf_counter() - begun


def packed(lengths: Sequence[int], cost: CostModel, pack_tokens: int) -> list[list[int]]:
    """As the scheduler would with time enough: the first ones in order, as many as pay."""
    steps, rest = [], list(lengths)
    while rest:
        count = pack([Share(n, 0) for n in rest[:16]], [FAR] * min(16, len(rest)), cost.predict, pack_tokens)
        steps.append(rest[:count])
        rest = rest[count:]
    return steps


def ways(lengths: Sequence[int], cost: CostModel, pack_tokens: int) -> dict[str, list[list[int]]]:
    """Each way to read these prompts, as steps of lengths."""
    ordered = sorted(lengths)
    parts = [ordered[start : start + SUB_BATCH] for start in range(0, len(ordered), SUB_BATCH)]
    return {
        "padded": [[max(lengths)] * len(lengths)],
        "sorted, padded": [[max(part)] * len(part) for part in parts],
        "one by one": [[length] for length in lengths],
        "one pack": [list(lengths)],
        "packed": packed(lengths, cost, pack_tokens),
    }


def case(engine: Engine, lengths: Sequence[int], num_rounds: int, calm: Calm) -> dict[str, list[float]]:
    """Seconds of each way, round by round, in turn forwards and backwards."""
    steps = ways(lengths, CostModel(engine.scheduler.cost.fit), engine.scheduler.settings.pack_tokens)
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(num_rounds):
        for name in list(steps)[:: 1 if number % 2 == 0 else -1]:
            taken[name].append(calm.measure(lambda name=name: seconds(engine, steps[name])))  # type: ignore[misc]
    return taken


def decision_s(engine: Engine, lengths: Sequence[int]) -> float:
    cost, pack_tokens = CostModel(engine.scheduler.cost.fit), engine.scheduler.settings.pack_tokens
    begun = time.perf_counter()
    for _ in range(100):
        packed(lengths, cost, pack_tokens)
    return (time.perf_counter() - begun) / 100


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m headway.bench.packing", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length-scale", type=float, default=1 / 16)
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    engine = build_engine(EngineSettings(model=options.model, max_model_len=2048, enable_prefix_caching=False))
    calm = Calm()
    rows, reached = [], []
    loads: dict[str, Callable[[int], list[int]]] = {
        "qwen": lambda n: _lengths(named("qwen", num_requests=n, seed=2), options.length_scale),
        "azure-conv": lambda n: _lengths(named("azure-conv", num_requests=n, seed=2), options.length_scale),
        "uniform 64": lambda n: [64] * n,
    }
    with torch.inference_mode():
        for name, size in track([(name, size) for name in loads for size in options.batches], description="batches"):
            lengths = loads[name](size)
            taken = case(engine, lengths, options.rounds, calm)
            rows.append(_row(engine, name, lengths, taken))
            if size == 16:
                reached.append(_verdict(name, taken))
    header = ["lengths", "batch", "tokens", "padded tokens", "packs", "padded / packed", "sorted, padded / packed",
              "one by one / packed", "one pack / packed", "deciding, share"]  # fmt: skip
    body = (
        f"{options.model}, {engine.facts.dtype}, {engine.facts.num_threads} threads; packs of up to "
        f"{engine.scheduler.settings.pack_tokens} tokens. Medians of {options.rounds} rounds (least … most).\n\n"
        f"{report.table(header, rows)}\n\nAt batch 16: {'; '.join(reached)}. A pack computes no padding at all. "
        f"{calm.verdict()}"
    )
    report.write("packing", "Packing", "python -m headway.bench.packing", body, options.folder)


def _lengths(load: Load, scale: float) -> list[int]:
    lengths = [asked.num_prompt for asked in load.scaled(scale).within(2048).requests]
    random.Random(0).shuffle(lengths)
    return lengths


def _ratio(taken: dict[str, list[float]], name: str) -> list[float]:
    return [a / b for a, b in zip(taken[name], taken["packed"], strict=True)]


def _row(engine: Engine, name: str, lengths: Sequence[int], taken: dict[str, list[float]]) -> list[object]:
    cost, pack_tokens = CostModel(engine.scheduler.cost.fit), engine.scheduler.settings.pack_tokens
    cells = []
    for way in ("padded", "sorted, padded", "one by one", "one pack"):
        found = _ratio(taken, way)
        cells.append(f"{statistics.median(found):.2f} ({min(found):.2f} … {max(found):.2f})")
    share = decision_s(engine, lengths) / statistics.median(taken["packed"])
    num_packs = len(packed(lengths, cost, pack_tokens))
    return [name, len(lengths), sum(lengths), max(lengths) * len(lengths), num_packs, *cells, f"{share:.3%}"]


def _verdict(name: str, taken: dict[str, list[float]]) -> str:
    padded, single = (statistics.median(_ratio(taken, way)) for way in ("padded", "one by one"))
    least = "" if name.startswith("uniform") else f" (1.9 wanted: {'reached' if padded >= 1.9 else 'not reached'})"
    return f"{name} {padded:.2f} × padded{least}, {single:.2f} × one by one"


if __name__ == "__main__":
    main()
