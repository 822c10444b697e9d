"""How sure goodputs are: of requests that are drawn again, the same ones for all ways."""

import random

import pytest

from headway.bench.contest import Contender, Run
from headway.bench.multiplex_sure import BLOCK, TIMES, Drawings, drawn_again, pooled_goodput
from headway.bench.multiplex_sure import interval as interval_of
from headway.bench.multiplex_verdict import Kept
from headway.bench.score import score

NO_SCORE = score([], {})
RATES = (8.0, 10.0, 12.0)


def contender(name: str, shares: dict[float, float], num_requests: int, draws: int = 1, seed: int = 0) -> Contender:
    """Which requests meet their targets goes by the draw, not by who serves them: who attains more meets them too."""
    found = Contender(name, RATES[0])
    for draw in range(draws):
        luck = [random.Random(f"{seed}, {draw}, {number}").random() for number in range(num_requests)]
        for rate, share in shares.items():
            found.runs.append(Run(rate, NO_SCORE, met=tuple(each < share for each in luck), draw=draw))
    found.good = pooled_goodput(found)
    return found


def interval(again: Drawings) -> tuple[float, float]:
    found = interval_of(again)
    assert found is not None
    return found


def kept(*contenders: Contender) -> list[Kept]:
    again = drawn_again({each.name: each for each in contenders})
    return [Kept.of(each, again[each.name]) for each in contenders]


def test_what_is_the_same_is_surely_the_same() -> None:
    """The same requests for both: however unsure each goodput is, there is nothing between them."""
    shares = dict(zip(RATES, (0.95, 0.9, 0.85), strict=True))
    one, other = kept(contender("one", shares, 100), contender("other", shares, 100))
    low, high = interval(one.again)
    assert low < 0.97 * high
    over = one.over(other)
    assert sum(each == (1.0, 1.0) for each in over.again) > 0.95 * TIMES
    assert (over.says(0.97), over.says(1.15)) == ("reached", "not reached")


def test_more_requests_make_surer() -> None:
    """Four times as many, in one draw or in four: half as wide, as it is with shares."""
    shares = dict(zip(RATES, (0.97, 0.9, 0.8), strict=True))
    widths = []
    for num_requests, draws in ((100, 1), (400, 1), (400, 4)):
        found = [kept(contender("one", shares, num_requests, draws, seed))[0].again for seed in range(6)]
        widths.append(sum(high - low for low, high in map(interval, found)))
    assert widths[0] > 1.4 * widths[1] > 2.0 * widths[2]


def test_a_claim_that_drawings_leave_open_is_undecided() -> None:
    """The same shares of other requests, of which there are few."""
    shares = dict(zip(RATES, (0.95, 0.9, 0.85), strict=True))
    one, other = kept(contender("one", shares, 60), contender("other", shares, 60, seed=1))
    over = one.over(other)
    low, high = interval(over.again)
    assert low < 0.97 < high
    assert over.says(0.97) == "undecided"
    assert over.told.startswith(f"{over.ratio:.2f} ({low:.2f} … ")


def test_those_who_come_together_are_drawn_together() -> None:
    """Whole blocks that miss say less than as many requests that miss one by one."""
    together, apart = Contender("together", 1.0), Contender("apart", 1.0)
    for rate, num_missed in ((8.0, 1), (12.0, 3)):
        num = 20 * BLOCK
        together.runs.append(Run(rate, NO_SCORE, met=tuple(n >= num_missed * BLOCK for n in range(num))))
        apart.runs.append(Run(rate, NO_SCORE, met=tuple(n % 20 >= num_missed for n in range(num))))
    again = drawn_again({"together": together, "apart": apart})
    assert pooled_goodput(together) == pooled_goodput(apart) == pytest.approx(10.0)
    assert interval(again["apart"]) == pytest.approx((10.0, 10.0))
    low, high = interval(again["together"])
    assert high - low > 1.0


def test_what_is_beyond_the_rates_that_were_tried_is_not_known() -> None:
    """Below the lowest, or above the highest, in however few of the drawings."""
    below, above = contender("below", {8.0: 0.5, 10.0: 0.4}, 100), contender("above", {8.0: 1.0, 10.0: 0.99}, 100)
    nobody, everybody = kept(below, above)
    assert set(nobody.again) == {(0.0, 8.0)}
    assert set(everybody.again) == {(10.0, float("inf"))}
    assert nobody.told == "< 8.00 (0.00 … 8.00)"
    assert everybody.told == "≥ 10.00 (10.00 … )"
    assert everybody.over(everybody).says(0.97) == nobody.over(nobody).says(0.97) == "undecided"
    assert everybody.over(nobody).says(1.15) == "reached"


def test_each_part_of_a_load_keeps_its_share() -> None:
    """Of two parts only the second misses: however blocks are drawn, that is so many of all."""
    load = Contender("one", 1.0)
    for rate, num_missed in ((8.0, 10), (12.0, 30)):
        second = tuple(number % 100 >= num_missed for number in range(100))
        load.runs.append(Run(rate, NO_SCORE, met=(True,) * 100 + tuple(sorted(second))))
    low, high = interval(drawn_again({"one": load}, num_parts=2)["one"])
    freely = interval(drawn_again({"one": load})["one"])
    assert pooled_goodput(load) == pytest.approx(10.0)
    assert freely[0] <= low < 10.0 < high <= freely[1]
    regular = (True,) * 100 + tuple(number % 20 >= 4 for number in range(100))
    load.runs = [Run(rate, NO_SCORE, met=regular) for rate in (8.0, 12.0)]
    assert {low for low, _ in drawn_again({"one": load}, num_parts=2)["one"]} == {12.0}


def test_a_short_part_is_not_taken_for_sure() -> None:
    """Of a load of three parts with less than two blocks each: what is drawn again is not always the same."""
    luck = random.Random(0)
    load = Contender("one", 1.0)
    for rate, share in ((8.0, 0.97), (12.0, 0.8)):
        load.runs.append(Run(rate, NO_SCORE, met=tuple(luck.random() < share for _ in range(87))))
    low, high = interval(drawn_again({"one": load}, num_parts=3)["one"])
    assert low < 0.95 * high


def test_each_draw_counts_alike() -> None:
    """However many runs of it there are: of one there may be those of two ways that did the same."""
    load = Contender("one", 1.0)
    for rate, share in ((8.0, 20), (12.0, 16)):
        met = tuple(number < share for number in range(20))
        load.runs += [Run(rate, NO_SCORE, met=met)] * 3
        load.runs.append(Run(rate, NO_SCORE, met=(True,) * 20, draw=1))
    assert pooled_goodput(load) == pytest.approx(12.0)
