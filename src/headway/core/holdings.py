"""Which request holds which pages: the ticket's side of the page table."""

from collections import Counter
from collections.abc import Collection, Iterable

from headway.core.pages import PageTable
from headway.core.ticket import Ticket, Twin


class Holdings:
    """Takes, shares, publishes and gives back pages on behalf of tickets. Prompts are read together up to
    `pack_tokens`: of several answers to one that fits no two times into that, one reads it and the others find it
    cached."""

    def __init__(self, pages: PageTable, prefix_caching: bool, counters: Counter[str], pack_tokens: int = 0) -> None:
        self.pages = pages
        self.prefix_caching = prefix_caching
        self.counters = counters
        self._pack_tokens = pack_tokens
        self._twins: Counter[Twin] = Counter()  # open tickets of each
        self._awaiting: dict[bytes, set[int]] = {}  # key of a page that is not cached -> whose next one it is

    def expect_hits(self, ticket: Ticket) -> None:
        """Note how much of the prompt is cached now: a hint for its price, not a promise; and how much will be, when
        another answer to the same prompt of the same call has begun."""
        if not self.prefix_caching:
            return
        ticket.update_keys(self.pages.page_tokens)
        self.look_again(ticket)
        num_usable = self._num_usable(ticket)
        if 2 * num_usable * self.pages.page_tokens > self._pack_tokens:
            request = ticket.request
            twin = ticket.keys[num_usable - 1], request.arrival, request.priority, request.slo
            if self._twins[twin] and not ticket.needs_every_row:
                ticket.num_promised = num_usable * self.pages.page_tokens
            self._twins[twin] += 1
            ticket.twin = twin

    def look_again(self, ticket: Ticket) -> None:
        """Note how much of it is cached by now, if it has no pages yet, and which page it would need next."""
        if ticket.pages or not self.prefix_caching or ticket.needs_every_row:
            return
        num_matched = len(self._match(ticket))
        ticket.num_cached_hint = num_matched * self.pages.page_tokens
        self._await(ticket, ticket.keys[num_matched] if num_matched < self._num_usable(ticket) else None)

    def more_has_come(self, ticket: Ticket) -> bool:
        """Whether the page that it would need next is cached by now."""
        return ticket.awaited is not None and self.pages.knows(ticket.awaited)

    def _await(self, ticket: Ticket, key: bytes | None) -> None:
        if ticket.awaited == key:
            return
        if ticket.awaited is not None and (others := self._awaiting.get(ticket.awaited)):
            others.discard(ticket.number)
            if not others:
                del self._awaiting[ticket.awaited]
        ticket.awaited = key
        if key is not None:
            self._awaiting.setdefault(key, set()).add(ticket.number)

    def take_prompt(self, ticket: Ticket, reserve: int, now: float) -> bool:
        """Shared and fresh pages for all its tokens, leaving `reserve` pages; False (nothing changed) if too few."""
        matched = [] if ticket.pages else self._match(ticket)
        num_fresh = self.pages.pages_for(len(ticket.tokens)) - len(matched) - len(ticket.pages)
        if num_fresh + self.pages.num_cached(matched) + reserve > self.pages.num_available:
            self._starves(ticket, now)
            return False
        self.pages.share(matched)
        fresh = self.pages.take(num_fresh)
        assert fresh is not None
        if not ticket.pages:
            ticket.num_computed = len(matched) * self.pages.page_tokens
            ticket.num_published = len(matched)
            self.counters["prefix_queries"] += len(ticket.tokens)
            self.counters["prefix_hits"] += ticket.num_computed
            if ticket.record.first_scheduled is None:
                ticket.record.num_cached_tokens = ticket.num_computed
        ticket.num_cached_hint = 0
        self._await(ticket, None)
        ticket.pages += matched + fresh
        self.no_longer_starves(ticket, now)
        return True

    def has_room(self, ticket: Ticket) -> bool:
        """Whether all its tokens, the newest one included, have a place."""
        return len(ticket.tokens) <= len(ticket.pages) * self.pages.page_tokens

    def take_room(self, ticket: Ticket, now: float) -> bool:
        """A page for its newest token if it needs one; False if there is none."""
        if not self.has_room(ticket):
            fresh = self.pages.take(1)
            if fresh is None:
                self._starves(ticket, now)
                return False
            ticket.pages += fresh
        self.no_longer_starves(ticket, now)
        return True

    def publish(self, ticket: Ticket) -> Collection[int]:
        """Full pages become hits for others: the numbers of those who wait for one of them."""
        num_full = ticket.num_computed // self.pages.page_tokens
        if not self.prefix_caching or num_full <= ticket.num_published:
            return ()
        ticket.update_keys(self.pages.page_tokens)
        found: list[int] = []
        for index in range(ticket.num_published, num_full):
            self.pages.publish(ticket.pages[index], ticket.keys[index])
            found += self._awaiting.get(ticket.keys[index], ())
        ticket.num_published = num_full
        return found

    def release(self, ticket: Ticket) -> None:
        """Give everything back; what was computed is lost to this ticket, but may stay cached."""
        # the end of a prefix is worth less than its start: given back first, it is evicted first
        self.pages.give_back(reversed(ticket.pages))
        self._await(ticket, None)
        if ticket.twin is not None:
            self._twins[ticket.twin] -= 1
            if not self._twins[ticket.twin]:
                del self._twins[ticket.twin]
            ticket.twin, ticket.num_promised = None, 0
        ticket.pages = []
        ticket.num_computed = ticket.num_published = ticket.num_cached_hint = 0

    def park(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            self.pages.park(ticket.pages)

    def unpark(self, tickets: Iterable[Ticket]) -> None:
        for ticket in tickets:
            self.pages.unpark(ticket.pages)

    def no_longer_starves(self, ticket: Ticket, now: float) -> None:
        if ticket.starved_since is not None:
            ticket.record.starved_s += now - ticket.starved_since
            ticket.starved_since = None

    def check_integrity(self, tickets: Iterable[Ticket]) -> None:
        """Assert that those who may have twins are counted, and those who wait for a page known by it; nobody else."""
        tickets = list(tickets)
        assert Counter(ticket.twin for ticket in tickets if ticket.twin is not None) == self._twins
        awaited = {(ticket.awaited, ticket.number) for ticket in tickets if ticket.awaited is not None}
        assert awaited == {(key, number) for key, numbers in self._awaiting.items() for number in numbers}
        assert not any(ticket.pages for ticket in tickets if ticket.awaited is not None)

    def _starves(self, ticket: Ticket, now: float) -> None:
        if ticket.starved_since is None:
            ticket.starved_since = now

    def _match(self, ticket: Ticket) -> list[int]:
        """Pages that the ticket can start from: always leaves at least one token to compute. None for whom
        every token's hidden state is needed: no page has those."""
        if ticket.needs_every_row:
            return []
        return self.pages.match(ticket.keys[: self._num_usable(ticket)])

    def _num_usable(self, ticket: Ticket) -> int:
        return (len(ticket.tokens) - 1) // self.pages.page_tokens
