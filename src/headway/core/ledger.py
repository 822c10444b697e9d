"""What became of each request: its timestamps, its ending, and for every missed target a cause.

Owns the accounts, decides nothing. All instants are absolute seconds on the clock that was passed in.
"""

from dataclasses import dataclass, field
from typing import Literal

from headway.core.request import SLO

EndKind = Literal["finished", "refused", "cancelled", "failed"]

Cause = Literal[
    "queued_behind",  # others were served first
    "parked",  # suspended for something more urgent
    "starved_of_pages",  # waited for, or lost, KV pages
    "predicted_wrong",  # its own work took longer than the cost model said
    "infeasible",  # the target was shorter than its own work
    "engine_lost",
    "cancelled",
]


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
    busy_prefill_s: float = 0.0
    kind: EndKind | None = None
    reason: str = ""  # "stop" or "length" when finished, else a machine-readable code
    message: str = ""
    stop_id: int | None = None
    retry_after_s: float | None = None
    missed: dict[str, Cause] = field(default_factory=dict)  # target name -> cause

    @property
    def ttft_s(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot_s(self) -> float | None:
        """Mean seconds between tokens, over the gaps that there were."""
        if self.first_token is None or self.last_token is None or self.num_output_tokens < 2:
            return None
        return (self.last_token - self.first_token) / (self.num_output_tokens - 1)
