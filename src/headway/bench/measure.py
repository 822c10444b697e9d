"""What `headway bench` measures: a server alone, at a rate, up to the highest rate it serves well, against another.

Owns the order of runs and what is kept of each. No two runs send the same tokens, else the second would find them in
the server's prefix cache.
"""

import asyncio
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from headway.bench import load as loads
from headway.bench.client import Replay, Server, ServerError, replay
from headway.bench.compare import ORDER, Block
from headway.bench.load import Load
from headway.bench.score import Outcome, Score, quantile, score
from headway.bench.search import Found, Point, Search
from headway.bench.traces import Asked
from headway.core.request import SLO

NUM_WARM_UP = 2
NUM_LONE = 5
LONE_TOKENS = 16  # of a lone answer, at most: enough gaps for a TPOT

Steps = Callable[[str, int], Callable[[], None]]  # (what, how many) -> to be called after each


@dataclass(frozen=True)
class Run:
    """One load at one rate. `rate` is what was asked for, `seed` what its tokens were made from."""

    rate: float
    seed: int
    score: Score
    outcomes: tuple[Outcome, ...]
    late_ms: dict[str, float]
    complaints: dict[str, str]


class Alone(NamedTuple):
    """Medians of lone requests: TTFT of each class's p90 prompt, and TPOT of the base class (None of one token)."""

    num_prompt: dict[str, int]
    ttft_s: dict[str, float]
    tpot_s: float | None


class Bench:
    """Measures servers with one load. `steps` is told of everything that takes long."""

    def __init__(self, load: Load, vocab_size: int, seed: int, steps: Steps) -> None:
        self.load = load
        self._vocab_size = vocab_size
        self._seed = seed
        self._steps = steps
        self._num_runs = 0

    def alone(self, server: Server) -> Alone:
        """Warm up, then one request at a time. Raises ServerError if the server does not answer them."""
        kinds = self.load.kinds
        done = self._steps("alone", NUM_WARM_UP + len(kinds) * NUM_LONE)
        base = loads.base_kind(self.load)
        num_prompt = {kind: loads.p90_prompt(self.load, kind) for kind in kinds}
        ttft_s: dict[str, float] = {}
        tpots_s: list[float] = []
        for number in range(NUM_WARM_UP):
            self._lone(server, num_prompt[base], LONE_TOKENS, number)
            done()
        for place, kind in enumerate(kinds, start=1):
            num_output = min(LONE_TOKENS, self._median_output(kind))
            found = []
            for number in range(NUM_LONE):
                found.append(self._lone(server, num_prompt[kind], num_output, 1000 * place + number))
                done()
            ttft_s[kind] = statistics.median([one.ttft_s for one in found if one.ttft_s is not None])
            if kind == base:
                tpots_s = [one.tpot_s for one in found if one.tpot_s]  # 0: all tokens in one packet, no pace to tell
        return Alone(num_prompt, ttft_s, statistics.median(tpots_s) if tpots_s else None)

    def _median_output(self, kind: str) -> int:
        return int(quantile([asked.num_output for asked in self.load.requests if asked.kind == kind], 0.5))

    def _lone(self, server: Server, num_prompt: int, num_output: int, number: int) -> Outcome:
        prompt = loads.lone_prompt(num_prompt, number, self._vocab_size, self._seed + self._next_run())
        got = asyncio.run(replay(server, [Asked(0.0, num_prompt, num_output)], [prompt], {}))
        outcome = got.outcomes[0]
        if outcome.ending != "finished":
            said = got.complaints.get(outcome.reason, "")
            hint = "; if it takes no token ids, give --text" if outcome.reason == "400" and not server.as_text else ""
            raise ServerError(
                f"A single request of {num_prompt} tokens to {server.url} ended with {outcome.reason}"
                f"{': ' + said.rstrip('.') if said else ''}{hint}."
            )
        return outcome

    def at(self, server: Server, rate: float, targets: Mapping[str, SLO], what: str = "") -> Run:
        """The whole load once, at this rate."""
        at_rate = self.load.at_rate(rate)
        seed = self._seed + self._next_run()
        prompts = loads.prompts(at_rate, self._vocab_size, seed)
        done = self._steps(f"{what or 'rate'} {rate:.4g}/s", len(prompts))
        got: Replay = asyncio.run(replay(server, at_rate.requests, prompts, targets, done))
        if all(outcome.reason == "no connection" for outcome in got.outcomes):
            raise ServerError(
                f"Nobody answers at {server.url} any more: none of {len(prompts)} requests at {rate:.4g} requests/s "
                "found a connection. Start the server again, and look why it ended."
            )
        return Run(rate, seed, score(got.outcomes, targets), got.outcomes, got.lateness(), got.complaints)

    def at_each(
        self, server: Server, rates: Sequence[float], targets: Mapping[str, SLO], judge: "Judge", share: float
    ) -> Found[Run]:
        """Given rates; what passed is judged as in a search."""
        look = Search(lambda rate: self.at(server, rate, targets), judge, share=share, repeats=1)
        points: list[Point[Run]] = [look.visit(rate) for rate in sorted(set(rates))]
        failed_at = min((point.rate for point in points if not point.passed), default=float("inf"))
        # one that passed above one that failed was lucky
        passed = [point.rate for point in points if point.passed and point.rate < failed_at]
        return Found(max(passed, default=0.0), failed_at, tuple(points))

    def in_turns(self, a: Server, b: Server, rate: float, targets: Mapping[str, SLO], num_blocks: int) -> "Turns":
        """Blocks of A B B A."""
        runs: list[tuple[str, Run]] = []
        blocks = []
        for number in range(num_blocks):
            found: dict[str, list[Run]] = {"A": [], "B": []}
            for side in ORDER:
                run = self.at(a if side == "A" else b, rate, targets, f"block {number + 1}, {side},")
                found[side].append(run)
                runs.append((side, run))
            blocks.append(Block(tuple(r.outcomes for r in found["A"]), tuple(r.outcomes for r in found["B"])))
        return Turns(blocks, runs)

    def capacity(self, alone: Alone) -> float:
        """Where to begin to look: half of what a server that takes one prompt after the other would do."""
        per_token = {kind: alone.ttft_s[kind] / alone.num_prompt[kind] for kind in self.load.kinds}
        mean_s = statistics.fmean(asked.num_prompt * per_token[asked.kind] for asked in self.load.requests)
        return 0.5 / max(mean_s, 1e-4)

    def _next_run(self) -> int:
        self._num_runs += 1
        return self._num_runs


Judge = Callable[[Run], Mapping[str, float]]


class Turns(NamedTuple):
    """What came of A B B A: the blocks, and every run in its order with its side."""

    blocks: list[Block]
    runs: list[tuple[str, Run]]


def by_every_class(run: Run) -> Mapping[str, float]:
    return run.score.shares()


def by_every_class_ttft(run: Run) -> Mapping[str, float]:
    return run.score.shares(ttft_only=True)


def one_request(run: Run) -> Mapping[str, float]:
    """What one request is of each class."""
    return {kind: 1 / marks.num for kind, marks in run.score.by_kind.items()}
