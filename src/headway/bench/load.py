"""A load: what is asked and at which instant, made from a trace or drawn to its shape, and its classes' targets.

Every change of a load gives a new one whose `source` says what was done, so that a result can name its load. All
draws are seeded. Knows nothing of who serves it.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, Self

import numpy as np

from headway.bench.score import quantile
from headway.bench.traces import KINDS, Asked, Trace
from headway.core.request import SLO

Arrivals = Literal["trace", "poisson", "gamma", "uniform"]
ARRIVALS: tuple[Arrivals, ...] = ("trace", "poisson", "gamma", "uniform")

TTFT_RATIO = {"text": 1.0, "image": 2.0, "search": 16.0, "file": 24.0}  # FlowPrefill's targets for QwenTrace
QWEN_MIX = {"text": 0.69, "image": 0.07, "search": 0.20, "file": 0.03}
TARGET_SHARE = 0.9  # the prompt that a class's target is made for: its p90

FEW = 20  # requests of a class: fewer, and one of them decides about its tenth
_NEXT_LAP = 1 << 48  # added to the blocks' ids when a trace is gone through again …
_NEXT_DRAW = 1 << 40  # … and when one of its requests is drawn again


@dataclass(frozen=True)
class Load:
    """Requests in the order of arrival, each with a kind (its class). `timed`: their instants mean something."""

    name: str
    source: str
    requests: tuple[Asked, ...]
    timed: bool = True
    has_kinds: bool = True

    @classmethod
    def of(cls, name: str, source: str, trace: Trace, num_requests: int, seed: int, window: int = 0) -> Self:
        """So many requests of a trace. A timed one, or one with shared beginnings, in its order from its start, or from
        the start of its nth window of so many; else in a seeded order. If there are not enough it is gone through
        again, with other tokens."""
        rng = np.random.default_rng([seed, 1])
        in_order = trace.timed or any(asked.blocks for asked in trace.requests)
        last, num_gaps = trace.requests[-1].at_s, len(trace.requests) - 1
        span_s = last + last / max(1, num_gaps)  # one gap between two laps
        taken: list[Asked] = []
        lap = 0
        skipped = window * num_requests if in_order else 0
        while len(taken) < num_requests + skipped:
            given = trace.requests if in_order else [trace.requests[i] for i in rng.permutation(len(trace.requests))]
            taken += _lap(given[: num_requests + skipped - len(taken)], lap, span_s)
            lap += 1
        if skipped:
            taken = [replace(asked, at_s=asked.at_s - taken[skipped].at_s) for asked in taken[skipped:]]
        has_kinds = any(asked.kind for asked in taken)
        kinds = [replace(asked, kind=asked.kind or "text") for asked in taken]
        source += f" from request {skipped} on" if skipped else ""
        return cls(name, source, tuple(kinds), trace.timed, has_kinds)

    @property
    def rate(self) -> float:
        """Requests per second over the gaps that there are; infinite if all come at once."""
        span_s = self.requests[-1].at_s if self.requests else 0.0
        return (len(self.requests) - 1) / span_s if span_s > 0 else float("inf")

    @property
    def kinds(self) -> tuple[str, ...]:
        """The classes that occur, in the order of KINDS."""
        found = {asked.kind for asked in self.requests}
        return tuple(kind for kind in KINDS if kind in found)

    def at_rate(self, rate: float) -> Self:
        """The same gaps, stretched so that the rate is exactly this. The shape of bursts stays."""
        if not 0 < rate < float("inf"):
            raise ValueError(f"A rate must be a positive number of requests per second, not {rate}.")
        if not self.timed:
            raise ValueError(f"The load {self.name} has no arrivals: give a process, such as poisson.")
        if len(self.requests) > 1 and self.rate == float("inf"):
            raise ValueError(f"All requests of the load {self.name} come at once: give a process, such as poisson.")
        return self._stretched(self.rate / rate if len(self.requests) > 1 else 1.0, f"{rate:g} requests/s")

    def faster(self, rate_scale: float) -> Self:
        """So many times the rate that it has."""
        if not 0 < rate_scale < float("inf"):
            raise ValueError(f"A rate scale must be a positive number, not {rate_scale}.")
        return self._stretched(1 / rate_scale, f"{rate_scale:g} times its rate")

    def arriving(self, process: Arrivals, rate: float, seed: int, cv: float = 1.0) -> Self:
        """New instants: gaps drawn (gamma: with this coefficient of variation), then stretched to exactly `rate`."""
        if process == "trace":
            return self.at_rate(rate)
        if not 0 < cv < float("inf"):
            raise ValueError(f"A coefficient of variation must be a positive number, not {cv}.")
        shape = 1.0 if process == "poisson" else 1 / cv**2
        gaps = np.random.default_rng([seed, 2]).gamma(shape, 1 / shape, size=max(0, len(self.requests) - 1))
        if process == "uniform" or not gaps.sum() > 0:
            gaps = np.ones_like(gaps)
        instants = [0.0, *np.cumsum(gaps).tolist()]
        requests = tuple(replace(a, at_s=at_s) for a, at_s in zip(self.requests, instants, strict=False))
        how = f"gamma arrivals (CV {cv:g}, seed {seed})" if process == "gamma" else f"{process} arrivals (seed {seed})"
        return replace(self, requests=requests, timed=True, source=f"{self.source}; {how}").at_rate(rate)

    def scaled(self, length_scale: float) -> Self:
        """Prompts, their blocks and answers so many times as long; one token at least."""
        if not 0 < length_scale < float("inf"):
            raise ValueError(f"A length scale must be a positive number, not {length_scale}.")
        requests = tuple(
            replace(
                asked,
                num_prompt=max(1, round(asked.num_prompt * length_scale)),
                num_output=max(1, round(asked.num_output * length_scale)),
                block_tokens=asked.block_tokens * length_scale,
            )
            for asked in self.requests
        )
        return replace(self, requests=requests, source=f"{self.source}; lengths x {length_scale:g}")

    def answering(self, max_tokens: int) -> Self:
        """Every answer this long; 1 asks for the first token only."""
        if max_tokens < 1:
            raise ValueError(f"An answer has at least one token, not {max_tokens}.")
        requests = tuple(replace(asked, num_output=max_tokens) for asked in self.requests)
        return replace(self, requests=requests, source=f"{self.source}; answers of {max_tokens}")

    def cautions(self) -> list[str]:
        """What makes shares of its classes worth less, in sentences."""
        numbers = {kind: sum(asked.kind == kind for asked in self.requests) for kind in self.kinds}
        few = ", ".join(f"{number} of class {kind}" for kind, number in numbers.items() if number < FEW)
        return [f"Careful: only {few}; give more --num-requests to trust their share."] if few else []

    def within(self, num_tokens: int) -> Self:
        """Prompts and answers cut so that both fit a context of this many tokens."""
        if num_tokens < 2:
            raise ValueError(f"A context holds at least a prompt and an answer of one token each, not {num_tokens}.")
        cut = [_within(asked, num_tokens) for asked in self.requests]
        num_cut = sum(one != asked for one, asked in zip(cut, self.requests, strict=True))
        what = f"; {num_cut} of {len(cut)} cut to a context of {num_tokens}" if num_cut else ""
        return replace(self, requests=tuple(cut), source=self.source + what)

    def mixed(self, mix: Mapping[str, float], seed: int) -> Self:
        """Classes in these proportions. With kinds: each instant gets a request drawn from the class drawn for it.
        Without: classes by length, the shortest prompts of the first class, the longest of the last."""
        shares = _shares(mix)
        if not self.has_kinds:
            return self._by_length(shares)
        absent = [kind for kind in shares if kind not in self.kinds]
        if absent:
            raise ValueError(f"The load {self.name} has no request of class {absent[0]}, only {', '.join(self.kinds)}.")
        rng = np.random.default_rng([seed, 3])
        pools = {kind: [asked for asked in self.requests if asked.kind == kind] for kind in shares}
        drawn = rng.choice(list(shares), size=len(self.requests), p=list(shares.values()))
        requests = []
        times: Counter[int] = Counter()  # that each was drawn: again, it is another of its length, not the same prompt
        for asked, kind in zip(self.requests, drawn.tolist(), strict=True):
            like = pools[kind][int(rng.integers(len(pools[kind])))]
            requests.append(replace(_again(like, times[id(like)], _NEXT_DRAW), at_s=asked.at_s))
            times[id(like)] += 1
        return replace(self, requests=tuple(requests), source=f"{self.source}; classes drawn {_told(shares)}")

    def _by_length(self, shares: Mapping[str, float]) -> Self:
        order = sorted(range(len(self.requests)), key=lambda i: self.requests[i].num_prompt)
        bounds = np.cumsum(list(shares.values())) * len(order)
        requests = list(self.requests)
        for rank, i in enumerate(order):
            kind = list(shares)[min(int(np.searchsorted(bounds, rank + 0.5)), len(shares) - 1)]
            requests[i] = replace(requests[i], kind=kind)
        what = f"{self.source}; classes by prompt length {_told(shares)}"
        return replace(self, requests=tuple(requests), has_kinds=True, source=what)

    def _stretched(self, factor: float, what: str) -> Self:
        requests = tuple(replace(asked, at_s=asked.at_s * factor) for asked in self.requests)
        return replace(self, requests=requests, source=f"{self.source}; {what}")


def _lap(given: list[Asked], lap: int, span_s: float) -> list[Asked]:
    if lap == 0:
        return list(given)
    return [replace(_again(asked, lap, _NEXT_LAP), at_s=asked.at_s + lap * span_s) for asked in given]


def _again(asked: Asked, times: int, step: int) -> Asked:
    """The same with other tokens: blocks that no earlier one had."""
    return replace(asked, blocks=tuple(block + times * step for block in asked.blocks))


def _within(asked: Asked, num_tokens: int) -> Asked:
    """The answer may have half of the context at most, so that something is left to read."""
    num_output = max(1, min(asked.num_output, num_tokens // 2))
    return replace(asked, num_prompt=max(1, min(asked.num_prompt, num_tokens - num_output)), num_output=num_output)


def _shares(mix: Mapping[str, float]) -> dict[str, float]:
    unknown = [kind for kind in mix if kind not in KINDS]
    if unknown:
        raise ValueError(f"There is no class {unknown[0]!r}: classes are {', '.join(KINDS)}.")
    total = sum(mix.values())
    if not 0 < total < float("inf") or any(share < 0 for share in mix.values()):
        raise ValueError("A class mix needs shares that are not negative, one of them positive.")
    return {kind: mix[kind] / total for kind in KINDS if mix.get(kind)}


def _told(shares: Mapping[str, float]) -> str:
    return ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())


# Tokens


def prompts(load: Load, vocab_size: int, seed: int) -> list[tuple[int, ...]]:
    """Token ids for every request: equal blocks have equal tokens, everything else is unrelated.

    From the middle of the vocabulary, away from both ends, where special tokens are.
    """
    low = vocab_size // 8
    high = max(low + 1, vocab_size - vocab_size // 8)
    return [_tokens(asked, number, low, high, seed) for number, asked in enumerate(load.requests)]


def lone_prompt(num_tokens: int, number: int, vocab_size: int, seed: int) -> tuple[int, ...]:
    """A prompt that is in no load and shares nothing with one: for warming up and measuring alone."""
    asked = Asked(0.0, num_tokens, 1)
    low = vocab_size // 8
    return _tokens(asked, (1 << 40) + number, low, max(low + 1, vocab_size - vocab_size // 8), seed)


def _tokens(asked: Asked, number: int, low: int, high: int, seed: int) -> tuple[int, ...]:
    """A hash of (owner, place in it, seed), where the owner is a block or, past the blocks, the request."""
    position = np.arange(asked.num_prompt, dtype=np.uint64)
    owner = np.full(asked.num_prompt, 2 * number + 1, dtype=np.uint64)
    place = position.copy()
    if asked.blocks and asked.block_tokens > 0:
        starts = np.floor(np.arange(len(asked.blocks) + 1) * asked.block_tokens + 1e-9).astype(np.int64)
        block = np.searchsorted(starts, position.astype(np.int64), side="right") - 1
        inside = block < len(asked.blocks)
        owner[inside] = 2 * np.array(asked.blocks, dtype=np.int64).view(np.uint64)[block[inside]]
        place[inside] -= starts[block[inside]].astype(np.uint64)
    mixed = _mix(_mix(owner + np.uint64(_mix_int(seed))) + place)
    return tuple((low + mixed % np.uint64(high - low)).astype(np.int64).tolist())


def _mix(x: np.typing.NDArray[np.uint64]) -> np.typing.NDArray[np.uint64]:
    """SplitMix64's finish: every bit of the argument moves every bit of the result. Wraps on purpose."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _mix_int(seed: int) -> int:
    return int(_mix(np.array([seed & (2**64 - 1)], dtype=np.uint64))[0])


# Targets


def p90_prompt(load: Load, kind: str) -> int:
    """The prompt length that a class's target is made for."""
    return int(quantile([asked.num_prompt for asked in load.requests if asked.kind == kind], TARGET_SHARE))


def base_kind(load: Load) -> str:
    """The class whose isolated TTFT all targets are multiples of: text, or else the one with the shortest target."""
    return min(load.kinds, key=lambda kind: TTFT_RATIO[kind])


def targets(
    load: Load,
    isolated_ttft_s: float,
    k: float,
    isolated_tpot_s: float | None = None,
    k_tpot: float | None = None,
) -> dict[str, SLO]:
    """Targets per class. `isolated_ttft_s` is that of `base_kind`'s p90 prompt alone on the machine, measured in the
    same run; the base class gets k times that, the others more by TTFT_RATIO. TPOT likewise, the same for all
    (`k_tpot` is `k` if not said); without `isolated_tpot_s` there is no TPOT target."""
    base = TTFT_RATIO[base_kind(load)]
    tpot_s = None if isolated_tpot_s is None else (k if k_tpot is None else k_tpot) * isolated_tpot_s
    return {kind: SLO(ttft_s=k * isolated_ttft_s * TTFT_RATIO[kind] / base, tpot_s=tpot_s) for kind in load.kinds}
