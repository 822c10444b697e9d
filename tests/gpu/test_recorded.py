"""Steps that are replayed: the tokens of those that are launched operator by operator, and not a bit lost by being
suspended between two parts while others use the same recording."""

from dataclasses import replace

import pytest
import torch

from headway.bench.exactness import USUAL, Bench, small_config
from headway.core.work import Segment
from headway.models.weights import random_decoder
from headway.stages.tiling import Tiling

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]
LENGTHS = (1, 17, 64, 3, 130)


def bench_of(dtype: torch.dtype, records: bool = True) -> Bench:
    """For up to eight rows. Its layers are recorded one by one, so that there is something to suspend between."""
    model = random_decoder(replace(small_config(), num_layers=4, windows=(None,) * 4), 0, dtype, "cuda")
    bench = Bench(model, USUAL)
    if not records:
        return bench
    bench.stage.tiling = Tiling(replace(USUAL, linear_bytes=1.0), 0.010)
    with torch.inference_mode():
        bench.stage.record(8)
    bench.stage.tiling = Tiling(USUAL, 0.010)
    return bench


def prompts(bench: Bench, name: str) -> list[tuple[Segment, int]]:
    """All of them read, each on pages of its own; with its first token."""
    made, start = [], 0
    for number, length in enumerate(LENGTHS):
        pages = range(start, start + length // bench.page_tokens + 4)
        segment = bench.prompt(f"{name}{number}", [(7 * n + number) % 331 for n in range(length)], pages)
        made.append((segment, bench.finish(bench.stage.run(bench.work(segment)))[segment.request_id]))
        start = pages.stop
    return made


def next_of(segment: Segment, token: int, offset: int) -> Segment:
    at = len(segment.tokens) + offset
    return Segment(segment.request_id, (token,), at, at, segment.pages, (0,))


@torch.inference_mode()
def test_the_same_tokens_as_operator_by_operator() -> None:
    """Five members in a recording of eight rows."""
    texts = []
    for records in (True, False):
        bench = bench_of(torch.float32, records)
        members = prompts(bench, "r")
        text = [[token] for _, token in members]
        for offset in range(16):
            step = [next_of(segment, text[n][-1], offset) for n, (segment, _) in enumerate(members)]
            drawn = bench.finish(bench.stage.run(bench.work(*step)))
            for n, (segment, _) in enumerate(members):
                text[n].append(drawn[segment.request_id])
        texts.append(text)
    assert texts[0] == texts[1]


@torch.inference_mode()
def test_suspended_between_parts() -> None:
    """Another step of the same size in between; logits and the next step's, bit for bit."""
    bench = bench_of(torch.bfloat16)
    members = prompts(bench, "r")
    others = []
    for number in range(3):
        pages = range(100 + 4 * number, 104 + 4 * number)
        segment = bench.prompt(f"o{number}", range(5 + number, 20 + number), pages)
        others.append((segment, bench.finish(bench.stage.run(bench.work(segment)))[segment.request_id]))
    step = [next_of(segment, token, 0) for segment, token in members]
    num_tiles = sum(1 for _ in bench.stage.run(bench.work(*step)))
    first = bench.sampler.logits["r2"][-1]
    for place in range(num_tiles):
        running = bench.stage.run(bench.work(*step))
        for _ in range(place + 1):
            next(running)
        bench.finish(bench.stage.run(bench.work(*(next_of(segment, token, 0) for segment, token in others))))
        bench.finish(running)
        assert torch.equal(bench.sampler.logits["r2"][-1], first)
    assert num_tiles > 4


@torch.inference_mode()
def test_a_member_leaves_between_parts() -> None:
    """It is named, its pages are not touched any more, and the others get their tokens."""
    bench = bench_of(torch.float32)
    members = prompts(bench, "r")
    step = [next_of(segment, token, 0) for segment, token in members]
    wanted = bench.finish(bench.stage.run(bench.work(*step)))
    work = bench.work(*step)
    running = bench.stage.run(work)
    next(running)
    bench.stage.drop(work.id, "r1")
    left = []
    while True:
        try:
            tile = next(running)
        except StopIteration as stop:
            drawn = {commit.request_id: commit.tokens[-1] for commit in stop.value.commits}
            break
        left += tile.left
    assert left == ["r1"]
    assert drawn == {name: token for name, token in wanted.items() if name != "r1"}
