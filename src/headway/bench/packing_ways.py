"""Ways to read a batch of prompts: padded, sorted and padded, one by one, all at once, as the scheduler packs them; and
the batches, of real lengths, that are read in all of them."""

import os
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from headway.bench import traces
from headway.bench.load import Load, lone_prompt
from headway.bench.named import named
from headway.bench.replay import replay
from headway.core.cost import CostModel, Share
from headway.core.packing import MAX_MEMBERS, pack
from headway.core.request import Request, Sampling
from headway.core.work import Outcome, Segment, Work
from headway.placement.engine import Engine
from headway.stages.stage import Running

SUB_BATCH = 8
FAR_S = 1e9  # slack enough for anything
POPULATION = 2000  # requests of a load, of which batches are drawn
SHAREGPT = "lengths_sharegpt_8k.csv.gz"
UNIFORM = "uniform"
SCHEDULED = "scheduled"
WAYS = ("padded", "sorted, padded", "one by one", "one pack", SCHEDULED)
GREEDY = Sampling(temperature=0.0)


class Member(NamedTuple):
    """One prompt in a step: its number in the batch, and how many tokens are computed for it, padding included."""

    number: int
    num_computed: int


Step = list[Member]


class Batch(NamedTuple):
    """Prompts that are there at once."""

    prompts: list[tuple[int, ...]]

    @property
    def lengths(self) -> list[int]:
        return [len(prompt) for prompt in self.prompts]

    def steps(self, way: str) -> list[Step]:
        """How a way reads them. What the scheduler would make of it is the scheduler's to say."""
        whole = [Member(number, length) for number, length in enumerate(self.lengths)]
        if way == "padded":
            return [_padded(whole)]
        if way == "sorted, padded":
            ordered = sorted(whole, key=lambda member: member.num_computed)
            return [_padded(ordered[start : start + SUB_BATCH]) for start in range(0, len(ordered), SUB_BATCH)]
        return [[member] for member in whole] if way == "one by one" else [whole]


def _padded(members: Sequence[Member]) -> Step:
    longest = max(member.num_computed for member in members)
    return [member._replace(num_computed=longest) for member in members]


class Taken(NamedTuple):
    """Seconds of a batch, the first token of each prompt, and the share of the time in which was decided."""

    seconds: float
    tokens: dict[str, int]
    deciding: float = 0.0


def take(engine: Engine, batch: Batch, way: str) -> Taken:
    """Read a batch one way."""
    if way == SCHEDULED:
        requests = [Request(str(n), prompt, 1, 0.0, sampling=GREEDY) for n, prompt in enumerate(batch.prompts)]
        settings = replace(engine.scheduler.settings, refuse_unattainable=False, prefix_caching=False)
        run = replay(engine, requests, settings)
        begun = min(record.first_scheduled or 0.0 for record in run.records.values())
        seconds = run.ended - begun
        return Taken(seconds, run.tokens, sum(run.decisions_s) / seconds)
    works = [_work(engine, batch, number, step) for number, step in enumerate(batch.steps(way))]
    for index, prompt in enumerate(batch.prompts):
        engine.stage.open(Request(str(index), prompt, 1, 0.0, sampling=GREEDY))
    tokens: dict[str, int] = {}
    begun = time.perf_counter()
    for work in works:
        tokens |= {commit.request_id: commit.tokens[0] for commit in _finished(engine.stage.run(work)).commits}
    seconds = time.perf_counter() - begun
    for index in range(len(batch.prompts)):
        engine.stage.close(str(index))
    return Taken(seconds, tokens)


def _finished(running: Running) -> Outcome:
    while True:
        try:
            next(running)
        except StopIteration as stop:
            outcome: Outcome = stop.value
            return outcome


def _work(engine: Engine, batch: Batch, number: int, step: Step) -> Work:
    """On the first pages of the pool. A token is drawn after the prompt's last, wherever its padding ends."""
    segments, first_page = [], 0
    for index, num_computed in step:
        prompt = batch.prompts[index]
        num_pages = -(-num_computed // engine.pool.shape.page_tokens)
        pages = tuple(range(first_page, first_page + num_pages))
        tokens = prompt + (0,) * (num_computed - len(prompt))
        segments.append(Segment(str(index), tokens, 0, 0, pages, (len(prompt) - 1,)))
        first_page += num_pages
    assert first_page <= engine.pool.shape.num_pages, "the pool is too small for this batch"
    return Work(number, "language", tuple(segments))


def packed(engine: Engine, lengths: Sequence[int]) -> list[list[int]]:
    """As the scheduler does with time enough: the first ones in order, as many as pay."""
    cost, pack_tokens = CostModel(engine.scheduler.cost.fit), engine.scheduler.settings.pack_tokens
    packs, rest = [], list(lengths)
    while rest:
        few = rest[:MAX_MEMBERS]
        count = pack([Share(length, 0) for length in few], [FAR_S] * len(few), cost, pack_tokens)
        packs.append(rest[:count])
        rest = rest[count:]
    return packs


# What is read


def populations(mean_tokens: int, longest: int) -> dict[str, list[int]]:
    """Prompt lengths by load, scaled to the same mean, so that what differs is their shape."""
    loads = {
        "qwen text": named("qwen", num_requests=POPULATION, seed=1),
        "azure-conv": named("azure-conv", num_requests=POPULATION, seed=1),
    }
    if (path := Path(os.environ.get("HEADWAY_DATA", "")) / "traces" / SHAREGPT).is_file():
        loads["sharegpt"] = Load.of("sharegpt", f"trace {path.name}", traces.read(path), POPULATION, 1)
    found = {name: [a.num_prompt for a in load.requests if a.kind == "text"] for name, load in loads.items()}
    scales = {name: mean_tokens / statistics.mean(lengths) for name, lengths in found.items()}
    real = {name: [min(longest, max(1, round(n * scales[name]))) for n in found[name]] for name in found}
    return real | {UNIFORM: [mean_tokens]}


def draw(population: Sequence[int], size: int, vocab_size: int, seed: int) -> Batch:
    rng = random.Random(seed)
    return Batch([lone_prompt(rng.choice(population), n, vocab_size, seed) for n in range(size)])
