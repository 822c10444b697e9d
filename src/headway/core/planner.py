"""Which step a lane is to run from here on: the one it has, a suspended one, a new one, or none.

Owns the comparison of everything that could have the device, and when to look again if nothing happens. What goes into
a new step is `composition`'s, who goes first is `policy`'s, what happened is the scheduler's.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from heapq import merge

from headway.core.candidates import NEXT_TOKEN, number_of_ticket, step_candidate, token_candidate
from headway.core.composition import Composer
from headway.core.cost import CostModel
from headway.core.policy import Candidate, Tier, can_wait_s, should_switch, standing, whom_to_switch_to
from headway.core.queue import Queue
from headway.core.settings import MAIN, TOKENS, Lane, SchedulerSettings
from headway.core.sharing import Sharing
from headway.core.steps import Steps
from headway.core.ticket import Step
from headway.core.work import Work

NEVER = float("inf")
MAX_TRIES = 8  # candidates without pages that one decision looks past


@dataclass(slots=True)
class Planner:
    """Makes, starts and suspends steps. `num_places()`: how many more requests may hold pages."""

    settings: SchedulerSettings
    cost: CostModel
    queue: Queue
    steps: Steps
    composer: Composer
    sharing: Sharing
    num_places: Callable[[], int]
    due: float | None = None  # the next instant, after the last plan, at which something changes without an event
    _token: Candidate | None = field(default=None, init=False)
    _token_is_known: bool = field(default=False, init=False)

    def plan(self, now: float, lane: Lane) -> Work | None:
        """Called once for each batch of events and lane."""
        self.steps.see(lane, now)
        if lane.name == TOKENS:
            work = self._tokens_beside(now)
        else:
            self.sharing.decide(self.queue, self.steps, self.composer.decoding, now)
            work = self._main(now)
        self.sharing.set_paces(self.steps, now, decoding=bool(self.composer.decoding))
        self.due = self._next_instant(now)
        return work

    def _main(self, now: float) -> Work | None:
        running = self.steps.on_device
        if running is not None:
            return self._switch(running, now) if self.settings.suspends else running.work
        return self._chunk(now) if self.settings.preempt == "chunk" else self._choose(now)

    def _tokens_beside(self, now: float) -> Work | None:
        """The step of the lane for tokens. It makes one after another, or only what is due while a prompt is read."""
        running = self.steps.on.get(TOKENS)
        if running is not None:
            return running.work
        if not self.sharing.is_divided:
            return None
        step = next((step for step in self.steps.parked() if step.decoding), None)
        if step is None and (self.sharing.is_apart or self._is_due_beside(now)):
            step = self._next_token(now)
        return None if step is None else self.steps.put(step, TOKENS, now)

    def _is_due_beside(self, now: float) -> bool:
        """Whether the next token cannot wait for the prompt on the device."""
        token, beside = self._token_candidate(), self.steps.on_device
        return token is not None and beside is not None and not beside.decoding and token.ripe_at <= now

    def forget_token(self) -> None:
        """Who waits for another token may be others now."""
        self._token_is_known = False

    def _switch(self, running: Step, now: float) -> Work:
        """The running step's Work, or that of whoever has a reason to take its place."""
        settings = self.settings
        own = self._step_candidate(running, now)
        token = self._token_candidate()
        if (
            token is not None
            and not self.sharing.is_divided
            and token.ripe_at <= now
            and should_switch(own, token, now, settings.tile_s, settings.order)
        ):
            step = self._next_token(now)
            if step is not None:
                return self._change(running, step, now)
        # a token adds nothing to what is parked, nor does a parked step, of which those that would are left out
        prompts = self.steps.may_park(running, settings.max_num_parked, settings.most_parked_tokens)
        step = self._first_that_can_start(
            lambda order: whom_to_switch_to(own, order, now, settings.tile_s, settings.order), now, prompts=prompts
        )
        return running.work if step is None else self._change(running, step, now)

    def _change(self, running: Step, step: Step, now: float) -> Work:
        self.steps.park(running, now)
        return self.steps.put(step, MAIN, now)

    def _choose(self, now: float) -> Work | None:
        """The best candidate that can start; what is not ripe comes last, but before an idle device."""
        # whoever begins may have to make room for a token: where as much is parked as may be, that gets on first
        prompts = self.steps.may_begin(self.settings.max_num_parked, self.settings.most_parked_tokens)
        step = self._first_that_can_start(lambda order: next(order, None), now, prompts=prompts)
        if step is None and not self.sharing.is_apart:
            step = self._next_token(now)
        return None if step is None else self.steps.put(step, MAIN, now)

    def _first_that_can_start(
        self, pick: Callable[[Iterator[Candidate]], Candidate | None], now: float, *, prompts: bool
    ) -> Step | None:
        """The step of whom `pick` takes from the candidates in order; of the next one if that one finds no pages."""
        in_vain: set[int] = set()
        num_places = self.num_places()
        while True:
            order = self._in_order(now, num_places, prompts=prompts)
            chosen = pick(candidate for candidate in order if candidate.key not in in_vain)
            if chosen is None:
                return None
            step = self._prepare(chosen, num_places, now)
            if step is not None:
                return step
            in_vain.add(chosen.key)
            if len(in_vain) >= MAX_TRIES or self._keeps_others_out(chosen, now):
                num_places = 0  # from here on only those who have their pages

    def _chunk(self, now: float) -> Work | None:
        """Tokens and pieces of prompts in one step that runs to its end."""
        self._token_is_known = False
        step = self.composer.mixture(self.settings.chunk_tokens, self.num_places(), now)
        return None if step is None else self.steps.put(step, MAIN, now)

    def _prepare(self, chosen: Candidate, num_places: int, now: float) -> Step | None:
        """The step behind a candidate, made if need be; None (and nothing changed) if it lacks pages."""
        if chosen.key > 0:
            return self.steps[chosen.key]
        token = self._token_candidate() if self.settings.takes_along else None
        first = next(self._queued(now, num_places), None) if chosen.key == NEXT_TOKEN else chosen
        if token is not None and first is not None:
            waits = chosen.key == NEXT_TOKEN  # the prompt, for tokens, if they do not go together
            step = self.composer.along(token, first, num_places, self._spare_s(now), self.sharing, now, waits=waits)
            self._token_is_known = False
            if step is not None:
                return step
        if chosen.key == NEXT_TOKEN:
            return self._next_token(now)
        return self.composer.prompts(chosen, num_places, self._spare_s(now), now)

    def _queued(self, now: float, num_places: int) -> Iterator[Candidate]:
        """The queue in its order; without a place only those in it who have theirs."""
        queued = self.queue.in_order(now)
        if num_places > 0:
            return queued
        begun = self.queue.begun
        return (c for c in queued if number_of_ticket(c.key) in begun) if begun else iter(())

    def _next_token(self, now: float) -> Step | None:
        """One more token for everybody between two steps; None if there is nobody, or no room."""
        self._token_is_known = False
        return self.composer.tokens(now)

    def _keeps_others_out(self, candidate: Candidate, now: float) -> bool:
        """Pages that come free belong to a starved prompt first, or small ones would keep it out for ever."""
        return candidate.key < 0 and standing(candidate, now, self.settings.order).tier is Tier.STARVED

    def _in_order(self, now: float, num_places: int, *, prompts: bool) -> Iterator[Candidate]:
        """Everything that is ripe and could have the device, but the step that has it; the first to start first."""
        order = self.settings.order
        running, most = self.steps.on_device, self.settings.most_parked_tokens
        parked = [step for step in self._parked() if running is None or self.steps.may_swap(running, step, most)]
        others = [self._step_candidate(step, now) for step in parked]
        token = self._token_candidate()
        if token is not None and token.ripe_at <= now and not self.sharing.is_divided:
            others.append(token)
        others.sort(key=lambda candidate: standing(candidate, now, order).order)
        if not prompts:
            return iter(others)
        queued = self._queued(now, num_places)
        return merge(others, queued, key=lambda c: standing(c, now, order).order) if others else queued

    def _next_instant(self, now: float) -> float | None:
        """When to look again if nothing happens: a token is ripe, a target needs a start, a wait has been too long."""
        instants = []
        parked = self._parked()
        if parked:
            waiting = [self._step_candidate(step, now) for step in parked]
            instants += [candidate.starved_at for candidate in waiting]
        if self.steps.on_device is not None and self.settings.suspends:
            tile_s = self.settings.tile_s
            token = self._token_candidate()
            if token is not None:
                instants.append(token.ripe_at)
            queue = self.queue
            instants += [queue.next_start(now + tile_s) - tile_s, queue.next_turn(), queue.next_starved()]
            if parked:
                instants += [c.deadline - c.remaining_s - tile_s for c in waiting if c.deadline is not None]
        soonest = min((instant for instant in instants if now < instant), default=NEVER)
        soonest = min(soonest, self.queue.next_expiry())  # may have passed since events were handled: then at once
        return soonest if soonest < NEVER else None

    def _token_candidate(self) -> Candidate | None:
        """The next token of all between two steps; looked up once until a step is made, or ends, or somebody leaves.
        None while they are made in a lane of their own, one after another."""
        if self.sharing.is_apart:
            return None
        if not self._token_is_known:
            between = self.composer.between_steps()
            rides, tile_s = self.settings.takes_along, self.settings.tile_s
            token = token_candidate(between, self.cost, tile_s, rides=rides) if between else None
            if token is not None:  # it must begin sooner where it takes longer
                token = token._replace(ripe_at=token.ripe_at - (self.sharing.token_pace - 1) * token.total_s)
            self._token, self._token_is_known = token, True
        return self._token

    def _parked(self) -> list[Step]:
        """Those that the main lane may resume."""
        parked = self.steps.parked()
        return [step for step in parked if not step.decoding] if self.sharing.is_divided else parked

    def _step_candidate(self, step: Step, now: float) -> Candidate:
        return step_candidate(step, self.cost, self.settings, now)

    def _spare_s(self, now: float) -> float:
        """How long every step that has begun, and can still be in time, can wait."""
        begun = [self._step_candidate(step, now) for step in self.steps.all()]
        order = self.settings.order
        on_time = [candidate for candidate in begun if standing(candidate, now, order).tier is Tier.ON_TIME]
        return min((left for c in on_time if (left := can_wait_s(c, now, order)) >= 0), default=NEVER)
