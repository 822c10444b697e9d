"""Shows that suspending, packing and sharing change nothing: `python -m headway.bench.exactness`.

One stage, one pool, three comparisons, bit for bit:

  suspended   a prompt's step is stopped after every single tile of a small model (and at random tiles of a larger
              one), other requests' prefills and tokens run in between, then it goes on; logits, keys and values
              must equal those of the uninterrupted run, and so must the text that follows
  packed      several prompts in one step against each alone: the same greedy tokens in float32
  isolated    changing prompt A changes no bit of prompt B's logits in the same pack
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal, NamedTuple

import torch
from rich.progress import track
from torch import Tensor

from headway.bench import report
from headway.core.request import Request, Sampling
from headway.core.work import Commit, Segment, Work
from headway.kv.pool import KVPool, PoolShape
from headway.models import presets, weights
from headway.models.config import DecoderConfig, parse_config
from headway.models.decoder import Decoder
from headway.stages.language import LanguageStage
from headway.stages.matrices import packed
from headway.stages.panels import panels_for
from headway.stages.sample import MakeMatcher, Sampler, no_matcher
from headway.stages.tiling import Rates, Tiling

Quantization = Literal["none", "int8"]
SERVED: tuple[Quantization, ...] = ("none", "int8")
SMALL = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 331,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
SLOW = Rates(
    1e8, 1e9, 1e7, 1e8, 1e6, 1e6, 1e6
)  # a device so slow that a small model's operators are cut into many tiles
USUAL = Rates(3e11, 1.5e10, 2e11, 5e9, 2e8, 2e8, 1e8)


class RecordingSampler(Sampler):
    """Draws as usual and keeps the logits."""

    def __init__(self, vocab_size: int, make_matcher: MakeMatcher = no_matcher) -> None:
        super().__init__(vocab_size, make_matcher)
        self.logits: dict[str, list[Tensor]] = {}

    def draw(self, logits_RV: Tensor, request_ids: Sequence[str], positions: Sequence[int]) -> tuple[Commit, ...]:
        self._keep(logits_RV, request_ids)
        return super().draw(logits_RV, request_ids, positions)

    def draw_there(
        self, logits_RV: Tensor, request_ids: Sequence[str], positions: Sequence[int]
    ) -> tuple[tuple[Commit, ...], list[int]]:
        drawn, others = super().draw_there(logits_RV, request_ids, positions)
        here = [row for row in range(len(request_ids)) if row not in others]
        self._keep(logits_RV[here], [request_ids[row] for row in here])
        return drawn, others

    def _keep(self, logits_RV: Tensor, request_ids: Sequence[str]) -> None:
        for row, request_id in enumerate(request_ids):
            self.logits.setdefault(request_id, []).append(logits_RV[row].clone())


@dataclass
class Bench:
    """A stage of its own, with pages handed out by hand. As `served` its matrices are packed, which takes the model's
    own away; else they are as they are."""

    model: Decoder
    rates: Rates
    num_pages: int = 256
    page_tokens: int = 16
    served: Quantization | None = None
    stage: LanguageStage = field(init=False)
    pool: KVPool = field(init=False)
    sampler: RecordingSampler = field(init=False)
    num_works: int = 0

    def __post_init__(self) -> None:
        c = self.model.config
        shape = PoolShape(self.num_pages, c.num_layers, self.page_tokens, c.num_kv_heads, c.head_size, self.model.dtype)
        self.pool = KVPool(shape, self.model.device)
        self.sampler = RecordingSampler(c.vocab_size)
        model, matrices = self.model, None
        if self.served is not None:
            model, matrices = packed(model, integers=self.served == "int8")
        self.stage = LanguageStage(model, self.pool, Tiling(self.rates, 0.010), self.sampler, matrices)

    def prompt(self, name: str, tokens: Sequence[int], pages: Sequence[int], max_tokens: int = 1) -> Segment:
        """A whole prompt as one segment; its request is open from here on."""
        sampling = Sampling(temperature=0.0)
        self.stage.open(Request(name, tuple(tokens), max_tokens, 0.0, sampling=sampling))
        return Segment(name, tuple(tokens), 0, 0, tuple(pages), (len(tokens) - 1,))

    def work(self, *segments: Segment) -> Work:
        self.num_works += 1
        return Work(self.num_works, "language", segments)

    def finish(self, running: object) -> dict[str, int]:
        """Run a step to its end: request -> token."""
        while True:
            try:
                next(running)  # type: ignore[call-overload]
            except StopIteration as stop:
                return {commit.request_id: commit.tokens[-1] for commit in stop.value.commits}

    def go_on(self, segment: Segment, first: int, count: int) -> list[int]:
        """Decode greedily: `count` tokens after the prompt, the first of which is known."""
        tokens = [first]
        position = segment.first_position + len(segment.tokens)
        while len(tokens) < count:
            step = Segment(segment.request_id, (tokens[-1],), position, position, segment.pages, (0,))
            tokens.append(self.finish(self.stage.run(self.work(step)))[segment.request_id])
            position += 1
        return tokens


class Suspended(NamedTuple):
    num_tiles: int
    num_stops: int
    num_differences: int


def suspended_anywhere(
    model: Decoder,
    rates: Rates,
    num_tokens: int,
    stops: int | None,
    follow: int,
    seed: int = 0,
    served: Quantization | None = None,
) -> Suspended:
    """Stop a prompt's step after each tile in turn (or at `stops` random ones), run others, resume, compare."""
    rng = random.Random(seed)
    vocabulary = model.config.vocab_size
    bench = Bench(model, rates, served=served)
    num_pages = -(-(num_tokens + follow) // bench.page_tokens)
    own, other, third = (range(start, start + num_pages) for start in (0, num_pages, 2 * num_pages))
    tokens = [rng.randrange(vocabulary) for _ in range(num_tokens)]

    def fresh(name: str) -> Segment:
        bench.pool.blocks_PL2KSD[: 3 * num_pages] = 0
        return bench.prompt(name, tokens, own)

    segment = fresh("plain")
    num_tiles = sum(1 for _ in bench.stage.run(bench.work(segment)))
    kv = bench.pool.blocks_PL2KSD[list(own)].clone()
    logits = bench.sampler.logits["plain"][-1]
    text = bench.go_on(segment, int(logits.float().argmax()), follow)

    places = range(num_tiles) if stops is None else sorted(rng.sample(range(num_tiles), min(stops, num_tiles)))
    num_differences = 0
    for place in track(places, description=f"{num_tokens} tokens, {num_tiles} tiles", transient=True):
        segment = fresh(f"stop{place}")
        running = bench.stage.run(bench.work(segment))
        for _ in range(place + 1):
            next(running)
        # somebody else's prefill, then tokens of a third and of that other one together
        a = bench.prompt(f"a{place}", [rng.randrange(vocabulary) for _ in range(19)], other)
        b = bench.prompt(f"b{place}", [rng.randrange(vocabulary) for _ in range(7)], third)
        first = bench.finish(bench.stage.run(bench.work(a)))[a.request_id]
        second = bench.finish(bench.stage.run(bench.work(b)))[b.request_id]
        mixed = (
            Segment(a.request_id, (first,), 19, 19, a.pages, (0,)),
            Segment(b.request_id, (second,), 7, 7, b.pages, (0,)),
        )
        bench.finish(bench.stage.run(bench.work(*mixed)))
        bench.finish(running)
        same = torch.equal(bench.pool.blocks_PL2KSD[list(own)], kv)
        same &= torch.equal(bench.sampler.logits[segment.request_id][-1], logits)
        if stops is not None or place % 16 == 0:
            same &= bench.go_on(segment, int(logits.float().argmax()), follow) == text
        num_differences += not same
        bench.sampler.logits.clear()
    return Suspended(num_tiles, len(places), num_differences)


def packed_as_alone(model: Decoder, rates: Rates, lengths: Sequence[int], follow: int) -> tuple[int, int, float]:
    """Each prompt alone and all in one step: (prompts, prompts whose greedy tokens differ, largest logit distance)."""
    rng = random.Random(1)
    bench = Bench(model, rates)
    prompts = [[rng.randrange(model.config.vocab_size) for _ in range(length)] for length in lengths]
    segments, start = [], 0
    for number, prompt in enumerate(prompts):
        num_pages = -(-(len(prompt) + follow) // bench.page_tokens)
        segments.append(bench.prompt(f"alone{number}", prompt, range(start, start + num_pages)))
        start += num_pages
    alone = []
    for segment in segments:
        first = bench.finish(bench.stage.run(bench.work(segment)))[segment.request_id]
        alone.append(bench.go_on(segment, first, follow))
    bench.pool.blocks_PL2KSD.zero_()
    pack = [bench.prompt(f"packed{n}", s.tokens, s.pages) for n, s in enumerate(segments)]
    firsts = bench.finish(bench.stage.run(bench.work(*pack)))
    num_different = 0
    distance = 0.0
    for number, segment in enumerate(pack):
        tokens = bench.go_on(segment, firsts[segment.request_id], follow)
        num_different += tokens != alone[number]
        logits = bench.sampler.logits
        away = (logits[f"packed{number}"][0] - logits[f"alone{number}"][0]).abs().max().item()
        distance = max(distance, away)
    return len(prompts), num_different, distance


def isolated(model: Decoder, rates: Rates, length_a: int, length_b: int, trials: int) -> tuple[int, int]:
    """Packs of A and B with A changed: (packs, packs in which a bit of B's logits or pages changed)."""
    rng = random.Random(2)
    bench = Bench(model, rates)
    vocabulary = model.config.vocab_size
    pages_a = range(-(-length_a // bench.page_tokens))
    pages_b = range(len(pages_a), len(pages_a) - (-length_b // bench.page_tokens))
    b = [rng.randrange(vocabulary) for _ in range(length_b)]
    reference: tuple[Tensor, Tensor] | None = None
    num_changed = 0
    for trial in range(trials):
        a = [rng.randrange(vocabulary) for _ in range(length_a)]
        pack = bench.prompt(f"a{trial}", a, pages_a), bench.prompt(f"b{trial}", b, pages_b)
        bench.finish(bench.stage.run(bench.work(*pack)))
        seen = bench.sampler.logits[f"b{trial}"][0], bench.pool.blocks_PL2KSD[list(pages_b)].clone()
        if reference is None:
            reference = seen
        num_changed += not all(torch.equal(now, then) for now, then in zip(seen, reference, strict=True))
    return trials, num_changed


def small_config() -> DecoderConfig:
    return parse_config(SMALL)


def main() -> None:
    small = weights.random_decoder(small_config(), 0, torch.float32)
    large_config = presets.preset("smollm2-135m")
    rows = []
    with torch.inference_mode():
        done = suspended_anywhere(small, SLOW, 150, None, 16)
        rows.append(["small, float32", "after every tile", done.num_tiles, done.num_stops, done.num_differences])
        for dtype in (torch.float32, torch.bfloat16):
            large = weights.random_decoder(large_config, 0, dtype)
            done = suspended_anywhere(large, USUAL, 400, 24, 8)
            name = f"smollm2-135m shape, {str(dtype).removeprefix('torch.')}"
            rows.append([name, "at random tiles", done.num_tiles, done.num_stops, done.num_differences])
        cpu = torch.device("cpu")
        there = [served for served in SERVED if panels_for(torch.bfloat16, cpu, integers=served == "int8")]
        for served, num_tokens in product(there, (400, 100)):
            large = weights.random_decoder(large_config, 0, torch.bfloat16)
            done = suspended_anywhere(large, USUAL, num_tokens, 24, 8, served=served)
            name = f"the same as served, {'bfloat16' if served == 'none' else served}, {num_tokens} tokens"
            rows.append([name, "at random tiles", done.num_tiles, done.num_stops, done.num_differences])
        suspension = report.table(["model", "suspended", "tiles in the step", "stops", "runs that differ"], rows)

        rows = []
        for name, model, rates in (("small", small, SLOW), ("smollm2-135m shape", None, USUAL)):
            chosen = model or weights.random_decoder(large_config, 0, torch.float32)
            count, different, distance = packed_as_alone(chosen, rates, (1, 17, 64, 3, 130), 64)
            packs, changed = isolated(chosen, rates, 37, 21, 12)
            rows.append([name, count, different, f"{distance:.1e}", packs, changed])
        packing = report.table(
            [
                "model (float32)",
                "prompts",
                "differ in 64 tokens",
                "largest logit distance",
                "packs with A changed",
                "packs in which B changed",
            ],
            rows,
        )
    report.write(
        "exactness",
        "Exactness: suspending, packing and sharing change nothing",
        report.command("python -m headway.bench.exactness", None),
        f"As served: matrices packed, and of few tokens whole layers in one call; else torch's matrices. Between stop "
        f"and resumption, two other prompts are prefilled and decoded on the same device. Compared bit "
        f"for bit: logits, all keys and values, and the greedy text that follows.\n\n{suspension}\n\n{packing}",
    )


if __name__ == "__main__":
    main()
