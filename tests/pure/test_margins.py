"""Packs in whole runs with exact prices: whoever had time to spare still has, after being read with others.

Nobody who could be on time alone is made late by company, and nobody is brought closer to its deadline than the margin
that wrong prices are given.
"""

import random

import pytest
from story import Story

from headway.core.cost import CostFit, shares_of
from headway.core.policy import RESCUE_SHARE, Order
from headway.core.request import SLO, Request
from headway.core.settings import Lane, Lanes, SchedulerSettings
from headway.core.work import Segment, Work
from headway.placement.simulate import Device, fleet, priced

FIT = CostFit(step_s=0.05, token_s=0.001, segment_s=0.002, pair_s=1e-6)


def crowd(rng: random.Random, pace_s: float, *, answers: bool = False) -> list[Request]:
    now, sent = 0.0, []
    for number in range(250):
        now += rng.expovariate(1 / pace_s)
        slo = SLO(ttft_s=rng.choice((None, rng.uniform(0.08, 0.4), rng.uniform(0.3, 3.0))))
        prompt = (0,) * rng.choice((3, 10, 40, 120))
        sent.append(Request(f"r{number}", prompt, rng.choice((1, 1, 2, 6)) if answers else 1, now, slo))
    return sent


@pytest.mark.parametrize("lanes", ["turns", "mixed"])
@pytest.mark.parametrize("pace_s", [0.05, 0.08])
@pytest.mark.parametrize("order", ["slack", "deadline"])
@pytest.mark.parametrize("seed", range(4))
def test_company_takes_nobody_s_margin(seed: int, order: Order, pace_s: float, lanes: Lanes) -> None:
    """Every step with more than one prompt, at the instant it is planned: of each member with a target that could be
    met alone, the step's end is before the deadline less the margin. Members without such a target may wait. Tokens
    that ride along are company too."""
    sent = {request.id: request for request in crowd(random.Random(seed), pace_s, answers=lanes == "mixed")}
    settings = SchedulerSettings(
        max_model_len=400,
        pack_tokens=150,
        order=order,
        lanes=lanes,
        prefix_caching=False,
        refuse_unattainable=False,
        max_num_queued=1000,
    )
    engine = priced(settings, Device(fit=FIT, tile_s=0.005))
    plan = engine.scheduler.plan
    seen: set[int] = set()
    num_protected = 0

    def spare_s(segment: Segment, end: float) -> float | None:
        """How long before its deadline, less its margin, such an end is."""
        request = sent[segment.request_id]
        target_s = request.slo.ttft_s
        return None if target_s is None else request.arrival + target_s * (1 - RESCUE_SHARE) - end

    def watched(now: float, lane: Lane) -> Work | None:
        nonlocal num_protected
        work = plan(now, lane)
        if work is None or work.id in seen:
            return work
        seen.add(work.id)
        whole = [
            segment
            for segment in work.segments
            if segment.context_tokens + len(segment.tokens) == len(sent[segment.request_id].prompt)
        ]
        rides = len(whole) < len(work.segments)
        for number, segment in enumerate(whole if len(work.segments) > 1 else ()):
            before: list[Segment] = []
            if rides:  # who would be late behind these, if they went alone, may as well go with them
                before = [*(other for other in work.segments if other not in whole), *whole[:number]]
            alone_s = spare_s(segment, now + FIT.seconds(shares_of([*before, segment])))
            packed_s = spare_s(segment, now + FIT.seconds(shares_of(work.segments)))
            margin_s = 0.0 if rides else RESCUE_SHARE * (sent[segment.request_id].slo.ttft_s or 0.0)
            if alone_s is not None and packed_s is not None and alone_s >= -margin_s:  # in time, were it alone
                assert packed_s >= -1e-9
                num_protected += 1
        return work

    engine.scheduler.plan = watched  # type: ignore[method-assign]
    fleet(sent.values(), [engine])
    assert num_protected > 2, "hardly any packs: the story proves nothing"


def test_one_that_is_late_already_takes_no_urgency_from_its_pack() -> None:
    """It rides along with one that is in time; a third one, due later than that, waits its turn."""
    story = Story(pack_tokens=200)
    story.arrives("first", 50, slo=SLO(ttft_s=60.0))
    running = story.plan()
    story.arrives("late", 10, slo=SLO(ttft_s=0.3))
    story.arrives("in time", 40, slo=SLO(ttft_s=2.4))
    story.passes(0.5)
    story.done(running, first=7)
    pack = story.plan()
    assert pack is not None
    assert {segment.request_id for segment in pack.segments} == {"late", "in time"}
    story.passes(0.05)
    story.arrives("third", 180, slo=SLO(ttft_s=2.2))
    assert story.plan(progress=0.1) is pack


def test_company_takes_nothing_from_a_suspended_step() -> None:
    """An urgent prompt suspends one that can spare its time, but not that of everybody else who waits."""
    story = Story(pack_tokens=250)
    story.arrives("long", 200, slo=SLO(ttft_s=2.3))
    assert story.plan() is not None
    story.passes(0.1)
    for name in ("a", "b", "c"):
        story.arrives(name, 20)
    story.arrives("urgent", 11, slo=SLO(ttft_s=1.0))
    taken = story.plan(progress=0.05)
    assert taken is not None
    assert [segment.request_id for segment in taken.segments] == ["urgent"]


def test_a_starved_one_keeps_its_turn_in_company() -> None:
    """It has waited far too long and takes along one whose target is far: an urgent newcomer does not suspend it."""
    story = Story(pack_tokens=200)
    story.arrives("starved", 30, slo=SLO(ttft_s=0.3))
    story.arrives("far", 30, slo=SLO(ttft_s=600.0))
    story.passes(14.0)
    work = story.plan()
    assert work is not None
    assert len(work.segments) == 2
    story.arrives("urgent", 20, slo=SLO(ttft_s=0.3))
    assert story.plan(progress=0.05) is work
