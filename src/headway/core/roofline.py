"""What a step takes on a share of the device, beside another step or alone: each operator is bound by arithmetic or by
memory, whichever takes longer there.

After Nexus (arXiv 2507.06608), whose saturation curves are measured rates here: a device is so many *units* (cores, or
groups of multiprocessors), and what 1, 2, … of them do in a second is known. Two steps side by side share what memory
gives them all: if together they ask for more, each gets its part of it. What remains between that and two steps that
really ran side by side is a measured factor. Levels are the cost model's, which learns from every step; the roofline
says only how many times as long a step takes on a share.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.cost import Share


class Split(NamedTuple):
    """How many units each lane has while both are busy."""

    prompts: int
    tokens: int


class Power(NamedTuple):
    """What some units do together in a second: floating point operations in matrices and in attention, bytes read."""

    flops: float
    attention_flops: float
    bytes: float


class Anatomy(NamedTuple):
    """What a step of a model asks for: of each row in the layers, of each row that a token is drawn from in the head,
    of each pair of query and key, of each token of context; and what is read whatever the rows."""

    layer_flops: float
    layer_bytes: float
    head_flops: float
    head_bytes: float
    pair_flops: float
    context_bytes: float


class Demand(NamedTuple):
    """Seconds of a step, and the share of them in which memory is what it waits for."""

    seconds: float
    memory_share: float


@dataclass(frozen=True, slots=True)
class Roofline:
    """`powers[u]` is of u units; the most units are the whole device. `friction` are the measured factors beyond the
    model of (prompts, tokens) side by side, by split; 1.0 where none was measured."""

    anatomy: Anatomy
    powers: Mapping[int, Power]
    friction: Mapping[Split, tuple[float, float]] = field(default_factory=dict)

    @property
    def units(self) -> int:
        return max(self.powers)

    @property
    def splits(self) -> tuple[Split, ...]:
        """All that both lanes' powers are known of, the fewest units for prompts first."""
        known = sorted(self.powers)
        return tuple(Split(units, self.units - units) for units in known if self.units - units in self.powers)

    def demand(self, shares: Sequence[Share], units: int, memory: float = 1.0) -> Demand:
        """Of a step of these segments on so many units, with that share of their memory rate."""
        power, of = self.powers[units], self.anatomy
        rows = sum([share.num_tokens for share in shares])
        context = sum([share.context_tokens for share in shares])
        pairs = sum([n * (context + n / 2) for n, context in shares])
        rate = power.bytes * memory
        seconds = reading_s = 0.0
        for flops, speed, num_bytes in (
            (of.layer_flops * rows, power.flops, of.layer_bytes),
            (of.head_flops * len(shares), power.flops, of.head_bytes),
            (of.pair_flops * pairs, power.attention_flops, of.context_bytes * context),
        ):
            arithmetic_s, memory_s = flops / speed, num_bytes / rate
            seconds += max(arithmetic_s, memory_s)
            if memory_s > arithmetic_s:
                reading_s += memory_s
        return Demand(seconds, reading_s / seconds if seconds else 0.0)

    def paces(self, prompts: Sequence[Share], tokens: Sequence[Share], split: Split) -> tuple[float, float]:
        """How many times as long as alone on the whole device each takes, side by side on their shares."""
        alone = [self.demand(each, self.units).seconds for each in (prompts, tokens)]
        shared = [self.demand(each, units) for each, units in zip((prompts, tokens), split, strict=True)]
        asked = sum(self.powers[units].bytes * each.memory_share for units, each in zip(split, shared, strict=True))
        left = min(1.0, self.powers[self.units].bytes / asked) if asked else 1.0
        if left < 1.0:
            shared = [self.demand(each, units, left) for each, units in zip((prompts, tokens), split, strict=True)]
        friction = self.friction.get(split, (1.0, 1.0))
        first, second = (
            beyond * each.seconds / whole for beyond, each, whole in zip(friction, shared, alone, strict=True)
        )
        return first, second
