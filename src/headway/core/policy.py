"""Who goes first, and who must give way: deadlines, slack, tiers. Pure functions over candidates.

A candidate is any step that could have the device: a prompt not begun, a pack, a suspended step, the next token of
everybody who decodes. The policy sees prices and deadlines only, never what kind of work it is.

The order is EDF with slack (S-EDF, FlowPrefill, arXiv 2602.16603) with its known faults repaired: what can no longer
meet its target is ordered by an aged, size-proportional deadline instead of by -1/deadline; a request just past its
target keeps its place for a short while; a switch needs a reason (`should_switch`); and nobody waits for ever.
"""

from enum import IntEnum
from typing import NamedTuple

STRETCH = 10.0  # best effort: a request may take this many times its own prefill …
PATIENCE_S = 2.0  # … or this long, whichever is more, before it counts as late
STARVED_S = 10.0  # later than that by so much, it goes before everything
SMALL_SHARE = 0.1  # of the running step's rest: a challenger this short may pass even one with no slack to spare
RESCUE_SHARE = 0.1  # of its target: how late a request may be predicted to be and still keep its place


class Tier(IntEnum):
    """Candidates of a lower tier go first."""

    STARVED = 0
    ON_TIME = 1  # has a target that it can still meet
    BEST_EFFORT = 2  # has none, or can no longer meet it


class Candidate(NamedTuple):
    """`deadline` is absolute, None without a target; `rescue_s` how far past it still counts as on time.

    `total_s` is the whole predicted work, `remaining_s` what is left of it. `ripe_at`: before that instant there is
    no use in running it unless the device is idle. `starved_at`: from then on it goes first. `keeps_up`: it continues
    what callers are already reading, and what it asks for is bounded by who has been let in.
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


class Standing(NamedTuple):
    """A candidate's place at one instant. `order` compares; `slack_s` is what it can still wait."""

    tier: Tier
    order: tuple[float, ...]
    slack_s: float


def soft_deadline(arrival: float, total_s: float) -> float:
    """The deadline of a request that has no target, in proportion to its size: short ones first, all of them aged."""
    return arrival + max(PATIENCE_S, STRETCH * total_s)


def standing(candidate: Candidate, now: float) -> Standing:
    """Where the candidate stands now; sort by `order`, lowest first."""
    soft = soft_deadline(candidate.arrival, candidate.total_s)
    latest = soft if candidate.deadline is None else max(soft, candidate.deadline)
    if now >= min(candidate.starved_at, latest + STARVED_S):
        return Standing(Tier.STARVED, (Tier.STARVED, candidate.arrival), soft - now - candidate.remaining_s)
    if candidate.deadline is not None:
        slack = candidate.deadline - now - candidate.remaining_s
        if slack >= -candidate.rescue_s:
            return Standing(Tier.ON_TIME, (Tier.ON_TIME, candidate.priority, candidate.deadline), slack)
    slack = soft - now - candidate.remaining_s
    return Standing(Tier.BEST_EFFORT, (Tier.BEST_EFFORT, candidate.priority, soft), slack)


def should_switch(running: Candidate, challenger: Candidate, now: float, least_gain_s: float) -> bool:
    """Whether the running step must give way: only if the challenger goes before it, would be late by waiting for it,
    and does not merely trade its own miss for the other's. `least_gain_s` is one tile: less is not worth a switch."""
    own, other = standing(running, now), standing(challenger, now)
    if running.remaining_s <= least_gain_s:
        return False
    late = other.slack_s < running.remaining_s
    small = challenger.remaining_s <= SMALL_SHARE * running.remaining_s
    if challenger.keeps_up and small and late:
        return True  # whoever runs, a starved prompt too: it costs that one little, and it cannot come without end
    if other.order >= own.order:
        return False
    if other.tier is Tier.STARVED:
        return True
    harmless = own.slack_s - challenger.remaining_s >= 0
    return late and (small or harmless or other.tier < own.tier or challenger.priority < running.priority)
