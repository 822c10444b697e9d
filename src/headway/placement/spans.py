"""What the device did, as it happened: a span for each stretch in which one step had it, or one lane of it, without
another in between.

Owns the engine's side, where the driver notes spans at events only (never at a tile) and another thread takes them
away, and the door's side, where the last of them are kept. Knows neither why a step was suspended nor who may see it.
"""

from collections import deque
from typing import Literal, NamedTuple

from headway.core.request import Request
from headway.core.settings import MAIN
from headway.core.work import Work

MAX_NOTED = 256  # spans that nobody has taken yet
MAX_NAMED = 4  # requests of a step that a span names
MAX_KEPT = 1024  # at the door

Kind = Literal["prefill", "decode", "mixed"]
Ending = Literal["done", "suspended", "left", "failed"]


class Span(NamedTuple):
    """One stretch of a step. `begun` and `ended` are seconds on the host's monotonic clock.

    `ending` says why the device was let go: the step was done; it was suspended, and another span of the same Work
    follows; all its requests left; or it failed. None: it has the device still, `ended` says nothing. A suspended step
    that is given up has a last span of no length. `resumed`: the same Work had the device before.
    """

    work_id: int
    begun: float
    ended: float
    kind: Kind
    num_tokens: int
    num_requests: int
    request_ids: tuple[str, ...]  # the first few
    ending: Ending | None = None
    resumed: bool = False
    lane: str = MAIN


class Spans:
    """The engine's notes. All but `take` and reading `running` belong to the threads that drive.

    Nothing here waits: the deque is bounded, and its ends may be used by two threads without a lock.
    """

    def __init__(self, most: int = MAX_NOTED) -> None:
        self._on: dict[str, Span] = {}  # by lane
        self._noted: deque[Span] = deque(maxlen=most)
        self._suspended: dict[int, Span] = {}  # by Work
        self._prompt_tokens: dict[str, int] = {}  # of the open requests

    @property
    def running(self) -> tuple[Span, ...]:
        """Those that have a lane."""
        return tuple(self._on.values())

    def open(self, request: Request) -> None:
        """A request may appear in Works from now on."""
        self._prompt_tokens[request.id] = len(request.prompt)

    def close(self, request_id: str) -> None:
        """It will not appear again."""
        self._prompt_tokens.pop(request_id, None)

    def begin(self, work: Work, now: float, lane: str = MAIN) -> None:
        """The lane is given to this step. If another has it, that one is suspended; if it has it, it goes on."""
        running = self._on.get(lane)
        if running is not None:
            if running.work_id == work.id:
                return
            self._noted.append(running._replace(ended=now, ending="suspended"))
            self._suspended[running.work_id] = running
        before = self._suspended.pop(work.id, None)
        if before is not None:
            self._on[lane] = before._replace(begun=now, ended=now, resumed=True, lane=lane)
            return
        names = tuple(segment.request_id for segment in work.segments[:MAX_NAMED])
        kind = self._kind(work)
        self._on[lane] = Span(work.id, now, now, kind, work.num_tokens, len(work.segments), names, lane=lane)

    def end(self, work_id: int, ending: Ending, now: float) -> None:
        """The step will not run again."""
        running = next((span for span in self.running if span.work_id == work_id), None)
        if running is not None:
            self._noted.append(running._replace(ended=now, ending=ending))
            del self._on[running.lane]
        elif (parked := self._suspended.pop(work_id, None)) is not None:
            self._noted.append(parked._replace(begun=now, ended=now, ending=ending, resumed=True))

    def take(self) -> tuple[Span, ...]:
        """What has ended since the last call, the oldest first. For one other thread."""
        taken = []
        while self._noted:
            taken.append(self._noted.popleft())
        return tuple(taken)

    def _kind(self, work: Work) -> Kind:
        """A segment decodes if it starts behind its request's prompt."""
        known = self._prompt_tokens
        num_decoding = sum(s.first_position >= known.get(s.request_id, s.first_position + 1) for s in work.segments)
        if num_decoding == 0:
            return "prefill"
        return "decode" if num_decoding == len(work.segments) else "mixed"


class History:
    """The door's memory of one engine after another. Works keep numbers of their own across engines."""

    def __init__(self, most: int = MAX_KEPT) -> None:
        self.running: tuple[Span, ...] = ()
        self.num_heard = 0  # ended spans, ever
        self._spans: deque[Span] = deque(maxlen=most)
        self._suspended: dict[int, Span] = {}
        self._before = 0  # Works of earlier engines
        self._last_work = 0

    def add(self, spans: tuple[Span, ...], running: tuple[Span, ...]) -> None:
        """What an engine has said: spans that have ended since, and those that have a lane."""
        for span in spans:
            self._keep(self._renumbered(span))
        self.running = tuple(map(self._renumbered, running))

    def since(self, num_heard: int) -> list[Span]:
        """Those that came after the first `num_heard`, as far as they are kept; the oldest first."""
        num_new = min(self.num_heard - num_heard, len(self._spans))
        return [self._spans[place] for place in range(len(self._spans) - num_new, len(self._spans))]

    def lose(self, now: float) -> None:
        """The engine is gone: what it had begun has failed."""
        for span in self.running:
            self._keep(span._replace(ended=max(now, span.begun), ending="failed"))
        self.running = ()
        for span in list(self._suspended.values()):
            self._keep(span._replace(begun=now, ended=now, ending="failed", resumed=True))
        self._before = self._last_work

    def _renumbered(self, span: Span) -> Span:
        number = self._before + span.work_id
        self._last_work = max(self._last_work, number)
        return span._replace(work_id=number)

    def _keep(self, span: Span) -> None:
        if span.ending == "suspended":
            self._suspended[span.work_id] = span
        else:
            self._suspended.pop(span.work_id, None)
        if len(self._suspended) > MAX_KEPT:  # an ending may be lost where spans come faster than they are sent
            del self._suspended[next(iter(self._suspended))]
        self._spans.append(span)
        self.num_heard += 1
