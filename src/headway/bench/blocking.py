"""How long an urgent request waits for its first operator: `python -m headway.bench.blocking`.

Long prompts keep the device busy; short ones come at random instants, with targets that make them go first. Blocking is
the time from such a request's instant to the moment at which its step begins, the decision included. Compared are
suspension at operators, at layers, at the end of chunks of 16 … 2048 tokens, and none; rounds of all of them in turn.
Beside it: what chunks cost in throughput, and what looking for mail after every tile costs.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.progress import track

from headway.bench import report
from headway.bench.calm import Calm
from headway.bench.policies import CHUNKS
from headway.bench.replay import Replay, SkippingClock, replay
from headway.bench.score import quantile
from headway.config import EngineSettings
from headway.core.cost import Share
from headway.core.request import SLO, Request, Sampling
from headway.core.settings import SchedulerSettings
from headway.core.work import Work
from headway.placement.engine import Engine, build_engine
from headway.placement.memory import keep_freed_memory
from headway.stages.stage import Running, Stage

URGENT_TOKENS = 16
MOST_LOST = 0.03  # of the throughput: what a chunk size may cost and still be taken
GREEDY = Sampling(temperature=0.0)


@dataclass
class Watched:
    """A stage that notes when each request's step began."""

    inner: Stage
    clock: SkippingClock
    begun: dict[str, float] = field(default_factory=dict)

    def open(self, request: Request) -> None:
        self.inner.open(request)

    def close(self, request_id: str) -> None:
        self.inner.close(request_id)

    def drop(self, work_id: int, request_id: str) -> None:
        self.inner.drop(work_id, request_id)

    def run(self, work: Work) -> Running:
        for segment in work.segments:
            self.begun.setdefault(segment.request_id, self.clock.now())
        return (yield from self.inner.run(work))


def schedulers(base: SchedulerSettings) -> dict[str, SchedulerSettings]:
    served = replace(base, refuse_unattainable=False, pack=False)
    chunked = {f"chunk {size}": replace(served, preempt="chunk", chunk_tokens=size, pack=True) for size in CHUNKS}
    return {
        "operator": served,
        "layer": replace(served, preempt="layer"),
        **chunked,
        "none": replace(served, preempt="none"),
    }


def mixture(engine: Engine, num_long: int, long_tokens: int, num_urgent: int, seed: int) -> list[Request]:
    """Long prompts all at once, and urgent ones spread over the time that those take."""
    rng = random.Random(seed)
    vocab_size = engine.stage.model.config.vocab_size
    cost = engine.scheduler.cost
    span_s = 0.95 * num_long * cost.fit.seconds((Share(long_tokens, 0),))
    urgent_s = cost.fit.seconds((Share(URGENT_TOKENS, 0),))

    def prompt(length: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size) for _ in range(length))

    requests = [
        Request(f"long {n}", prompt(long_tokens), 1, 0.0, slo=SLO(ttft_s=1e4), sampling=GREEDY) for n in range(num_long)
    ]
    for number in range(num_urgent):
        at_s = (number + rng.uniform(0.05, 0.95)) * span_s / num_urgent
        slo = SLO(ttft_s=2 * urgent_s)
        requests.append(
            Request(f"urgent {number}", prompt(URGENT_TOKENS), 1, at_s, slo=slo, sampling=GREEDY, slo_class="urgent")
        )
    return requests


def blocked_s(engine: Engine, requests: Sequence[Request], settings: SchedulerSettings) -> tuple[list[float], Replay]:
    """Seconds that each urgent request waited for its step to begin."""
    watchers: list[Watched] = []

    def watch(stage: Stage, clock: SkippingClock) -> Stage:
        watchers.append(Watched(stage, clock))
        return watchers[0]

    run = replay(engine, requests, settings, watch)
    urgent = [record for record in run.records.values() if record.slo_class == "urgent"]
    return [watchers[0].begun[record.request_id] - record.arrival for record in urgent], run


def lone_s(engine: Engine, length: int, settings: SchedulerSettings) -> float:
    """Seconds of one long prompt alone, from its first step to its token."""
    prompt = tuple(range(1, length + 1))
    record = replay(engine, [Request("lone", prompt, 1, 0.0, sampling=GREEDY)], settings).records["lone"]
    assert record.first_token is not None
    assert record.first_scheduled is not None
    return record.first_token - record.first_scheduled


def ratios(calm: Calm, one: Callable[[], float], other: Callable[[], float], num_pairs: int) -> list[float]:
    """One over the other, pair by pair, A B B A."""
    found = []
    for number in range(num_pairs):
        if number % 2 == 0:
            a, b = calm.measure(one), calm.measure(other)
        else:
            b, a = calm.measure(other), calm.measure(one)
        found.append(a / b)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m headway.bench.blocking", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--long-tokens", type=int, default=1024)
    parser.add_argument("--num-long", type=int, default=6)
    parser.add_argument("--num-urgent", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--folder", type=Path, default=report.RESULTS)
    options = parser.parse_args(arguments)
    keep_freed_memory()
    engine = build_engine(
        EngineSettings(model=options.model, max_model_len=options.long_tokens + 64, enable_prefix_caching=False)
    )
    calm = Calm()
    compared = schedulers(engine.scheduler.settings)
    body = "\n\n".join(
        [
            f"{options.model}, {engine.facts.dtype}, {engine.facts.num_threads} threads. B = "
            f"{engine.facts.max_tile_ms:g} ms.",
            *_report(engine, compared, options, calm),
        ]
    )
    report.write("blocking", "Blocking", "python -m headway.bench.blocking", body, options.folder)


def _report(
    engine: Engine, compared: dict[str, SchedulerSettings], options: argparse.Namespace, calm: Calm
) -> list[str]:
    waits, parked = _waits(engine, compared, options)
    losses = {
        name: statistics.median(
            ratios(
                calm,
                lambda s=settings: lone_s(engine, options.long_tokens, s),  # type: ignore[misc]
                lambda: lone_s(engine, options.long_tokens, compared["none"]),
                options.pairs,
            )
        )
        - 1
        for name, settings in track(compared.items(), description="throughput")
        if name.startswith("chunk")
    }
    cheap = [name for name, loss in losses.items() if loss <= MOST_LOST]
    looks = ratios(
        calm,
        lambda: lone_s(engine, options.long_tokens, compared["operator"]),
        lambda: lone_s(engine, options.long_tokens, compared["none"]),
        2 * options.pairs,
    )
    rows = []
    ours = quantile(waits["operator"], 0.99)
    for name, seconds in waits.items():
        cells = [statistics.mean(seconds), *(quantile(seconds, share) for share in (0.5, 0.99)), max(seconds)]
        rows.append(
            [
                name,
                *(f"{1e3 * cell:.2f}" for cell in cells),
                f"{cells[2] / ours:.1f} ×",
                f"{losses[name]:+.1%}" if name in losses else "",
            ]
        )
    bound_ms = 1.5 * engine.facts.max_tile_ms
    verdict = [
        f"p99 at operators {1e3 * ours:.1f} ms against 1.5 × B = {bound_ms:g} ms: {_said(1e3 * ours <= bound_ms)}"
    ]
    if cheap:
        times = quantile(waits[cheap[0]], 0.99) / ours
        verdict.append(f"{cheap[0]} is the smallest that loses at most 3 %; it blocks {times:.1f} × as long (p99) as "
                       f"operators, against 10 ×: {_said(times >= 10)}")  # fmt: skip
    else:
        verdict.append("no chunk size loses 3 % or less")
    check = statistics.median(looks) - 1
    verdict.append(
        f"looking after every tile costs {check:+.2%} (median of {len(looks)} pairs, {min(looks) - 1:+.1%} … "
        f"{max(looks) - 1:+.1%}), against 2 %: {_said(check <= 0.02)}"
    )
    per_token = engine.stage.bytes_per_token + engine.pool.shape.page_bytes // engine.pool.shape.page_tokens
    header = ["scheduler", "mean ms", "p50 ms", "p99 ms", "longest ms", "p99 / operator's", "time of a long prompt"]
    return [
        f"{options.num_long} prompts of {options.long_tokens} tokens, {options.num_urgent} urgent ones of "
        f"{URGENT_TOKENS} in each of {options.rounds} rounds.",
        report.table(header, rows),
        "; ".join(verdict) + ".",
        f"Parked at most: {parked} tokens, {parked * per_token / 2**20:.1f} MiB of activations, keys and values. "
        + calm.verdict(),
    ]


def _waits(
    engine: Engine, compared: dict[str, SchedulerSettings], options: argparse.Namespace
) -> tuple[dict[str, list[float]], int]:
    waits: dict[str, list[float]] = {name: [] for name in compared}
    parked = 0
    rounds = [(number, name) for number in range(options.rounds) for name in compared]
    for number, name in track(rounds, description="blocking"):
        requests = mixture(engine, options.num_long, options.long_tokens, options.num_urgent, number)
        seconds, run = blocked_s(engine, requests, compared[name])
        waits[name] += seconds
        parked = max(parked, run.counters.get("most_parked_tokens", 0))
    return waits, parked


def _said(reached: bool) -> str:
    return "reached" if reached else "not reached"


if __name__ == "__main__":
    main()
