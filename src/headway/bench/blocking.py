"""How long an urgent request waits for its first operator: `python -m headway.bench.blocking`.

Long prompts keep the device busy; short ones of a better priority come at random instants. All schedulers compared go
strictly by priority, so that nobody waits by choice, as one with slack to spare would: blocking is the time from such a
request's instant to the moment at which its step begins, the decision included. Compared are suspension at operators,
at layers, at the end of chunks of 16 … 2048 tokens, and none; rounds of all of them in turn. Beside it: what chunks
cost in throughput, and what looking for mail after every tile costs.
"""

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
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
from headway.placement.calibrate import wait_for
from headway.placement.engine import Engine, build_engine
from headway.stages.stage import Running, Stage

COMMAND = "python -m headway.bench.blocking"
URGENT_TOKENS = 16
MOST_LOST = 0.03  # of the throughput: what a chunk size may cost and still be taken
LEAST_TIMES = 10.0  # shorter than at that chunk size
MOST_BOUNDS = 1.5  # times the bound B: p99 at operators
MOST_LOOKING = 0.02  # of a long prompt: what looking for mail after every tile may cost
SPARE = 2.0  # times its own prefill: an urgent one's target
SETTLED_S = 0.2  # after the start nothing else is to be done but what is asked
APART = 4.0  # times its own prefill: between two urgent ones, so that none waits for another
FAR_S = 1000.0  # after this the far letter comes; the clock is put forward to it
ORDERED = (
    'All of them run with `order="deadline"`, and urgent prompts have the better priority: a switch is due at once, '
    "where the order of slack, which is what is served, lets one wait that has time."
)
LOOKING = (
    "The cost of looking is a difference of noisy times: [overhead](overhead.md) has what one yield costs by itself."
)
GREEDY = Sampling(temperature=0.0)
URGENT = "urgent"


@dataclass
class Watched:
    """A stage that notes when the device was free for each request's step."""

    inner: Stage
    clock: SkippingClock
    device: torch.device
    begun: dict[str, float] = field(default_factory=dict)

    def open(self, request: Request) -> None:
        self.inner.open(request)

    def close(self, request_id: str) -> None:
        self.inner.close(request_id)

    def drop(self, work_id: int, request_id: str) -> None:
        self.inner.drop(work_id, request_id)

    def run(self, work: Work) -> Running:
        wait_for(self.device)
        for segment in work.segments:
            self.begun.setdefault(segment.request_id, self.clock.now())
        return (yield from self.inner.run(work))


def schedulers(base: SchedulerSettings, long_tokens: int) -> dict[str, SchedulerSettings]:
    """Of chunk sizes those that cut a long prompt: others read it whole."""
    served = replace(base, refuse_unattainable=False, order="deadline")
    return {
        "operator": served,
        "layer": replace(served, preempt="layer"),
        **{
            f"chunk {size}": replace(served, preempt="chunk", chunk_tokens=size)
            for size in CHUNKS
            if size < long_tokens
        },
        "none": replace(served, preempt="none"),
    }


class Mixture(NamedTuple):
    """What is asked: `requests`, and how it was made, in words."""

    requests: list[Request]
    said: str


def mixture(engine: Engine, num_long: int, long_tokens: int, num_urgent: int, seed: int) -> Mixture:
    """Long prompts without targets, one always waiting; urgent ones spread over the time that those take.

    Those have the better priority. Their target only says who came in time.
    """
    rng = random.Random(seed)
    vocab_size = engine.stage.model.config.vocab_size
    long_s, urgent_s = (engine.scheduler.cost.fit.seconds((Share(n, 0),)) for n in (long_tokens, URGENT_TOKENS))
    span_s = 0.95 * num_long * long_s
    num_urgent = max(1, min(num_urgent, int(span_s / (APART * urgent_s))))
    slot_s = span_s / num_urgent
    urgent = SLO(ttft_s=SPARE * urgent_s)

    def ask(name: str, number: int, length: int, at_s: float, slo: SLO, priority: int) -> Request:
        prompt = tuple(rng.randrange(vocab_size) for _ in range(length))
        return Request(
            id=f"{name} {number}",
            prompt=prompt,
            max_tokens=1,
            arrival=SETTLED_S + at_s,
            slo=slo,
            sampling=GREEDY,
            priority=priority,
            slo_class=name,
        )

    requests = [ask("long", n, long_tokens, max(0, n - 1) * 0.9 * long_s, SLO(), 0) for n in range(num_long)]
    for number in range(num_urgent):
        at_s = number * slot_s + rng.uniform(0.0, max(0.0, slot_s - 0.5 * APART * urgent_s))
        requests.append(ask(URGENT, number, URGENT_TOKENS, at_s, urgent, -1))
    return Mixture(
        requests,
        f"{num_long} prompts of {long_tokens} tokens, {num_urgent} urgent ones of {URGENT_TOKENS} at random instants, "
        f"one in every {1e3 * slot_s:.0f} ms, with {1e3 * (urgent.ttft_s or 0.0):.0f} ms for their first token "
        f"({1e3 * urgent_s:.0f} ms of them their own prefill)",
    )


class Blocked(NamedTuple):
    """Of one run: seconds that each urgent request waited for its step to begin, and how many came in time."""

    waits_s: list[float]
    num_met: int
    most_parked_tokens: int


def blocked(engine: Engine, requests: Sequence[Request], settings: SchedulerSettings) -> tuple[Blocked, Replay]:
    watchers: list[Watched] = []

    def watch(stage: Stage, clock: SkippingClock) -> Stage:
        watchers.append(Watched(stage, clock, engine.stage.model.device))
        return watchers[0]

    run = replay(engine, requests, settings, watch)
    urgent = [record for record in run.records.values() if record.slo_class == URGENT]
    waits = [watchers[0].begun[record.request_id] - record.arrival for record in urgent]
    met = sum(not record.missed for record in urgent)
    return Blocked(waits, met, run.counters.get("most_parked_tokens", 0)), run


def lone_s(engine: Engine, length: int, settings: SchedulerSettings, extra: Sequence[Request] = ()) -> float:
    """Seconds of one long prompt alone, from its first step to its token. `extra` goes behind it."""
    lone = Request("lone", tuple(range(1, length + 1)), 1, 0.0, sampling=GREEDY, priority=-1)
    record = replay(engine, [lone, *extra], settings).records["lone"]
    assert record.first_token is not None
    assert record.first_scheduled is not None
    return record.first_token - record.first_scheduled


def looked_for() -> list[Request]:
    """What there is to look for while a prompt is read: a letter that is far, and a timer, since one in the queue has
    a target that is far too."""
    slo = SLO(ttft_s=FAR_S)
    return [
        Request("waiting", (1, 2), 1, 0.0, slo=slo, sampling=GREEDY),
        Request("far", (1, 2), 1, FAR_S, sampling=GREEDY),
    ]


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


class Measured(NamedTuple):
    """`waits`: one per round. `losses` of throughput, by chunk size; `looks`: looking over never looking."""

    said: str
    waits: dict[str, list[Blocked]]
    losses: dict[str, list[float]]
    looks: list[float]

    def quantile_s(self, name: str, share: float) -> float:
        """Of all rounds together: one round has too few for a tail."""
        return quantile([wait for run in self.waits[name] for wait in run.waits_s], share)

    def mean_s(self, name: str) -> float:
        return statistics.median(statistics.mean(run.waits_s) for run in self.waits[name])

    def median_s(self, name: str) -> float:
        return statistics.median(quantile(run.waits_s, 0.5) for run in self.waits[name])

    def cheapest_chunk(self) -> str | None:
        """The smallest that costs no more throughput than `MOST_LOST`."""
        return next((name for name, lost in self.losses.items() if statistics.median(lost) <= MOST_LOST), None)


def measure(engine: Engine, options: argparse.Namespace, calm: Calm) -> Measured:
    compared = schedulers(engine.scheduler.settings, options.long_tokens)
    waits: dict[str, list[Blocked]] = {name: [] for name in compared}
    turns = [(n, name) for n in range(options.rounds) for name in list(compared)[:: 1 if n % 2 == 0 else -1]]
    said = ""
    for number, name in track(turns, description="blocking"):
        requests, said = mixture(engine, options.num_long, options.long_tokens, options.num_urgent, number)
        runs: list[Blocked] = []

        def once(name: str = name, requests: list[Request] = requests, runs: list[Blocked] = runs) -> float:
            found, run = blocked(engine, requests, compared[name])
            runs.append(found)
            return run.duration_s

        calm.measure(once)
        waits[name].append(runs[-1])
    whole = partial(lone_s, engine, options.long_tokens, replace(compared["none"], pack=False))
    losses: dict[str, list[float]] = {}
    for name, settings in track(compared.items(), description="throughput"):
        if name.startswith("chunk"):
            pairs = ratios(calm, partial(lone_s, engine, options.long_tokens, settings), whole, options.pairs)
            losses[name] = [1 - 1 / ratio for ratio in pairs]
    never, always = (replace(compared[name], pack=False) for name in ("none", "operator"))
    looks = ratios(
        calm,
        partial(lone_s, engine, options.long_tokens, always, looked_for()),
        partial(lone_s, engine, options.long_tokens, never, looked_for()),
        2 * options.pairs,
    )
    return Measured(said, waits, losses, looks)


def how(options: argparse.Namespace, engine: Engine, said: str) -> str:
    """What was asked of whom."""
    facts = engine.facts
    return (
        f"{options.model}, {facts.means}, B = {facts.max_tile_ms:g} ms. In each of {options.rounds} rounds: {said}. "
        f"{ORDERED} Mean and p50 are medians over rounds, p99 and longest are of all rounds together. Throughput: a "
        f"long prompt alone, in chunks and whole, {options.pairs} pairs of each, median (least … most)."
    )


def rows(found: Measured) -> list[list[str]]:
    made = []
    for name, runs in found.waits.items():
        seconds = [found.mean_s(name), found.median_s(name), *(found.quantile_s(name, share) for share in (0.99, 1.0))]
        num_urgent = sum(len(run.waits_s) for run in runs)
        lost = found.losses.get(name)
        made.append(
            [
                name,
                *(f"{1e3 * each:.2f}" for each in seconds),
                f"{seconds[0] / found.mean_s('operator'):.1f}",
                f"{seconds[2] / found.quantile_s('operator', 0.99):.1f}",
                f"{sum(run.num_met for run in runs) / num_urgent:.0%}",
                _spread(lost) if lost else "",
            ]
        )
    return made


def reading(found: Measured, bound_s: float) -> str:
    """What was wanted, and whether it was reached."""
    ours, wanted = found.quantile_s("operator", 0.99), MOST_BOUNDS * bound_s
    num_waits = sum(len(run.waits_s) for run in found.waits["operator"])
    said = [
        f"p99 at operators, of {num_waits} waits, within {MOST_BOUNDS:g} × B: "
        f"{_verdict(ours <= wanted, ours * 1e3, wanted * 1e3, 'ms')}"
    ]
    chunk = found.cheapest_chunk()
    if chunk is None:
        said.append(f"no chunk size loses {MOST_LOST:.0%} of the throughput or less, so there is none to compare with")
    else:
        times = found.quantile_s(chunk, 0.99) / ours
        said.append(
            f"p99 {LEAST_TIMES:g} times shorter than at {chunk}, the smallest that loses at most {MOST_LOST:.0%} of "
            f"throughput: {_verdict(times >= LEAST_TIMES, times, LEAST_TIMES, 'times')}"
        )
    looking = statistics.median(found.looks) - 1
    said.append(
        f"looking after every tile for at most {MOST_LOOKING:.0%}: "
        f"{_verdict(looking <= MOST_LOOKING, 1e2 * looking, 1e2 * MOST_LOOKING, '%')} "
        f"({_spread([ratio - 1 for ratio in found.looks])} in {len(found.looks)} pairs)"
    )
    return "; ".join(said) + f". {LOOKING}"


def _verdict(reached: bool, found: float, wanted: float, unit: str) -> str:
    return f"{'reached' if reached else 'not reached'}, {found:.3g} {unit} against {wanted:g}"


def _spread(shares: Sequence[float]) -> str:
    return f"{statistics.median(shares):+.1%} ({min(shares):+.1%} … {max(shares):+.1%})"


def parked(engine: Engine, waits: Mapping[str, Sequence[Blocked]]) -> str:
    """The most that was suspended at once, in bytes."""
    tokens, shape = max(run.most_parked_tokens for runs in waits.values() for run in runs), engine.pool.shape
    pages = -(-tokens // shape.page_tokens)
    return (
        f"Suspended at once were at most {tokens} tokens: {tokens * engine.stage.bytes_per_token / 2**20:.2f} MiB of "
        f"activations, and {pages} pages, {pages * shape.page_bytes / 2**20:.2f} MiB of keys and values."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="random:smollm2-135m")
    parser.add_argument("--long-tokens", type=int, default=1536, help="of each long prompt")
    parser.add_argument("--num-long", type=int, default=5, help="long prompts of a run")
    parser.add_argument("--num-urgent", type=int, default=40, help="of a run, or as many as do not meet each other")
    parser.add_argument("--rounds", type=int, default=4, help="of all schedulers; every other one backwards")
    parser.add_argument(
        "--pairs", type=int, default=9, help="of chunked and whole long prompts; twice that for looking"
    )
    parser.add_argument("--quick", action="store_true", help="two rounds and pairs with long prompts of 256 tokens")
    parser.add_argument("--folder", type=Path, default=report.RESULTS, help="where the page is written")
    options = parser.parse_args(arguments)
    if options.quick:
        options.long_tokens, options.num_long, options.num_urgent, options.rounds, options.pairs = 256, 2, 4, 2, 2
    engine = build_engine(
        EngineSettings(model=options.model, max_model_len=options.long_tokens + 64, enable_prefix_caching=False)
    )
    calm = Calm()
    found = measure(engine, options, calm)
    header = ["scheduler", "mean ms", "p50 ms", "p99 ms", "longest ms", "mean / operator's", "p99 / operator's",
              "in time", "throughput lost"]  # fmt: skip
    body = (
        f"{how(options, engine, found.said)}\n\n{report.table(header, rows(found))}\n\n"
        f"{reading(found, engine.facts.max_tile_ms / 1e3)} {parked(engine, found.waits)} {calm.verdict()}"
    )
    report.write("blocking", "Blocking", report.command(COMMAND, arguments), body, options.folder)


if __name__ == "__main__":
    main()
