"""The lives of the last calls, for whoever asks why one was late.

Owns how many are remembered, who may look at which, and what is shown. A call of a tenant is shown to that tenant only.
"""

from collections import OrderedDict
from typing import Literal

import msgspec

from headway.core.ledger import Record
from headway.server.life import Call
from headway.server.verdict import TARGETS, SloReport, milliseconds, reports, targets_met

MAX_CALLS = 1024
MAX_ANSWERS = 4096  # of all of them: a call may have hundreds
_PREFIXES = (
    "",
    "cmpl-",
    "chatcmpl-",
    "resp_",
    "embd-",
    "score-",
)  # of an answer's id; what follows is the X-Request-Id


class Timelines:
    """Forgets the call that was not asked for the longest."""

    def __init__(self, max_calls: int = MAX_CALLS, max_answers: int = MAX_ANSWERS) -> None:
        self._max_calls = max_calls
        self._max_answers = max_answers
        self._calls: OrderedDict[tuple[str, str], Call] = OrderedDict()  # (tenant, id), the latest last
        self._num_answers = 0

    def keep(self, call: Call) -> None:
        """From now on it can be found; a new call takes the place of an old one with its id."""
        key = call.tenant, call.id
        if key in self._calls:
            self._forget(key)
        self._calls[key] = call
        self._num_answers += len(call.records)
        while len(self._calls) > self._max_calls or (self._num_answers > self._max_answers and len(self._calls) > 1):
            self._forget(next(iter(self._calls)))

    def find(self, name: str, tenant: str) -> Call | None:
        """By the answer's id or the X-Request-Id; of calls that share the latter, the newest."""
        keys = [(owner, prefix + name) for owner in dict.fromkeys((tenant, "")) for prefix in _PREFIXES]
        found = [key for key in keys if key in self._calls]
        if not found:
            return None
        newest = max(found, key=lambda key: self._calls[key].arrival)
        self._calls.move_to_end(newest)
        return self._calls[newest]

    def _forget(self, key: tuple[str, str]) -> None:
        self._num_answers -= len(self._calls.pop(key).records)


class ShownMoment(msgspec.Struct):
    at_ms: float | None  # after the arrival
    what: str
    detail: str


class ShownAnswer(msgspec.Struct):
    """`kind` is null while it is open: then what the door itself has seen is all there is."""

    index: int
    kind: str | None
    reason: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    predicted_ttft_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    queue_ms: float | None
    parked_ms: float | None
    total_ms: float | None
    preemptions: int
    recomputes: int
    slo_met: bool | None
    slo: dict[str, SloReport]
    moments: list[ShownMoment]


class Shown(msgspec.Struct):
    """One call. Milliseconds everywhere."""

    id: str
    object: Literal["request.timeline"]
    serial: int  # as it is called in /live
    model: str
    state: Literal["open", "ended"]
    slo_class: str | None
    tenant: str | None
    priority: int
    targets: dict[str, float | None]
    choices: list[ShownAnswer]


def shown(call: Call) -> Shown:
    """What a caller may see of a call."""
    targets = {f"{target}_ms": milliseconds(getattr(call.slo, f"{target}_s")) for target in TARGETS}
    is_open = any(record.kind is None for record in call.records)
    return Shown(
        id=call.id,
        object="request.timeline",
        serial=call.serial,
        model=call.model,
        state="open" if is_open else "ended",
        slo_class=call.slo_class or None,
        tenant=call.tenant or None,
        priority=call.priority,
        targets={name: value for name, value in targets.items() if value is not None},
        choices=[_answer(index, record) for index, record in enumerate(call.records)],
    )


def _answer(index: int, record: Record) -> ShownAnswer:
    def since_arrival(at: float | None) -> float | None:
        return None if at is None else milliseconds(at - record.arrival)

    return ShownAnswer(
        index=index,
        kind=record.kind,
        reason=record.reason or None,
        prompt_tokens=record.num_prompt_tokens,
        cached_tokens=record.num_cached_tokens,
        completion_tokens=record.num_output_tokens,
        predicted_ttft_ms=milliseconds(record.predicted_ttft_s),
        ttft_ms=milliseconds(record.ttft_s),
        tpot_ms=milliseconds(record.tpot_s),
        queue_ms=since_arrival(record.first_scheduled),
        parked_ms=None if record.kind is None else milliseconds(record.parked_s),
        total_ms=since_arrival(record.ended),
        preemptions=record.num_preemptions,
        recomputes=record.num_recomputes,
        slo_met=targets_met([record]),
        slo=reports([record]),
        moments=[ShownMoment(since_arrival(at), what, detail) for at, what, detail in record.timeline],
    )
