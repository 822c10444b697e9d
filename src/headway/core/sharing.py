"""How the device is shared between its lanes: asks `division` in view of who waits and who decodes, keeps every step's
pace, and learns from steps that ran side by side."""

from collections import Counter
from collections.abc import Mapping
from itertools import islice
from typing import NamedTuple

from headway.core.candidates import SOFT_TPOT_S, number_of_ticket
from headway.core.cost import CostModel, Share, shares_of
from headway.core.division import HOLD_S, Divider, Situation
from headway.core.lifecycle import State
from headway.core.pages import PageTable
from headway.core.queue import Queue
from headway.core.roofline import Roofline, Split
from headway.core.settings import MAIN, TOKENS, SchedulerSettings
from headway.core.steps import Steps
from headway.core.ticket import Step, Ticket

MAX_LOOKED_AT = 8  # prompts in the queue: those further back come nearer before they count
WEIGHT = 0.1  # of the newest step in a correction
BOUNDS = (0.5, 4.0)  # of a correction
HANDOVER = 0.3  # of the bound of a tile: one that has begun on a share ends on it, and aims at 0.6
LEAST_BESIDE = 0.25  # of a prompt's step: with less of it beside others it says more of its price than of its pace
FORGOTTEN_S = 2 * HOLD_S  # undivided for so long: what was learnt side by side may be true no more, and is let go


class Sharing:
    """The state of one engine's division. Without a `roofline` the device is never divided."""

    def __init__(
        self,
        settings: SchedulerSettings,
        cost: CostModel,
        pages: PageTable,
        roofline: Roofline | None,
        counters: Counter[str],
    ) -> None:
        self.roofline = roofline
        self.divider = Divider(settings.lanes, roofline.splits if roofline is not None else ())
        self.correction = {MAIN: 1.0, TOKENS: 1.0}  # of paces side by side, by what steps have taken
        self._handover_s = HANDOVER * settings.tile_s
        self._done_beside = (0.5, 0.5)  # of a prompt's step, while others ran: by its uncorrected pace, and in fact
        self._cost = cost
        self._pages = pages
        self._counters = counters
        self._side_by_side = False
        self._paces_of_late = (1.0, 1.0)  # of prompts and tokens side by side
        self._mean_stretch = 1.0  # of prompts beside which tokens come and go
        if self.divider.split is not None and roofline is not None:
            self._paces_of_late = (roofline.units / self.divider.split.prompts, 1.0)
        self._last_split = self.divider.split  # a lane's step may outlive the division that it began under
        self._undivided_since: float | None = None

    @property
    def token_pace(self) -> float:
        """How many times as long as alone tokens take beside a prompt."""
        return self._paces_of_late[1] if self.is_divided else 1.0

    @property
    def toll(self) -> float:
        """What prompts lose by a step for tokens, in parts of what it takes alone: all of it if they are suspended."""
        prompts, tokens = self._paces_of_late
        return tokens * (1.0 - 1.0 / prompts) if self.is_divided else 1.0

    def left_to_prompts(self, token_share: float) -> float:
        """Of the device, if a step for tokens, alone on it, takes that share of their target."""
        if not self.is_divided or not token_share:
            return 1.0 - token_share
        always_beside = 1.0 / max(1.0, self._paces_of_late[0])
        return always_beside if self.is_apart else max(always_beside, 1.0 - self.toll * token_share)

    @property
    def shares(self) -> Split | None:
        """Of the lanes, if both have a step."""
        return self._last_split if self._side_by_side else None

    @property
    def is_divided(self) -> bool:
        """Whether tokens that come while prompts are read have a lane of their own."""
        return self.divider.split is not None

    @property
    def is_apart(self) -> bool:
        """Whether tokens are made in that lane only, one after another."""
        return self.is_divided and not self.divider.tokens_wait

    def units(self, lane: str) -> int:
        """How many units of the device the lane has: all of them while the other has nothing to do."""
        if self.roofline is None:
            return 1
        if self.shares is None:
            return self.roofline.units
        return self.shares.prompts if lane == MAIN else self.shares.tokens

    def decide(self, queue: Queue, steps: Steps, decoding: Mapping[int, Ticket], now: float) -> None:
        """Look anew how the device is to be divided, if there are both prompts and tokens."""
        if not self.divider.may_divide or not decoding:
            return
        self._forget(now)
        ahead = _prompts_ahead(queue, steps, self._cost.predict(()), now)
        if not ahead:
            return
        first = min(ahead, key=lambda each: each.due_s / max(each.seconds, 1e-9))
        context = sum(ticket.num_computed for ticket in decoding.values())
        token_s = self._cost.next_tokens(len(decoding), context)
        target_s = min(ticket.request.slo.tpot_s or SOFT_TPOT_S for ticket in decoding.values())
        used = 1.0 - self._pages.num_available / self._pages.num_pages
        tokens = (Share(1, context // len(decoding)),) * len(decoding)
        before = self.divider.num_changes
        split = self.divider.decide(
            Situation(first.seconds, first.due_s, token_s, target_s, used, first.fixed_s, self._handover_s),
            lambda split: self._paces((first.prompt,), tokens, split),
            now,
        )
        self._last_split = split or self._last_split
        if self.divider.num_changes > before:
            self._counters["repartitions"] += 1
            if split is not None:
                self._paces_of_late = self._paces((first.prompt,), tokens, split)

    def _forget(self, now: float) -> None:
        """Corrections are learnt side by side only: without this, one that says never to divide would stay for ever."""
        if self.is_divided or self._undivided_since is None:
            self._undivided_since = None if self.is_divided else now
        elif now - self._undivided_since >= FORGOTTEN_S:
            self.correction = {MAIN: 1.0, TOKENS: 1.0}
            self._done_beside, self._undivided_since = (0.5, 0.5), now

    def set_paces(self, steps: Steps, now: float, *, decoding: bool) -> None:
        """After a plan: who is in which lane may be another now. `decoding`: whether tokens come beside prompts."""
        prompts, tokens = steps.on.get(MAIN), steps.on.get(TOKENS)
        self._side_by_side = prompts is not None and tokens is not None
        if self.shares is None or prompts is None or tokens is None:
            for step in steps.on.values():
                rest = self._mean_stretch if self.is_divided and decoding and not step.decoding else 1.0
                step.keep_pace(1.0, rest, now, beside=False)
            return
        both = shares_of(prompts.work.segments), shares_of(tokens.work.segments)
        self._paces_of_late = first, second = self._paces(*both, self.shares)
        target_s = min((ticket.request.slo.tpot_s or SOFT_TPOT_S for ticket in tokens.tickets), default=SOFT_TPOT_S)
        self._mean_stretch = 1.0  # if the step has outlived its division, others come in turns
        if self.is_divided:
            self._mean_stretch = 1.0 / self.left_to_prompts(min(1.0, tokens.predicted_s / target_s))
        prompts.keep_pace(first, self._mean_stretch, now, beside=True)
        tokens.keep_pace(second, second, now, beside=True)

    def observe(self, step: Step, taken_s: float, now: float) -> None:
        """Learn from a step that ran beside others."""
        step.stop(now)
        if step.predicted_s <= 0 or step.beside_s <= 0:
            return
        if not step.decoding:
            if step.beside_s < LEAST_BESIDE * taken_s:
                return
            after = self._of_prompts(step, taken_s)
        elif step.is_steady:  # as most of them are: what another took says little of its pace
            before = self.correction[TOKENS]
            after = before * (1.0 + WEIGHT * (taken_s / (step.predicted_s * step.pace) - 1.0))
        else:
            return
        lane = TOKENS if step.decoding else MAIN
        self.correction[lane] = min(max(after, BOUNDS[0]), BOUNDS[1])

    def _of_prompts(self, step: Step, taken_s: float) -> float:
        """The correction, by this prompt and those before it. Others come beside it now and then: what it did not do
        alone it did then, in more or less time than its pace said. One such difference says little, so sums are
        compared. It is alone again only with its next tile."""
        after_s = step.num_partings * self._handover_s
        alone_s = taken_s - step.beside_s - after_s
        believed_s = step.done_beside_s * (1.0 + after_s / step.beside_s)
        believed, done = self._done_beside
        believed += WEIGHT * (believed_s * self.correction[MAIN] / step.predicted_s - believed)
        done += WEIGHT * (1.0 - alone_s / step.predicted_s - done)
        self._done_beside = believed, done
        return believed / done if done > 0 else BOUNDS[1]

    def _paces(self, prompts: tuple[Share, ...], tokens: tuple[Share, ...], split: Split) -> tuple[float, float]:
        assert self.roofline is not None
        first, second = self.roofline.paces(prompts, tokens, split)
        return max(1.0, first * self.correction[MAIN]), max(1.0, second * self.correction[TOKENS])


class _Ahead(NamedTuple):
    """Seconds of work up to somebody's first token, those of them that steps take whatever is in them, seconds until it
    is due or infinity, and the prompt."""

    seconds: float
    fixed_s: float
    due_s: float
    prompt: Share


def _prompts_ahead(queue: Queue, steps: Steps, step_s: float, now: float) -> list[_Ahead]:
    """Of who waits for a first token: those who have begun, then the first of the queue. What has begun is ahead of
    what is due later. Who is late even if there were no tokens is due for nobody, and gives way. What tokens ride along
    in is not suspended for them, and goes before prompts as they do: it is in nobody's way for longer than it takes,
    and that time is gone for who waits. A prompt that has begun by itself does not save what a step costs, but the next
    one will: a division is for longer than one."""
    begun: list[_Ahead] = []
    ridden_s = 0.0
    for step in steps.all():
        if not step.decoding:
            left_s = step.remaining_s / step.mean_pace
            due = [_due_s(ticket, now) for ticket in step.tickets if not ticket.num_generated]
            due_s = min([each for each in due if each >= left_s], default=float("inf"))
            if any(ticket.state is State.DECODING for ticket in step.tickets):
                ridden_s += left_s
            else:
                begun.append(_Ahead(left_s, min(step_s, left_s), due_s, shares_of(step.work.segments)[-1]))

    def waits(seconds: float, fixed_s: float, due_s: float, prompt: Share) -> _Ahead:
        before_s = sum(each.seconds for each in begun if each.due_s <= due_s)
        return _Ahead(seconds + before_s, fixed_s, due_s - ridden_s, prompt)

    found = [waits(0.0, each.fixed_s, each.due_s, each.prompt) for each in begun]
    seconds = fixed_s = 0.0  # of their tokens, and of their parts in steps
    for candidate in islice(queue.in_order(now), MAX_LOOKED_AT):
        number = number_of_ticket(candidate.key)
        ticket, amortized_s = queue.ticket(number), queue.amortized_s(number)
        own_s = min(amortized_s, max(0.0, candidate.remaining_s - step_s))
        seconds += own_s
        fixed_s += amortized_s - own_s
        steps_s = max(fixed_s, min(step_s, candidate.remaining_s))  # one at least is theirs alone
        share = Share(ticket.num_to_compute, ticket.num_computed)
        found.append(waits(seconds + steps_s, steps_s, _due_s(ticket, now), share))
    return [each if each.seconds <= each.due_s else each._replace(due_s=float("inf")) for each in found]


def _due_s(ticket: Ticket, now: float) -> float:
    target_s = ticket.request.slo.ttft_s
    return float("inf") if target_s is None or ticket.num_generated else ticket.request.arrival + target_s - now
