"""What became of each request: its timestamps, its ending, and for every missed target a cause.

Owns the accounts, decides nothing. All instants are absolute seconds on the clock that was passed in.
"""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Self

from headway.core.lifecycle import State
from headway.core.request import SLO, Request

EndKind = Literal["finished", "refused", "cancelled", "failed"]

Cause = Literal[
    "queued_behind",  # others were served first
    "parked",  # suspended for something more urgent
    "starved_of_pages",  # waited for, or lost, KV pages
    "predicted_wrong",  # its own work took longer than the cost model said
    "infeasible",  # the target was shorter than its own work
    "engine_lost",
    "step_failed",
    "refused",
    "cancelled",
]


MAX_MOMENTS = 64  # of one request: what comes later is not noted, but for its first token and its ending


class Moment(NamedTuple):
    """Something in the life of a request: an instant, a word for a program, and what else there is to say."""

    at: float
    what: str
    detail: str = ""


@dataclass(slots=True)
class Record:
    """The life of one request. Written by the scheduler, read by the door, the metrics and the bench."""

    request_id: str
    arrival: float
    slo: SLO
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    num_output_tokens: int = 0
    first_scheduled: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    ended: float | None = None
    longest_gap_s: float = 0.0
    num_preemptions: int = 0
    num_recomputes: int = 0
    parked_s: float = 0.0
    starved_s: float = 0.0
    predicted_prefill_s: float = 0.0
    predicted_ttft_s: float | None = None  # at its arrival, with everything that was to go before it
    overrun_s: float = 0.0  # what its prefill's steps took beyond their price
    prefill_parked_s: float = 0.0  # of the above, what was before the first token
    prefill_starved_s: float = 0.0
    predicted_token_s: float = 0.0  # of another token alone, when the first was there
    token_overrun_s: float = 0.0  # what the steps of its other tokens took beyond their price
    kind: EndKind | None = None
    reason: str = ""  # "stop" or "length" when finished, else a machine-readable code
    message: str = ""
    stop_id: int | None = None
    retry_after_s: float | None = None
    missed: dict[str, Cause] = field(default_factory=dict)  # target name -> cause
    slo_class: str = ""
    tenant: str = ""
    timeline: list[Moment] = field(default_factory=list)

    @classmethod
    def open(cls, request: Request) -> Self:
        """The account of a request that has just arrived."""
        record = cls(request.id, request.arrival, request.slo, len(request.prompt))
        record.slo_class, record.tenant = request.slo_class, request.tenant
        record.timeline.append(Moment(request.arrival, "arrived", f"{len(request.prompt)} tokens"))
        return record

    def note(self, at: float, what: str, detail: str = "") -> None:
        """Another moment of its life."""
        if len(self.timeline) < MAX_MOMENTS or what == "first_token":
            self.timeline.append(Moment(at, what, detail))

    def begin_answer(self, now: float, token_s: float) -> None:
        """The first token is there; another one alone would take `token_s`."""
        self.first_token = now
        self.predicted_token_s = token_s
        self.prefill_parked_s, self.prefill_starved_s = self.parked_s, self.starved_s

    def overran(self, seconds: float) -> None:
        """A step that it was in took so much longer than predicted."""
        if self.first_token is None:
            self.overrun_s += seconds
        else:
            self.token_overrun_s += seconds

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens, over the gaps that there were."""
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)


def settle(record: Record, ending: State, reason: str, now: float) -> None:
    """Close the account: how it ended, and a cause for every target that was missed."""
    record.ended = now
    record.kind = _KINDS[ending]
    record.reason = reason
    record.timeline.append(Moment(now, record.kind, reason))
    for name, target_s, taken_s in (
        ("ttft", record.slo.ttft_s, record.ttft_s),
        ("tpot", record.slo.tpot_s, record.tpot_s),
        ("total", record.slo.total_s, now - record.arrival if ending is State.FINISHED else None),
    ):
        if target_s is None:
            continue
        if taken_s is not None and taken_s <= target_s and ending is not State.FAILED:  # what broke off is no answer
            continue
        if ending is State.FINISHED and taken_s is None:
            continue  # one token has no gaps
        record.missed[name] = _cause(record, ending, reason, name, target_s)


_KINDS: dict[State, EndKind] = {
    State.FINISHED: "finished",
    State.REFUSED: "refused",
    State.CANCELLED: "cancelled",
    State.FAILED: "failed",
}


def _cause(record: Record, ending: State, reason: str, target: str, target_s: float) -> Cause:
    """What cost the most time, of what the account shows and as far as the target counts it."""
    if ending is State.CANCELLED:
        return "cancelled"
    if reason in ("engine_lost", "shutdown"):
        return "engine_lost"
    if ending is State.FAILED:
        return "step_failed"
    if ending is State.REFUSED and reason != "deadline_expired":
        return "refused"
    num_gaps = max(0, record.num_output_tokens - 1)
    tokens_s = num_gaps * record.predicted_token_s
    alone_s = {"ttft": record.predicted_prefill_s, "tpot": record.predicted_token_s}
    if alone_s.get(target, record.predicted_prefill_s + tokens_s) > target_s:
        return "infeasible"
    is_answered = record.first_token is not None
    until = record.first_token if record.first_token is not None else record.ended
    assert until is not None
    own_s = record.predicted_prefill_s if record.first_scheduled is not None else 0.0
    lost_s: dict[Cause, float] = {
        "queued_behind": 0.0,
        "parked": record.prefill_parked_s if is_answered else record.parked_s,
        "starved_of_pages": record.prefill_starved_s if is_answered else record.starved_s,
        "predicted_wrong": record.overrun_s,
    }
    lost_s["queued_behind"] = until - record.arrival - own_s - sum(lost_s.values())
    if target != "ttft" and record.first_token is not None and record.last_token is not None:
        # beyond what the tokens would have taken alone: their own steps were slow, or others were served in between
        between_s = record.last_token - record.first_token - tokens_s
        after_s: dict[Cause, float] = {
            "parked": record.parked_s - record.prefill_parked_s,
            "starved_of_pages": record.starved_s - record.prefill_starved_s,
            "predicted_wrong": record.token_overrun_s,
        }
        after_s["queued_behind"] = between_s - sum(after_s.values())
        lost_s = after_s if target == "tpot" else {cause: lost_s[cause] + after_s[cause] for cause in lost_s}
    return max(lost_s, key=lambda cause: lost_s[cause])
