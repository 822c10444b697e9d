"""What goes into a new step: prompts that may be read together, one more token for all who decode, or both at once.

The mixture is what chunked prefill does, where a step cannot be suspended and is kept short instead; it is here so that
the two can be compared in one program.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from headway.core.candidates import number_of_ticket
from headway.core.cost import CostModel, Share
from headway.core.holdings import Holdings
from headway.core.lifecycle import State
from headway.core.packing import MAX_MEMBERS, pack
from headway.core.policy import RESCUE_SHARE, Candidate, Order, standing
from headway.core.queue import Queue
from headway.core.steps import Steps
from headway.core.ticket import Step, Ticket


@dataclass(frozen=True, slots=True)
class Composer:
    """Makes steps out of tickets. `decoding` are those with a first token, by number; `pack_tokens` 0: no packs."""

    queue: Queue
    decoding: dict[int, Ticket]
    steps: Steps
    holdings: Holdings
    cost: CostModel
    order: Order
    pack_tokens: int

    def between_steps(self) -> list[Ticket]:
        """Who waits for another token."""
        return [ticket for ticket in self.decoding.values() if ticket.step is None]

    def prompts(
        self, chosen: Candidate, num_places: int, spare_s: float, now: float, token: Candidate | None = None
    ) -> Step | None:
        """The chosen prompt and those behind it that fit into one prefill without harm to each other, or to suspended
        steps, which can wait for `spare_s`; None if there are no pages. `token`: the next one of all between two steps,
        if it may ride along."""
        candidates, tickets = [chosen], [self.queue.ticket(number_of_ticket(chosen.key))]
        num_tokens = tickets[0].num_to_compute - tickets[0].num_cached_hint
        if num_tokens < self.pack_tokens:
            others = (other for other in self.queue.in_order(now) if other.key != chosen.key)
            for other in islice(others, min(num_places, MAX_MEMBERS) - 1):
                candidates.append(other)
                tickets.append(self.queue.ticket(number_of_ticket(other.key)))
                num_tokens += tickets[-1].num_to_compute - tickets[-1].num_cached_hint
                if num_tokens > self.pack_tokens:
                    break
        shares = [Share(t.num_to_compute - t.num_cached_hint, t.num_cached_hint) for t in tickets]
        slacks_s = [self._spare_s(candidate, now) for candidate in candidates]
        num_members = pack(shares, slacks_s, self.cost.predict, self.pack_tokens, spare_s)
        members: list[tuple[Ticket, int | None]] = []
        for ticket in tickets[:num_members]:
            if not self.holdings.take_prompt(ticket, len(self.decoding), now):
                break
            members.append((ticket, None))
        for ticket, _ in members:
            self.queue.discard(ticket)
        if members and token is not None and self._rides_along(token, [ticket for ticket, _ in members], now):
            members = self._with_room(now) + members
        return self.steps.begin(members, now, decoding=False) if members else None

    def _rides_along(self, token: Candidate, prompts: list[Ticket], now: float) -> bool:
        """Whether the next token of all gains by coming with these prompts. It does if it comes in time, and adds less
        to them than the part of a step of its own that it saves: one that comes when half of its time is over saves
        half a step."""
        between = self.between_steps()
        shares = [Share(t.num_to_compute, t.num_computed) for t in prompts]
        without_s = self.cost.predict(shares)
        with_s = self.cost.predict([*shares, *(Share(1, t.num_computed) for t in between)])
        assert token.deadline is not None
        share = (now - token.arrival) / max(token.deadline - token.arrival, 1e-9)
        return now + with_s <= token.ripe_at + token.remaining_s and with_s - without_s < share * token.remaining_s

    def _spare_s(self, candidate: Candidate, now: float) -> float:
        """What it can give to others in its step: its slack but for a margin, since prices are not exact."""
        slack_s = standing(candidate, now, self.order).slack_s
        margin_s = 0.0 if candidate.deadline is None else RESCUE_SHARE * (candidate.deadline - candidate.arrival)
        return slack_s if slack_s < 0 else max(0.0, slack_s - margin_s)

    def tokens(self, now: float) -> Step | None:
        """One more token for everybody between two steps."""
        members = self._with_room(now)
        return self.steps.begin(members, now, decoding=True) if members else None

    def mixture(self, num_tokens: int, num_places: int, now: float) -> Step | None:
        """One more token for everybody, and of the prompts as much as fits into `num_tokens`, in their order."""
        members = self._with_room(now)
        num_decoding, budget = len(members), num_tokens - len(members)
        prompts = self._prompts_with_pages(num_places, now) if budget > 0 else iter(())
        for ticket in prompts:
            members.append((ticket, min(budget, ticket.num_to_compute)))
            budget -= min(budget, ticket.num_to_compute)
            if budget <= 0 or not self.pack_tokens:
                break
        for ticket, _ in members[num_decoding:]:
            self.queue.discard(ticket)
        return self.steps.begin(members, now, decoding=len(members) == num_decoding) if members else None

    def _prompts_with_pages(self, num_places: int, now: float) -> Iterator[Ticket]:
        """Prompts in order: those that have begun, who have their pages and must get on or nobody does, and as many
        new ones as there are places and pages for."""
        num_begun, num_tries = len(self.queue.begun), MAX_MEMBERS
        for candidate in self.queue.in_order(now):
            ticket = self.queue.ticket(number_of_ticket(candidate.key))
            if ticket.number in self.queue.begun:
                num_begun -= 1
                yield ticket
            elif num_places > 0 and num_tries > 0:
                num_tries -= 1
                if self.holdings.take_prompt(ticket, len(self.decoding), now):
                    num_places -= 1
                    yield ticket
            elif num_begun == 0:
                return

    def _with_room(self, now: float) -> list[tuple[Ticket, int | None]]:
        """All between two steps, with a page for the next token; who finds none may cost the latest comer its own."""
        between = self.between_steps()
        in_need = [ticket for ticket in between if not self.holdings.has_room(ticket)]
        for ticket in sorted(in_need, key=_urgency):
            while ticket.state is State.DECODING and not self.holdings.take_room(ticket, now):
                self._recompute_later(max(self.between_steps(), key=_urgency), now)
        return [(ticket, None) for ticket in (self.between_steps() if in_need else between)]

    def _recompute_later(self, ticket: Ticket, now: float) -> None:
        """Back to the queue without its pages: its tokens are kept, their keys and values are computed again."""
        self.holdings.counters["recomputes"] += 1
        ticket.record.num_recomputes += 1
        ticket.record.note(now, "recomputed", "its pages were given to others")
        del self.decoding[ticket.number]
        ticket.move(State.QUEUED)
        self.holdings.release(ticket)
        self.holdings.expect_hits(ticket)
        self.queue.add(ticket, now)


def _urgency(ticket: Ticket) -> tuple[int, int]:
    """Among those who decode: by priority, then first come."""
    return ticket.request.priority, ticket.number
