"""The pages about blocking, packing and decisions: small runs of what they run, and figures made of known numbers."""

import argparse
import gc
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from headway.bench import (
    blocking,
    contention,
    decisions,
    goodput,
    goodput_more,
    goodput_page,
    goodput_simulated,
    gpu,
    packing,
    packing_memory,
    packing_ways,
)
from headway.bench.blocking import Blocked
from headway.bench.contest import Contender, Run
from headway.bench.load import Load
from headway.bench.score import Outcome, score
from headway.config import EngineSettings
from headway.core import event as ev
from headway.core.cost import Share
from headway.core.request import SLO, Request
from headway.placement.engine import Engine, build_engine


@pytest.fixture(scope="module")
def engine(tiny_folder: object) -> Engine:
    """In float32, so that equal work draws equal tokens, and with operators cut small."""
    folder: Path = tiny_folder("llama2", num_hidden_layers=16)  # type: ignore[operator]
    return build_engine(
        EngineSettings(model=str(folder), dtype="float32", max_tile_ms=0.2, enable_prefix_caching=False)
    )


def test_what_urgent_ones_wait_is_known(engine: Engine) -> None:
    """Every urgent prompt's wait is known, none is before its instant; without suspension nothing is parked."""
    requests, _ = blocking.mixture(engine, num_long=3, long_tokens=400, num_urgent=6, seed=1)
    urgent = [request for request in requests if request.slo_class == blocking.URGENT]
    settings = blocking.schedulers(engine.scheduler.settings, 400)
    found, run = blocking.blocked(engine, requests, settings["operator"])
    assert len(found.waits_s) == len(urgent) > 0
    assert min(found.waits_s) >= 0
    assert {record.kind for record in run.records.values()} == {"finished"}
    whole, _ = blocking.blocked(engine, requests, settings["none"])
    assert whole.most_parked_tokens == 0, "never suspended"


def test_urgent_ones_do_not_meet_each_other(engine: Engine) -> None:
    """However many are asked for, there are only so many that none has to wait for another."""
    requests, _ = blocking.mixture(engine, num_long=3, long_tokens=400, num_urgent=10_000, seed=1)
    instants = sorted(request.arrival for request in requests if request.slo_class == blocking.URGENT)
    own_s = engine.scheduler.cost.fit.seconds([Share(blocking.URGENT_TOKENS, 0)])
    assert all(later - earlier >= 2 * own_s * 0.999 for earlier, later in pairwise(instants))


def test_the_smallest_chunk_that_costs_little_is_compared_with() -> None:
    """Blocking 2 ms against 30 ms at a chunk that loses 2 %: fifteen times; a chunk that loses 10 % does not count."""
    waits = {name: [Blocked([seconds], 1, 0)] for name, seconds in
             (("operator", 0.002), ("chunk 16", 0.004), ("chunk 64", 0.030), ("none", 0.5))}  # fmt: skip
    losses = {"chunk 16": [0.1], "chunk 64": [0.02]}
    found = blocking.Measured("", waits, losses, looks=[1.01, 1.03, 1.05])
    assert found.cheapest_chunk() == "chunk 64"
    said = blocking.reading(found, bound_s=0.010)
    assert ": reached, 2 ms against 15" in said
    assert ": reached, 15 times against 10" in said
    assert ": not reached, 3 % against 2" in said, "looking after every tile cost 3 %"
    assert "[overhead](overhead.md) has what one yield costs" in said


def test_a_page_about_blocking_says_in_which_order(engine: Engine) -> None:
    """A switch there is due at once; what is served may wait with it."""
    said = blocking.how(argparse.Namespace(model="tiny", rounds=2, pairs=5), engine, "3 prompts")
    assert 'In each of 2 rounds: 3 prompts. All of them run with `order="deadline"`' in said
    assert "a switch is due at once" in said


def test_every_way_reads_the_same_prompts(engine: Engine) -> None:
    """Padded, sorted, packed or as scheduled: the same first tokens as one by one, with padding where it belongs."""
    batch = packing_ways.draw([3, 9, 40], 12, engine.stage.model.config.vocab_size, seed=1)
    with torch.inference_mode():
        taken = {way: packing_ways.take(engine, batch, way) for way in packing_ways.WAYS}
    assert len(taken["one by one"].tokens) == 12
    for way in packing_ways.WAYS:
        assert taken[way].tokens == taken["one by one"].tokens, way
        assert taken[way].seconds > 0
    case = packing.Case("some", 12, [batch])
    total, longest = sum(batch.lengths), max(batch.lengths)
    assert [case.computed(way) for way in ("one pack", "one by one", "padded")] == [total, total, 12 * longest]
    assert total <= case.computed("sorted, padded") <= 12 * longest


def test_packs_are_read_in_order_and_whole(engine: Engine) -> None:
    """What is decided takes every prompt once, and no pack of several beyond the saturation count."""
    lengths = [5, 200, 7, 7, 30, 1] * 4
    packs = packing_ways.packed(engine, lengths)
    assert [length for taken in packs for length in taken] == lengths
    most = engine.scheduler.settings.pack_tokens
    assert all(len(taken) == 1 or sum(taken) <= most for taken in packs)


def test_the_largest_batch_within_a_memory(engine: Engine) -> None:
    """One more would not fit; padding leaves room for fewer, by as much as the longest is longer than the mean."""
    lengths = [10, 10, 10, 70] * 100
    cap_bytes = (
        2000 * engine.pool.shape.page_bytes // engine.pool.shape.page_tokens + 400 * engine.stage.bytes_per_token
    )
    sizes = {way: packing_memory.largest_batch(engine, lengths, way, cap_bytes) for way in packing_ways.WAYS}
    for way, size in sizes.items():
        held = [
            packing_memory.activation_bytes(engine, lengths[:few], way)
            + packing_memory.page_bytes(engine, lengths[:few], way)
            for few in (size, size + 1)
        ]
        assert held[0] <= cap_bytes < held[1], way
    assert 1.9 * sizes["padded"] < sizes["scheduled"] <= sizes["one by one"]


def test_real_lengths_have_one_mean() -> None:
    """Loads differ in shape, not in how much there is to read."""
    found = packing_ways.populations(mean_tokens=64, longest=1023)
    assert {"qwen text", "azure-conv", packing_ways.UNIFORM} <= set(found)
    for lengths in found.values():
        assert sum(lengths) / len(lengths) == pytest.approx(64, rel=0.1)


@pytest.mark.parametrize("num_tenants", [1, 8])
def test_the_queue_is_kept_at_its_length(num_tenants: int) -> None:
    """Every kind of event happens, the queue stays as long as it is to be, but for one that was read in part and comes
    back, and the books agree."""
    course = decisions.Course(20, num_tenants, seed=1)
    while not course.is_full:
        course.decide()
    kinds = set()
    for _ in range(400):
        decision = course.decide()
        kinds.add(decision.kind)
        assert 0 < decision.plan_s < decision.seconds
        assert course.scheduler.loads()[1] <= 20 + 1
    course.scheduler.check_integrity()
    assert {decisions.KINDS[kind] for kind in (ev.Arrived, ev.StepDone, ev.Cancelled)} <= kinds


def test_the_collector_is_as_before() -> None:
    """Measured as in the engine; whoever comes after finds it as it was."""
    before = gc.get_threshold()
    with decisions.collecting_as_the_engine_does():
        assert gc.get_threshold() != before
        assert gc.get_freeze_count() > 0
    assert gc.get_threshold() == before
    assert gc.get_freeze_count() == 0


def test_a_page_of_decisions(tmp_path: Path) -> None:
    """The whole command, short: a row for each case, and what it comes to."""
    decisions.main(["--quick", "--decisions", "50", "--folder", str(tmp_path)])
    page = (tmp_path / "decisions.md").read_text(encoding="utf8")
    assert page.count("\n| 100 |") == 3
    assert "a minute of wall time" in page


def test_a_page_of_simulated_cases(tmp_path: Path) -> None:
    """The whole command, short: one load, a row of ratios, and what was wanted of it. Nothing measured is needed."""
    short = ["--cases", "qwen:16:2", "--num-requests", "12", "--draws", "1", "--folder", str(tmp_path)]
    goodput_simulated.main(short)
    page = (tmp_path / "goodput.md").read_text(encoding="utf8")
    assert "\n| 0.5 b, prices | qwen 1/16, k = 2 |" in page
    assert "reached, " in page
    assert re.search(r"- qwen 1/16, k = 2: [0-9.]+ req/s, [0-9.]+ \(", page), "what bounds who refuses nobody"
    assert len(goodput_page.read(tmp_path).sections) == 1


@pytest.mark.parametrize(("ours", "verdict"), [
    ((9.6, 9.0, 9.8), "reached, 0.96 × chunk 256 against 0.95, which lies within the spread"),
    ((8.0, 8.0, 8.0), "not reached, 0.80 × chunk 256 against 0.95"),
])  # fmt: skip
def test_uniform_lengths_are_judged_by_the_best_chunk(ours: tuple[float, ...], verdict: str) -> None:
    """Three draws, in all of which chunks of 256 keep 10 requests/s."""
    outcomes = [Outcome("text", 0.0, 64, 1, "finished", 1.0, ttft_s=2.0)]
    failed = [Run(11.0, score(outcomes, {"text": SLO(ttft_s=1.0)}))]
    goods = {"none": 9.0, "fcfs": 8.0, "chunk 64": 7.0, "chunk 256": 10.0}
    draws = [
        {name: Contender(name, 1.0, good, 11.0, failed) for name, good in (goods | {"operator": own}).items()}
        for own in ours
    ]
    said = goodput_more.uniform_told("m", draws, 90, 100.0)
    assert "90 requests a run, 3 draws: medians (least … most)." in said
    assert "| chunk 256 | 10 (10 … 10) | " in said
    assert f"- m, uniform lengths: {verdict}" in said
    assert "90 requests a run, 1 draw." in goodput_more.uniform_told("m", draws[:1], 90, 100.0)


def test_uniform_lengths_are_drawn_as_often_as_asked(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each draw has as many requests as a run is to have, all of one length, and instants of its own."""
    case, loads = goodput.Case("qwen", 64, 2.0), []

    def contest(starts: dict[str, float], attain: Any, *_: object, **__: object) -> dict[str, Contender]:
        loads.append(attain.__self__.load)
        run = Run(11.0, score([Outcome("text", 0.0, 64, 1, "finished", 1.0)], {}))
        return {name: Contender(name, start, 5.0, runs=[run]) for name, start in starts.items()}

    monkeypatch.setattr(goodput_more, "contest", contest)
    options = argparse.Namespace(model="m", num_requests=12, draws=2)
    said = goodput_more.uniform(engine, case, options, goodput.Tries())
    assert "12 requests a run, 2 draws" in said
    assert [{asked.num_prompt for asked in load.requests} for load in loads] == [{goodput_more.UNIFORM_TOKENS}] * 2
    assert [len(load.requests) for load in loads] == [12, 12]
    assert loads[0].requests[5].at_s != loads[1].requests[5].at_s


def test_targets_and_rates_go_with_the_machine(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run for which the machine is half as fast gets twice the time at half the rate, and counts as one at the rate
    that was asked for; if it was as fast again at the run's end, the run is made again."""
    field = goodput.field_of(engine, goodput.Case("qwen", 64, 2.0), 8, 1, goodput.Tries())
    asked: list[tuple[float, float]] = []
    lone = iter([2.0, 1.0, 2.0, 2.0])
    plain = goodput.requests_of

    def requests_of(load: Load, texts: object, slos: dict[str, SLO]) -> list[Request]:
        asked.append((load.rate, slos["text"].ttft_s or 0.0))
        return plain(load, texts, slos)  # type: ignore[arg-type]

    monkeypatch.setattr(goodput, "isolated_ttft_s", lambda *_: next(lone) * field.isolated_s)
    monkeypatch.setattr(goodput, "requests_of", requests_of)
    run = field.attain("fcfs", 50.0)
    assert asked == [(pytest.approx(25.0), pytest.approx(2 * (field.slos["text"].ttft_s or 0.0)))] * 2
    assert (run.rate, run.disturbed, field.tries.num_discarded) == (50.0, False, 1)


def test_prices_that_never_become_right_are_told_as_that() -> None:
    """Steps take twice as long from the first on. Prices that follow are right at the third; prices that do not follow
    are never right, however long they are looked at."""
    follows = [(float(n), 2.0, min(2.0, 1.0 + 0.3 * n)) for n in range(1, 11)]
    assert contention.noticed(follows) == 3.0
    assert contention.noticed([(float(n), 2.0, 1.2) for n in range(1, 11)]) is None


@pytest.mark.parametrize(("p99", "said"), [("1.93", "reached, 1.93 ms"), ("2.16", "not reached, 2.16 ms")])
def test_the_longest_waits_on_a_gpu_are_judged(p99: str, said: str) -> None:
    waits = [["1", "1.0", "9.00", "9.9"], ["4", "0.8", p99, "2.5"]]
    assert gpu.waiting(waits, 4) == f"At 4 tiles a p99 of at most 2 ms: {said}."
