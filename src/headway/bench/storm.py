"""Random storms on a virtual clock: `python -m headway.bench.storm`.

Thousands of arrivals (bursts, shared beginnings, targets that can and cannot be met), callers that leave, deadlines
that pass in the queue, and engines that die, in a memory too small for all. Every request must end exactly once, with
its own tokens, and every page must come back.
"""

import random
from collections import Counter
from typing import NamedTuple

from rich.progress import track

from headway.bench import report
from headway.core import event as ev
from headway.core.request import SLO, Request
from headway.core.roofline import Roofline
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import FakeSimulation
from headway.stages.stage import FakeStage

NUM_PAGES = 48
MAX_MODEL_LEN = 120
SETTINGS = SchedulerSettings(
    max_model_len=MAX_MODEL_LEN, max_num_seqs=12, max_num_queued=60, pack_tokens=40, tile_s=0.002, max_num_parked=3
)
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


class Survived(NamedTuple):
    """What a storm did: how requests ended, and how often each thing happened."""

    num_requests: int
    endings: Counter[str]
    counters: Counter[str]


def survive(
    seed: int, num_requests: int, settings: SchedulerSettings = SETTINGS, roofline: Roofline | None = None
) -> Survived:
    """Run one storm; with a roofline, on a device that can be divided. Asserts that nobody is lost, nobody gets
    another's tokens, no page leaks."""
    letters, requests = storm(seed, num_requests)
    simulation = FakeSimulation(letters, settings, num_pages=NUM_PAGES, page_tokens=4, roofline=roofline)
    turns = 0
    while simulation.step():
        turns += 1
        if turns % 16 == 0:
            simulation.scheduler.check_integrity()
    simulation.scheduler.check_integrity()

    ended = {request_id: len(records) for request_id, records in simulation.ended.items()}
    assert ended == dict.fromkeys(requests, 1), "somebody ended twice, or never"
    assert simulation.scheduler.pages.num_available == NUM_PAGES
    assert simulation.stage.open_requests == set()
    assert simulation.driver.num_open_steps == 0
    endings: Counter[str] = Counter()
    for request_id, request in requests.items():
        record = simulation.ended[request_id][0]
        answer = simulation.delivered.get(request_id, [])
        assert answer == expected_answer(request, len(answer)), f"{request_id} got somebody else's tokens"
        assert record.num_output_tokens == len(answer)
        if record.kind == "finished" and record.reason == "length":
            assert len(answer) == min(request.max_tokens, MAX_MODEL_LEN - len(request.prompt))
        assert record.kind != "refused" or not answer
        endings[f"{record.kind} ({record.reason})"] += 1
    return Survived(num_requests, endings, simulation.scheduler.counters)


def main() -> None:
    storms = [survive(seed, 1000) for seed in track(range(10), description="storms")]
    endings, counters = Counter[str](), Counter[str]()
    for survived in storms:
        endings += survived.endings
        counters += survived.counters
    rows = [[name, count] for name, count in endings.most_common()]
    happened = [[name, counters[name]] for name in ("events", "plans", "preemptions", "recomputes", "prefix_hits")]
    total = sum(survived.num_requests for survived in storms)
    report.write(
        "storm",
        "Ten storms",
        report.command("python -m headway.bench.storm", None),
        f"{total} requests in {len(storms)} storms of different pace. Each ended exactly once, every delivered token "
        f"was its own request's, all {NUM_PAGES} pages came back, and all counts agreed at every 16th turn.\n\n"
        f"{report.table(['ended', 'requests'], rows)}\n\n{report.table(['happened', 'times'], happened)}",
    )


if __name__ == "__main__":
    main()
