"""Whether prompts and tokens take turns on the whole device or run side by side on a share each, and on which.

Proactive: it predicts what both ways would do to first tokens and to the time between tokens before anything is late.
After Nexus (arXiv 2507.06608) and DuetServe (arXiv 2511.04791): the device is divided only when a first token would
come late without, tokens riding along included, and only if that is better. While pages are plenty, prompts are
favoured: as many units for them as the tokens' target allows. When pages become few, tokens are, since only they give
pages back. Both ways have hysteresis.

Taking turns, tokens come just in time, once in a target, and leave 1 - step / target of the device to prompts. Riding
along, they save the prompts what a step costs whatever is in it. Side by side they come just in time too: for the time
of their own step, which takes `pace` times as long, prompts are slowed down instead of suspended. That is never worse
than turns where both get more done at once than one after the other. Tokens that are favoured wait for nothing, and
slow down prompts all the time. It is not known here what a token or a prompt is: they are two kinds of work of known
cost and target.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from headway.core.candidates import ALONG
from headway.core.roofline import Split
from headway.core.settings import Lanes

GAIN = 0.05  # less is not worth going back for …
WORTH = 0.15  # … nor dividing for: what is predicted of two lanes leaves out how they hand cores to each other
HARM_S = 1.0  # so long a division must have done harm before it is left
HOLD_S = 60.0  # so long a division must have been of no use, or another better, before it is left
FEW_PAGES = 0.70  # of all pages in use: from here on tokens are favoured …
ENOUGH_PAGES = 0.60  # … until no more than this
BUSIEST = 0.8  # of the time in which tokens are wanted: more than that beside prompts is no reason to divide …
BUSY = 0.95  # … nor to stay divided
STRETCH = 1.3  # how much longer than at best prompts may take while tokens are favoured
MAX_SPLITS = 15  # that are looked at: a search among them takes four evaluations at most

Paces = Callable[[Split], tuple[float, float]]


class Situation(NamedTuple):
    """What a decision goes by, in seconds. `prompt_s` is the work ahead of the first token that is due `due_s` from
    now, itself included, alone on the device; `due_s` is infinite if nobody waits for one in particular. `token_s` is
    one more token for all who decode, alone on the device, and `target_s` the time in which it is wanted; `pages_used`
    a share of all. `fixed_s` of the prompt's work is saved if tokens ride along. After a step for tokens beside them it
    takes `handover_s` until prompts have the whole device again."""

    prompt_s: float
    due_s: float
    token_s: float
    target_s: float
    pages_used: float
    fixed_s: float = 0.0
    handover_s: float = 0.0


class Prediction(NamedTuple):
    """How many times as long prompts take, and how far apart tokens come; side by side also how much of the time in
    which tokens are wanted their steps take."""

    stretch: float
    gap_s: float
    busy: float = 0.0


Predict = Callable[[Split], Prediction]


@dataclass(slots=True)
class Divider:
    """Remembers what was decided. `splits`: the fewest units for prompts first; none: the device cannot be divided."""

    lanes: Lanes
    splits: tuple[Split, ...]
    split: Split | None = None
    num_changes: int = 0
    num_evaluations: int = 0  # of the last decision
    favours_tokens: bool = False
    _other_since: float | None = field(default=None, init=False)
    _harm_since: float | None = field(default=None, init=False)
    _undivided_until: float = field(default=float("-inf"), init=False)

    def __post_init__(self) -> None:
        if len(self.splits) > MAX_SPLITS:
            last = len(self.splits) - 1
            self.splits = tuple(self.splits[round(i * last / (MAX_SPLITS - 1))] for i in range(MAX_SPLITS))
        if self.lanes == "split" and self.splits:
            self.split = self.splits[len(self.splits) // 2]

    @property
    def tokens_wait(self) -> bool:
        """Whether tokens beside prompts come when they are due, and not one after another."""
        return self.lanes == "auto" and not self.favours_tokens

    @property
    def may_divide(self) -> bool:
        return self.lanes in ("split", "auto") and bool(self.splits)

    def decide(self, situation: Situation, paces: Paces, now: float) -> Split | None:
        """How the device is divided from here on; None: not at all. `paces` is evaluated at most five times."""
        if self.lanes == "auto" and self.splits:
            self._settle(*self._best(situation, paces), now)
        return self.split

    def _settle(self, best: Split | None, is_urgent: bool, now: float) -> None:
        """Take what is best: soon if it is urgent, else if it has been better for a while. A division that was left is
        tried again no sooner than leaves one change in `HOLD_S`."""
        is_harm = is_urgent and best is None and self.split is not None
        if not is_harm:
            self._harm_since = None
        elif self._harm_since is None:
            self._harm_since = now
        if best == self.split:
            self._other_since = None
            return
        if self._other_since is None:  # whatever is better than this, and be it one way and then another
            self._other_since = now
        held_s = now - self._other_since
        if self.split is None and now < self._undivided_until:
            return
        does_harm = self._harm_since is not None and now - self._harm_since >= HARM_S
        if does_harm or held_s >= HOLD_S or (is_urgent and self.split is None):
            if best is None:
                self._undivided_until = now + (2 * HOLD_S if does_harm else HOLD_S)
            self.split, self._other_since, self._harm_since = best, None, None
            self.num_changes += 1

    def _best(self, at: Situation, paces: Paces) -> tuple[Split | None, bool]:
        """The best way, and whether to take it at once: something would be late, or a division does harm."""
        self.num_evaluations = 1
        if at.pages_used >= FEW_PAGES:
            self.favours_tokens = True
        elif at.pages_used <= ENOUGH_PAGES:
            self.favours_tokens = False
        turns = by_turns(at)

        def predict(split: Split) -> Prediction:
            self.num_evaluations += 1
            return side_by_side(at, *paces(split), waits=self.tokens_wait)

        if at.prompt_s * turns.stretch <= at.due_s and turns.gap_s <= at.target_s:
            return None, self.split is not None and self._is_worse(predict(self.split), turns)
        found = self._for_tokens(predict) if self.favours_tokens else self._for_prompts(predict, turns.gap_s)
        if found is None:
            return None, True
        split, beside = found
        # hysteresis: the way that is taken may be a little worse
        least = GAIN if self.split is not None or self.favours_tokens else WORTH
        margin = 1 + GAIN if split == self.split else 1 - least
        gains = beside.gap_s < turns.gap_s * margin
        if not self.favours_tokens:
            gains = beside.stretch < turns.stretch * margin
        return (split if gains else None), True

    def _is_worse(self, beside: Prediction, turns: Prediction) -> bool:
        """For whom is favoured."""
        if self.favours_tokens:
            return beside.gap_s > turns.gap_s * (1 + GAIN)
        return beside.stretch > turns.stretch * (1 + GAIN)

    def _for_prompts(self, predict: Predict, gap_s: float) -> tuple[Split, Prediction] | None:
        """The most units for prompts with which tokens come no later than they would otherwise, with room for more who
        come to decode: while tokens take longer, there are."""
        busiest = BUSIEST if self.split is None else BUSY
        return _last(self.splits, predict, lambda found: found.gap_s <= gap_s and found.busy <= busiest)

    def _for_tokens(self, predict: Predict) -> tuple[Split, Prediction]:
        """The most units for tokens with which prompts take little longer than they must."""
        most = predict(self.splits[-1])
        limit = STRETCH * most.stretch
        others = self.splits[-2::-1]
        return _last(others, predict, lambda found: found.stretch <= limit) or (self.splits[-1], most)


def by_turns(at: Situation) -> Prediction:
    """Tokens just in time, riding along where that saves something. A target that the device cannot meet still leaves
    some of its time to prompts."""
    gap_s = max(at.target_s, ALONG * at.token_s)
    alone = 1 - at.fixed_s / at.prompt_s if at.prompt_s else 1.0
    return Prediction(alone / (1 - at.token_s / gap_s) if gap_s else alone, gap_s)


def side_by_side(at: Situation, stretch: float, pace: float, *, waits: bool) -> Prediction:
    """On shares on which prompts take `stretch` times as long while tokens take `pace` times as long beside them."""
    step_s = at.token_s * pace
    if not waits:
        return Prediction(stretch, step_s)
    busy = (step_s + at.handover_s) / at.target_s
    if step_s >= at.target_s:
        return Prediction(stretch, step_s, busy)
    return Prediction(1 / (1 - min(1.0, busy) * (1 - 1 / stretch)), at.target_s, busy)


def _last(
    splits: tuple[Split, ...], predict: Predict, holds: Callable[[Prediction], bool]
) -> tuple[Split, Prediction] | None:
    """The last for which it holds, where it holds up to some point and not beyond: found by halving."""
    found = None
    low, high = 0, len(splits)
    while low < high:
        middle = (low + high) // 2
        prediction = predict(splits[middle])
        if holds(prediction):
            found, low = (splits[middle], prediction), middle + 1
        else:
            high = middle
    return found
