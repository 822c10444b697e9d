"""What a scheduler is told once, at its start, and what it is told about the device each time it is asked."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from headway.core.policy import Order

Preempt = Literal["operator", "layer", "chunk", "none"]
Lanes = Literal["turns", "mixed", "split", "auto"]


@dataclass(frozen=True, slots=True)
class SchedulerSettings:
    """`tile_s` is the bound B. `pack_tokens` is where more tokens in a step stop making it more efficient.

    A suspended step keeps its pages and, for every token in it, activations: `max_parked_tokens` bounds their bytes.
    It is never less than one longest request, which must always be able to give way.

    `order`, `preempt`, `pack` and `refuse_unattainable` are switches for comparison: "slack", "operator" and the others
    on is what this project is for. With `preempt` "chunk" steps are never suspended, but hold `chunk_tokens` at most,
    tokens of those who decode among them; with "none" they are neither suspended nor cut.

    `lanes`: prompts and tokens take turns; "mixed", which is what is served, tokens ride along with what of the prompts
    leaves them in time; "split", each has a fixed share of the device while there are both; "auto", mixed or divided as
    `division` predicts.
    """

    max_model_len: int
    max_num_seqs: int = 64
    max_num_queued: int = 1024
    pack_tokens: int = 512
    tile_s: float = 0.010
    max_num_parked: int = 8
    max_parked_tokens: int = 1 << 20
    max_parked_s: float = 30.0
    prefix_caching: bool = True
    stage: str = "language"
    order: Order = "slack"
    preempt: Preempt = "operator"
    chunk_tokens: int = 512
    pack: bool = True
    refuse_unattainable: bool = True
    lanes: Lanes = "turns"

    @property
    def most_parked_tokens(self) -> int:
        """The bound that holds: one longest request may be parked at least."""
        return max(self.max_parked_tokens, self.max_model_len)

    @property
    def suspends(self) -> bool:
        """Whether a step may be suspended before its end."""
        return self.preempt in ("operator", "layer")

    @property
    def takes_along(self) -> bool:
        """Whether tokens ride along in a prompt's step."""
        return self.suspends and self.lanes in ("mixed", "auto")


MAIN = "main"  # what runs anything, on the whole device, or prompts while tokens have a share of their own
TOKENS = "tokens"  # what runs nothing but tokens, and only while the device is divided


class Lane(NamedTuple):
    """One share of a device, as the driver sees it: how far the Work that is on it has come (0 … 1)."""

    name: str = MAIN
    progress: float = 0.0
