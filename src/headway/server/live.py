"""`GET /live`: what the device does, as server-sent events for the page, the last seconds first.

Everyone who may look at the server may look at this, whatever their tenant. So a step is told by numbers alone: when it
had the device, how many tokens and requests it was made of, and for the first few of these a serial number and the name
under which their class is counted. Ids, tenants, prompts and answers stay out. Who knows a request's id finds its
serial number in its timeline, which only its own tenant may read.

Nothing is kept for a reader: each asks the history for what it has not told yet, whenever what it told before has been
taken off its hands. A slow one misses spans; it never makes them pile up.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

import msgspec
from starlette.types import Receive, Scope, Send

from headway.placement.link import EngineLink, LinkState
from headway.placement.spans import Ending, Kind, Span
from headway.placement.wire import Beat
from headway.server.errors import not_ready
from headway.server.life import Call
from headway.server.metrics import Judged
from headway.server.transport import EventStream
from headway.server.verdict import class_counted

MAX_READERS = 32
MAX_LABELS = 4096  # requests whose serial numbers are remembered
PACE_S = 0.2  # between two events
SILENCE_S = 1.0  # without news there is one this often all the same
VISIT_S = 600.0  # then a reader must come again, so that one who does not read keeps no place for ever
PATIENCE_S = 60.0  # how much longer it may take to be told that
RETRY_S = 15.0  # a reader too many may try again after this


class Label(msgspec.Struct, frozen=True):
    """A request, as far as everybody may know it."""

    serial: int
    slo_class: str


class Stretch(msgspec.Struct, frozen=True):
    """A span, as far as everybody may know it. Seconds on the server's monotonic clock; `ending` as in `Span`."""

    step: int
    begun: float
    ended: float
    kind: Kind
    tokens: int
    requests: int
    of: tuple[Label, ...]
    ending: Ending | None
    resumed: bool
    lane: str


class News(msgspec.Struct, frozen=True):
    """One event. `now` is on the clock of the stretches; `running` have the device, their end is not known."""

    now: float
    state: LinkState
    stretches: list[Stretch]
    running: list[Stretch]
    beat: Beat | None
    classes: Mapping[str, Judged]


class Live:
    """Tells readers about one engine. `judged` is who was in time, by class."""

    def __init__(
        self, link: EngineLink, judged: Mapping[str, Judged], now: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_readers = 0
        self._link = link
        self._judged = judged
        self._now = now
        self._labels: OrderedDict[str, Label] = OrderedDict()

    def expect(self, call: Call) -> None:
        """The answers of this call are shown under its number from now on."""
        label = Label(call.serial, class_counted(call.slo_class, call.slo))
        for record in call.records:
            self._labels[record.request_id] = label
        while len(self._labels) > MAX_LABELS:
            self._labels.popitem(last=False)

    def reader(self, keep_alive_s: float) -> "Visit":
        """An answer that tells one reader until it leaves, the engine is gone or its time is over."""
        return Visit(EventStream(self._news, keep_alive_s))

    async def _news(self, stream: EventStream) -> None:
        """Raises ApiError 503 at once if there are too many already."""
        if self.num_readers >= MAX_READERS:
            raise not_ready(
                "too_many_readers",
                f"{MAX_READERS} readers are looking on already: try again later, or ask GET /state now and then.",
                RETRY_S,
            )
        self.num_readers += 1
        try:
            history, num_told, told_at, leaves_at = self._link.history, 0, 0.0, self._now() + VISIT_S
            running: tuple[Span, ...] = ()
            state: LinkState | None = None
            while state != "down" and self._now() < leaves_at:
                news = history.num_heard > num_told or history.running != running or self._link.state != state
                if news or self._now() - told_at >= SILENCE_S:
                    spans = history.since(num_told)
                    num_told, running, state, told_at = (
                        history.num_heard,
                        history.running,
                        self._link.state,
                        self._now(),
                    )
                    stream.put([msgspec.json.encode(self._tell(spans))])
                    await stream.taken()
                await asyncio.sleep(PACE_S)
        finally:
            self.num_readers -= 1

    def _tell(self, spans: list[Span]) -> News:
        return News(
            now=self._now(),
            state=self._link.state,
            stretches=[self._stretch(span) for span in spans],
            running=[self._stretch(span) for span in self._link.history.running],
            beat=self._link.beat,
            classes=self._judged,
        )

    def _stretch(self, span: Span) -> Stretch:
        of = tuple(self._labels[name] for name in span.request_ids if name in self._labels)
        return Stretch(
            step=span.work_id,
            begun=round(span.begun, 6),
            ended=round(span.ended, 6),
            kind=span.kind,
            tokens=span.num_tokens,
            requests=span.num_requests,
            of=of,
            ending=span.ending,
            resumed=span.resumed,
            lane=span.lane,
        )


class Visit:
    """An event stream that is given up when its reader has not taken an event off our hands for far too long."""

    def __init__(self, stream: EventStream) -> None:
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout(VISIT_S + PATIENCE_S):
                await self._stream(scope, receive, send)
        except TimeoutError:
            return  # half an answer: the server closes the connection
