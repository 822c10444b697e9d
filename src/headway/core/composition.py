"""What goes into a new step: prompts that may be read together, one more token for all who decode, or both at once.

Both at once is how tokens ride along: with as much of the prompts as leaves them in time (`along`). `mixture` is what
chunked prefill does, where a step cannot be suspended and is kept short instead; it is here so that the two can be
compared in one program.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

from headway.core.candidates import ALONG, WHOLE, number_of_ticket
from headway.core.cost import Amount, CostModel, Share
from headway.core.holdings import Holdings
from headway.core.lifecycle import State
from headway.core.packing import MAX_MEMBERS, pack
from headway.core.policy import RESCUE_SHARE, Candidate, Order, Tier, can_wait_s, standing
from headway.core.queue import Queue
from headway.core.sharing import Sharing
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

    def prompts(self, first: Candidate, num_places: int, spare_s: float, now: float) -> Step | None:
        """This prompt and those behind it that fit into one prefill without harm to each other, or to suspended steps,
        which can wait for `spare_s`; None if there are no pages."""
        members = self._with_pages(self._packed(self._from(first, num_places, now), spare_s, now), now)
        return self.steps.begin(members, now, decoding=False) if members else None

    def along(
        self,
        token: Candidate,
        first: Candidate,
        num_places: int,
        spare_s: float,
        sharing: Sharing,
        now: float,
        *,
        waits: bool,
    ) -> Step | None:
        """The next token of all between two steps and of the prompts, from this one on, as much as leaves it in time;
        None if that gains nothing, or there are no pages. Where tokens have a lane, prompts are not cut for them.
        `waits`: if they do not go together, the prompt waits for the token, and not the token for the prompt."""
        prompts = self._along(token, self._from(first, num_places, now), spare_s, sharing, now, waits=waits)
        members = self._with_pages(prompts, now)
        return self.steps.begin([*self._with_room(now), *members], now, decoding=False) if members else None

    def _from(self, first: Candidate, num_places: int, now: float) -> Iterator[Candidate]:
        """It and those behind it that there may be places for."""
        # while somebody can be in time the starved go one at a time
        alone = self.queue.has_on_time and standing(first, now, self.order).tier is Tier.STARVED
        others = (other for other in self.queue.in_order(now, starved=not alone) if other.key != first.key)
        for candidate in islice(chain((first,), others), max(1, min(num_places, MAX_MEMBERS))):
            ticket = self.queue.ticket(number_of_ticket(candidate.key))
            if self.holdings.more_has_come(ticket):
                self.holdings.look_again(ticket)
            yield candidate

    def _with_pages(self, wanted: list[tuple[Ticket, int | None]], now: float) -> list[tuple[Ticket, int | None]]:
        """Those of them that have pages, or find some, up to the first that does not: they leave the queue."""
        members = []
        for ticket, most in wanted:
            if not (ticket.number in self.queue.begun or self._take_pages(ticket, now)):
                break
            members.append((ticket, most))
        self._start(members, now)
        return members

    def _start(self, members: list[tuple[Ticket, int | None]], now: float) -> None:
        """They leave the queue, with all that there is of them or so many tokens."""
        self.queue.start([(t, 1.0 if most is None else most / t.num_to_compute) for t, most in members], now)

    def _packed(self, candidates: Iterable[Candidate], spare_s: float, now: float) -> list[tuple[Ticket, int | None]]:
        """As many of them, the first one included, as can be read together."""
        tickets: list[Ticket] = []
        slacks_s: list[float] = []
        num_tokens = 0
        for candidate in candidates:
            tickets.append(self.queue.ticket(number_of_ticket(candidate.key)))
            slacks_s.append(self._spare_s(candidate, now))
            num_tokens += tickets[-1].num_to_compute - tickets[-1].num_cached_hint
            if num_tokens > self.pack_tokens:
                break
        num_members = pack([_share(t) for t in tickets], slacks_s, self.cost, self.pack_tokens, spare_s)
        return [(ticket, None) for ticket in tickets[:num_members]]

    def _along(
        self,
        token: Candidate,
        candidates: Iterable[Candidate],
        spare_s: float,
        sharing: Sharing,
        now: float,
        *,
        waits: bool,
    ) -> list[tuple[Ticket, int | None]]:
        """How much of which prompts goes into one step with the next token of all, so that it comes in time: all that
        fits, the last one cut, or whole, and the token a little later, if it would be late in parts. Nobody waits for
        others behind it who cannot, and who would be late in this company stays behind. If they end sooner, the token
        gains if it adds less to them than the part of a step of its own that it saves: one that comes when half of its
        time is over saves half a step. None of them if it does not, or if one would be late for the token's sake."""
        assert token.deadline is not None
        left_s = max((token.deadline - now) / self.cost.upper(1.0), ALONG * token.total_s)
        context = [ticket.num_computed for ticket in self.between_steps()]
        together, prompts = Amount.next_tokens(len(context), sum(context)), Amount()
        members: list[tuple[Ticket, int | None]] = []
        seconds = self.cost.of(together)
        for candidate in candidates:
            ticket = self.queue.ticket(number_of_ticket(candidate.key))
            share = _share(ticket)
            before_s, seconds = seconds, self.cost.of(together.plus(share))
            fits = seconds <= left_s
            # a price grows ever faster with its tokens: part of them costs less than in proportion
            most = share.num_tokens if fits else int(share.num_tokens * (left_s - before_s) / (seconds - before_s))
            read_s = seconds if fits else left_s * share.num_tokens / max(most, 1)
            slack_s = self._spare_s(candidate, now)
            if (  # late in parts, but not whole: by itself it would cost the token more
                not sharing.is_divided
                and now + seconds - token.arrival <= WHOLE * token.rescue_s
                and seconds - candidate.remaining_s <= slack_s < read_s - candidate.remaining_s
            ):
                fits, read_s = True, seconds
            is_late = 0 <= slack_s < read_s - candidate.remaining_s
            if is_late and not members and not (waits and fits):
                return []
            if members:
                room = self.pack_tokens - prompts.tokens
                alone_s = self.cost.of(prompts.plus(share)) - candidate.remaining_s
                if fits and is_late and alone_s <= slack_s and not waits:
                    return []
                if (share.num_tokens if fits else 1) > room or (is_late and (alone_s > slack_s or not fits)):
                    seconds = before_s
                    break
                most = min(most, room)
            taken_s = seconds if fits else left_s
            if (members and taken_s > spare_s) or (not fits and sharing.is_divided):
                seconds = before_s
                break
            if not fits:
                return [*members, (ticket, most)] if most > 0 else members
            together, prompts = together.plus(share), prompts.plus(share)
            members.append((ticket, None))
            if slack_s >= 0:
                spare_s = min(spare_s, slack_s + candidate.remaining_s)
        saved = min(1.0, (now + seconds - token.arrival) / token.rescue_s)
        gains = seconds - self.cost.of(prompts) < saved * sharing.toll * token.total_s
        return members if members and gains else []

    def _take_pages(self, ticket: Ticket, now: float) -> bool:
        return self.holdings.take_prompt(ticket, len(self.decoding), now)

    def _spare_s(self, candidate: Candidate, now: float) -> float:
        """What it can give to others in its step: its slack but for a margin, since prices are not exact."""
        slack_s = can_wait_s(candidate, now, self.order)
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
        self._start(members[num_decoding:], now)
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
                if self._take_pages(ticket, now):
                    num_places -= 1
                    yield ticket
            elif num_begun == 0:
                return

    def _with_room(self, now: float) -> list[tuple[Ticket, int | None]]:
        """All between two steps, with a page for the next token. Who finds none may cost others their own: first
        prompts that are read in part and in no step, then those who decode, the latest comer of them first."""
        between = self.between_steps()
        in_need = [ticket for ticket in between if not self.holdings.has_room(ticket)]
        for ticket in sorted(in_need, key=_urgency):
            while ticket.state is State.DECODING and not self.holdings.take_room(ticket, now):
                begun = [self.queue.ticket(number) for number in self.queue.begun]
                self._recompute_later(max(begun or self.between_steps(), key=_urgency), now)
        return [(ticket, None) for ticket in (self.between_steps() if in_need else between)]

    def _recompute_later(self, ticket: Ticket, now: float) -> None:
        """Back to the queue, or to its place in it, without its pages: its tokens are kept, their keys and values are
        computed again."""
        self.holdings.counters["recomputes"] += 1
        ticket.record.num_recomputes += 1
        ticket.record.note(now, "recomputed", "its pages were given to others")
        if ticket.state is State.DECODING:
            del self.decoding[ticket.number]
            ticket.move(State.QUEUED)
        else:
            self.queue.discard(ticket)
        self.holdings.release(ticket)
        self.holdings.expect_hits(ticket)
        self.queue.add(ticket, now)


def _share(ticket: Ticket) -> Share:
    """What there is to compute of it, as far as is known."""
    hint = ticket.num_cached_hint
    return Share(ticket.num_to_compute - hint, ticket.num_computed + hint)


def _urgency(ticket: Ticket) -> tuple[int, int]:
    """Among those who decode: by priority, then first come."""
    return ticket.request.priority, ticket.number
