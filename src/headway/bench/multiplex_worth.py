"""What a share of a device is worth: by the roofline that the controller goes by, and as measured, alone and side by
side. A section of the page that `bench.multiplex` prints."""

import statistics
from typing import NamedTuple

import torch

from headway.bench import report
from headway.core.cost import Share
from headway.core.roofline import Roofline, Split
from headway.placement.dividing import Pair, best_s, side_by_side
from headway.placement.engine import Engine

PROMPTS = ((Share(64, 0),), (Share(256, 0),), (Share(128, 512),))  # held out: the friction is measured with others
TOKENS = ((Share(1, 128),) * 2, (Share(1, 512),) * 4, (Share(1, 256),) * 16)


class Worth(NamedTuple):
    """Paces (prompts, tokens) side by side, as predicted and as measured, for one pair of steps."""

    prompts: tuple[Share, ...]
    tokens: tuple[Share, ...]
    predicted: tuple[float, float]
    measured: tuple[float, float]

    @property
    def sum_of_speeds(self) -> float:
        """1 for taking turns: what both get done in the time of one, each in parts of its own speed alone."""
        return sum(1 / pace for pace in self.measured)


def worth(engine: Engine, roofline: Roofline, split: Split) -> list[Worth]:
    stage, units = engine.stage, roofline.units
    found = []
    with torch.inference_mode():
        for one in PROMPTS:
            for other in TOKENS:
                alone = Pair(best_s(stage, one), best_s(stage, other))
                both = side_by_side(stage, one, other, split, units)
                measured = (both.prompts_s / alone.prompts_s, both.tokens_s / alone.tokens_s)
                found.append(Worth(one, other, roofline.paces(one, other, split), measured))
    return found


class Alone(NamedTuple):
    """Seconds of a step on one unit over those on all, predicted and measured."""

    shape: tuple[Share, ...]
    predicted: float
    measured: float


def on_one_unit(engine: Engine, roofline: Roofline) -> list[Alone]:
    found = []
    least = min(roofline.powers)
    with torch.inference_mode():
        for shape in (*PROMPTS, *TOKENS):
            whole_s = best_s(engine.stage, shape)
            torch.set_num_threads(least)
            try:
                part_s = best_s(engine.stage, shape)
            finally:
                torch.set_num_threads(roofline.units)
            predicted = roofline.demand(shape, least).seconds / roofline.demand(shape, roofline.units).seconds
            found.append(Alone(shape, predicted, part_s / whole_s))
    return found


def words(shape: tuple[Share, ...]) -> str:
    one = shape[0]
    if one.num_tokens == 1:
        return f"a token of {len(shape)} behind {one.context_tokens}"
    return f"{one.num_tokens} tokens" + (f" behind {one.context_tokens}" if one.context_tokens else "")


def section(engine: Engine, roofline: Roofline) -> str:
    """Rates of its cores, and paces of steps on some of them, predicted and measured."""
    split = roofline.splits[len(roofline.splits) // 2]
    alone, both = on_one_unit(engine, roofline), worth(engine, roofline, split)
    error_alone = statistics.mean(abs(each.predicted / each.measured - 1) for each in alone)
    error_both = statistics.mean(
        abs(predicted / measured - 1)
        for each in both
        for predicted, measured in zip(each.predicted, each.measured, strict=True)
    )
    rates = [
        [units, f"{power.flops / 1e9:.0f}", f"{power.attention_flops / 1e9:.0f}", f"{power.bytes / 1e9:.1f}"]
        for units, power in sorted(roofline.powers.items())
    ]
    sums = [each.sum_of_speeds for each in both]
    prompts_pace, tokens_pace = both[-1].measured
    return "\n\n".join(
        [
            "### What a share of this device is worth",
            "Rates of its cores, measured at the engine's start:",
            report.table(["cores", "GFLOP/s, matrices", "GFLOP/s, attention", "GB/s of weights"], rates),
            "How many times as long a step takes alone on the fewest cores, predicted by the roofline / measured "
            f"(mean error {error_alone:.0%}): "
            + "; ".join(f"{words(each.shape)} {each.predicted:.2f} / {each.measured:.2f}" for each in alone)
            + ".",
            f"Side by side on {split.prompts} + {split.tokens}, how many times as long as alone on all, predicted / "
            f"measured (mean error {error_both:.0%}). The sum of speeds is 1 for taking turns.",
            report.table(
                ["prompt", "tokens", "prompt's pace", "tokens' pace", "sum of speeds"],
                [
                    [
                        words(each.prompts),
                        words(each.tokens),
                        *(f"{p:.2f} / {m:.2f}" for p, m in zip(each.predicted, each.measured, strict=True)),
                        f"{each.sum_of_speeds:.2f}",
                    ]
                    for each in both
                ],
            ),
            f"The sum of speeds is {min(sums):.2f} … {max(sums):.2f}, median {statistics.median(sums):.2f}. For the "
            f"last pair: a share pays where taking turns leaves prompts less than 1/{prompts_pace:.2f} of the device, "
            f"that is where a token's step takes more than {1 - 1 / prompts_pace:.0%} of its target, and is possible "
            f"where it takes less than {1 / tokens_pace:.0%}.",
        ]
    )
