"""The steps that have begun and not ended: the one in each lane of the device, and those that are suspended.

Owns starting, suspending, resuming and removing them, and what each of that means for their tickets and pages. Which
step it should be is not decided here.
"""

from collections import Counter
from collections.abc import Sequence

from headway.core.cost import CostModel, Price, shares_of
from headway.core.holdings import Holdings
from headway.core.lifecycle import State
from headway.core.settings import MAIN, Lane
from headway.core.ticket import Step, Ticket
from headway.core.work import Segment, Work

NOWHERE = range(0)


class Steps:
    """All open steps of one engine, by the id of their Work."""

    def __init__(self, stage: str, cost: CostModel, holdings: Holdings, counters: Counter[str]) -> None:
        self.on: dict[str, Step] = {}  # by lane
        self._stage = stage
        self._cost = cost
        self._holdings = holdings
        self._counters = counters
        self._open: dict[int, Step] = {}
        self._num_works = 0

    def __getitem__(self, work_id: int) -> Step:
        return self._open[work_id]

    def __contains__(self, work_id: int) -> bool:
        return work_id in self._open

    @property
    def on_device(self) -> Step | None:
        """The one in the main lane."""
        return self.on.get(MAIN)

    def all(self) -> list[Step]:
        return list(self._open.values())

    def parked(self) -> list[Step]:
        return [step for step in self._open.values() if step.parked_since is not None]

    def begin(self, members: Sequence[tuple[Ticket, int | None]], now: float, *, decoding: bool) -> Step:
        """A new step of these tickets, each with all its tokens that are not computed yet or the first so many."""
        self._num_works += 1
        work = Work(self._num_works, self._stage, tuple(_segment(ticket, most) for ticket, most in members))
        tickets = [ticket for ticket, _ in members]
        price = self._price(work.segments, decoding=decoding)
        step = Step(work, tickets, price, self._cost.seconds(price), decoding, seen_at=now)
        self._open[work.id] = step
        for ticket in tickets:
            ticket.step = step
            if ticket.state is State.QUEUED:
                ticket.move(State.RUNNING)
                if ticket.record.first_scheduled is None:
                    ticket.record.first_scheduled = now
                ticket.record.note(now, "scheduled", f"{step.num_tokens} tokens of {len(tickets)} requests in the step")
        return step

    def _price(self, segments: Sequence[Segment], *, decoding: bool) -> Price:
        if decoding and sum([len(segment.tokens) for segment in segments]) == len(segments):
            return self._cost.fit.next_tokens(len(segments), sum([segment.context_tokens for segment in segments]))
        return self._cost.fit.price(shares_of(segments))

    def put(self, step: Step, lane: str, now: float) -> Work:
        """The lane is the step's from here on; whose it was is parked, or gone."""
        if step.parked_since is not None:
            self._resume(step, now)
        self.on[lane] = step
        step.seen_at = now
        return step.work

    def see(self, lane: Lane, now: float) -> None:
        """How far the step in a lane has come."""
        step = self.on.get(lane.name)
        if step is not None:
            step.progress = lane.progress
            step.seen_at = now

    def may_park(self, running: Step, most: int, most_tokens: int) -> bool:
        """Suspended work is bounded in count and in bytes. A step of single tokens keeps next to nothing."""
        if running.decoding:
            return True
        num_parked, num_tokens = self._kept()
        return num_parked < most and num_tokens + running.num_tokens <= most_tokens

    def may_swap(self, running: Step, parked: Step, most_tokens: int) -> bool:
        """Whether a suspended step may take the running one's place: that may keep more."""
        if running.decoding or parked.decoding or running.num_tokens <= parked.num_tokens:
            return True
        return self._kept()[1] - parked.num_tokens + running.num_tokens <= most_tokens

    def may_begin(self, most: int, most_tokens: int) -> bool:
        """Whether a prompt may begin that a token may have to suspend: one at least, or none ever would."""
        num_parked, num_tokens = self._kept()
        return num_parked == 0 or (num_parked < most and num_tokens < most_tokens)

    def _kept(self) -> tuple[int, int]:
        """How many prompts' steps are suspended, and their tokens."""
        sizes = [step.num_tokens for step in self.parked() if not step.decoding]
        return len(sizes), sum(sizes)

    def park(self, step: Step, now: float) -> None:
        self._counters["preemptions"] += 1
        step.stop(now)
        step.parked_since = now
        self._holdings.park(step.tickets)
        for ticket in step.tickets:
            ticket.record.num_preemptions += 1
            if ticket.state is State.RUNNING:
                ticket.move(State.PARKED)
                ticket.record.note(now, "parked", f"{step.progress:.0%} of the step done")
        num_tokens = sum(other.num_tokens for other in self.parked())
        self._counters["most_parked_tokens"] = max(self._counters["most_parked_tokens"], num_tokens)

    def _resume(self, step: Step, now: float) -> None:
        assert step.parked_since is not None
        self._holdings.unpark(step.tickets)
        for ticket in step.tickets:
            ticket.record.parked_s += now - step.parked_since
            if ticket.state is State.PARKED:
                ticket.move(State.RUNNING)
                ticket.record.note(now, "resumed")
        step.parked_since = None

    def remove(self, work_id: int) -> Step:
        step = self._open.pop(work_id)
        if step.parked_since is not None:
            self._holdings.unpark(step.tickets)
        for lane, on_it in list(self.on.items()):
            if on_it is step:
                del self.on[lane]
        return step

    @staticmethod
    def members(step: Step) -> list[tuple[Segment, Ticket]]:
        """Its segments with their tickets, without those that have left."""
        if len(step.tickets) == len(step.work.segments):
            return list(zip(step.work.segments, step.tickets, strict=True))
        by_id = {ticket.request.id: ticket for ticket in step.tickets}
        return [(s, by_id[s.request_id]) for s in step.work.segments if s.request_id in by_id]


def _segment(ticket: Ticket, most: int | None) -> Segment:
    start, request = ticket.num_computed, ticket.request
    end = len(ticket.tokens) if most is None else min(len(ticket.tokens), start + most)
    tokens = tuple(ticket.tokens[start:end])
    logits_at = (len(tokens) - 1,) if ticket.draws_after(end) else ()
    scored_at = NOWHERE if request.sampling.num_prompt_logprobs is None else ticket.scored_within(start, end)
    return Segment(request.id, tokens, start, start, tuple(ticket.pages), logits_at, request.adapter, scored_at)
