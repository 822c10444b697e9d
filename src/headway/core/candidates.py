"""Turns tickets and steps into the candidates that the policy compares: a price, a deadline, a time to be ripe. And
what those who decode take of the device."""

from collections.abc import Collection

from headway.core.cost import CostModel
from headway.core.lifecycle import State
from headway.core.policy import RESCUE_SHARE, Candidate, late_at, starves_at
from headway.core.settings import SchedulerSettings
from headway.core.ticket import Step, Ticket

SOFT_TPOT_S = 0.2  # without a TPOT target a request still gets a token this often while prompts are being read
IN_TURN = 2.0  # times as long as a token's step is its target at least: the other half of the time is for prompts …
ALONG = 1.25  # … a fifth, if prompts get on in the same step
WHOLE = 1.5  # times its target: so late a token may be that a prompt rides along whole which else would be late
LONGEST_GAP = 2.0  # times its target: an answer that is ahead of its pace may be kept waiting for prompts so long
SHORTEST_GAP = 0.75  # times its target: one that is behind its pace is due so soon
PACE = 0.95  # of its target: the last token may be late by what nobody foresaw
CREDIT = 0.5  # of its target: an answer may be so much behind its pace …
PAYS_BACK = 16  # … as long as so many tokens are surely to come, in which it catches up
NEXT_TOKEN = 0  # the key of the step that does not exist yet: one more token for everybody who decodes

ALWAYS = float("-inf")
NEVER = float("inf")


def key_of_ticket(number: int) -> int:
    """Keys: 0 the next token, n > 0 the Work n, below 0 a ticket in the queue."""
    return -1 - number


def number_of_ticket(key: int) -> int:
    return -1 - key


def prefill_s(ticket: Ticket, cost: CostModel, *, as_fitted: bool = False, promised: bool = False) -> float:
    """Seconds to compute what is not in pages yet, as far as is known; `promised`: nor will be, when its turn comes."""
    hint = max(ticket.num_cached_hint, ticket.num_promised) if promised else ticket.num_cached_hint
    return cost.prefill(ticket.num_to_compute - hint, ticket.num_computed + hint, as_fitted=as_fitted)


def ticket_candidate(ticket: Ticket, cost: CostModel) -> Candidate:
    """A prompt alone. One that lost its pages in mid-answer counts from its last token, and if it was promised a pace
    it keeps its place however late it is: its caller is reading."""
    slo, last = ticket.request.slo, ticket.record.last_token
    if last is None:
        start, target = ticket.request.arrival, _first_token_within(ticket, cost)
        latest = slo.ttft_s if slo.ttft_s is not None else slo.total_s
    else:
        start, target = last, slo.tpot_s or SOFT_TPOT_S
        latest = target
    seconds = prefill_s(ticket, cost)
    return Candidate(
        key=key_of_ticket(ticket.number),
        arrival=start,
        priority=ticket.request.priority,
        deadline=None if target is None else start + target,
        rescue_s=0.0 if target is None or latest is None else latest * (1 + RESCUE_SHARE) - target,
        total_s=seconds,
        remaining_s=seconds,
        ripe_at=ALWAYS,
        keeps_up=last is not None and slo.tpot_s is not None,
    )


def _first_token_within(ticket: Ticket, cost: CostModel) -> float | None:
    """The TTFT target, or what the whole answer's leaves for it if that is less: not all of the answer may come to be
    written, so half of it at least. It orders; on time is still who can meet the target itself."""
    slo = ticket.request.slo
    if slo.total_s is None:
        return slo.ttft_s
    answer_s = max(0, ticket.max_tokens - 1) * cost.next_tokens(1, len(ticket.request.prompt))
    left_s = max(slo.total_s / 2, slo.total_s - answer_s)
    return left_s if slo.ttft_s is None else min(slo.ttft_s, left_s)


def on_pace(ticket: Ticket, target_s: float) -> float:
    """When its next token is due, if it may be later, or must be sooner, by what the answer is ahead of its pace, or
    behind it; within bounds. Where targets are judged at the door, steps are shorter than they, and a long answer can
    catch up."""
    record = ticket.record
    assert record.first_token is not None
    assert record.last_token is not None
    credit = CREDIT if ticket.num_surely - record.num_output_tokens >= PAYS_BACK else 0.0
    on_time = record.first_token + (PACE * record.num_output_tokens + credit) * target_s
    latest = record.last_token + LONGEST_GAP * target_s
    return max(record.last_token + SHORTEST_GAP * target_s, min(on_time, latest))


def next_tokens_s(tickets: Collection[Ticket], cost: CostModel) -> float:
    """One more token for each of them in one step, alone on the device."""
    return cost.next_tokens(len(tickets), sum([ticket.num_computed for ticket in tickets]))


def shortest_target_s(step_s: float, tile_s: float, *, rides: bool) -> float:
    """The pace that tokens can be held to whose step takes so long: a target that the device cannot meet still leaves
    some of its time to prompts. In turns that is cut into tiles; what tokens ride along with ends when they are due."""
    return ALONG * step_s if rides else IN_TURN * step_s + tile_s


def token_share(tickets: Collection[Ticket], cost: CostModel, tile_s: float, *, rides: bool) -> float:
    """The share of the device that their tokens take if each comes just when it is due."""
    step_s = next_tokens_s(tickets, cost)
    target_s = min([ticket.request.slo.tpot_s or SOFT_TPOT_S for ticket in tickets])
    return step_s / max(target_s, shortest_target_s(step_s, tile_s, rides=rides))


def token_candidate(tickets: list[Ticket], cost: CostModel, tile_s: float, *, rides: bool = False) -> Candidate:
    """One step for everybody who decodes. It may wait until the first token would come late, less one tile; where it
    `rides` along with prompts, as long as its answer's pace allows."""
    predicted_s = next_tokens_s(tickets, cost)
    shortest_s = shortest_target_s(predicted_s, tile_s, rides=rides)
    deadline = rescue_s = arrival = priority = NEVER
    for ticket in tickets:
        request, last = ticket.request, ticket.record.last_token
        assert last is not None, "a request decodes after its first token"
        target = request.slo.tpot_s or SOFT_TPOT_S
        if target < shortest_s:
            target = shortest_s
        if last < arrival:
            arrival = last
        due = on_pace(ticket, target) if rides else last + target
        if due < deadline:
            deadline = due
        if target < rescue_s:
            rescue_s = target
        if request.priority < priority:
            priority = request.priority
    return Candidate(
        key=NEXT_TOKEN,
        arrival=arrival,
        priority=int(priority),
        deadline=deadline,
        rescue_s=rescue_s,
        total_s=predicted_s,
        remaining_s=predicted_s,
        ripe_at=deadline - predicted_s - tile_s,
        keeps_up=True,
    )


def step_candidate(step: Step, cost: CostModel, settings: SchedulerSettings, now: float) -> Candidate:
    """A step that has begun: as urgent as its most urgent member that can still be in time, if there is one. A decision
    looks several times: what it has found is kept as long as it is true."""
    remaining_s = step.remaining_at(now)
    at = now, remaining_s, step.parked_since
    if step.seen_as is None or step.seen_as[0] != at:
        step.seen_as = at, _seen(step, cost, settings, remaining_s, now)
    return step.seen_as[1]


def _seen(step: Step, cost: CostModel, settings: SchedulerSettings, remaining_s: float, now: float) -> Candidate:
    if step.candidates is None:
        step.candidates = _candidates(step, cost, settings.tile_s)
        step.starved_at = min([starves_at(member) for member in step.candidates])
    members = step.candidates
    parked_until = NEVER if step.parked_since is None else step.parked_since + settings.max_parked_s
    due = [member for member in members if member.deadline is not None]
    in_time = [member for member in due if now < late_at(member, remaining_s)]
    urgent = min(in_time or due, key=_deadline, default=None)
    return Candidate(
        key=step.work.id,
        arrival=min([member.arrival for member in members]),
        priority=min([member.priority for member in in_time or members]),
        deadline=None if urgent is None else urgent.deadline,
        rescue_s=0.0 if urgent is None else urgent.rescue_s,
        total_s=step.predicted_s,
        remaining_s=remaining_s,
        ripe_at=ALWAYS,
        starved_at=min(parked_until, step.starved_at),
        keeps_up=urgent is not None and urgent.keeps_up,
    )


def _candidates(step: Step, cost: CostModel, tile_s: float) -> tuple[Candidate, ...]:
    """What it is made of, by the prices at its beginning: each prompt, and the next token of those who decode."""
    if step.decoding:
        return (token_candidate(step.tickets, cost, tile_s),)
    riders = [ticket for ticket in step.tickets if ticket.state is State.DECODING]
    prompts = [ticket_candidate(ticket, cost) for ticket in step.tickets if ticket.state is not State.DECODING]
    return (*prompts, token_candidate(riders, cost, tile_s, rides=True)) if riders else tuple(prompts)


def _deadline(candidate: Candidate) -> float:
    return NEVER if candidate.deadline is None else candidate.deadline
