"""Who goes first, as stories: each known fault of deadline scheduling with slack, and that it is repaired here."""

from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from headway.core.policy import (
    PATIENCE_S,
    RESCUE_SHARE,
    STARVED_S,
    STRETCH,
    Candidate,
    Tier,
    should_switch,
    soft_deadline,
    standing,
)

TILE_S = 0.01


def candidate(
    target_s: float | None = None,
    *,
    arrival: float = 0.0,
    total_s: float = 1.0,
    remaining_s: float | None = None,
    priority: int = 0,
    starved_at: float = float("inf"),
) -> Candidate:
    """A prompt that arrived at `arrival` and wants its first token within `target_s`, if it says so."""
    return Candidate(
        key=1,
        arrival=arrival,
        priority=priority,
        deadline=None if target_s is None else arrival + target_s,
        rescue_s=RESCUE_SHARE * (target_s or 0.0),
        total_s=total_s,
        remaining_s=total_s if remaining_s is None else remaining_s,
        ripe_at=float("-inf"),
        starved_at=starved_at,
    )


def token(deadline: float, total_s: float = 0.02) -> Candidate:
    """One more token for all who are being read to."""
    begun = candidate(0.1, arrival=deadline - 0.1, total_s=total_s)
    return begun._replace(ripe_at=deadline - total_s - TILE_S, keeps_up=True)


def goes_first(a: Candidate, b: Candidate, now: float = 0.0) -> bool:
    return standing(a, now).order < standing(b, now).order


# Order


def test_who_is_being_read_to_is_never_too_late_to_keep_its_place() -> None:
    """A token is a second late. A prompt in the same state is a lost cause and waits; the token goes before the prompt
    on the device, though that is on time, and though it is too long for the token to be small beside it."""
    running = candidate(3.0, arrival=10.0, total_s=0.1)
    late = token(deadline=9.0)
    assert goes_first(late, running, now=10.0)
    assert should_switch(running, late, 10.0, TILE_S)
    assert goes_first(running, late._replace(keeps_up=False), now=10.0)


def test_among_those_on_time_the_earlier_deadline_goes_first() -> None:
    """Both can be met: plain earliest deadline first, whoever came first."""
    assert goes_first(candidate(2.0, arrival=0.5), candidate(4.0), now=0.5)


def test_feasible_goes_before_infeasible() -> None:
    """One wants in 1 s what takes 3 s; the other can still be served in time. The lost cause has the earlier deadline,
    and yet it waits: serving it first would miss both."""
    lost, winnable = candidate(1.0, total_s=3.0), candidate(5.0)
    assert goes_first(winnable, lost)
    assert standing(lost, 0.0).tier is Tier.BEST_EFFORT


def test_of_two_missed_the_later_deadline_does_not_win() -> None:
    """Ordering the infeasible by -1/deadline serves the freshest miss first and leaves the oldest for ever. Here the
    one that has waited longer goes first."""
    older, newer = candidate(1.0, arrival=0.0), candidate(1.0, arrival=2.0)
    assert standing(older, 9.0).tier is standing(newer, 9.0).tier is Tier.BEST_EFFORT
    assert goes_first(older, newer, now=9.0)


def test_one_just_past_its_target_keeps_its_place() -> None:
    """Predicted to be late by less than a tenth of its target, it still goes with those on time: dropping it to the
    back would turn a hair's breadth into a disaster. Beyond that it is best effort."""
    tight = candidate(1.0)
    assert standing(tight, 0.09).tier is Tier.ON_TIME
    assert standing(tight, 0.11).tier is Tier.BEST_EFFORT


def test_priority_has_the_sign_of_vllm() -> None:
    """Lower goes first, also against an earlier deadline, and also among those without a target."""
    assert goes_first(candidate(9.0, priority=-1), candidate(2.0, priority=0))
    assert goes_first(candidate(priority=1), candidate(priority=2))


def test_priority_does_not_turn_best_effort_into_a_promise() -> None:
    """A request without targets goes behind one that has a target, whatever its priority says."""
    assert goes_first(candidate(9.0, priority=5), candidate(priority=-5))


# Best effort


def test_best_effort_short_before_long() -> None:
    """Nobody asked for a deadline: each gets one in proportion to its size, so a short prompt is not behind a long."""
    short, long = candidate(total_s=0.3), candidate(total_s=3.0)
    assert goes_first(short, long)
    assert soft_deadline(0.0, 3.0) == STRETCH * 3.0
    assert soft_deadline(0.0, 0.1) == PATIENCE_S


def test_best_effort_ages() -> None:
    """A long prompt that has waited for most of its patience goes before a short one that has just come."""
    assert goes_first(candidate(total_s=3.0), candidate(arrival=28.5, total_s=0.1), now=28.5)


def test_best_effort_is_never_starved() -> None:
    """A stream of urgent requests never ends; some time after its soft deadline the one without a target goes first."""
    patient = candidate(total_s=3.0)
    starved_at = STRETCH * 3.0 + STARVED_S
    for now in (starved_at - 1.0, starved_at):
        urgent = candidate(2.0, arrival=now, priority=-9)
        assert goes_first(patient, urgent, now) == (now >= starved_at)
    assert should_switch(candidate(2.0, arrival=starved_at), patient, starved_at, TILE_S)


def test_of_two_starved_the_older_goes_first() -> None:
    """Among those who waited too long neither priority nor size counts."""
    assert goes_first(candidate(priority=5), candidate(arrival=1.0, priority=-5), now=100.0)


def test_a_step_that_was_parked_too_long_is_starved() -> None:
    """A suspended prefill holds memory: from `starved_at` on it goes before everything."""
    parked = candidate(remaining_s=0.5, starved_at=3.0)
    urgent = candidate(1.5, arrival=3.0)
    assert not goes_first(parked, urgent, now=2.9)
    assert goes_first(parked, urgent, now=3.0)


# Switching


def test_a_switch_needs_a_challenger_that_would_be_late() -> None:
    """The newcomer's deadline is the earlier one, but it can wait for what is running: nothing is gained."""
    running = candidate(20.0, total_s=2.0)
    assert not should_switch(running, candidate(10.0), 0.0, TILE_S)
    assert should_switch(running, candidate(2.5), 0.0, TILE_S)


def test_a_switch_needs_more_than_a_tile_to_gain() -> None:
    """What is running ends within one tile anyhow."""
    urgent = candidate(0.1, total_s=0.1)
    assert not should_switch(candidate(20.0, total_s=2.0, remaining_s=TILE_S), urgent, 0.0, TILE_S)
    assert should_switch(candidate(20.0, total_s=2.0, remaining_s=2 * TILE_S), urgent, 0.0, TILE_S)


def test_a_miss_is_not_traded_for_another() -> None:
    """Running to the end meets one deadline, switching would meet the other: the one that has begun keeps on."""
    running, challenger = candidate(1.1), candidate(1.05)
    assert standing(challenger, 0.0).slack_s < running.remaining_s
    assert not should_switch(running, challenger, 0.0, TILE_S)


def test_a_small_step_may_pass() -> None:
    """Same situation, but the challenger takes a twentieth of the time: one tile's worth of harm, one target saved."""
    running = candidate(1.01)
    assert should_switch(running, candidate(0.5, total_s=0.05), 0.0, TILE_S)
    assert not should_switch(running, candidate(0.5, total_s=0.2), 0.0, TILE_S)


def test_a_better_priority_may_cost_the_running_one_its_target() -> None:
    """Two targets cannot both be met; the caller has said which one matters."""
    assert should_switch(candidate(1.1), candidate(1.05, priority=-1), 0.0, TILE_S)


def test_best_effort_gives_way_to_a_target_but_not_the_other_way_round() -> None:
    """Whoever promised nothing can be suspended; it does not suspend a promise in return."""
    promised, unhurried = candidate(1.5), candidate(total_s=1.0)
    assert should_switch(unhurried, promised, 0.6, TILE_S)
    assert not should_switch(promised, unhurried, 0.6, TILE_S)
    assert should_switch(unhurried, candidate(1.5, arrival=8.8), 8.8, TILE_S), "even if its soft deadline is then lost"


@dataclass
class Runner:
    """A candidate that makes progress while it has the device."""

    arrival: float
    target_s: float | None
    total_s: float
    done_s: float = 0.0

    def now(self) -> Candidate:
        return candidate(
            self.target_s, arrival=self.arrival, total_s=self.total_s, remaining_s=self.total_s - self.done_s
        )


def count_switches(first: Runner, second: Runner, step_s: float) -> int:
    """Run both on one device with an event every `step_s`, until both are done."""
    now, switches = second.arrival, 0
    running, waiting = first, second
    running.done_s = min(running.total_s, now - running.arrival)
    while running.done_s < running.total_s or waiting.done_s < waiting.total_s:
        if running.done_s >= running.total_s:
            running, waiting = waiting, running
        elif waiting.done_s < waiting.total_s and should_switch(running.now(), waiting.now(), now, TILE_S):
            running, waiting = waiting, running
            switches += 1
        running.done_s += step_s
        now += step_s
    return switches


def test_two_equal_requests_never_trade_the_device() -> None:
    """Twins that came together, with a tight target, a loose one or none: however often something happens, whoever
    began goes on."""
    for target_s in (None, 0.5, 1.5, 3.0, 30.0):
        for total_s in (0.1, 1.0, 6.0):
            twins = Runner(0.0, target_s, total_s), Runner(0.0, target_s, total_s)
            assert count_switches(*twins, step_s=total_s / 50) == 0


@given(
    target_s=st.none() | st.floats(0.05, 30.0),
    total_s=st.floats(0.05, 10.0),
    gap_share=st.floats(0.0, 1.0),
    num_events=st.integers(5, 100),
)
def test_equal_requests_that_came_one_after_another_hardly_trade(
    target_s: float | None, total_s: float, gap_share: float, num_events: int
) -> None:
    """The older may lose the device when its target is lost, and take it back when the younger's is too: never more."""
    older, younger = Runner(0.0, target_s, total_s), Runner(gap_share * total_s, target_s, total_s)
    assert count_switches(older, younger, step_s=total_s / num_events) <= 2
