"""Takes in events and says what follows. One class owns the state and has one mutator, `handle`; `plan` picks the work.

Knows no device, no socket, no clock: time comes in with every call. What each request asked for is in its ticket, who
goes first is `policy`'s to say, the pages are counted by `pages`, and every ending is written to the ledger.
"""

from collections import Counter
from collections.abc import Iterable
from typing import assert_never

from headway.core import event as ev
from headway.core.admission import PROVEN_S, Crowd, Limits, is_too_slow, refusal, unattainable
from headway.core.candidates import prefill_s
from headway.core.composition import Composer
from headway.core.cost import CostModel, Share
from headway.core.forecast import Forecaster, Lengths
from headway.core.holdings import Holdings
from headway.core.ledger import settle
from headway.core.lifecycle import State
from headway.core.pages import PageTable
from headway.core.planner import Planner
from headway.core.queue import Queue
from headway.core.roofline import Roofline
from headway.core.settings import Lane, SchedulerSettings
from headway.core.sharing import Sharing
from headway.core.steps import Steps
from headway.core.tenants import Tenants
from headway.core.ticket import Ticket
from headway.core.work import Commit, Segment, Work


class Scheduler:
    """All scheduling state of one engine. Only the driver calls it, one call at a time."""

    def __init__(
        self, settings: SchedulerSettings, cost: CostModel, pages: PageTable, roofline: Roofline | None = None
    ) -> None:
        """`roofline`: of a device that can be divided."""
        self.settings = settings
        self.cost = cost
        self.pages = pages
        self.counters: Counter[str] = Counter()
        self.step_sizes: Counter[int] = Counter()  # n -> steps of at most 2**n tokens, and more than half as many
        self.draining = False
        self._tickets: dict[str, Ticket] = {}
        self._decoding: dict[int, Ticket] = {}  # by ticket number, in a step or between two
        self._num_of: Counter[str] = Counter()  # open requests, by tenant
        self._num_arrived = 0
        self._proven_at: dict[bool, float] = {}  # when a step bound by arithmetic, or by memory, last showed its price
        pack_tokens = settings.pack_tokens if settings.pack else 0
        cost.chunk_tokens = settings.chunk_tokens if settings.preempt == "chunk" else None
        self._tenants = Tenants()
        self._holdings = Holdings(pages, settings.prefix_caching, self.counters, pack_tokens)
        self._queue = Queue(cost, self._tenants, settings.order, pack_tokens, self._holdings.look_again)
        self._steps = Steps(settings.stage, cost, self._holdings, self.counters)
        composer = Composer(self._queue, self._decoding, self._steps, self._holdings, cost, settings.order, pack_tokens)
        self.sharing = Sharing(settings, cost, pages, roofline, self.counters)
        self._planner = Planner(settings, cost, self._queue, self._steps, composer, self.sharing, self._num_places)
        self._lengths = Lengths()
        self._forecaster = Forecaster(
            settings,
            self._queue,
            self._steps,
            self._decoding,
            pages,
            self._num_places,
            self._lengths,
            cost,
            self.sharing,
        )
        self._limits = Limits(settings.max_model_len, settings.max_num_queued, pages.num_pages, pages.page_tokens)

    # Events

    def handle(self, event: ev.Event, now: float) -> list[ev.Effect]:
        """Take note of what happened at `now`; returns what the driver must carry out, in order."""
        self.counters["events"] += 1
        if not isinstance(event, ev.Arrived | ev.Due):
            self._planner.forget_token()
        match event:
            case ev.Arrived():
                return self._arrived(event, now)
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

    def _arrived(self, arrived: ev.Arrived, now: float) -> list[ev.Effect]:
        request = arrived.request
        assert request.id not in self._tickets, f"request {request.id} arrived twice"
        longest = min(self.settings.max_model_len, self.pages.num_pages * self.pages.page_tokens)
        ticket = Ticket.open(self._num_arrived, request, longest)
        self._num_arrived += 1
        num_waiting = len(self._queue) + arrived.num_in_front
        num_of_tenant = self._num_of[request.tenant] + arrived.num_of_tenant
        crowd = Crowd(num_waiting, num_of_tenant, self._queue.backlog_s, self.draining)
        self._num_of[request.tenant] += 1
        refused = refusal(request, self._limits, crowd)
        if refused is None:
            self._holdings.expect_hits(ticket)
            if ticket.expiry <= now:
                return [self._expired(ticket, max(1.0, crowd.backlog_s), now)]
            forecast = self._forecaster.forecast(ticket, now)
            ticket.record.predicted_prefill_s = prefill_s(ticket, self.cost)
            ticket.record.predicted_ttft_s = forecast.mean_s
            if self.settings.refuse_unattainable:
                refused = unattainable(request, forecast)
            # a pace is refused by the price of steps that are being run, and show it
            if refused is not None and not is_too_slow(request, forecast) and self._proves(ticket, now):
                refused = None
        if refused is not None:
            ticket.record.message = refused.message
            ticket.record.retry_after_s = refused.retry_after_s
            return [self._end(ticket, State.REFUSED, refused.reason, now)]
        self._tickets[request.id] = ticket
        self._queue.add(ticket, now)
        ticket.record.note(now, "admitted", f"first token expected after {forecast.mean_s * 1000:.0f} ms")
        return [ev.Admit(request, forecast.mean_s)]

    def _proves(self, ticket: Ticket, now: float) -> bool:
        """Whether it is let in to show what such a step takes at present: none has for long, nor has one been let in
        for that, and no other prompt is there that would. Prices are learnt from what is let in, so who is refused by
        a wrong one would be for ever."""
        hint = ticket.num_cached_hint
        num_pages = self.pages.pages_for(ticket.num_to_compute - hint) + len(self._decoding)
        if len(self._queue) or self._num_places() <= 0 or num_pages > self.pages.num_available:
            return False
        if any(not step.decoding for step in self._steps.all()):
            return False
        share = Share(ticket.num_to_compute - hint, ticket.num_computed + hint)
        kind = self.cost.fit.price((share,)).is_arithmetic
        if now - self._proven_at.setdefault(kind, now) <= PROVEN_S:
            return False
        self._proven_at[kind] = now
        return True

    def _step_done(self, done: ev.StepDone, now: float) -> list[ev.Effect]:
        step = self._steps.remove(done.work_id)
        step.stop(now)
        if len(step.tickets) == len(step.work.segments) and not step.scores:  # else it was not what its price was for
            if step.was_beside:
                self.sharing.observe(step, done.busy_s, now)
            else:
                self.cost.observe(step.price, done.busy_s)
                self._proven_at[step.price.is_arithmetic] = now
        over_s = done.busy_s - step.predicted_s - (step.beside_s - step.done_beside_s)
        effects: list[ev.Effect] = []
        commits = {commit.request_id: commit for commit in done.outcome.commits}
        members = self._steps.members(step)
        self._count(members)
        for segment, ticket in members:
            ticket.step = None
            if over_s > 0:
                ticket.record.overran(over_s)
            commit = commits.get(segment.request_id)
            if commit is not None and commit.failure:  # not published: its pages may hold what broke it
                effects.append(self._fail(ticket, *commit.failure, now))
                continue
            ticket.num_computed += len(segment.tokens)
            if commit is not None and commit.prompt_logprobs:
                ticket.num_scored += len(commit.prompt_logprobs)
            if found := self._holdings.publish(ticket):
                self._queue.reprice(found)
            if ticket.state is State.LEAVING:
                effects.append(self._finish_leaving(ticket, now))
            elif commit is not None and commit.tokens:
                self._commit(ticket, commit, now, effects)
            else:
                self._read(ticket, commit, now, effects)
        return effects

    def _count(self, members: list[tuple[Segment, Ticket]]) -> None:
        """A step of these is done, whatever came of it."""
        had: dict[str, int] = {}
        for segment, ticket in members:
            tenant = ticket.request.tenant
            had[tenant] = had.get(tenant, 0) + len(segment.tokens)
        for tenant, num_tokens in had.items():
            self._tenants.charge(tenant, num_tokens)
        if num_tokens := sum(had.values()):
            self.counters["step_tokens"] += num_tokens
            self.step_sizes[(num_tokens - 1).bit_length()] += 1

    def _read(self, ticket: Ticket, commit: Commit | None, now: float, effects: list[ev.Effect]) -> None:
        """A piece of the prompt is read, and no token was drawn after it: there is more of it, or that was all."""
        if commit is not None:
            effects.append(ev.Deliver(commit))
            if commit.vector:  # the answer that a caller waits for as others wait for their first token
                ticket.record.begin_answer(now, 0.0)
                ticket.record.note(now, "first_token")
        if ticket.max_tokens == 0 and ticket.num_to_compute == 0:
            if ticket.record.first_token is None:  # what was told of the prompt was the answer
                ticket.record.begin_answer(now, 0.0)
                ticket.record.note(now, "first_token")
            effects.append(self._end(ticket, State.FINISHED, "length", now))
        else:
            ticket.move(State.QUEUED)
            self._queue.add(ticket, now)

    def _commit(self, ticket: Ticket, commit: Commit, now: float, effects: list[ev.Effect]) -> None:
        record, request, tokens = ticket.record, ticket.request, commit.tokens
        num_kept, reason = 0, ""
        num_before = len(ticket.tokens) - len(request.prompt)
        for token in tokens:
            num_kept += 1
            if token in request.stop_ids and num_before + num_kept > request.min_tokens:
                reason, record.stop_id = "stop", token
                break
            if num_before + num_kept >= ticket.max_tokens:
                reason = "length"
                break
        if num_kept < len(tokens):
            commit = commit._replace(tokens=tokens[:num_kept], logprobs=commit.logprobs[:num_kept])
        elif commit.complete:
            reason = "stop"
        ticket.tokens += commit.tokens
        last = record.last_token
        if last is None:
            record.begin_answer(now, self.cost.next_tokens(1, ticket.num_computed))
            record.note(now, "first_token")
        elif now - last > record.longest_gap_s:
            record.longest_gap_s = now - last
        record.last_token = now
        record.num_output_tokens = num_before + num_kept
        effects.append(ev.Deliver(commit))
        if reason:
            effects.append(self._end(ticket, State.FINISHED, reason, now))
        elif ticket.state is State.RUNNING:
            ticket.move(State.DECODING)
            ticket.num_surely = self._lengths.surely(ticket)
            self._decoding[ticket.number] = ticket

    def _step_failed(self, work_id: int, cause: str, now: float) -> list[ev.Effect]:
        step = self._steps.remove(work_id)
        effects: list[ev.Effect] = []
        for _, ticket in self._steps.members(step):
            effects.append(self._fail(ticket, "step_failed", cause, now))
        return effects

    def _left(self, work_id: int, request_ids: Iterable[str], now: float) -> list[ev.Effect]:
        step = self._steps[work_id]
        effects: list[ev.Effect] = []
        for request_id in request_ids:
            ticket = self._tickets[request_id]
            step.leave(ticket)
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
        self._steps.remove(step.work.id)
        effects: list[ev.Effect] = [ev.Abandon(step.work.id)]
        for member in step.tickets:
            member.step = None
            effects.append(self._finish_leaving(member, now))
        return effects

    def _expire(self, now: float) -> list[ev.Effect]:
        """Whoever waits past the instant at which the whole answer was due goes before any prefill is spent on it."""
        late = self._queue.expired(now)
        wait_s = max(1.0, self._queue.backlog_s) if late else 0.0  # summed once: a whole queue may expire together
        return [self._expired(ticket, wait_s, now) for ticket in late]

    def _expired(self, ticket: Ticket, wait_s: float, now: float) -> ev.End:
        alone_s = min(prefill_s(ticket, self.cost), prefill_s(ticket, self.cost, as_fitted=True))
        total_s = ticket.request.slo.total_s
        is_hopeless = total_s is not None and alone_s > total_s
        ticket.record.message = "The deadline passed before the request could start: " + (
            f"this prompt takes {alone_s * 1000:.3g} ms by itself, give it more time."
            if is_hopeless
            else f"try again in {wait_s:.0f} s, or give it more time."
        )
        ticket.record.retry_after_s = None if is_hopeless else wait_s
        return self._end(ticket, State.REFUSED, "deadline_expired", now)

    def _lose_everything(self, cause: str, now: float) -> list[ev.Effect]:
        effects: list[ev.Effect] = []
        for step in self._steps.all():
            effects.append(ev.Abandon(step.work.id))
            self._steps.remove(step.work.id)
        effects += [self._fail(ticket, "engine_lost", cause, now) for ticket in list(self._tickets.values())]
        return effects

    # Plans

    def plan(self, now: float, lane: Lane) -> Work | None:
        """What the lane is to run from here on: the Work that is on it, a parked one, a new one, or nothing."""
        self.counters["plans"] += 1
        return self._planner.plan(now, lane)

    def next_due(self) -> float | None:
        """The next instant, after the last plan, at which something becomes due without an event."""
        return self._planner.due

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
        self._queue.discard(ticket)
        self._decoding.pop(ticket.number, None)
        self._holdings.release(ticket)
        self._num_of[ticket.request.tenant] -= 1
        if not self._num_of[ticket.request.tenant]:
            del self._num_of[ticket.request.tenant]
        if ending is State.FINISHED and ticket.max_tokens > 1:
            self._lengths.observe(ticket.num_generated, ticket.max_tokens)
        self.counters[ending.value] += 1
        settle(ticket.record, ending, reason, now)
        return ev.End(ticket.record)

    # Questions

    def _num_places(self) -> int:
        """How many more requests may hold pages."""
        return self.settings.max_num_seqs - self._num_active() - len(self._queue.begun)

    def _num_active(self) -> int:
        return len(self._tickets) - len(self._queue)

    @property
    def num_open(self) -> int:
        return len(self._tickets)

    @property
    def backlog_s(self) -> float:
        """Predicted seconds of prefill that wait or have begun."""
        return self._queue.backlog_s + sum(step.remaining_s for step in self._steps.all())

    def loads(self) -> tuple[int, int, int]:
        """How many requests run (hold pages), wait in the queue, are parked."""
        num_parked = sum(len(step.tickets) for step in self._steps.parked())
        return self._num_active() - num_parked, len(self._queue), num_parked

    def check_integrity(self) -> None:
        """Assert that all records agree with each other and no page leaks. For tests, after any event."""
        self.pages.check_integrity([ticket.pages for ticket in self._tickets.values()])
        for ticket in self._tickets.values():
            assert (ticket.state is State.QUEUED) == (ticket.number in self._queue)
            assert (ticket.state is State.DECODING) <= (ticket.number in self._decoding)
            assert ticket.step is None or ticket.step.work.id in self._steps
            assert (ticket.state in (State.RUNNING, State.PARKED)) <= (ticket.step is not None)
            assert ticket.num_computed <= len(ticket.pages) * self.pages.page_tokens
            assert ticket.record.num_output_tokens == ticket.num_generated
            assert self._num_of[ticket.request.tenant] > 0
        for step in self._steps.all():
            assert step.tickets, "a step without members"
            assert (step in self._steps.on.values()) == (step.parked_since is None)
        self._holdings.check_integrity(self._tickets.values())
        self._queue.check_integrity()
