"""Thousands of random arrivals, cancels, expiries and engine losses on a virtual clock: nothing is lost or leaked."""

import random

import pytest

from headway.core import event as ev
from headway.core.request import SLO, Request
from headway.core.scheduler import SchedulerSettings
from headway.placement.simulate import Simulation
from headway.stages.stage import FakeStage

PREFIXES = [tuple(range(start, start + 24)) for start in (100, 300, 500)]


def random_request(rng: random.Random, number: int, now: float) -> Request:
    """Short and long, some sharing a beginning, with and without targets."""
    length = rng.choice((1, 2, 5, 9, 17, 30, 60))
    shared = rng.choice(PREFIXES)[: rng.randrange(0, 24)] if rng.random() < 0.5 else ()
    prompt = shared + tuple(rng.randrange(FakeStage.VOCABULARY) for _ in range(length))
    slo = SLO(
        ttft_s=rng.choice((None, 0.02, 0.1, 1.0)),
        tpot_s=rng.choice((None, 0.01, 0.05)),
        total_s=rng.choice((None, None, None, 0.05, 1.0)),
    )
    return Request(
        id=f"r{number}",
        prompt=prompt,
        max_tokens=rng.choice((1, 2, 8, 40)),
        arrival=now,
        slo=slo,
        stop_ids=(rng.randrange(FakeStage.VOCABULARY),),
        min_tokens=rng.choice((0, 3)),
        priority=rng.choice((0, 0, 0, 1, -1)),
        tenant=rng.choice(("", "a")),
    )


def storm(seed: int, num_requests: int) -> tuple[list[tuple[float, ev.Event]], dict[str, Request]]:
    rng = random.Random(seed)
    letters: list[tuple[float, ev.Event]] = []
    requests = {}
    now = 0.0
    pace = rng.choice((0.002, 0.01, 0.04))  # from heavy overload to light load
    for number in range(num_requests):
        now += rng.expovariate(1 / pace) if rng.random() < 0.8 else 0.0
        request = random_request(rng, number, now)
        requests[request.id] = request
        letters.append((now, ev.Arrived(request)))
        if rng.random() < 0.25:
            gone = ev.Cancelled if rng.random() < 0.7 else ev.Stopped
            letters.append((now + rng.expovariate(20), gone(request.id)))
        if number % 400 == 399:
            letters.append((now, ev.EngineLost("the test pulled the plug")))
    return letters, requests


def expected_answer(request: Request, length: int) -> list[int]:
    tokens = list(request.prompt)
    for _ in range(length):
        tokens.append(FakeStage.next_token(tuple(tokens)))
    return tokens[len(request.prompt) :]


@pytest.mark.parametrize("seed", range(10))
def test_every_request_ends_once_and_no_page_leaks(seed: int) -> None:
    """1,000 requests a seed, too many for memory and time: each ends exactly once, with the tokens that are its own."""
    letters, requests = storm(seed, 1000)
    settings = SchedulerSettings(
        max_model_len=120, max_num_seqs=12, max_num_queued=60, pack_tokens=40, tile_s=0.002, max_num_parked=3
    )
    simulation = Simulation(letters, settings, num_pages=48, page_tokens=4)
    turns = 0
    while simulation.step():
        turns += 1
        if turns % 16 == 0:
            simulation.scheduler.check_integrity()
    simulation.scheduler.check_integrity()

    assert {request_id: len(records) for request_id, records in simulation.ended.items()} == dict.fromkeys(requests, 1)
    assert simulation.scheduler.pages.num_available == 48
    assert simulation.stage.open_requests == set()
    assert simulation.driver.num_open_steps == 0
    kinds = set()
    for request_id, request in requests.items():
        record = simulation.ended[request_id][0]
        kinds.add(record.kind)
        answer = simulation.delivered.get(request_id, [])
        assert answer == expected_answer(request, len(answer)), f"{request_id} got somebody else's tokens"
        assert record.num_output_tokens == len(answer)
        if record.kind == "finished" and record.reason == "length":
            assert len(answer) == min(request.max_tokens, 120 - len(request.prompt))
        if record.kind == "refused":
            assert answer == []
    assert kinds == {"finished", "refused", "cancelled", "failed"}
    counters = simulation.scheduler.counters
    assert counters["preemptions"] > 0
    assert counters["recomputes"] > 0
    assert counters["prefix_hits"] > 0


def test_one_plan_for_each_drained_batch_of_events() -> None:
    """However many tiles run, the scheduler is asked only when something has happened."""
    letters, _ = storm(seed=3, num_requests=300)
    settings = SchedulerSettings(max_model_len=120, max_num_seqs=12, pack_tokens=40, tile_s=0.002)
    simulation = Simulation(letters, settings, num_pages=48, num_layers=24, tiles_per_layer=40, tile_s=1e-6)
    batches = 0
    handle, plan = simulation.scheduler.handle, simulation.scheduler.plan
    seen: list[ev.Event] = []

    def counted_handle(event: ev.Event, now: float) -> list[ev.Effect]:
        seen.append(event)
        return handle(event, now)

    def counted_plan(now: float, lane: object) -> object:
        nonlocal batches
        assert seen, "a plan without an event"
        seen.clear()
        batches += 1
        return plan(now, lane)  # type: ignore[arg-type]

    simulation.scheduler.handle = counted_handle  # type: ignore[method-assign]
    simulation.scheduler.plan = counted_plan  # type: ignore[method-assign,assignment]
    simulation.run()
    counters = simulation.scheduler.counters
    assert counters["plans"] == batches <= counters["events"]
    assert simulation.driver.num_tiles > 20 * counters["plans"]
