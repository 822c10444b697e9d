"""Decides what runs, only at events. One class owns the state and has one mutator, `handle`; `plan` picks the work.

Knows no device, no socket, no clock: time comes in with every call. What each request asked for is in its ticket, who
goes first is `policy`'s to say, the pages are counted by `pages`, and every ending is written to the ledger.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, assert_never

from headway.core import event as ev
from headway.core.admission import Limits, refusal
from headway.core.candidates import (
    NEXT_TOKEN,
    number_of_ticket,
    prefill_s,
    step_candidate,
    ticket_candidate,
    token_candidate,
)
from headway.core.cost import CostModel, Share, shares_of
from headway.core.holdings import Holdings
from headway.core.ledger import settle
from headway.core.lifecycle import State
from headway.core.packing import pack
from headway.core.pages import PageTable
from headway.core.policy import Candidate, Tier, should_switch, standing
from headway.core.request import Request
from headway.core.ticket import Step, Ticket
from headway.core.work import Commit, Segment, Work


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """`tile_s` is the bound B. `pack_tokens` is where more tokens in a step stop making it more efficient.

    A suspended step keeps its pages and, for every token in it, activations: `max_parked_tokens` bounds their bytes.
    It is never less than one longest request, which must always be able to give way.
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_num_queued: int = 1024
    pack_tokens: int = 512
    tile_s: float = 0.010
    max_num_parked: int = 8
    max_parked_tokens: int = 1 << 20
    max_parked_s: float = 30.0
    prefix_caching: bool = True
    stage: str = "language"


class Lane(NamedTuple):
    """One share of a device, as the driver sees it: how far the Work that is on it has come (0 … 1)."""

    name: str = "main"
    progress: float = 0.0


class Scheduler:
    """All scheduling state of one engine. Only the driver calls it, one call at a time."""

    def __init__(self, settings: SchedulerSettings, cost: CostModel, pages: PageTable) -> None:
        self.settings = settings
        self.cost = cost
        self.pages = pages
        self.counters: Counter[str] = Counter()
        self.draining = False
        self._tickets: dict[str, Ticket] = {}
        self._queued: dict[int, Ticket] = {}  # by ticket number
        self._decoding: dict[int, Ticket] = {}  # by ticket number, in a step or between two
        self._steps: dict[int, Step] = {}  # by Work id
        self._on_device: Step | None = None
        self._num_arrived = 0
        self._num_works = 0
        self._due: float | None = None
        self._holdings = Holdings(pages, settings.prefix_caching, self.counters)
        self._limits = Limits(settings.max_model_len, settings.max_num_queued, pages.num_pages, pages.page_tokens)

    # Events

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Take note of what happened at `now`; returns what the driver must carry out, in order."""
        self.counters["events"] += 1
        match event:
            case ev.Arrived(request):
                return self._arrived(request, now)
            case ev.StepDone():
                return self._step_done(event, now)
            case ev.StepFailed(work_id, cause):
                return self._step_failed(work_id, cause, now)
            case ev.Left(work_id, request_ids):
                return self._left(work_id, request_ids, now)
            case ev.Cancelled(request_id):
                return self._close(request_id, State.CANCELLED, "cancelled", now)
            case ev.Stopped(request_id):
                return self._close(request_id, State.FINISHED, "stop", now)
            case ev.Due():
                return self._expire(now)
            case ev.EngineLost(cause):
                return self._lose_everything(cause, now)
            case ev.Draining():
                self.draining = True
                return []
            case _ as unreachable:
                assert_never(unreachable)

    def _arrived(self, request: Request, now: float) -> list[ev.Effect]:
        assert request.id not in self._tickets, f"request {request.id} arrived twice"
        longest = min(self.settings.max_model_len, self.pages.num_pages * self.pages.page_tokens)
        ticket = Ticket.open(self._num_arrived, request, longest)
        self._num_arrived += 1
        refused = refusal(request, self._limits, len(self._queued), self._backlog_s, self.draining)
        if refused is not None:
            ticket.record.message = refused.message
            ticket.record.retry_after_s = refused.retry_after_s
            return [self._end(ticket, State.REFUSED, refused.reason, now)]
        self._holdings.expect_hits(ticket)
        ticket.record.predicted_prefill_s = prefill_s(ticket, self.cost)
        self._tickets[request.id] = ticket
        self._queued[ticket.number] = ticket
        return [ev.Admit(request)]

    def _step_done(self, done: ev.StepDone, now: float) -> list[ev.Effect]:
        step = self._remove_step(done.work_id)
        if len(step.tickets) == len(step.work.segments):  # else it became shorter than its price on the way
            self.cost.observe(shares_of(step.work.segments), done.busy_s)
        effects: list[ev.Effect] = []
        commits = {commit.request_id: commit for commit in done.outcome.commits}
        for segment, ticket in self._members(step):
            ticket.step = None
            if not step.decoding:
                ticket.record.overrun_s += max(0.0, done.busy_s - step.predicted_s)
            commit = commits.get(segment.request_id)
            if commit is not None and commit.failure:  # not published: its pages may hold what broke it
                effects.append(self._fail(ticket, "not_finite", commit.failure, now))
                continue
            ticket.num_computed += len(segment.tokens)
            self._holdings.publish(ticket)
            if ticket.state is State.LEAVING:
                effects.append(self._finish_leaving(ticket, now))
                continue
            if commit is None:  # a chunk in the middle of a prompt
                ticket.move(State.QUEUED)
                self._queued[ticket.number] = ticket
                continue
            effects += self._commit(ticket, commit, now)
        return effects

    def _commit(self, ticket: Ticket, commit: Commit, now: float) -> list[ev.Effect]:
        record, request = ticket.record, ticket.request
        kept = 0
        reason = ""
        for token in commit.tokens:
            ticket.tokens.append(token)
            kept += 1
            if token in request.stop_ids and ticket.num_generated > request.min_tokens:
                reason, record.stop_id = "stop", token
            elif ticket.num_generated >= ticket.max_tokens:
                reason = "length"
            if reason:
                break
        if kept:
            if record.first_token is None:
                record.first_token = now
            elif record.last_token is not None:
                record.longest_gap_s = max(record.longest_gap_s, now - record.last_token)
            record.last_token = now
            record.num_output_tokens = ticket.num_generated
        effects: list[ev.Effect] = [
            ev.Deliver(commit._replace(tokens=commit.tokens[:kept], logprobs=commit.logprobs[:kept]))
        ]
        if reason:
            effects.append(self._end(ticket, State.FINISHED, reason, now))
        elif ticket.state is State.RUNNING:
            ticket.move(State.DECODING)
            self._decoding[ticket.number] = ticket
        return effects

    def _step_failed(self, work_id: int, cause: str, now: float) -> list[ev.Effect]:
        step = self._remove_step(work_id)
        effects: list[ev.Effect] = []
        for _, ticket in self._members(step):
            effects.append(self._fail(ticket, "step_failed", cause, now))
        return effects

    def _left(self, work_id: int, request_ids: Iterable[str], now: float) -> list[ev.Effect]:
        step = self._steps[work_id]
        effects: list[ev.Effect] = []
        for request_id in request_ids:
            ticket = self._tickets[request_id]
            step.tickets.remove(ticket)
            ticket.step = None
            effects.append(self._finish_leaving(ticket, now))
        return effects

    def _close(self, request_id: str, ending: State, reason: str, now: float) -> list[ev.Effect]:
        """The caller wants no more of it. Inside a step with others it leaves at the next layer boundary."""
        ticket = self._tickets.get(request_id)
        if ticket is None or ticket.state is State.LEAVING:
            return []
        step = ticket.step
        if step is None:
            return [self._end(ticket, ending, reason, now)]
        ticket.move(State.LEAVING)
        ticket.pending_end = (ending, reason)
        if any(member.state is not State.LEAVING for member in step.tickets):
            return [ev.Drop(step.work.id, request_id)]
        self._remove_step(step.work.id)
        effects: list[ev.Effect] = [ev.Abandon(step.work.id)]
        for member in step.tickets:
            member.step = None
            effects.append(self._finish_leaving(member, now))
        return effects

    def _expire(self, now: float) -> list[ev.Effect]:
        """Whoever waits past the instant at which the whole answer was due goes before any prefill is spent on it."""
        late = [ticket for ticket in self._queued.values() if self._expiry(ticket) <= now]
        for ticket in late:
            ticket.record.message = "The deadline passed before the request could start."
        return [self._end(ticket, State.REFUSED, "deadline_expired", now) for ticket in late]

    def _lose_everything(self, cause: str, now: float) -> list[ev.Effect]:
        effects: list[ev.Effect] = [ev.Abandon(work_id) for work_id in self._steps]
        for work_id in list(self._steps):
            self._remove_step(work_id)
        effects += [self._fail(ticket, "engine_lost", cause, now) for ticket in list(self._tickets.values())]
        return effects

    # Plans

    def plan(self, now: float, lane: Lane) -> Work | None:
        """What the lane is to run from here on: the Work that is on it, a parked one, a new one, or nothing."""
        self.counters["plans"] += 1
        running = self._on_device
        if running is not None:
            running.progress = lane.progress
        candidates = self._candidates()
        work = self._switch(running, candidates, now) if running is not None else self._choose(candidates, now)
        self._due = self._next_instant(candidates, now)
        return work

    def next_due(self) -> float | None:
        """The next instant, after the last plan, at which something becomes due without an event."""
        return self._due

    def _switch(self, running: Step, candidates: list[Candidate], now: float) -> Work:
        """The running step's Work, or that of the first candidate that has a reason to take its place."""
        own = self._step_candidate(running)
        order = _in_order((c for c in candidates if c.ripe_at <= now), now)
        prompts_wait = not self._may_park(running)  # a token, or a parked step, adds nothing to what is parked
        for challenger in order:
            if prompts_wait and challenger.key < 0:
                continue
            if not should_switch(own, challenger, now, self.settings.tile_s):
                continue
            step = self._prepare(challenger, order, now)
            if step is not None:
                self._park(running, now)
                return self._put_on_device(step, now)
            prompts_wait |= self._keeps_others_out(challenger, now)
        return running.work

    def _choose(self, candidates: list[Candidate], now: float) -> Work | None:
        """The best candidate that can start; what is not ripe comes last, but before an idle device."""
        ripe = _in_order((c for c in candidates if c.ripe_at <= now), now)
        order = ripe + _in_order((c for c in candidates if c.ripe_at > now), now)
        prompts_wait = False
        for best in order:
            if prompts_wait and best.key < 0:
                continue
            step = self._prepare(best, order, now)
            if step is not None:
                return self._put_on_device(step, now)
            prompts_wait |= self._keeps_others_out(best, now)
        return None

    def _keeps_others_out(self, candidate: Candidate, now: float) -> bool:
        """Pages that come free belong to a starved prompt first, or small ones would keep it out for ever."""
        return candidate.key < 0 and standing(candidate, now).tier is Tier.STARVED

    def _next_instant(self, candidates: list[Candidate], now: float) -> float | None:
        """When to look again if nothing happens: a token is ripe, a target needs a start, a wait has been too long."""
        between = self._between_steps() if self._on_device is not None else []
        instants = [token_candidate(between, self.cost, self.settings.tile_s).ripe_at] if between else []
        if self._on_device is not None:
            latest_end = ((c.deadline, c.remaining_s) for c in candidates if self._waits(c))
            instants += [end - left - self.settings.tile_s for end, left in latest_end if end is not None]
        instants += [candidate.starved_at for candidate in map(self._step_candidate, self._parked())]
        instants += [self._expiry(ticket) for ticket in self._queued.values()]
        return min((instant for instant in instants if now < instant < float("inf")), default=None)

    def _waits(self, candidate: Candidate) -> bool:
        """Whether this prompt or parked step still waits, now that something was put on the device."""
        if candidate.key < 0:
            return number_of_ticket(candidate.key) in self._queued
        return candidate.key in self._steps and self._steps[candidate.key].parked_since is not None

    def _candidates(self) -> list[Candidate]:
        """Everything that could have the device, but the step that has it."""
        found = [self._step_candidate(step) for step in self._parked()]
        if self._num_active() < self.settings.max_num_seqs:
            found += [ticket_candidate(ticket, self.cost) for ticket in self._queued.values()]
        between = self._between_steps()
        if between:
            found.append(token_candidate(between, self.cost, self.settings.tile_s))
        return found

    def _step_candidate(self, step: Step) -> Candidate:
        return step_candidate(step, self.cost, self.settings.tile_s, self.settings.max_parked_s)

    # Starting, parking, resuming

    def _prepare(self, chosen: Candidate, order: list[Candidate], now: float) -> Step | None:
        """The step behind a candidate, made if need be; None (and nothing changed) if it lacks pages."""
        if chosen.key == NEXT_TOKEN:
            return self._token_step(now)
        return self._steps[chosen.key] if chosen.key > 0 else self._prompt_step(chosen, order, now)

    def _put_on_device(self, step: Step, now: float) -> Work:
        if step.parked_since is not None:
            self._resume(step, now)
        self._on_device = step
        return step.work

    def _prompt_step(self, chosen: Candidate, order: list[Candidate], now: float) -> Step | None:
        """The chosen prompt and those behind it that fit into one prefill without harm."""
        places = self.settings.max_num_seqs - self._num_active()
        queued = [chosen] + [other for other in order if other.key < 0 and other.key != chosen.key]
        tickets = [self._queued[number_of_ticket(candidate.key)] for candidate in queued[:places]]
        shares = [Share(t.num_to_compute - t.num_cached_hint, t.num_cached_hint) for t in tickets]
        slacks = [standing(candidate, now).slack_s for candidate in queued[: len(tickets)]]
        num_members = pack(shares, slacks, self.cost.predict, self.settings.pack_tokens)
        members: list[Ticket] = []
        for ticket in tickets[:num_members]:
            if not self._holdings.take_prompt(ticket, len(self._decoding), now):
                break
            members.append(ticket)
        for ticket in members:
            del self._queued[ticket.number]
            ticket.move(State.RUNNING)
            if ticket.record.first_scheduled is None:
                ticket.record.first_scheduled = now
        return self._new_step(members, decoding=False) if members else None

    def _token_step(self, now: float) -> Step | None:
        """One more token for everybody between two steps; who finds no page may cost the latest comer its own."""
        for ticket in sorted(self._between_steps(), key=_urgency):
            while ticket.state is State.DECODING and not self._holdings.take_room(ticket, now):
                self._recompute_later(max(self._between_steps(), key=_urgency), now)
        members = self._between_steps()
        return self._new_step(members, decoding=True) if members else None

    def _new_step(self, tickets: list[Ticket], *, decoding: bool) -> Step:
        self._num_works += 1
        work = Work(self._num_works, self.settings.stage, tuple(map(_segment, tickets)))
        step = Step(work, tickets, self.cost.predict(shares_of(work.segments)), decoding)
        for ticket in tickets:
            ticket.step = step
        self._steps[work.id] = step
        return step

    def _recompute_later(self, ticket: Ticket, now: float) -> None:
        """Back to the queue without its pages: its tokens are kept, their keys and values are computed again."""
        self.counters["recomputes"] += 1
        ticket.record.num_recomputes += 1
        del self._decoding[ticket.number]
        ticket.move(State.QUEUED)
        self._holdings.release(ticket)
        self._holdings.expect_hits(ticket)
        self._queued[ticket.number] = ticket

    def _may_park(self, running: Step) -> bool:
        """Suspended work is bounded in count and in bytes. A step of single tokens keeps next to nothing."""
        if running.decoding:
            return True
        parked = self._parked()
        num_tokens = running.work.num_tokens + sum(step.work.num_tokens for step in parked)
        limit = max(self.settings.max_parked_tokens, self.settings.max_model_len)
        return len(parked) < self.settings.max_num_parked and num_tokens <= limit

    def _park(self, step: Step, now: float) -> None:
        self.counters["preemptions"] += 1
        step.parked_since = now
        self._holdings.park(step.tickets)
        for ticket in step.tickets:
            ticket.record.num_preemptions += 1
            if ticket.state is State.RUNNING:
                ticket.move(State.PARKED)

    def _resume(self, step: Step, now: float) -> None:
        assert step.parked_since is not None
        self._holdings.unpark(step.tickets)
        for ticket in step.tickets:
            ticket.record.parked_s += now - step.parked_since
            if ticket.state is State.PARKED:
                ticket.move(State.RUNNING)
        step.parked_since = None

    def _remove_step(self, work_id: int) -> Step:
        step = self._steps.pop(work_id)
        if step.parked_since is not None:
            self._holdings.unpark(step.tickets)
        if self._on_device is step:
            self._on_device = None
        return step

    # Endings

    def _fail(self, ticket: Ticket, reason: str, message: str, now: float) -> ev.End:
        """It ends with its step, unless it had its answer already and was only leaving."""
        ticket.step = None
        if ticket.pending_end is not None:
            return self._finish_leaving(ticket, now)
        ticket.record.message = message
        return self._end(ticket, State.FAILED, reason, now)

    def _finish_leaving(self, ticket: Ticket, now: float) -> ev.End:
        assert ticket.pending_end is not None
        return self._end(ticket, *ticket.pending_end, now)

    def _end(self, ticket: Ticket, ending: State, reason: str, now: float) -> ev.End:
        ticket.move(ending)
        self._holdings.no_longer_starves(ticket, now)
        self._tickets.pop(ticket.request.id, None)
        self._queued.pop(ticket.number, None)
        self._decoding.pop(ticket.number, None)
        self._holdings.release(ticket)
        self.counters[ending.value] += 1
        settle(ticket.record, ending, reason, now)
        return ev.End(ticket.record)

    # Questions

    def _members(self, step: Step) -> list[tuple[Segment, Ticket]]:
        by_id = {ticket.request.id: ticket for ticket in step.tickets}
        return [(s, by_id[s.request_id]) for s in step.work.segments if s.request_id in by_id]

    def _between_steps(self) -> list[Ticket]:
        return [ticket for ticket in self._decoding.values() if ticket.step is None]

    def _parked(self) -> list[Step]:
        return [step for step in self._steps.values() if step.parked_since is not None]

    def _num_active(self) -> int:
        return len(self._tickets) - len(self._queued)

    def _backlog_s(self) -> float:
        """Predicted prefill work in the queue."""
        return sum(prefill_s(queued, self.cost) for queued in self._queued.values())

    def _expiry(self, ticket: Ticket) -> float:
        """When a queued request is too late to be worth starting."""
        total_s = ticket.request.slo.total_s
        if total_s is None or ticket.record.first_token is not None:
            return float("inf")
        return ticket.request.arrival + total_s

    @property
    def num_open(self) -> int:
        return len(self._tickets)

    def loads(self) -> tuple[int, int, int]:
        """How many requests run (hold pages), wait in the queue, are parked."""
        num_parked = sum(len(step.tickets) for step in self._parked())
        return self._num_active() - num_parked, len(self._queued), num_parked

    def check_integrity(self) -> None:
        """Assert that all records agree with each other and no page leaks. For tests, after any event."""
        self.pages.check_integrity([ticket.pages for ticket in self._tickets.values()])
        for ticket in self._tickets.values():
            assert (ticket.state is State.QUEUED) == (ticket.number in self._queued)
            assert (ticket.state is State.DECODING) <= (ticket.number in self._decoding)
            assert ticket.step is None or ticket.step.work.id in self._steps
            assert (ticket.state in (State.RUNNING, State.PARKED)) <= (ticket.step is not None)
            assert ticket.num_computed <= len(ticket.pages) * self.pages.page_tokens
        for step in self._steps.values():
            assert step.tickets, "a step without members"
            assert (step is self._on_device) == (step.parked_since is None)


def _in_order(candidates: Iterable[Candidate], now: float) -> list[Candidate]:
    return sorted(candidates, key=lambda candidate: standing(candidate, now).order)


def _urgency(ticket: Ticket) -> tuple[int, int]:
    """Among those who decode: by priority, then first come."""
    return ticket.request.priority, ticket.number


def _segment(ticket: Ticket) -> Segment:
    start, request = ticket.num_computed, ticket.request
    tokens = tuple(ticket.tokens[start:])
    return Segment(request.id, tokens, start, start, tuple(ticket.pages), (len(tokens) - 1,), request.adapter)
