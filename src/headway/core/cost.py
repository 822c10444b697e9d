"""What a step will take, in seconds. Fitted at the engine's start, corrected by what steps really took.

One formula for prefill, decode and mixtures, since they are one pass:

    T = step_s + max(stream_s, token_s · n) + segment_s · k + pair_s · Σ nᵢ · (contextᵢ + nᵢ / 2)

with n tokens in k segments. `stream_s` is the time to read all weights once: below about stream_s / token_s tokens
a step is bound by memory, above it by arithmetic. The two sides drift apart under load (a busy neighbour costs
arithmetic more than it costs memory), so each keeps its own correction.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from headway.core.work import Segment


class Share(NamedTuple):
    """One segment as far as its price goes."""

    num_tokens: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class CostFit:
    """The coefficients of the formula, seconds each."""

    step_s: float = 0.0
    stream_s: float = 0.0
    token_s: float = 1e-4
    segment_s: float = 0.0
    pair_s: float = 0.0


class CostModel:
    """A fit and two running corrections (exponentially weighted ratios of taken to fitted seconds)."""

    WEIGHT = 0.2  # of the newest step
    BOUNDS = (0.2, 20.0)  # a correction outside of these is a broken clock or a suspended machine

    def __init__(self, fit: CostFit) -> None:
        self.fit = fit
        self._correction = {"memory": 1.0, "arithmetic": 1.0}

    def predict(self, shares: Iterable[Share]) -> float:
        """Seconds for one step of these segments."""
        fitted, side = self._fitted(shares)
        return fitted * self._correction[side]

    def prefill(self, num_tokens: int, context_tokens: int = 0) -> float:
        """Seconds for one segment alone."""
        return self.predict((Share(num_tokens, context_tokens),))

    def observe(self, shares: Iterable[Share], taken_s: float) -> None:
        """Learn from a step that took `taken_s` seconds of the device."""
        fitted, side = self._fitted(shares)
        if fitted <= 0:
            return
        low, high = self.BOUNDS
        ratio = min(max(taken_s / fitted, low), high)
        self._correction[side] += self.WEIGHT * (ratio - self._correction[side])

    def _fitted(self, shares: Iterable[Share]) -> tuple[float, str]:
        tokens = segments = 0
        pairs = 0.0
        for num_tokens, context_tokens in shares:
            tokens += num_tokens
            segments += 1
            pairs += num_tokens * (context_tokens + num_tokens / 2)
        fit = self.fit
        arithmetic = fit.token_s * tokens
        seconds = fit.step_s + max(fit.stream_s, arithmetic) + fit.segment_s * segments + fit.pair_s * pairs
        return seconds, "arithmetic" if arithmetic > fit.stream_s else "memory"


def shares_of(segments: Iterable[Segment]) -> tuple[Share, ...]:
    return tuple(Share(len(segment.tokens), segment.context_tokens) for segment in segments)
