"""When a device is divided: only where a deadline would suffer, as an exhaustive search would, and not to and fro."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from headway.core.division import (
    BUSIEST,
    HARM_S,
    HOLD_S,
    MAX_SPLITS,
    STRETCH,
    Divider,
    Situation,
    by_turns,
    side_by_side,
)
from headway.core.roofline import Split

HALVES = (Split(1, 1),)
SPLITS = tuple(Split(units, 16 - units) for units in range(1, 16))
# prompts are late by turns: a token a third of a second apart takes a tenth
LATE = Situation(prompt_s=1.0, due_s=1.2, token_s=0.1, target_s=0.3, pages_used=0.1)


def free(split: Split) -> tuple[float, float]:
    """A device on which shares cost nothing."""
    return 1.0, 1.0


def test_taking_turns_leaves_the_rest_of_each_interval_to_prompts() -> None:
    assert by_turns(LATE) == pytest.approx((1.5, 0.3, 0.0))
    assert by_turns(LATE._replace(token_s=0.4)) == pytest.approx((5.0, 0.5, 0.0)), "a fifth of the time at least"


def test_riding_along_saves_what_a_step_costs_whatever_is_in_it() -> None:
    """A fifth of the prompt's second; then it is in time, and the device is not divided."""
    rides = LATE._replace(fixed_s=0.2, due_s=1.25)
    assert by_turns(rides) == pytest.approx((1.2, 0.3, 0.0))
    assert Divider("auto", HALVES).decide(rides, free, 0.0) is None
    assert Divider("auto", HALVES).decide(rides._replace(due_s=1.1), lambda split: (1.9, 1.2), 0.0) is None


def test_side_by_side_a_share_slows_prompts_while_tokens_are_made() -> None:
    """A third of each interval by turns; beside, at 1.2 times as long, 0.4 of it at half speed."""
    assert side_by_side(LATE, 2.0, 1.2, waits=True) == pytest.approx((1.25, 0.3, 0.4))
    assert side_by_side(LATE, 2.0, 1.2, waits=False) == pytest.approx((2.0, 0.12, 0.0))
    assert side_by_side(LATE, 2.0, 3.5, waits=True) == pytest.approx((2.0, 0.35, 3.5 / 3)), (
        "always, if they cannot wait"
    )


def test_it_does_not_divide_for_tokens_that_would_hardly_rest() -> None:
    """Beside prompts their steps would take nine tenths of the time in which they are wanted: with some more of them it
    is too much, and then they are late. Divided already, it stays so for a little longer."""

    def crowded(split: Split) -> tuple[float, float]:
        return 1.2, 2.7

    divider = Divider("auto", HALVES)
    assert divider.decide(LATE, crowded, 0.0) is None
    assert divider.decide(LATE, lambda split: (1.2, 2.3), 1.0) == Split(1, 1)
    assert divider.decide(LATE, crowded, 2.0) == Split(1, 1)
    assert divider.decide(LATE, crowded, 4.0) == Split(1, 1)
    divider.decide(LATE, lambda split: (1.2, 2.95), 5.0)
    assert divider.decide(LATE, lambda split: (1.2, 2.95), 6.5) is None


@pytest.mark.parametrize("lanes", ["turns", "mixed"])
def test_it_divides_only_if_told_so(lanes: str) -> None:
    assert Divider(lanes, HALVES).decide(LATE, free, 0.0) is None  # type: ignore[arg-type]


def test_a_fixed_split_stays() -> None:
    divider = Divider("split", SPLITS)
    assert divider.split == Split(8, 8)
    assert divider.decide(LATE._replace(due_s=math.inf), free, 0.0) == Split(8, 8)


def test_it_divides_when_a_first_token_would_be_late_and_not_before() -> None:
    divider = Divider("auto", HALVES)
    assert divider.decide(LATE._replace(due_s=1.6), free, 0.0) is None
    assert divider.decide(LATE._replace(due_s=math.inf), free, 1.0) is None, "nobody waits for it"
    assert divider.num_changes == 0
    assert divider.decide(LATE, free, 2.0) == Split(1, 1)
    assert divider.num_changes == 1


def test_it_does_not_divide_where_that_gains_nothing() -> None:
    """Both at once get no more done than one after the other; or tokens come too late."""
    assert Divider("auto", HALVES).decide(LATE, lambda split: (2.0, 2.0), 0.0) is None
    assert Divider("auto", HALVES).decide(LATE, lambda split: (2.0, 1.0), 0.0) == Split(1, 1)
    assert Divider("auto", HALVES).decide(LATE, lambda split: (1.0, 3.1), 0.0) is None
    assert Divider("auto", ()).decide(LATE, free, 0.0) is None


def test_a_way_that_was_taken_is_left_only_when_another_was_better_for_a_while() -> None:
    divider = Divider("auto", HALVES)
    calm = LATE._replace(due_s=10.0)
    divider.decide(LATE, free, 0.0)
    assert divider.decide(calm, free, 10.0) == Split(1, 1)
    assert divider.decide(LATE, free, 50.0) == Split(1, 1), "it was needed again: the wait begins anew"
    assert divider.decide(calm, free, 60.0) == Split(1, 1)
    assert divider.decide(calm, free, 60.0 + HOLD_S) is None


def test_a_division_that_does_harm_is_left_soon_and_not_tried_again_soon() -> None:
    divider = Divider("auto", HALVES)
    divider.decide(LATE, free, 0.0)
    assert divider.decide(LATE, lambda split: (3.0, 2.5), 0.5) == Split(1, 1), "once may be noise"
    assert divider.decide(LATE, lambda split: (3.0, 2.5), 0.5 + HARM_S) is None
    assert divider.decide(LATE, free, 2.0) is None
    assert divider.decide(LATE, lambda split: (3.0, 2.5), 3.0) is None
    assert divider.decide(LATE, free, 2.0 + 2 * HOLD_S) == Split(1, 1)
    calm = LATE._replace(due_s=10.0)
    divider.decide(calm, lambda split: (3.0, 2.5), 3.0 + 2 * HOLD_S)
    assert divider.decide(calm, lambda split: (3.0, 2.5), 4.0 + 2 * HOLD_S) is None, "where nothing is late either"


def test_harm_is_not_counted_from_when_it_was_merely_not_needed() -> None:
    """Calm for two seconds, then one prediction that says that the division does harm: that may be noise."""
    divider = Divider("auto", HALVES)
    calm = LATE._replace(due_s=10.0)
    divider.decide(LATE, free, 0.0)
    for instant in (1.0, 2.0):
        divider.decide(calm, free, instant)
    assert divider.decide(calm, lambda split: (3.0, 2.5), 3.0) == Split(1, 1)
    assert divider.decide(calm, free, 3.5) == Split(1, 1)
    assert divider.decide(calm, lambda split: (3.0, 2.5), 4.5) == Split(1, 1)


def test_what_was_left_because_it_was_not_needed_is_not_taken_again_at_once() -> None:
    """Needed once in seventy seconds: divided and left are one change a minute at most."""
    divider = Divider("auto", HALVES)
    calm = LATE._replace(due_s=10.0)
    for second in range(0, 3600):
        divider.decide(LATE if second % 70 == 0 else calm, free, float(second))
    assert divider.num_changes <= 60


def test_where_tokens_are_favoured_a_division_is_judged_by_them() -> None:
    """Pages are few: tokens come sooner beside prompts, which take longer. That is no harm."""
    divider = Divider("auto", HALVES)
    few = LATE._replace(pages_used=0.9)
    assert divider.decide(few, lambda split: (2.0, 1.2), 0.0) == Split(1, 1)
    for tick in range(20):
        assert divider.decide(few._replace(due_s=10.0), lambda split: (2.0, 1.2), 1.0 + tick / 2) == Split(1, 1)


def test_harm_is_left_each_time_and_comes_back_after_two_minutes() -> None:
    """A load that goes on as it was, ten looks a second: dividing looks good until it is done."""
    divider = Divider("auto", HALVES)
    changes = []
    for tick in range(2600):
        divided = divider.split is not None
        divider.decide(LATE, (lambda split: (3.0, 2.5)) if divided else free, tick / 10)
        if (divider.split is not None) != divided:
            changes.append(tick / 10)
    rounds = [number * (2 * HOLD_S + HARM_S) for number in range(3)]
    assert changes == pytest.approx([at for begun in rounds for at in (begun, begun + HARM_S)], abs=0.5)


def test_a_noisy_constant_load_changes_it_once_a_minute_at_most() -> None:
    """Predictions that differ by up to a third from one decision to the next, ten a second, for an hour."""
    rng = random.Random(0)
    divider = Divider("auto", SPLITS)
    for tick in range(36_000):
        noise = [rng.uniform(0.75, 1.33) for _ in range(4)]
        at = Situation(noise[0], 1.5 * noise[1], 0.1 * noise[2], 0.3, 0.5)

        def paces(split: Split, by: float = noise[3]) -> tuple[float, float]:
            return 16 / split.prompts * by, 6 / split.tokens * by

        divider.decide(at, paces, tick / 10)
    assert divider.num_changes <= 60


def test_few_pages_favour_tokens_until_there_are_enough() -> None:
    divider = Divider("auto", SPLITS)

    def paces(split: Split) -> tuple[float, float]:
        return 1 + 0.02 * split.tokens, 1 + 0.02 * split.prompts

    def now(pages_used: float) -> Split | None:
        fresh = Divider("auto", SPLITS, favours_tokens=divider.favours_tokens)
        split = fresh.decide(LATE._replace(pages_used=pages_used), paces, 0.0)
        divider.favours_tokens = fresh.favours_tokens
        return split

    assert now(0.65) == Split(15, 1)
    assert now(0.71) == Split(1, 15)
    assert now(0.65) == Split(1, 15), "between the marks it stays as it is"
    assert now(0.59) == Split(15, 1)


@given(
    st.builds(
        Situation,
        prompt_s=st.floats(0.001, 100),
        due_s=st.floats(0.001, 100),
        token_s=st.floats(0.001, 1),
        target_s=st.floats(0.001, 1),
        pages_used=st.floats(0, 1),
    ),
    st.lists(st.floats(1.0, 20.0), min_size=40, max_size=40),
    st.lists(st.floats(1.0, 20.0), min_size=40, max_size=40),
    st.integers(1, 40),
)
def test_six_evaluations_find_what_an_exhaustive_search_finds(
    at: Situation, stretches: list[float], paces: list[float], num_splits: int
) -> None:
    """More units never harm who has them; else anything may be predicted."""
    stretch_of = sorted(stretches[:num_splits], reverse=True)  # by units for prompts
    pace_of = sorted(paces[:num_splits])
    splits = tuple(Split(units, num_splits + 1 - units) for units in range(1, num_splits + 1))

    def predict(split: Split) -> tuple[float, float]:
        return stretch_of[split.prompts - 1], pace_of[split.prompts - 1]

    divider = Divider("auto", splits)
    chosen = divider.decide(at, predict, 0.0)
    assert divider.num_evaluations <= 6
    assert len(divider.splits) <= MAX_SPLITS

    turns = by_turns(at)
    if at.prompt_s * turns.stretch <= at.due_s and turns.gap_s <= at.target_s:
        assert chosen is None
        return
    waits = at.pages_used < 0.7
    found = {split: side_by_side(at, *predict(split), waits=waits) for split in divider.splits}
    if not waits:
        least = min(each.stretch for each in found.values())
        allowed = [split for split in found if found[split].stretch <= STRETCH * least]
        best = min(allowed, key=lambda split: (found[split].gap_s, split.prompts))
        gains = found[best].gap_s < turns.gap_s * 0.95
    else:
        allowed = [split for split in found if found[split].gap_s <= turns.gap_s and found[split].busy <= BUSIEST]
        best = max(allowed, key=lambda split: split.prompts, default=None)  # type: ignore[assignment]
        gains = best is not None and found[best].stretch < turns.stretch * 0.85
    assert chosen == (best if gains else None)
