"""When a newcomer can expect its first token: what goes before it, what it takes itself, what tokens take meanwhile,
and when there is room for it. And how far apart the others.

Looks at the queue, the open steps and the pages, changes nothing, and cannot know who comes next, nor how long answers
become: that is learnt.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile
from typing import ClassVar

from headway.core.admission import Forecast
from headway.core.candidates import next_tokens_s, prefill_s, step_candidate, ticket_candidate, token_share
from headway.core.cost import CostModel
from headway.core.pages import PageTable
from headway.core.policy import Standing, Tier, standing, whom_to_switch_to
from headway.core.queue import Queue
from headway.core.settings import SchedulerSettings
from headway.core.sharing import Sharing
from headway.core.steps import Steps
from headway.core.ticket import Step, Ticket

READING = 1.1  # times as long as its step a token takes that comes while prompts are read now and then


@dataclass(slots=True)
class Lengths:
    """How long answers have become of late: what part of the tokens that they might have had, in the mean, and how many
    nine in ten had at least, as far as that was up to them."""

    WEIGHT: ClassVar[float] = 0.05  # of the newest answer
    SHORT: ClassVar[float] = 0.1  # of them are shorter than `at_least`
    part: float = 0.5
    at_least: float = float("inf")  # nothing is known

    def observe(self, num_tokens: int, most: int) -> None:
        """An answer has ended, of itself or because it might have no more."""
        self.part += self.WEIGHT * (num_tokens / most - self.part)
        if num_tokens == most < self.at_least:
            return
        if self.at_least == float("inf"):
            self.at_least = float(num_tokens)
        is_shorter = num_tokens < self.at_least  # down a large step or up a small one: at rest where a tenth is shorter
        self.at_least = max(1.0, self.at_least * (1.0 + 2 * self.WEIGHT * (self.SHORT - is_shorter)))

    def surely(self, ticket: Ticket) -> float:
        """Tokens that this answer has at least, in nine cases of ten."""
        return min(self.at_least, self.expected(ticket))

    def expected(self, ticket: Ticket) -> float:
        """Tokens of this answer."""
        return self.part * ticket.max_tokens

    def left(self, ticket: Ticket) -> float:
        """Tokens that it is still to have: one at least."""
        return max(1.0, self.expected(ticket) - ticket.num_generated)


@dataclass(frozen=True, slots=True)
class Forecaster:
    """Reads the scheduler's state. `num_places()`: how many more requests may hold pages."""

    settings: SchedulerSettings
    queue: Queue
    steps: Steps
    decoding: dict[int, Ticket]
    pages: PageTable
    num_places: Callable[[], int]
    lengths: Lengths
    cost: CostModel
    sharing: Sharing

    def forecast(self, ticket: Ticket, now: float) -> Forecast:
        """For a ticket that is not in the queue yet."""
        alone_s = prefill_s(ticket, self.cost, promised=True)
        spare = self.sharing.left_to_prompts(self._decode_share())
        candidate = ticket_candidate(ticket, self.cost)._replace(debt_s=self.queue.debt_s(ticket.request.tenant))
        own = standing(candidate, now, self.settings.order)
        rides = self.settings.takes_along and bool(self.decoding) and not self.sharing.is_divided
        open_s = along_s = 0.0
        for step in self.steps.all():
            if not step.decoding:
                before_s = self._before_s(step, own.order, now)
                if any(t.num_generated for t in step.tickets):
                    along_s += before_s
                else:
                    open_s += before_s
        num_queued, queued_s = self.queue.before(ticket, now)
        room_s = self._room_s(ticket, max(0, num_queued - len(self.queue.begun)))
        ahead_s = (queued_s + open_s) / spare + along_s
        fixed_s = self.cost.predict(()) if rides else 0.0
        own_s = now - ticket.request.arrival + max(0.0, alone_s - fixed_s) / spare
        mean_s = own_s + max(room_s, ahead_s + self._let_end_s(own, ahead_s, now) / spare)
        undisturbed_s = min(alone_s, prefill_s(ticket, self.cost, as_fitted=True, promised=True))
        upper_s = max(mean_s, own_s + self.cost.upper(ahead_s))
        pace_s = paced_in_s = 0.0
        if ticket.is_paced and self.settings.refuse_unattainable:
            num_paced = num_queued * self.queue.paced_share(own.tier)
            pace_s, paced_in_s = self._pace_s(ticket, num_paced, queued_s / spare, ahead_s)
        return Forecast(mean_s, upper_s, undisturbed_s, self._token_s(ticket), pace_s, paced_in_s)

    def _token_s(self, ticket: Ticket) -> float:
        """Its second token alone, if nothing slowed the device either."""
        token = self.cost.fit.next_tokens(1, len(ticket.tokens))
        return min(token.fitted_s, self.cost.seconds(token))

    def _pace_s(self, ticket: Ticket, num_before: float, queued_s: float, ahead_s: float) -> tuple[float, float]:
        """How far apart its tokens will come, for which a pace was asked, prompts being read now and then; and, if that
        is too far, in how long enough others will have ended. Beside it are those with a pace of their own and no worse
        a priority: who decodes and will do so in `ahead_s`, whose prompt is being read, and who waits in front of it,
        about `num_before` and `queued_s` of work, as far as they are not answered before its turn. The others are no
        reason to turn it away."""
        request, lengths = ticket.request, self.lengths
        target_s = request.slo.tpot_s
        assert target_s is not None
        now_s = next_tokens_s(self.decoding.values(), self.cost) if self.decoding else 0.0
        stay = [other for other in self.decoding.values() if lengths.left(other) * now_s > ahead_s]
        read = [other for step in self.steps.all() if not step.decoding for other in step.tickets]
        begun = [*stay, *(other for other in read if other.number not in self.decoding)]
        others = [other for other in begun if other.is_paced and other.request.priority <= request.priority]
        context = (sum([len(other.tokens) for other in others]) + len(ticket.tokens)) / (len(others) + 1)

        def step_s(num: int) -> float:
            num = max(1, min(num, self.settings.max_num_seqs))
            return self.cost.next_tokens(num, round(num * context))

        answer_s = lengths.expected(ticket) * step_s(len(others) + 1)
        num_waiting = round(num_before * min(1.0, answer_s / max(queued_s, 1e-9)))
        num = len(others) + num_waiting + 1
        if num == 1:
            return 0.0, 0.0
        pace_s = READING * step_s(num)
        if pace_s <= target_s:
            return pace_s, 0.0
        left = sorted([*(lengths.left(other) for other in others), *[lengths.expected(ticket)] * num_waiting])
        enough = (each for gone, each in enumerate(left, 1) if READING * step_s(num - gone) <= target_s)
        return pace_s, next(enough, left[-1]) * step_s(num)

    def _room_s(self, ticket: Ticket, num_before: int) -> float:
        """When there is a place and pages for it, and a place for each before it: answers that are being written end
        one by one, the shortest first, at a token a step."""
        decoding = self.decoding
        num_places = self.num_places() - num_before
        num_fresh = self.pages.pages_for(ticket.num_to_compute - ticket.num_cached_hint)
        num_pages = self.pages.num_available - len(decoding) - num_fresh
        if num_places > 0 and num_pages >= 0:
            return 0.0
        num_steps = 0.0
        for left, number in sorted((self.lengths.left(other), number) for number, other in decoding.items()):
            num_steps, num_places = left, num_places + 1
            num_pages += len(decoding[number].pages)
            if num_places > 0 and num_pages >= 0:
                break
        return num_steps * next_tokens_s(decoding.values(), self.cost)

    def _before_s(self, step: Step, order: tuple[float, ...], now: float) -> float:
        """What it takes before others, were it alone on the device."""
        left_s = step.remaining_at(now) / step.mean_pace
        on_device = step is self.steps.on_device
        if on_device and not self.settings.suspends:
            return left_s
        own = step_candidate(step, self.cost, self.settings, now)
        if standing(own, now, self.settings.order).order < order:
            return left_s
        return min(left_s, self.settings.tile_s) if on_device else 0.0

    def _let_end_s(self, own: Standing, ahead_s: float, now: float) -> float:
        """What the step on the device takes beyond its tile, if it goes behind but nobody has to suspend it."""
        step, settings = self.steps.on_device, self.settings
        if step is None or step.decoding or not settings.suspends:
            return 0.0
        if settings.order != "slack" or own.tier is Tier.STARVED:
            return 0.0
        running = step_candidate(step, self.cost, settings, now)
        running = running._replace(remaining_s=step.remaining_at(now) / step.mean_pace)
        left_s = max(0.0, running.remaining_s - settings.tile_s)
        if standing(running, now, settings.order).order < own.order or ahead_s + left_s > own.slack_s:
            return 0.0
        in_front = takewhile(lambda c: standing(c, now, settings.order).order < own.order, self.queue.in_order(now))
        gives_way = whom_to_switch_to(running, in_front, now, settings.tile_s, settings.order) is not None
        return 0.0 if gives_way else left_s

    def _decode_share(self) -> float:
        """The share of the device that tokens take if each comes just when it is due."""
        if not self.decoding:
            return 0.0
        if self.cost.chunk_tokens is not None:  # they have their places in each chunk
            return min(0.5, len(self.decoding) / self.cost.chunk_tokens)
        settings = self.settings
        return token_share(self.decoding.values(), self.cost, settings.tile_s, rides=settings.takes_along)
