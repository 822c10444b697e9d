"""The tickets that wait, in the order in which the policy would start them, without looking at all of them each time.

A thousand may wait, and a decision has a few hundred microseconds. So nothing is sorted when asked: a ticket is priced
once, when it comes, and put into the sorted row of its tenant and tier; heaps know when the next one changes its tier,
needs its start or expires. When the cost model has learnt that its prices are wrong by much, they are made anew, a few
with every decision.

Knows prices, deadlines and tenants. What a start needs besides (pages, places) is the scheduler's business.
"""

from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heappush
from itertools import tee
from typing import NamedTuple

from headway.core.candidates import prefill_s, ticket_candidate
from headway.core.cost import CostModel
from headway.core.policy import STARVED_SHARE, Candidate, Order, Tier, late_at, standing, starves_at
from headway.core.rows import NEVER, Key, Row, Shifted, merged
from headway.core.tenants import Tenants
from headway.core.ticket import Ticket

REPRICED_AT_ONCE = 2


class _Place(NamedTuple):
    """Where a ticket stands in the queue. `amortized_s` is its price when short prompts are read together."""

    ticket: Ticket
    candidate: Candidate
    tier: Tier
    key: Key
    amortized_s: float

    @property
    def start(self) -> float:
        """By when it must start to meet its target."""
        deadline = self.candidate.deadline
        return NEVER if deadline is None or self.tier is not Tier.ON_TIME else deadline - self.candidate.remaining_s


class Queue:
    """Everybody who waits for a first, or another, step of prefill."""

    def __init__(
        self,
        cost: CostModel,
        tenants: Tenants,
        order: Order = "slack",
        pack_tokens: int = 0,
        look_again: Callable[[Ticket], None] = lambda ticket: None,
    ) -> None:
        """`pack_tokens`: prompts are read together up to so many tokens; 0: one by one. `look_again` notes what a price
        depends on, before it is made anew."""
        self.cost = cost
        self.tenants = tenants
        self.order = order
        self.pack_tokens = pack_tokens
        self._look_again = look_again
        self.begun: set[int] = set()  # numbers of those whose prompt is read in part
        self._others_until = -NEVER  # the starved have had their share of the time up to then
        self._places: dict[int, _Place] = {}  # by ticket number
        self._rows: dict[Tier, dict[str, Row]] = {tier: {} for tier in Tier}
        self._num_in = [0 for _ in Tier]
        self._num_paced = [0 for _ in Tier]  # of these
        # instant and ticket number; an entry may speak of who has left, or moved
        self._turns: list[tuple[float, int]] = []  # when somebody's tier changes
        self._starts: list[tuple[float, int]] = []  # by when somebody on time must start
        self._expiries: list[tuple[float, int]] = []
        self._prices_of = cost.version
        self._stale: deque[int] = deque()  # numbers of those whose price is to be made anew
        self._orders: dict[bool, Iterator[Candidate]] = {}  # as far as they have been looked at, with and without …
        self._ordered_at: tuple[float, int, float] = (-NEVER, 0, 0.0)  # … the starved, at an instant, with these debts

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, number: int) -> bool:
        return number in self._places

    def ticket(self, number: int) -> Ticket:
        return self._places[number].ticket

    def amortized_s(self, number: int) -> float:
        """What it adds to a pack."""
        return self._places[number].amortized_s

    def add(self, ticket: Ticket, now: float) -> None:
        assert ticket.number not in self._places
        self._put(ticket, now)
        self.tenants.enter(ticket.request.tenant)
        if ticket.num_computed:
            self.begun.add(ticket.number)
        if ticket.expiry < NEVER:
            self._push(self._expiries, ticket.expiry, ticket.number, self._is_expiry)

    def discard(self, ticket: Ticket) -> None:
        """Take it out if it is in."""
        place = self._places.pop(ticket.number, None)
        self.begun.discard(ticket.number)
        if place is not None:
            self._take_out(place)
            self.tenants.leave(ticket.request.tenant)
        if not self._places:
            for heap in (self._turns, self._starts, self._expiries):
                heap.clear()

    def paced_share(self, tier: Tier) -> float:
        """Of those who wait in this tier or before it: who asked for a pace of tokens."""
        num = sum(self._num_in[: tier + 1])
        return sum(self._num_paced[: tier + 1]) / num if num else 0.0

    @property
    def has_on_time(self) -> bool:
        """Whether somebody waits who can still meet a target."""
        return bool(self._rows[Tier.ON_TIME])

    def start(self, members: Sequence[tuple[Ticket, float]], now: float) -> None:
        """So much of each goes into a step. If some of them have come first because they had starved, it is for a
        while the turn of those who can be in time."""
        places = [(self._places[ticket.number], share) for ticket, share in members]
        starved = [(at, share) for at, share in places if at.tier is Tier.STARVED]
        if starved and not self._starved_yield(now):
            first = starved[0][0]
            fixed_s = first.candidate.remaining_s - first.amortized_s
            starved_s = sum(share * (at.amortized_s + fixed_s / len(starved)) for at, share in starved)
            self._others_until = now + starved_s / STARVED_SHARE
        for ticket, _ in members:
            self.discard(ticket)

    def reprice(self, numbers: Iterable[int]) -> None:
        """What these tickets were priced by has changed: their prices are made anew, a few with every decision."""
        self._stale.extend(numbers)

    def in_order(self, now: float, *, starved: bool = True) -> Iterator[Candidate]:
        """Candidates, the first to start first, with those who have starved or without. The queue must not change
        meanwhile. A decision looks several times: what has been looked at is kept until something changes."""
        self._bring_up_to_date(now)
        at = now, self.tenants.version, self._served_token_s
        if at != self._ordered_at:
            self._orders.clear()
            self._ordered_at = at
        kept = self._orders.get(starved) or self._in_order(now, starved=starved)
        self._orders[starved], order = tee(kept)
        yield from order

    def _in_order(self, now: float, *, starved: bool) -> Iterator[Candidate]:
        debts = self._debts_s()
        for tier in Tier if starved else (Tier.ON_TIME, Tier.BEST_EFFORT):
            for number, debt_s in merged(self._rows_of(tier, debts, now), now):
                yield self._of(number, debt_s, now)

    def before(self, ticket: Ticket, now: float) -> tuple[int, float]:
        """How many would start before this ticket, were it in the queue, and the predicted seconds of that."""
        self._bring_up_to_date(now)
        tenant = ticket.request.tenant
        debts = self._debts_s(tenant)
        place = self._place(ticket, now)
        own_tier = place.tier
        if own_tier is Tier.STARVED and self._starved_yield(now):
            own_tier = Tier.BEST_EFFORT
        key = Shifted(tenant, Row(), debts.get(tenant, 0.0), own_tier is Tier.STARVED).of(place.key, now)
        first = [row for tier in Tier if tier < own_tier for row in self._rows_of(tier, debts, now)]
        rows = self._rows_of(own_tier, debts, now)
        if not debts or own_tier is Tier.STARVED:
            num, seconds = 0, 0.0
            for row in rows:
                num_before = row.num_before(key, now)
                num, seconds = num + num_before, seconds + row.first_s(num_before)
        else:
            num, seconds = self._before_in_turn(tenant, key, first, rows, now)
        if own_tier is Tier.ON_TIME and self._rows[Tier.STARVED]:
            return self._with_starved(num, seconds, debts, now)
        return num + sum([row.num for row in first]), seconds + sum([row.all_s for row in first])

    def _before_in_turn(
        self, tenant: str, key: Key, first: Iterable[Shifted], rows: Sequence[Shifted], now: float
    ) -> tuple[int, float]:
        """Of these rows, which share the device, those before somebody of this tenant, when `first` are served."""
        priority, due, number = key
        served_s: dict[str, float] = defaultdict(float)
        for row in first:
            served_s[row.tenant] += row.all_s
        num, seconds, own_s = 0, 0.0, served_s[tenant]
        for row in rows:
            if row.tenant == tenant:
                num_before = row.num_before(key, now)
                num, seconds = num + num_before, seconds + row.first_s(num_before)
        if own_s := own_s + seconds:  # what is served of its own tenant makes it later, too
            key = priority, max(due, now) + own_s, number
        for row in reversed(rows):  # who was starved, and yields, comes before the others of its tenant
            if row.tenant != tenant:
                num_before = row.num_before_in_turn(key, now, served_s[row.tenant])
                if num_before:  # else what the row takes need not be known
                    before_s = row.first_s(num_before)
                    served_s[row.tenant] += before_s
                    num, seconds = num + num_before, seconds + before_s
        return num, seconds

    def _with_starved(self, num: int, seconds: float, debts: Mapping[str, float], now: float) -> tuple[int, float]:
        """Before somebody who can be in time, behind so many others who can: of the starved, if it is their turn, one
        at once, and then their share of the time that the others take."""
        starved = self._starved(debts)
        at_once_s = 0.0
        if starved and not self._starved_yield(now):
            at_once_s = min(starved, key=lambda shifted: shifted.of(shifted.row.keys[0], now)).row.amortized_s[0]
        all_s, num_starved = sum([row.all_s for row in starved]), sum([row.num for row in starved])
        starved_s = min(all_s, at_once_s + seconds * STARVED_SHARE / (1 - STARVED_SHARE))
        share = starved_s / all_s if starved_s else 0.0
        return num + round(share * num_starved), seconds + starved_s

    def _starved_yield(self, now: float) -> bool:
        return now < self._others_until

    def _starved(self, debts: Mapping[str, float], *, yields: bool = False) -> list[Shifted]:
        return [Shifted(t, row, debts.get(t, 0.0), not yields) for t, row in self._rows[Tier.STARVED].items()]

    def _rows_of(self, tier: Tier, debts: Mapping[str, float], now: float) -> list[Shifted]:
        """The rows that are in this tier now. When the starved have had their share they count as best effort for a
        while."""
        yields = self._starved_yield(now)
        if tier is Tier.STARVED:
            return [] if yields else self._starved(debts)
        found = [Shifted(tenant, row, debts.get(tenant, 0.0)) for tenant, row in self._rows[tier].items()]
        return found + self._starved(debts, yields=True) if tier is Tier.BEST_EFFORT and yields else found

    def _of(self, number: int, debt_s: float, now: float) -> Candidate:
        candidate, tier = self._places[number].candidate, self._places[number].tier
        if tier is Tier.STARVED and self._starved_yield(now):
            candidate = candidate._replace(yields=True)
        return candidate._replace(debt_s=debt_s) if debt_s else candidate

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of everything that waits."""
        return sum([row.begun_s[-1] for rows in self._rows.values() for row in rows.values()])

    # Instants

    def expired(self, now: float) -> list[Ticket]:
        """Who has waited past the instant at which the whole answer was due."""
        late: list[Ticket] = []
        while self._expiries and self._expiries[0][0] <= now:
            place = self._places.get(heappop(self._expiries)[1])
            if place is not None and place.ticket.expiry <= now:
                late.append(place.ticket)
        return late

    def next_expiry(self) -> float:
        return self._first(self._expiries, self._is_expiry)

    def next_turn(self) -> float:
        """The next instant at which one of them is too late for its target, or has waited too long."""
        return self._first(self._turns, self._is_turn)

    def next_starved(self) -> float:
        """When the starved have their turn again, if there are any."""
        return self._others_until if self._rows[Tier.STARVED] else NEVER

    def next_start(self, now: float) -> float:
        """The next instant after `now` by which one of them must start to meet its target."""
        return self._first(self._starts, lambda place, instant: place.start == instant > now)

    def _is_turn(self, place: _Place, instant: float) -> bool:
        return self._turn(place) == instant

    @staticmethod
    def _is_start(place: _Place, instant: float) -> bool:
        return place.start == instant

    @staticmethod
    def _is_expiry(place: _Place, instant: float) -> bool:
        return place.ticket.expiry == instant

    def _push(
        self, heap: list[tuple[float, int]], instant: float, number: int, counts: Callable[[_Place, float], bool]
    ) -> None:
        """Entries that count no more go when they come to the front, or all of them when they are most of the heap."""
        if len(heap) > 4 * len(self._places) + 64:
            known = [(entry, self._places.get(entry[1])) for entry in set(heap)]
            heap[:] = [entry for entry, place in known if place is not None and counts(place, entry[0])]
            heapify(heap)
        heappush(heap, (instant, number))

    def _first(self, heap: list[tuple[float, int]], counts: Callable[[_Place, float], bool]) -> float:
        while heap:
            instant, number = heap[0]
            place = self._places.get(number)
            if place is not None and counts(place, instant):
                return instant
            heappop(heap)
        return NEVER

    def check_integrity(self) -> None:
        """Assert that every ticket is in exactly one row, at its place."""
        rows = [row for by_tenant in self._rows.values() for row in by_tenant.values()]
        assert sorted(key[2] for row in rows for key in row.keys) == sorted(self._places)
        waiting = Counter(place.ticket.request.tenant for place in self._places.values())
        assert all(self.tenants.num_waiting(tenant) == number for tenant, number in waiting.items())
        places = self._places.values()
        assert self._num_in == [sum(place.tier is tier for place in places) for tier in Tier]
        assert self._num_paced == [sum(place.tier is t and place.ticket.is_paced for place in places) for t in Tier]
        assert self.begun == {number for number, place in self._places.items() if place.ticket.num_computed}
        for row in rows:
            assert row.keys == sorted(row.keys)
            assert row.amortized_s == [self._places[number].amortized_s for *_, number in row.keys]

    # Inside

    def debt_s(self, tenant: str) -> float:
        """What this tenant has had beyond its share, in seconds of the device, if it waits now."""
        return self.tenants.debt(tenant) * self._served_token_s

    @property
    def _served_token_s(self) -> float:
        """What a token of what tenants have had counts."""
        return self.cost.fit.token_s * self.cost.correction

    def _debts_s(self, newcomer: str | None = None) -> Mapping[str, float]:
        return self.tenants.debts(newcomer, self._served_token_s)

    def _put(self, ticket: Ticket, now: float) -> None:
        """Price it, and let it stand where that puts it."""
        self._stand(self._place(ticket, now))

    def _stand(self, place: _Place) -> None:
        number, rows, tenant = place.ticket.number, self._rows[place.tier], place.ticket.request.tenant
        self._orders.clear()
        self._places[number] = place
        self._num_in[place.tier] += 1
        self._num_paced[place.tier] += place.ticket.is_paced
        if tenant not in rows:
            rows[tenant] = Row()
        rows[tenant].add(place.key, place.amortized_s)
        if (turn := self._turn(place)) < NEVER:
            self._push(self._turns, turn, number, self._is_turn)
        if (start := place.start) < NEVER:
            self._push(self._starts, start, number, self._is_start)

    def _place(self, ticket: Ticket, now: float) -> _Place:
        candidate = ticket_candidate(ticket, self.cost)
        return self._placed(ticket, candidate, self._amortized_s(ticket, candidate), now)

    def _placed(self, ticket: Ticket, candidate: Candidate, amortized_s: float, now: float) -> _Place:
        tier, _, _ = at = standing(candidate, now, self.order)
        priority, due = at.order[1:] if len(at.order) == 3 else (0.0, at.order[1])
        return _Place(ticket, candidate, tier, (priority, due, ticket.number), amortized_s)

    def _amortized_s(self, ticket: Ticket, candidate: Candidate) -> float:
        """The fixed part of a step is paid once for `pack_tokens` tokens, and a prompt once for all its answers."""
        remaining_s, num_tokens = candidate.remaining_s, ticket.num_to_compute
        if ticket.num_promised:
            remaining_s, num_tokens = prefill_s(ticket, self.cost, promised=True), num_tokens - ticket.num_promised
        if not self.pack_tokens:
            return remaining_s
        share = min(1.0, num_tokens / self.pack_tokens)
        return max(0.0, remaining_s - (1 - share) * self.cost.prefill(0))

    def _turn(self, place: _Place) -> float:
        """When it leaves its tier: a start becomes too late for its target, or it starves."""
        if self.order != "slack" or place.tier is Tier.STARVED:
            return NEVER
        starved = starves_at(place.candidate)
        return min(late_at(place.candidate), starved) if place.tier is Tier.ON_TIME else starved

    def _take_out(self, place: _Place) -> None:
        self._orders.clear()
        self._num_in[place.tier] -= 1
        self._num_paced[place.tier] -= place.ticket.is_paced
        rows, tenant = self._rows[place.tier], place.ticket.request.tenant
        rows[tenant].remove(place.key)
        if not rows[tenant].keys:
            del rows[tenant]

    def _bring_up_to_date(self, now: float) -> None:
        """Whoever's tier has changed by now goes to its new row. After a change of prices all do, a few at a time."""
        if self._prices_of != self.cost.version:
            self._prices_of = self.cost.version
            self._stale = deque(self._places)
        for _ in range(min(REPRICED_AT_ONCE, len(self._stale))):
            stale = self._places.get(self._stale.popleft())
            if stale is not None:
                self._look_again(stale.ticket)
                self._take_out(stale)
                self._put(stale.ticket, now)
        while self._turns and self._turns[0][0] <= now:
            instant, number = heappop(self._turns)
            moved = self._places.get(number)
            if moved is not None and self._turn(moved) == instant:
                self._take_out(moved)
                self._stand(self._placed(moved.ticket, moved.candidate, moved.amortized_s, now))
