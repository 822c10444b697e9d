"""What a step will take, in seconds. Fitted at the engine's start, corrected by what steps really took.

One formula for prefill, decode and mixtures, since they are one pass:

    T = step_s + token_s · n + segment_s · k + pair_s · Σ nᵢ · (contextᵢ + nᵢ / 2)

with n tokens in k segments: for one prompt the a + b·n + c·n·(context + n/2) of its causal attention. `step_s` is what
a step costs however few tokens it has, mostly reading the weights. Below about step_s / token_s tokens that is the
larger part, and a step is bound by memory; above it by arithmetic. The two drift apart under load (a busy neighbour
costs arithmetic more than memory), so each keeps its own correction.

The mean prediction orders and cuts; `upper` adds what is needed to be right nine times in ten, for promises.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from headway.core.work import Segment


class Share(NamedTuple):
    """One segment as far as its price goes."""

    num_tokens: int
    context_tokens: int


class Amount(NamedTuple):
    """All that the formula takes of a step: its tokens, its segments, and the pairs of tokens that attend."""

    tokens: int = 0
    segments: int = 0
    pairs: float = 0.0

    def plus(self, share: Share) -> "Amount":
        """The same step with another segment."""
        num_tokens, context_tokens = share
        pairs = num_tokens * (context_tokens + num_tokens / 2)
        return Amount(self.tokens + num_tokens, self.segments + 1, self.pairs + pairs)

    @staticmethod
    def next_tokens(num_segments: int, context_tokens: int) -> "Amount":
        """One token in each of so many segments, behind so much context in all."""
        return Amount(num_segments, num_segments, context_tokens + num_segments / 2)


class Price(NamedTuple):
    """What the formula says of one step, uncorrected, and whether arithmetic is the larger part of it."""

    fitted_s: float
    is_arithmetic: bool


@dataclass(frozen=True, slots=True)
class CostFit:
    """The coefficients of the formula, seconds each."""

    step_s: float = 0.0
    token_s: float = 1e-4
    segment_s: float = 0.0
    pair_s: float = 0.0

    def seconds(self, shares: Iterable[Share]) -> float:
        """The formula, uncorrected."""
        return self.price(shares).fitted_s

    def price(self, shares: Iterable[Share]) -> Price:
        """One step of these segments."""
        tokens = segments = 0
        pairs = 0.0
        for num_tokens, context_tokens in shares:
            tokens += num_tokens
            segments += 1
            pairs += num_tokens * (context_tokens + num_tokens / 2)
        return self.of(Amount(tokens, segments, pairs))

    def next_tokens(self, num_segments: int, context_tokens: int) -> Price:
        """One step of one token in each of so many segments, behind so much context in all."""
        return self.of(Amount.next_tokens(num_segments, context_tokens))

    def of(self, amount: Amount) -> Price:
        """One step of so much."""
        tokens, segments, pairs = amount
        arithmetic_s = self.token_s * tokens
        seconds = self.step_s + arithmetic_s + self.segment_s * segments + self.pair_s * pairs
        return Price(seconds, arithmetic_s > self.step_s)


class CostModel:
    """A fit, two running corrections (exponentially weighted ratios of taken to fitted seconds), and its own error."""

    WEIGHT = 0.2  # of the newest step, however short
    WEIGHT_A_SECOND = 0.15  # of one that took long: few of them are seen, and each tells of much time
    MOST_WEIGHT = 0.6
    BOUNDS = (0.2, 20.0)  # a correction outside of these is a broken clock or a suspended machine
    BELIEVED = 2.0  # times the prediction: more than this, up or down, one step alone is not believed
    UPPER_SHARE = 0.9  # of the steps take no longer than `upper` says
    UPPER_BOUNDS = (1.02, 3.0)
    UPPER_STEP = 0.02  # how far one step moves the estimate of that quantile
    DRIFT = 0.15  # of a correction: then prices that were made before are stale

    def __init__(self, fit: CostFit) -> None:
        self.fit = fit
        self.mean_error = 0.0  # running mean of |taken / predicted - 1|
        self.version = 0  # grows when prices have changed by much
        self.chunk_tokens: int | None = None  # of one step, if prompts are read in chunks
        self._correction = {False: 1.0, True: 1.0}
        self._priced_at = {False: 1.0, True: 1.0}
        self._upper = 1.1

    def predict(self, shares: Iterable[Share]) -> float:
        """Seconds for one step of these segments, the mean."""
        return self.seconds(self.fit.price(shares))

    def of(self, amount: Amount) -> float:
        """Seconds for one step of so much, the mean."""
        return self.seconds(self.fit.of(amount))

    def seconds(self, price: Price) -> float:
        """The mean, by what steps have taken of late."""
        return price.fitted_s * self._correction[price.is_arithmetic]

    def prefill(self, num_tokens: int, context_tokens: int = 0, *, as_fitted: bool = False) -> float:
        """Seconds to read one prompt alone, the mean: in one step, or in chunks that each cost a step. `as_fitted`: by
        the prices at the start, whatever steps have taken since."""
        predict = self.fit.seconds if as_fitted else self.predict
        seconds = predict((Share(num_tokens, context_tokens),))
        if self.chunk_tokens is not None and num_tokens > self.chunk_tokens:
            seconds += (-(-num_tokens // self.chunk_tokens) - 1) * predict((Share(0, 0),))
        return seconds

    def next_tokens(self, num_segments: int, context_tokens: int) -> float:
        """Seconds for one token of each of so many segments behind so much context in all, the mean."""
        return self.of(Amount.next_tokens(num_segments, context_tokens))

    def upper(self, seconds: float) -> float:
        """So long will it take at most in nine cases of ten, if `seconds` is the mean."""
        return seconds * self._upper

    @property
    def correction(self) -> float:
        """How much slower than fitted long steps are at present."""
        return self._correction[True]

    def observe(self, price: Price, taken_s: float) -> None:
        """Learn from a step of this price that took `taken_s` seconds of the device."""
        fitted, is_arithmetic = price
        if fitted <= 0:
            return
        before = self._correction[is_arithmetic]
        low, high = max(self.BOUNDS[0], before / self.BELIEVED), min(self.BOUNDS[1], before * self.BELIEVED)
        ratio = min(max(taken_s / fitted, low), high)
        surprise = ratio / before
        self.mean_error += self.WEIGHT / 4 * (abs(surprise - 1) - self.mean_error)
        step = self.UPPER_STEP * (self.UPPER_SHARE if surprise > self._upper else self.UPPER_SHARE - 1)
        self._upper = min(max(self._upper + step, self.UPPER_BOUNDS[0]), self.UPPER_BOUNDS[1])
        weight = min(max(self.WEIGHT, self.WEIGHT_A_SECOND * ratio * fitted), self.MOST_WEIGHT)
        correction = before + weight * (ratio - before)
        self._correction[is_arithmetic] = correction
        if abs(correction / self._priced_at[is_arithmetic] - 1) > self.DRIFT:
            self._priced_at[is_arithmetic] = correction
            self.version += 1


def shares_of(segments: Iterable[Segment]) -> tuple[Share, ...]:
    return tuple(Share(len(segment.tokens), segment.context_tokens) for segment in segments)
