"""Who goes first, and who must give way: deadlines, slack, tiers. Pure functions over candidates.

A candidate is any step that could have the device: a prompt not begun, a pack, a suspended step, the next token of
everybody who decodes. The policy sees prices and deadlines only, never what kind of work it is.

The order is EDF with slack (S-EDF, FlowPrefill, arXiv 2602.16603) with its known faults repaired: what can no longer
meet its target is ordered by an aged, size-proportional deadline instead of by -1/deadline; a request just past its
target keeps its place for a short while; a switch needs a reason (`whom_to_switch_to`); and nobody waits for ever. The
other orders are what others do, for comparison.
"""

from collections.abc import Iterable
from enum import IntEnum
from typing import Literal, NamedTuple

Order = Literal["slack", "deadline", "fcfs", "shortest"]

STRETCH = 10.0  # best effort: a request may take this many times its own prefill …
PATIENCE_S = 2.0  # … or this long, whichever is more, before it counts as late
STARVED_S = 10.0  # later than that by so much, it goes before everything …
STARVED_SHARE = 0.1  # … for so much of the time: many such would else keep out all who could be in time
SMALL_SHARE = 0.1  # of the running step's rest: a challenger this short may pass even one with no slack to spare
RESCUE_SHARE = 0.1  # of its target: how late a request may be predicted to be and still keep its place
AGEING = 0.05  # order "shortest": a second of waiting is worth so many seconds of work
MAX_LOOKED_AT = 32  # challengers: those further back are not looked at until they come forward


class Tier(IntEnum):
    """Candidates of a lower tier go first."""

    STARVED = 0
    ON_TIME = 1  # has a target that it can still meet
    BEST_EFFORT = 2  # has none, or can no longer meet it


class Candidate(NamedTuple):
    """`deadline` is absolute, None without a target; `rescue_s` how far past it still counts as on time.

    `total_s` is the whole predicted work, `remaining_s` what is left of it. `ripe_at`: before that instant there is
    no use in running it unless the device is idle. `starved_at`: from then on it goes first. `keeps_up`: it continues
    what callers are already reading, and what it asks for is bounded by who has been let in; so it may be late, but
    never too late to keep its place. `debt_s`: what those who sent it have had of the device beyond their share; it is
    ordered as if it were due so much later. `yields`: it has waited too long, but such ones have just had their share.
    """

    key: int  # the step's or ticket's number; says nothing to the policy
    arrival: float
    priority: int
    deadline: float | None
    rescue_s: float
    total_s: float
    remaining_s: float
    ripe_at: float
    starved_at: float = float("inf")
    keeps_up: bool = False
    debt_s: float = 0.0
    yields: bool = False


class Standing(NamedTuple):
    """A candidate's place at one instant. `order` compares; `slack_s` is what it can still wait."""

    tier: Tier
    order: tuple[float, ...]
    slack_s: float


def soft_deadline(arrival: float, total_s: float) -> float:
    """The deadline of a request that has no target, in proportion to its size: short ones first, all of them aged."""
    return arrival + max(PATIENCE_S, STRETCH * total_s)


def starves_at(candidate: Candidate) -> float:
    """When the candidate has waited so long that it goes before everything."""
    soft = soft_deadline(candidate.arrival, candidate.total_s)
    latest = soft if candidate.deadline is None else max(soft, candidate.deadline)
    return min(candidate.starved_at, latest + STARVED_S)


def late_at(candidate: Candidate, remaining_s: float | None = None) -> float:
    """When a start is too late for its target, the grace included; were there so much of it left, if that is given."""
    if candidate.deadline is None:
        return float("-inf")
    if candidate.keeps_up:
        return float("inf")
    return candidate.deadline - (candidate.remaining_s if remaining_s is None else remaining_s) + candidate.rescue_s


def standing(candidate: Candidate, now: float, by: Order = "slack") -> Standing:
    """Where the candidate stands now; sort by `order`, lowest first."""
    due = candidate.deadline
    if due is None:
        due = soft_deadline(candidate.arrival, candidate.total_s)
    slack_s = due - now - candidate.remaining_s
    if by == "slack":
        return _by_slack(candidate, now, slack_s)
    if now >= candidate.starved_at:
        return Standing(Tier.STARVED, (Tier.STARVED, candidate.arrival), slack_s)
    place = {
        "deadline": due,
        "fcfs": candidate.arrival,
        "shortest": candidate.remaining_s + AGEING * candidate.arrival,
    }[by]
    return Standing(Tier.ON_TIME, (Tier.ON_TIME, candidate.priority, _deferred(place, candidate, now)), slack_s)


def _by_slack(candidate: Candidate, now: float, slack_s: float) -> Standing:
    if now >= starves_at(candidate):
        if not candidate.yields or now >= candidate.starved_at:
            return Standing(Tier.STARVED, (Tier.STARVED, candidate.arrival + candidate.debt_s), slack_s)
        order = (Tier.BEST_EFFORT, 0.0, _deferred(candidate.arrival, candidate, now))
        return Standing(Tier.BEST_EFFORT, order, slack_s)
    if now < late_at(candidate) and candidate.deadline is not None:
        order = (Tier.ON_TIME, candidate.priority, _deferred(candidate.deadline, candidate, now))
        return Standing(Tier.ON_TIME, order, slack_s)
    soft = soft_deadline(candidate.arrival, candidate.total_s)
    order = (Tier.BEST_EFFORT, candidate.priority, _deferred(soft, candidate, now))
    return Standing(Tier.BEST_EFFORT, order, soft - now - candidate.remaining_s)


def can_wait_s(candidate: Candidate, now: float, by: Order = "slack") -> float:
    """How long it can still wait to be begun without being late, or, if it is predicted to be a little late anyhow,
    without losing its place; below 0: it has nothing left to lose."""
    tier, _, slack_s = standing(candidate, now, by)
    if slack_s < 0 and tier is Tier.ON_TIME and candidate.deadline is not None:
        return max(slack_s, late_at(candidate) - now)
    return slack_s


def _deferred(place: float, candidate: Candidate, now: float) -> float:
    """Its place among others if those who sent it have had more than their share: so much later than it would be, and
    however long it has waited, later than now; else an old flood would go before every newcomer. Among the starved it
    is only so much later: they have a share of the time, and nobody is to wait for ever."""
    return max(place, now) + candidate.debt_s if candidate.debt_s > 0 else place


def should_switch(
    running: Candidate, challenger: Candidate, now: float, least_gain_s: float, by: Order = "slack"
) -> bool:
    """Whether the running step must give way to this one. See `whom_to_switch_to`."""
    return whom_to_switch_to(running, (challenger,), now, least_gain_s, by) is not None


def whom_to_switch_to(
    running: Candidate, challengers: Iterable[Candidate], now: float, least_gain_s: float, by: Order = "slack"
) -> Candidate | None:
    """The first of the challengers, which come in order, if the running step must give way; else None.

    It must if somebody who goes before it would be late by waiting for it and for those in front, and its own miss
    would not be the only result: those before it take less than its slack, or little, or there are two of them at
    least, or one of a better tier or priority. `least_gain_s` is one tile: less is not worth a switch.
    """
    if running.remaining_s <= least_gain_s:
        return None
    own = standing(running, now, by)
    first: Candidate | None = None
    ahead_s = 0.0
    for number, challenger in enumerate(challengers):
        other = standing(challenger, now, by)
        late = other.slack_s < running.remaining_s + ahead_s
        if challenger.keeps_up and late and challenger.remaining_s <= SMALL_SHARE * running.remaining_s:
            return challenger  # whoever runs, a starved prompt too: it costs that one little, and comes not without end
        if other.order >= own.order or number >= MAX_LOOKED_AT:
            return None
        first = first or challenger
        if by != "slack" or other.tier is Tier.STARVED:
            return first
        ahead_s += challenger.remaining_s
        small = ahead_s <= SMALL_SHARE * running.remaining_s
        harmless = own.slack_s - ahead_s >= 0
        several = challenger is not first
        better = other.tier < own.tier or challenger.priority < running.priority
        if late and (small or harmless or several or better):
            return first
    return None
