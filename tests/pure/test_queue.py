"""The queue against the plain thing: sort everybody by `standing`, add up everybody in front, look at every instant.

Random comings and goings, steps of time, prices that turn out wrong, and tenants who have had more than their share.
At the end: that a decision looks at a few of a thousand, not at all of them.
"""

from collections import Counter
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story import Story

from headway.core import candidates, composition, forecast, policy, queue, scheduler
from headway.core import event as ev
from headway.core.candidates import number_of_ticket, ticket_candidate
from headway.core.cost import CostFit, CostModel, Share
from headway.core.policy import STARVED_SHARE, Candidate, Order, Tier, standing
from headway.core.queue import Queue
from headway.core.request import SLO, Request
from headway.core.settings import Lane
from headway.core.tenants import Tenants
from headway.core.ticket import Ticket

ORDERS = get_args(Order)
FIT = CostFit(step_s=0.3, token_s=0.01, segment_s=0.002, pair_s=1e-5)
CLOSE_S = 1e-9  # two that are due within so little of each other may stand in either order
NEVER = float("inf")


class Beside:
    """A queue, and beside it a list of who is in it, with every price that each could have been given so far."""

    def __init__(self, order: Order, pack_tokens: int) -> None:
        self.now = 100.0
        self.order = order
        self.pack_tokens = pack_tokens
        self.cost = CostModel(FIT)
        self.tenants = Tenants()
        self.queue = Queue(self.cost, self.tenants, order, pack_tokens)
        self.waiting: dict[int, Ticket] = {}
        self.prices: dict[int, dict[float, list[float]]] = {}  # number -> its seconds alone -> its seconds in a pack
        self.num_tickets = 0
        self.newcomer: str | None = None  # the tenant of somebody who is not in the queue yet

    def ticket(self, num_tokens: int, slo: SLO, priority: int, tenant: str, age_s: float) -> Ticket:
        prompt = (1,) * num_tokens
        request = Request(str(self.num_tickets), prompt, 1, self.now - age_s, slo, priority=priority, tenant=tenant)
        self.num_tickets += 1
        return Ticket.open(self.num_tickets, request, 10_000)

    def add(self, ticket: Ticket) -> None:
        self.waiting[ticket.number] = ticket
        self.queue.add(ticket, self.now)

    def discard(self, ticket: Ticket) -> None:
        del self.waiting[ticket.number]
        self.queue.discard(ticket)

    def take_prices(self) -> None:
        """What each would be priced at now: the queue may go on with an older price for a while."""
        for number, ticket in self.waiting.items():
            seconds = ticket_candidate(ticket, self.cost).remaining_s
            self.prices.setdefault(number, {}).setdefault(seconds, []).append(self.amortized_s(ticket, seconds))

    def amortized_s(self, ticket: Ticket, seconds: float) -> float:
        """A prompt of a tenth of a pack pays for a tenth of what the pack's step costs anyhow."""
        if not self.pack_tokens:
            return seconds
        others = 1 - min(1.0, len(ticket.tokens) / self.pack_tokens)
        return max(0.0, seconds - others * self.cost.predict([Share(0, 0)]))

    def debt_s(self, ticket: Ticket) -> float:
        return self.tenants.debts(self.newcomer).get(ticket.request.tenant, 0.0) * (FIT.token_s * self.cost.correction)

    def place(self, candidate: Candidate) -> tuple[float, ...]:
        return standing(candidate, self.now, self.order).order

    def in_order(self) -> list[Candidate]:
        self.take_prices()
        return list(self.queue.in_order(self.now))


def priced(ticket: Ticket, cost: CostModel, seconds: float) -> Candidate:
    return ticket_candidate(ticket, cost)._replace(total_s=seconds, remaining_s=seconds)


def check_order(beside: Beside) -> list[Candidate]:
    """Everybody once, at a price that was true once, with the debt of its tenant, and nobody before an earlier one."""
    next(beside.queue.in_order(beside.now), None)  # what one look has found is kept for the next
    found = beside.in_order()
    assert sorted(number_of_ticket(candidate.key) for candidate in found) == sorted(beside.waiting)
    for candidate in found:
        ticket = beside.waiting[number_of_ticket(candidate.key)]
        assert candidate.remaining_s in beside.prices[ticket.number]
        assert candidate == priced(ticket, beside.cost, candidate.remaining_s)._replace(debt_s=beside.debt_s(ticket))
    for candidate, sorted_one in zip(found, sorted(found, key=beside.place), strict=True):
        assert beside.place(candidate) == pytest.approx(beside.place(sorted_one), abs=CLOSE_S)
    return found


def check_instants(beside: Beside, found: list[Candidate]) -> None:
    """The next start and the next expiry against a look at everybody."""
    on_time = [c for c in found if standing(c, beside.now, beside.order).tier is Tier.ON_TIME]
    starts = [c.deadline - c.remaining_s for c in on_time if c.deadline is not None]
    assert beside.queue.next_start(beside.now) == min((s for s in starts if s > beside.now), default=NEVER)
    assert beside.queue.next_expiry() == min((ticket.expiry for ticket in beside.waiting.values()), default=NEVER)


def served_before(beside: Beside, found: list[Candidate], own: Candidate, nudge_s: float) -> float:
    """One after another is served, whoever stands first, until it is the newcomer's turn. While tenants wait beside
    each other, whoever is served makes those behind it, of the same tenant, due so much later."""
    of = {candidate.key: beside.waiting[number_of_ticket(candidate.key)].request.tenant for candidate in found}
    of[own.key] = beside.newcomer or ""
    shares = bool(beside.tenants.debts(beside.newcomer))
    served_s: Counter[str] = Counter()

    def place(candidate: Candidate) -> tuple[float, ...]:
        *tier, due = beside.place(candidate)
        after_s = served_s[of[candidate.key]] if shares and tier[0] != Tier.STARVED else 0.0
        if after_s:
            due = (due if candidate.debt_s else max(due, beside.now)) + after_s
        return (*tier, due + (nudge_s if candidate is own else 0.0))

    left = list(found)
    starved: list[float] = []
    while left and place(first := min(left, key=place)) < place(own):
        left.remove(first)
        (seconds,) = set(beside.prices[number_of_ticket(first.key)][first.remaining_s])
        served_s[of[first.key]] += seconds
        if place(first)[0] == Tier.STARVED:
            starved.append(seconds)
    if place(own)[0] != Tier.ON_TIME or not starved or beside.order != "slack":
        return sum(served_s.values())
    rest_s = sum(served_s.values()) - sum(starved)
    return rest_s + min(sum(starved), starved[0] + rest_s * STARVED_SHARE / (1 - STARVED_SHARE))


def check_seconds(beside: Beside, newcomer: Ticket) -> None:
    """What goes before a newcomer is what is served before it, each at its price in a pack."""
    found = beside.in_order()
    for _ in beside.waiting:  # after a change of prices they are made anew with every look, a few at a time
        found = beside.in_order()
    others = [c for c in found if standing(c, beside.now, beside.order).tier is not Tier.STARVED]
    assert list(beside.queue.in_order(beside.now, starved=False)) == others
    seconds = beside.queue.before(newcomer, beside.now)[1]
    if any(len(set(beside.prices[number_of_ticket(c.key)][c.remaining_s])) > 1 for c in found):
        return  # one price alone, several in a pack: the queue may have any of them
    own = ticket_candidate(newcomer, beside.cost)._replace(debt_s=beside.debt_s(newcomer))
    least, most = (served_before(beside, found, own, nudge_s) for nudge_s in (-CLOSE_S, CLOSE_S))
    assert least - CLOSE_S <= seconds <= most + CLOSE_S


targets = st.none() | st.floats(0.05, 20.0)
tickets = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(1, 300),
        "slo": st.builds(SLO, ttft_s=targets, total_s=targets),
        "priority": st.sampled_from([0, 0, 0, 1, -1]),
        "tenant": st.sampled_from(["", "a", "b"]),
        "age_s": st.just(0.0) | st.floats(0.0, 40.0),
    }
)
happenings = st.lists(
    st.one_of(
        st.tuples(st.just("comes"), tickets),
        st.tuples(st.just("comes"), tickets),
        st.tuples(st.just("goes"), st.integers(0, 30)),
        st.tuples(st.just("passes"), st.floats(0.0, 8.0)),
        st.tuples(st.just("learns"), st.tuples(st.floats(0.1, 8.0), st.sampled_from([1, 100]))),
        st.tuples(st.just("serves"), st.tuples(st.sampled_from(["", "a", "b"]), st.integers(1, 400))),
    ),
    max_size=30,
)


def happen(beside: Beside, what: str, how: object) -> None:
    match what, how:
        case "comes", dict():
            beside.add(beside.ticket(**how))
        case "goes", int():
            if beside.waiting:
                beside.discard(sorted(beside.waiting.items())[how % len(beside.waiting)][1])
        case "passes", float():
            beside.now += how
            late = {n: ticket for n, ticket in beside.waiting.items() if ticket.expiry <= beside.now}
            assert {ticket.number: ticket for ticket in beside.queue.expired(beside.now)} == late
            for ticket in late.values():
                beside.discard(ticket)
        case "learns", (float() as factor, int() as num_tokens):
            share = [Share(num_tokens, 0)]
            beside.cost.observe(FIT.price(share), factor * beside.cost.predict(share))
        case "serves", (str() as tenant, int() as num_tokens):
            if beside.tenants.num_waiting(tenant):
                beside.tenants.charge(tenant, num_tokens)


@pytest.mark.parametrize("order", ORDERS)
@given(crowd=st.lists(tickets, max_size=12), happens=happenings, newcomer=tickets, pack_tokens=st.sampled_from([0, 60]))
@settings(max_examples=60, deadline=None)
def test_the_queue_is_as_if_it_were_sorted_each_time(
    order: Order,
    crowd: list[dict[str, object]],
    happens: list[tuple[str, object]],
    newcomer: dict[str, object],
    pack_tokens: int,
) -> None:
    """After everything that can happen the order, the instants and all rows are those of the plain thing; at the end
    the seconds before one more are, too."""
    beside = Beside(order, pack_tokens)
    for what, how in [("comes", how) for how in crowd] + happens:
        happen(beside, what, how)
        found = check_order(beside)
        check_instants(beside, found)
        beside.queue.check_integrity()
    ticket = beside.ticket(**newcomer)  # type: ignore[arg-type]
    beside.newcomer = ticket.request.tenant
    beside.take_prices()
    check_seconds(beside, ticket)


def test_who_can_no_longer_be_on_time_goes_behind_and_at_last_in_front() -> None:
    """One wants its token within a second and is not begun, another within thirty: as time passes the first goes behind
    the second, and before everybody once it has waited far too long."""
    beside = Beside("slack", 0)
    beside.add(beside.ticket(10, SLO(ttft_s=1.0), 0, "", 0.0))
    beside.add(beside.ticket(10, SLO(ttft_s=30.0), 0, "", 0.0))
    orders = []
    for instant in (100.0, 102.0, 115.0):
        beside.now = instant
        orders.append([number_of_ticket(candidate.key) for candidate in check_order(beside)])
    assert orders == [[1, 2], [2, 1], [1, 2]]


def test_prices_are_made_anew_when_they_have_turned_out_wrong() -> None:
    """Twenty wait when the device turns out three times as slow: after some decisions all are priced by that."""
    beside = Beside("slack", 0)
    for number in range(20):
        beside.add(beside.ticket(100 + number, SLO(), 0, "", 0.0))
    before = sum(candidate.remaining_s for candidate in beside.in_order())
    for _ in range(20):
        beside.cost.observe(FIT.price([Share(100, 0)]), 3 * FIT.seconds([Share(100, 0)]))
    for _ in range(20):
        after = sum(candidate.remaining_s for candidate in beside.in_order())
    assert after == pytest.approx(3 * before, rel=CostModel.DRIFT)
    assert beside.queue.backlog_s == pytest.approx(after)


def test_whoever_is_in_debt_starves_so_much_later() -> None:
    """Two tenants' prompts have waited for minutes. Those of the one that has had five minutes more than its share
    stand behind the other's, and its newcomer behind the first of them only."""
    beside = Beside("slack", 0)
    for tenant, age_s in (("a", 300.0), ("b", 200.0), ("a", 100.0)):
        beside.add(beside.ticket(10, SLO(), 0, tenant, age_s))
    beside.tenants.charge("a", 30_000)
    newcomer = beside.ticket(10, SLO(), 0, "a", 150.0)
    assert [number_of_ticket(candidate.key) for candidate in check_order(beside)] == [2, 1, 3]
    assert beside.queue.before(newcomer, beside.now)[1] == pytest.approx(2 * beside.cost.prefill(10))


def test_whoever_is_in_debt_has_its_turn_at_last() -> None:
    """A tenant that had much waits while others, who had nothing, come and go without end, on time or starved: one of
    its prompts is in front when it has waited longer than they by its debt, and then the starved have had theirs."""
    beside = Beside("slack", 0)
    debtor = [beside.ticket(100, SLO(), 0, "a", 300.0) for _ in range(2)]
    for ticket in debtor:
        beside.add(ticket)
    beside.add(beside.ticket(100, SLO(ttft_s=30.0), 0, "b", 0.0))
    beside.add(beside.ticket(100, SLO(), 0, "c", 60.0))
    beside.tenants.charge("a", 25_000)  # 250 s
    one_s = beside.cost.prefill(100)
    assert [number_of_ticket(candidate.key) for candidate in check_order(beside)] == [4, 1, 2, 3]
    beside.tenants.charge("b", 5_000)
    beside.tenants.charge("c", 5_000)  # now 200 s
    assert [number_of_ticket(candidate.key) for candidate in check_order(beside)] == [1, 2, 4, 3]
    newcomer = beside.ticket(100, SLO(ttft_s=30.0), 0, "b", 0.0)
    share = STARVED_SHARE / (1 - STARVED_SHARE)
    assert beside.queue.before(newcomer, beside.now)[1] == pytest.approx(one_s * (2 + share))
    beside.queue.start([(debtor[0], 1.0)], beside.now)
    del beside.waiting[1]
    assert number_of_ticket(next(beside.queue.in_order(beside.now)).key) == 3
    beside.now += one_s / STARVED_SHARE
    assert number_of_ticket(next(beside.queue.in_order(beside.now)).key) == 2


def test_an_empty_queue_remembers_nobody() -> None:
    """Everybody has gone: no instant is left at which something would be due."""
    beside = Beside("slack", 60)
    for _ in range(5):
        beside.add(beside.ticket(10, SLO(ttft_s=5.0, total_s=9.0), 0, "", 0.0))
    for ticket in list(beside.waiting.values()):
        beside.discard(ticket)
    assert (beside.queue.next_start(beside.now), beside.queue.next_expiry()) == (NEVER, NEVER)
    assert (len(beside.queue), beside.queue.backlog_s, list(beside.queue.in_order(beside.now))) == (0, 0.0, [])


def test_those_who_have_left_are_not_remembered_for_long() -> None:
    """One waits for ever, thousands come with targets far away and go: what they were due at goes with most of them."""
    beside = Beside("slack", 0)
    beside.add(beside.ticket(10, SLO(), 0, "", 0.0))
    for _ in range(2000):
        ticket = beside.ticket(10, SLO(ttft_s=1e6, total_s=1e6), 0, "", 0.0)
        beside.add(ticket)
        beside.discard(ticket)
    heaps = (beside.queue._turns, beside.queue._starts, beside.queue._expiries)
    assert max(map(len, heaps)) < 100
    assert beside.queue.next_expiry() == NEVER
    beside.add(beside.ticket(10, SLO(ttft_s=1e6), 0, "", 0.0))
    for number in range(1000):  # who stays and is priced anew leaves as many behind
        beside.cost.fit = CostFit(step_s=0.1 + 0.001 * number)
        beside.queue.reprice([beside.num_tickets])
        beside.in_order()
    assert max(map(len, heaps)) < 100


# A decision looks at a few


def looks(monkeypatch: pytest.MonkeyPatch, num_waiting: int) -> Counter[str]:
    """How often one arrival and the plan after it price or place somebody, with so many in the queue, half of them
    with a target."""
    story = Story(num_pages=20_000, max_model_len=2000, max_num_queued=5000, max_num_seqs=5000, pack_tokens=100)
    story.arrives("running", 1500)
    running = story.plan()
    for number in range(num_waiting):
        slo = SLO(ttft_s=30.0 + 0.01 * number) if number % 2 else SLO()
        story.scheduler.handle(ev.Arrived(story.request(f"r{number}", 20, slo=slo, tenant="ab"[number % 2])), story.now)
    counts: Counter[str] = Counter()

    def counted(module: object, name: str) -> None:
        plain = getattr(module, name)

        def count(*arguments: object) -> object:
            counts[name] += 1
            return plain(*arguments)

        monkeypatch.setattr(module, name, count)

    for module in (queue, scheduler, composition, forecast, policy):
        if hasattr(module, "standing"):
            counted(module, "standing")
    for module in (queue, forecast, candidates):
        counted(module, "ticket_candidate")
    story.scheduler.handle(ev.Arrived(story.request("newcomer", 20, slo=SLO(ttft_s=0.5))), story.now)
    assert story.scheduler.plan(story.now, Lane(progress=0.1)) is not running
    monkeypatch.undo()
    return counts


def test_a_decision_does_not_look_at_all_of_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admitting, forecasting, choosing and packing with ten in the queue, and with a thousand: hardly more looks, and
    far from a look at each."""
    few, many = looks(monkeypatch, 10), looks(monkeypatch, 1000)
    assert few["standing"] > 0
    assert few["ticket_candidate"] > 0
    assert many["standing"] <= few["standing"] + 2 * policy.MAX_LOOKED_AT
    assert many["ticket_candidate"] <= few["ticket_candidate"] + 2
    assert many["standing"] < 150


def test_a_decision_looks_at_a_few_of_a_thousand_that_have_starved(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them goes first, in company of somebody who can be in time: the others are passed over at once."""
    story = Story(num_pages=20_000, max_model_len=2000, max_num_queued=5000, max_num_seqs=5000, pack_tokens=100)
    for number in range(1000):
        request = Request(f"old {number}", (1,) * 20, 1, -1000.0)
        story.scheduler.handle(ev.Arrived(request), story.now)
    for number in range(3):
        story.scheduler.handle(ev.Arrived(story.request(f"new {number}", 20, slo=SLO(ttft_s=9.0))), story.now)
    of, looked_at = Queue._of, list[int]()

    def counted(self: Queue, number: int, debt_s: float, now: float) -> Candidate:
        looked_at.append(number)
        return of(self, number, debt_s, now)

    monkeypatch.setattr(Queue, "_of", counted)
    work = story.scheduler.plan(story.now, Lane())
    assert work is not None
    names = [segment.request_id for segment in work.segments]
    assert sum(name.startswith("old") for name in names) == 1
    assert len(names) > 1
    assert len(looked_at) < 50
