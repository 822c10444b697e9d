"""When a newcomer can expect its first token: what goes before it, what it takes itself, what tokens take meanwhile.

Looks at the queue and the open steps, changes nothing, and cannot know who comes next.
"""

from dataclasses import dataclass
from itertools import takewhile

from headway.core.admission import Forecast
from headway.core.candidates import prefill_s, step_candidate, ticket_candidate, token_candidate
from headway.core.cost import CostModel
from headway.core.policy import Order, Standing, Tier, standing, whom_to_switch_to
from headway.core.queue import Queue
from headway.core.sharing import Sharing
from headway.core.steps import Steps
from headway.core.ticket import Step, Ticket


@dataclass(frozen=True, slots=True)
class Forecaster:
    """Reads the scheduler's state. `suspends`: whether a step gives way before its end."""

    queue: Queue
    steps: Steps
    decoding: dict[int, Ticket]
    cost: CostModel
    order: Order
    tile_s: float
    suspends: bool
    sharing: Sharing
    rides: bool

    def forecast(self, ticket: Ticket, now: float) -> Forecast:
        """For a ticket that is not in the queue yet."""
        alone_s = prefill_s(ticket, self.cost)
        spare = self.sharing.left_to_prompts(self._decode_share())
        candidate = ticket_candidate(ticket, self.cost)._replace(debt_s=self.queue.debt_s(ticket.request.tenant))
        own = standing(candidate, now, self.order)
        rides = self.rides and bool(self.decoding) and not self.sharing.is_divided
        open_s = along_s = 0.0
        for step in self.steps.all():
            if not step.decoding:
                before_s = self._before_s(step, own.order, now)
                if any(t.num_generated for t in step.tickets):
                    along_s += before_s
                else:
                    open_s += before_s
        ahead_s = (self.queue.seconds_before(ticket, now) + open_s) / spare + along_s
        fixed_s = self.cost.predict(()) if rides else 0.0
        own_s = now - ticket.request.arrival + max(0.0, alone_s - fixed_s) / spare
        mean_s = own_s + ahead_s + self._let_end_s(own, ahead_s, now) / spare
        undisturbed_s = alone_s / max(1.0, self.cost.correction)
        return Forecast(mean_s, max(mean_s, own_s + self.cost.upper(ahead_s)), undisturbed_s)

    def _before_s(self, step: Step, order: tuple[float, ...], now: float) -> float:
        """What it takes before others, were it alone on the device."""
        left_s = step.remaining_at(now) / step.pace
        on_device = step is self.steps.on_device
        if on_device and not self.suspends:
            return left_s
        own = step_candidate(step, self.cost, self.tile_s, float("inf"), now)
        if standing(own, now, self.order).order < order:
            return left_s
        return min(left_s, self.tile_s) if on_device else 0.0

    def _let_end_s(self, own: Standing, ahead_s: float, now: float) -> float:
        """What the step on the device takes beyond its tile, if it goes behind but nobody has to suspend it."""
        step = self.steps.on_device
        if step is None or step.decoding or not self.suspends or self.order != "slack" or own.tier is Tier.STARVED:
            return 0.0
        running = step_candidate(step, self.cost, self.tile_s, float("inf"), now)
        running = running._replace(remaining_s=step.remaining_at(now) / step.pace)
        left_s = max(0.0, running.remaining_s - self.tile_s)
        if standing(running, now, self.order).order < own.order or ahead_s + left_s > own.slack_s:
            return 0.0
        in_front = takewhile(lambda c: standing(c, now, self.order).order < own.order, self.queue.in_order(now))
        gives_way = whom_to_switch_to(running, in_front, now, self.tile_s, self.order) is not None
        return 0.0 if gives_way else left_s

    def _decode_share(self) -> float:
        """The share of the device that tokens take if each comes just when it is due."""
        if not self.decoding:
            return 0.0
        if self.cost.chunk_tokens is not None:  # they have their places in each chunk
            return min(0.5, len(self.decoding) / self.cost.chunk_tokens)
        token = token_candidate(list(self.decoding.values()), self.cost, self.tile_s, rides=self.rides)
        return token.remaining_s / token.rescue_s
