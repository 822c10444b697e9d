"""What became of a load's requests, judged: pure functions over outcomes. Knows no HTTP, no clock and no engine.

Rules. A request attains its targets if it finished with each of them met; a target that was not set is met, and an
answer of one token has no TPOT. Who was refused, cancelled or failed has missed every target, whatever it had met by
then, and stays in every denominator; the engine's ledger is milder, and leaves the refused and cancelled what they met.
Latencies count from the instant at which the load asked, not from when it was sent. A quantile is a value that occurred
(nearest rank): the smallest with at least that share at or under it, among those that have a value.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from headway.core.ledger import Record
from headway.core.request import SLO

SCALES = (0.4, 0.6, 0.8, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)  # of the targets, for the sweep
GOOD_SHARE = 0.9  # of a class must attain its targets for the class to be served well

Ending = Literal["finished", "refused", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One request's story. Seconds count from `at_s`, the instant at which the load asked for it.

    `gaps_s` are the times between what came, `end_s` when it was over, `reason` a code if it was refused or failed.
    """

    kind: str
    at_s: float
    num_prompt: int
    num_output: int
    ending: Ending
    end_s: float
    ttft_s: float | None = None
    tpot_s: float | None = None
    gaps_s: tuple[float, ...] = ()
    reason: str = ""
    num_asked: int = 0  # tokens that the load asked for, of one that finished; 0: as many as there were

    def meets_ttft(self, slo: SLO, scale: float = 1.0) -> bool:
        """Whether its first token came in time; an answer that broke off after it is none."""
        if self.ending != "finished":
            return False
        return slo.ttft_s is None or (self.ttft_s is not None and self.ttft_s <= slo.ttft_s * scale)

    def meets_all(self, slo: SLO, scale: float = 1.0) -> bool:
        on_pace = slo.tpot_s is None or self.tpot_s is None or self.tpot_s <= slo.tpot_s * scale
        in_time = slo.total_s is None or self.end_s <= slo.total_s * scale
        return self.meets_ttft(slo, scale) and on_pace and in_time


def outcome_of(record: Record, begun: float) -> Outcome:
    """One request's story, as the client would have seen it."""
    assert record.ended is not None
    ending = record.kind if record.kind in ("finished", "refused") else "failed"
    return Outcome(
        kind=record.slo_class,
        at_s=record.arrival - begun,
        num_prompt=record.num_prompt_tokens,
        num_output=record.num_output_tokens,
        ending=ending,
        end_s=record.ended - record.arrival,
        ttft_s=record.ttft_s,
        tpot_s=record.tpot_s,
        reason="" if ending == "finished" else record.reason,
    )


class Quantiles(NamedTuple):
    """Of seconds; NaN if there are none."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Marks:
    """Of some of the requests: how many attained their targets, and how long they took."""

    num: int
    num_refused: int
    num_failed: int
    joint: float  # share that met every target
    ttft_only: float  # share that met the TTFT target
    ttft_s: Quantiles
    tpot_s: Quantiles
    itl_s: Quantiles


@dataclass(frozen=True)
class Score:
    """Of a whole run. Goodput is requests per second that attained all their targets, over the time until the last
    one ended; `scales` tells for each multiple of the targets the joint share of all and of each class."""

    overall: Marks
    by_kind: dict[str, Marks]
    goodput: float
    throughput_tokens: float  # output tokens per second
    duration_s: float
    reasons: dict[str, int]
    scales: tuple["Scaled", ...]

    def shares(self, *, ttft_only: bool = False) -> dict[str, float]:
        """What each class attained."""
        return {kind: m.ttft_only if ttft_only else m.joint for kind, m in self.by_kind.items()}

    def meets(self, share: float = GOOD_SHARE, *, ttft_only: bool = False) -> bool:
        """Whether every class, not only the mean, attained this share."""
        return all(attained >= share for attained in self.shares(ttft_only=ttft_only).values())

    def meets_overall(self, share: float = GOOD_SHARE, *, ttft_only: bool = False) -> bool:
        return (self.overall.ttft_only if ttft_only else self.overall.joint) >= share


class Scaled(NamedTuple):
    """Joint shares had every target been `scale` times as long, recomputed from the same outcomes."""

    scale: float
    overall: float
    by_kind: dict[str, float]


def quantile(values: Sequence[float], share: float) -> float:
    """Nearest rank: the smallest value with at least `share` of all at or under it. NaN of nothing."""
    if not values:
        return math.nan
    return sorted(values)[max(0, math.ceil(share * len(values) - 1e-9) - 1)]


def score(outcomes: Sequence[Outcome], targets: Mapping[str, SLO]) -> Score:
    """Judge a run. A class without targets attains them by finishing."""
    kinds: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        kinds.setdefault(outcome.kind, []).append(outcome)
    begun = min((outcome.at_s for outcome in outcomes), default=0.0)
    duration_s = max((outcome.at_s + outcome.end_s for outcome in outcomes), default=0.0) - begun
    num_good = sum(outcome.meets_all(_slo(targets, outcome)) for outcome in outcomes)
    num_tokens = sum(outcome.num_output for outcome in outcomes)
    return Score(
        overall=marks(outcomes, targets),
        by_kind={kind: marks(some, targets) for kind, some in kinds.items()},
        goodput=num_good / duration_s if duration_s > 0 else 0.0,
        throughput_tokens=num_tokens / duration_s if duration_s > 0 else 0.0,
        duration_s=duration_s,
        reasons=dict(Counter(outcome.reason for outcome in outcomes if outcome.reason)),
        scales=tuple(
            Scaled(
                scale, attained(outcomes, targets, scale), {k: attained(o, targets, scale) for k, o in kinds.items()}
            )
            for scale in SCALES
        ),
    )


def marks(outcomes: Sequence[Outcome], targets: Mapping[str, SLO]) -> Marks:
    """Judge some of the requests together."""
    endings = Counter(outcome.ending for outcome in outcomes)
    met_ttft = sum(outcome.meets_ttft(_slo(targets, outcome)) for outcome in outcomes)
    return Marks(
        num=len(outcomes),
        num_refused=endings["refused"],
        num_failed=endings["failed"],
        joint=attained(outcomes, targets),
        ttft_only=met_ttft / len(outcomes) if outcomes else math.nan,
        ttft_s=_quantiles([outcome.ttft_s for outcome in outcomes if outcome.ttft_s is not None]),
        tpot_s=_quantiles([outcome.tpot_s for outcome in outcomes if outcome.tpot_s is not None]),
        itl_s=_quantiles([gap for outcome in outcomes for gap in outcome.gaps_s]),
    )


def attained(
    outcomes: Sequence[Outcome], targets: Mapping[str, SLO], scale: float = 1.0, *, ttft_only: bool = False
) -> float:
    """The share that met all of its targets, or that for the first token, each times `scale`."""
    if not outcomes:
        return math.nan
    meets = Outcome.meets_ttft if ttft_only else Outcome.meets_all
    return sum(meets(outcome, _slo(targets, outcome), scale) for outcome in outcomes) / len(outcomes)


def _slo(targets: Mapping[str, SLO], outcome: Outcome) -> SLO:
    return targets.get(outcome.kind, SLO())


def _quantiles(values: Sequence[float]) -> Quantiles:
    return Quantiles(quantile(values, 0.5), quantile(values, 0.9), quantile(values, 0.99))
