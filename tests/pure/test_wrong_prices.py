"""Prices that are wrong: decisions made by them get worse by a little, not by a lot.

A load of four classes on a simulated device whose true prices the scheduler does not know; beside it what serving by
arrival attains, which needs no prices at all.
"""

from collections import Counter
from dataclasses import replace

import pytest

from headway.bench.load import base_kind, p90_prompt, prompts, targets
from headway.bench.named import named
from headway.core.cost import CostFit, Share
from headway.core.request import Request
from headway.core.settings import SchedulerSettings
from headway.placement.simulate import Device, fleet, priced

FIT = CostFit(step_s=0.07, token_s=0.00193, segment_s=0.001, pair_s=6.7e-7)
EXACT = Device(fit=FIT, tile_s=0.006, num_pages=40_000)
OURS = SchedulerSettings(
    max_model_len=8192, max_num_queued=100_000, pack_tokens=250, prefix_caching=False, max_parked_tokens=16_000
)
BY_ARRIVAL = replace(OURS, preempt="none", order="fcfs", pack=False, refuse_unattainable=False)


def believed(factor: float) -> Device:
    fit = CostFit(FIT.step_s * factor, FIT.token_s * factor, FIT.segment_s * factor, FIT.pair_s * factor)
    return replace(EXACT, believed=fit)


WRONG = {
    "half": believed(0.5),
    "double": believed(2.0),
    "only steps cost": replace(EXACT, believed=CostFit(step_s=0.25, token_s=0.0)),
    "spread": replace(EXACT, spread=0.5),
}


def attained(settings: SchedulerSettings, device: Device, rate: float, seed: int) -> dict[str, float]:
    """Of each class, which share of its requests met its targets."""
    load = named("qwen", num_requests=300, seed=seed).scaled(1 / 16).answering(1).at_rate(rate)
    slo = targets(load, FIT.seconds([Share(p90_prompt(load, base_kind(load)), 0)]), 3.0)
    sent = [
        Request(str(number), prompt, 1, asked.at_s, slo[asked.kind], slo_class=asked.kind)
        for number, (prompt, asked) in enumerate(zip(prompts(load, 50_000, 0), load.requests, strict=True))
    ]
    records = fleet(sent, [priced(settings, device, seed=3)]).records.values()
    asked_for = Counter(record.slo_class for record in records)
    met = Counter(record.slo_class for record in records if record.kind == "finished" and not record.missed)
    return {kind: met[kind] / number for kind, number in asked_for.items()}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("seed", [1, 2])
def test_wrong_prices_cost_little(seed: int, wrong: str) -> None:
    """At a load that the device can carry, no class attains less than if everybody was served by arrival on the same
    device, and none loses more than 15 points against exact prices."""
    ours = attained(OURS, WRONG[wrong], 2.0, seed)
    exact = attained(OURS, EXACT, 2.0, seed)
    by_arrival = attained(BY_ARRIVAL, WRONG[wrong], 2.0, seed)
    assert len(ours) == 4
    for kind, share in ours.items():
        assert share >= by_arrival[kind]
        assert share >= exact[kind] - 0.15
    assert ours["text"] > by_arrival["text"] + 0.05
