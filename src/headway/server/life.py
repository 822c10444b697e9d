"""What the door knows of one call while it is open and afterwards: understood, predicted, measured, met.

Keeps an account of its own of each answer, from what it hears; the engine's takes its place when it comes. Holds no
prompt and no text, so that it may be kept for long. Knows no transport and no JSON shape.
"""

import itertools
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from headway.core.ledger import Record, settle
from headway.core.lifecycle import State
from headway.core.request import Request
from headway.server.intake import Ask
from headway.server.metrics import Metrics
from headway.server.verdict import TARGETS, milliseconds, targets_met

_serials = itertools.count(1)


class Call:
    """One call, whose answers share their terms. Tells the metrics what it hears (it is the stream's `Meter`).

    `serial` is its number among the calls of this process: what it is called before others than its caller.
    """

    def __init__(self, ask: Ask, metrics: Metrics, told: "Callable[[Call], None] | None" = None) -> None:
        """`told` is called once, when all of its answers have ended."""
        first = ask.requests[0]
        self.id = ask.id
        self.serial = next(_serials)
        self.model = ask.model
        self.arrival = first.arrival
        self.slo = first.slo
        self.slo_class = first.slo_class
        self.tenant = first.tenant
        self.priority = first.priority
        self._records = {request.id: Record.open(request) for request in ask.requests}
        self.num_answers = ask.num_answers  # to each prompt, as asked
        self.max_tokens = first.max_tokens
        # None: nothing is drawn; without the constraint's text, which may be long
        self.sampling = None if first.pooling else replace(first.sampling, constraint=None, logit_bias=())
        self._num_drawn = ask.num_drawn
        self._metrics = metrics
        self._gap, self._generated = metrics.gap, metrics.generated
        self._told = told

    @property
    def records(self) -> list[Record]:
        """One per answer, in the order of the choices; one without a `kind` is open."""
        return list(self._records.values())

    @property
    def num_prompt_tokens(self) -> int:
        """Of all its prompts, each counted once, however many answers it has."""
        return sum(record.num_prompt_tokens for record in self.records[:: self._num_drawn])

    def admitted(self, request: Request, predicted_ttft_s: float) -> None:
        record = self._records[request.id]
        record.predicted_ttft_s = predicted_ttft_s
        record.note(time.monotonic(), "admitted", f"first token expected after {predicted_ttft_s * 1000:.0f} ms")

    def delivered(self, request: Request, num_tokens: int) -> None:
        record, now = self._records[request.id], time.monotonic()
        if record.last_token is None:
            record.first_token = now
            record.note(now, "first_token")
        else:
            self._gap((now - record.last_token) / num_tokens)
        record.last_token = now
        record.num_output_tokens += num_tokens
        self._generated(num_tokens)

    def ended(self, request: Request, record: Record) -> None:
        own = self._records[request.id]
        if record.predicted_ttft_s is None:
            record.predicted_ttft_s = own.predicted_ttft_s
        if not record.timeline or record.timeline[-1].what != record.kind:  # written when the engine was gone
            assert record.kind is not None
            own.message, own.retry_after_s = record.message, record.retry_after_s
            settle(own, State(record.kind), record.reason, time.monotonic() if record.ended is None else record.ended)
            record = own
        self._records[request.id] = record
        self._metrics.ended(request, record)
        self._tell()

    def abandoned(self, request: Request) -> None:
        record = self._records[request.id]
        settle(record, State.CANCELLED, "abandoned", time.monotonic())
        self._metrics.abandoned(request, record)
        self._tell()

    def _tell(self) -> None:
        if any(record.kind is None for record in self._records.values()):
            return
        self._metrics.call_ended(self.num_answers, self.records)
        if self._told is not None:
            self._told(self)

    def headers(self) -> dict[str, str]:
        """What can be said of it by now. Of several answers the slowest counts, once all of them have come to it."""
        told = {"x-headway-slo-class": self.slo_class} if self.slo_class else {}
        for target in TARGETS:
            told[f"x-slo-{target}-ms"] = _text(getattr(self.slo, f"{target}_s"))
        predicted = [record.predicted_ttft_s for record in self.records if record.predicted_ttft_s is not None]
        told["x-headway-predicted-ttft-ms"] = _text(max(predicted, default=None))
        told["x-headway-ttft-ms"] = _text(_slowest(record.ttft_s for record in self.records))
        met = targets_met(self.records)
        told["x-headway-slo-met"] = "" if met is None else str(met).lower()
        return {name: value for name, value in told.items() if value}


def _slowest(seconds: Iterable[float | None]) -> float | None:
    known = list(seconds)
    return None if None in known else max(value for value in known if value is not None)


def _text(seconds: float | None) -> str:
    """In milliseconds; empty if there is nothing to say."""
    value = milliseconds(seconds)
    return "" if value is None or not math.isfinite(value) else f"{value:.15g}"
