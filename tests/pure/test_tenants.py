"""Nobody drowns in another's flood: accounts done by hand, then crowds on a virtual clock.

In whole runs a prompt of 100 tokens takes 0.1 s, one at a time.
"""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from story import Story, ending

from headway.bench.storm import survive
from headway.core import event as ev
from headway.core.admission import TENANT_SHARE
from headway.core.cost import CostFit
from headway.core.ledger import Record
from headway.core.request import SLO, Request
from headway.core.settings import SchedulerSettings
from headway.core.tenants import MOST_REMEMBERED, Tenants
from headway.placement.simulate import Device, fleet, priced

# Accounts


def test_a_tenant_alone_owes_nothing() -> None:
    tenants = Tenants()
    tenants.enter("a")
    tenants.charge("a", 1000)
    assert tenants.debts() == {}


def test_debt_is_what_one_had_beyond_the_least_served() -> None:
    tenants = Tenants()
    for tenant in "abc":
        tenants.enter(tenant)
    for tenant, num_tokens in (("a", 700), ("b", 200), ("c", 300)):
        tenants.charge(tenant, num_tokens)
    assert tenants.debts() == {"a": 500, "b": 0, "c": 100}


def test_who_comes_late_has_no_claim_to_the_past() -> None:
    """A was served while nobody else wanted anything: the newcomer starts where A stands."""
    tenants = Tenants()
    tenants.enter("a")
    tenants.charge("a", 1000)
    tenants.enter("b")
    assert tenants.debts() == {"a": 0, "b": 0}
    tenants.charge("a", 50)
    assert tenants.debts() == {"a": 50, "b": 0}


def test_a_newcomer_is_compared_as_if_it_waited() -> None:
    """What a forecast asks: B would start level, whatever A has had; A would owe what it has had since, and nothing
    has changed by asking."""
    tenants = Tenants()
    tenants.enter("a")
    tenants.charge("a", 1000)
    assert tenants.debts("b") == {"a": 0, "b": 0}
    tenants.enter("b")
    tenants.leave("a")
    tenants.charge("a", 200)
    assert tenants.debts("a") == {"a": 200, "b": 0}
    assert tenants.debts() == {}


def test_who_wants_nothing_saves_nothing_up() -> None:
    """B has an answer that is being written while A uses the rest of the device, which nobody else wants: when both
    wait, neither goes before the other for what was."""
    tenants = Tenants()
    for tenant, num_tokens in (("b", 10), ("a", 50_000)):
        tenants.enter(tenant)
        tenants.leave(tenant)
        tenants.charge(tenant, num_tokens)
    tenants.enter("a")
    tenants.enter("b")
    assert tenants.debts() == {"a": 0, "b": 0}


def test_a_debt_is_lifted_while_others_are_served() -> None:
    """A rests owing 500; B and C have had as much since: when A comes back it owes nothing, and has saved up nothing
    either."""
    tenants = Tenants()
    for tenant in "abc":
        tenants.enter(tenant)
    tenants.charge("a", 500)
    tenants.leave("a")
    for tenant in "bc":
        tenants.charge(tenant, 500)
    tenants.enter("a")
    assert tenants.debts() == {"a": 0, "b": 0, "c": 0}
    tenants.leave("a")
    for tenant in "bc":
        tenants.charge(tenant, 300)
    tenants.enter("a")
    assert tenants.debts() == {"a": 0, "b": 0, "c": 0}


def test_coming_and_going_pays_no_debt() -> None:
    """A leaves and comes back at once: what it had is not forgotten."""
    tenants = Tenants()
    tenants.enter("a")
    tenants.enter("b")
    tenants.charge("a", 500)
    tenants.leave("a")
    tenants.enter("a")
    assert tenants.debts() == {"a": 500, "b": 0}


def test_when_nobody_is_left_all_is_forgotten() -> None:
    tenants = Tenants()
    tenants.enter("a")
    tenants.enter("b")
    tenants.charge("a", 500)
    tenants.leave("a")
    tenants.leave("b")
    tenants.enter("b")
    tenants.enter("a")
    assert tenants.debts() == {"a": 0, "b": 0}


def test_a_thousand_names_do_not_fill_the_memory() -> None:
    """One tenant is always there and gets its share; names that are used once come and go."""
    tenants = Tenants()
    tenants.enter("steady")
    for number in range(1000):
        tenants.enter(f"once {number}")
        for tenant in ("steady", f"once {number}"):
            tenants.charge(tenant, 10)
        tenants.leave(f"once {number}")
    assert len(tenants._served) <= MOST_REMEMBERED + 4


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["enter", "leave", "charge"]), st.integers(1, 500))),
)
def test_debts_are_never_below_nothing(happens: list[tuple[str, str, int]]) -> None:
    """Whatever comes and goes: with two tenants or more, somebody owes nothing and nobody less than that; and what one
    of them owes, or would if it came, is the same wherever it is asked."""
    tenants = Tenants()
    for tenant, what, num_tokens in happens:
        if what == "enter":
            tenants.enter(tenant)
        elif tenants.num_waiting(tenant):
            tenants.leave(tenant) if what == "leave" else tenants.charge(tenant, num_tokens)
        debts = tenants.debts()
        assert sorted(debts) == [name for name in "abc" if tenants.num_waiting(name)] or len(debts) == 0
        assert min(debts.values(), default=0) == 0
        for name in "abc":
            assert tenants.debt(name) == tenants.debts(name).get(name, 0)
            assert tenants.debts(name, 2.0) == {other: 2.0 * debt for other, debt in tenants.debts(name).items()}


# Who goes first


def settings(**changes: object) -> SchedulerSettings:
    chosen = {"pack": False, "prefix_caching": False, "refuse_unattainable": False} | changes
    return SchedulerSettings(max_model_len=1000, **chosen)  # type: ignore[arg-type]


def prompt(request_id: str, at: float, tenant: str, slo: SLO | None = None, **wishes: object) -> Request:
    return Request(request_id, (0,) * 100, 1, at, slo or SLO(), tenant=tenant, **wishes)  # type: ignore[arg-type]


def served(sent: list[Request], **changes: object) -> dict[str, Record]:
    device = Device(fit=CostFit(token_s=0.001), tile_s=0.005)
    return fleet(sorted(sent, key=lambda request: request.arrival), [priced(settings(**changes), device)]).records


def flood(num_requests: int, slo: SLO | None = None) -> list[Request]:
    return [prompt(f"a{number}", 0.0, "a", slo) for number in range(num_requests)]


def ttft_s(records: dict[str, Record], request_id: str) -> float:
    found = records[request_id].ttft_s
    assert found is not None
    return found


@pytest.mark.parametrize("ttft", [None, 2.0, 30.0])
@pytest.mark.parametrize("at", [0.05, 0.5])
def test_a_flood_does_not_drown_a_drop(at: float, ttft: float | None) -> None:
    """A sends fifty prompts, five seconds of work, and B sends one a little later. Without names it would be the last;
    with them it is there when A has had its head start, and as much again as B."""
    slo = SLO(ttft_s=ttft)
    drowned = served([*flood(50, slo), prompt("b", at, "a", slo)])
    saved = served([*flood(50, slo), prompt("b", at, "b", slo)])
    if ttft is None or ttft > 5:
        assert ttft_s(drowned, "b") > 4.5 - at
    assert ttft_s(saved, "b") <= at + 0.1 + 0.1 + 0.1 + 0.01


def test_a_flood_refuses_no_drop() -> None:
    """A sends ten times what the device can do and is refused down to what fits its target; B sends little, with the
    same target. Were B judged by A's whole queue it would be refused as often: but it is served in turn with A."""
    rng = random.Random(4)
    slo = SLO(ttft_s=2.0)
    sent = [prompt(f"a{number}", number / 100, "a", slo) for number in range(2000)]
    sent += [prompt(f"b{number}", number + rng.random(), "b", slo) for number in range(20)]
    records = served(sent, refuse_unattainable=True)
    of_b = [record for request_id, record in records.items() if request_id.startswith("b")]
    assert sum(record.kind == "refused" for record in of_b) <= 1
    assert sum(record.missed == {} for record in of_b) >= 18


@pytest.mark.parametrize("ttft", [None, 60.0])
def test_an_old_flood_does_not_drown_a_drop(ttft: float | None) -> None:
    """A has sent fifty seconds of work; ten seconds later B sends a prompt. Without a target it waits for its patience
    at most, as if A's prompts had come when it did; with one it is served long before it is due."""
    slo = SLO(ttft_s=ttft)
    records = served([*flood(500, slo), prompt("b", 10.0, "b", slo)])
    assert ttft_s(records, "b") <= (2.5 if ttft is None else ttft / 5)


def test_two_floods_share_alike() -> None:
    """Both send fifty at once: at no instant has one had more than two prompts more than the other."""
    sent = flood(50) + [prompt(f"b{number}", 0.01, "b") for number in range(50)]
    records = served(sent)
    order = sorted(records, key=lambda request_id: records[request_id].first_token or 0.0)
    lead = 0
    for request_id in order[:-1]:
        lead += 1 if request_id.startswith("a") else -1
        assert -2 <= lead <= 2


def test_long_prompts_count_as_what_they_are() -> None:
    """A's prompts are four times as long as B's: for each of A's there are about four of B's, not one."""
    slo = SLO(ttft_s=30.0)
    sent = [Request(f"a{number}", (0,) * 400, 1, 0.0, slo, tenant="a") for number in range(10)]
    sent += [prompt(f"b{number}", 0.0, "b", slo) for number in range(40)]
    records = served(sent)
    order = sorted(records, key=lambda request_id: records[request_id].first_token or 0.0)
    assert 13 <= sum(name.startswith("b") for name in order[:20]) <= 18


def test_a_tenant_alone_has_plain_deadlines() -> None:
    """Names change nothing where there is but one: the same prompts, with one tenant and with none, in the same order
    at the same instants."""
    rng = random.Random(1)
    wishes = [(rng.random() * 3, SLO(ttft_s=rng.choice((None, 1.0, 3.0, 30.0)))) for _ in range(50)]
    runs = [served([prompt(f"r{n}", at, tenant, slo) for n, (at, slo) in enumerate(wishes)]) for tenant in ("a", "")]
    assert [[(name, record.first_token) for name, record in records.items()] for records in runs[:1]] == [
        [(name, record.first_token) for name, record in records.items()] for records in runs[1:]
    ]


def test_within_a_tenant_the_urgent_goes_first() -> None:
    """A's own urgent prompt is not behind A's flood, however much A owes."""
    sent = [*flood(50, SLO(ttft_s=60.0)), prompt("mine", 1.0, "a", SLO(ttft_s=0.5)), prompt("b", 0.0, "b")]
    assert ttft_s(served(sent), "mine") < 0.3


# Who is let in


def test_no_tenant_fills_the_queue() -> None:
    """A tenant with a name may have open half as many as may wait; others are still let in, and so is it when one of
    its own has ended. Requests without a name are bounded by the queue alone."""
    story = Story(max_num_queued=8, num_pages=400)
    for number in range(int(8 * TENANT_SHARE)):
        story.arrives(f"a{number}", 4, tenant="a")
    refused = ending(story.tell(ev.Arrived(story.request("one more", 4, tenant="a"))))
    assert (refused.kind, refused.reason, refused.first_scheduled) == ("refused", "tenant_over_share", None)
    assert refused.retry_after_s == 1.0
    story.arrives("b", 4, tenant="b")
    story.tell(ev.Cancelled("a0"))
    story.arrives("again", 4, tenant="a")
    nameless = Story(max_num_queued=8)
    for number in range(8):
        nameless.arrives(f"r{number}", 4)
    assert ending(nameless.tell(ev.Arrived(nameless.request("ninth", 4)))).reason == "queue_full"


@pytest.mark.parametrize("seed", range(5))
def test_a_storm_leaves_no_open_account(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of every kind, refusals, losses: in the end nobody has anything open, and a newcomer owes nothing."""
    kept: list[Tenants] = []
    plain = Tenants.__init__

    def keep(self: Tenants) -> None:
        plain(self)
        kept.append(self)

    monkeypatch.setattr(Tenants, "__init__", keep)
    survive(seed, 500)
    (tenants,) = kept
    assert tenants.num_active == 0
    for tenant in ("", "a", "b"):
        assert tenants.num_waiting(tenant) == 0
        tenants.enter(tenant)
    assert set(tenants.debts().values()) == {0}
