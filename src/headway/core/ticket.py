"""The scheduler's own records: a Ticket per open request, a Step per Work that is planned and not yet done."""

from dataclasses import dataclass, field

from headway.core.cost import Price
from headway.core.ledger import Record
from headway.core.lifecycle import State, check_move
from headway.core.policy import Candidate
from headway.core.prefix import extend_keys, root_key
from headway.core.request import SLO, Request
from headway.core.work import Work

SAME_PACE = 0.1  # by so much it may change, as the step beside changes, and count as the same
# Several answers to one prompt: the key of all that can be cached of it, and what gives them one place in the order.
Twin = tuple[bytes, float, int, SLO]

_Seen = tuple[float, float, float | None]  # when the policy saw a step, with how much left, and suspended since when


@dataclass(slots=True, eq=False)
class Ticket:
    """What is known of an open request.

    `tokens` is the prompt and what was generated; the first `num_computed` of them are in `pages`, of which the first
    `num_published` carry a prefix key. `number` grows with arrival.
    """

    number: int
    request: Request
    max_tokens: int
    record: Record
    tokens: list[int]
    root: bytes
    state: State = State.QUEUED
    num_computed: int = 0
    num_cached_hint: int = 0
    num_published: int = 0
    num_surely: float = 0.0  # tokens of its answer, at least, by how long others have become; set with the first
    twin: Twin | None = None  # what another answer to the same prompt has as well, until it gives its pages back
    num_promised: int = 0  # of its tokens: what such a one, in front of it, will leave in the cache
    awaited: bytes | None = None  # the key of the first page that it needs and nobody has computed
    pages: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    step: "Step | None" = None
    starved_since: float | None = None
    pending_end: tuple[State, str] | None = None  # how it ends once it has left its step
    num_scored: int = 0  # of the prompt's tokens, from the second on: their logprobs have been told

    @classmethod
    def open(cls, number: int, request: Request, longest: int) -> "Ticket":
        """`longest` is how many tokens, prompt and answer, the engine has room for."""
        record = Record.open(request)
        room = longest - len(request.prompt)
        root = root_key(request.tenant, request.adapter, salt=request.cache_salt)
        return cls(number, request, min(request.max_tokens, room), record, list(request.prompt), root)

    @property
    def num_to_compute(self) -> int:
        return len(self.tokens) - self.num_computed

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt)

    @property
    def is_paced(self) -> bool:
        """Whether it is to have tokens after its first one, at a pace that was asked for."""
        return self.max_tokens > 1 and self.request.slo.tpot_s is not None

    @property
    def num_to_score(self) -> int:
        """Tokens of the prompt whose logprobs are asked and not told yet."""
        asked = self.request.sampling.num_prompt_logprobs is not None
        return len(self.request.prompt) - 1 - self.num_scored if asked else 0

    @property
    def needs_every_row(self) -> bool:
        """Whether all its tokens must be computed for it, because something is asked of each that no page keeps."""
        return bool(self.num_to_score) or self.request.pooling == "mean"

    def draws_after(self, end: int) -> bool:
        """Whether a token is to be drawn when the first `end` of its tokens are computed."""
        return end == len(self.tokens) and self.max_tokens > 0

    def scored_within(self, start: int, end: int) -> range:
        """Of the positions start … end - 1, counted from `start`: those after which a prompt token is to be scored."""
        if not self.num_to_score:
            return range(0)
        return range(max(0, self.num_scored - start), min(end, len(self.request.prompt) - 1) - start)

    @property
    def expiry(self) -> float:
        """When it is too late to be worth starting: the whole answer was due, and nothing has been done for it."""
        total_s = self.request.slo.total_s
        if total_s is None or self.record.first_scheduled is not None:
            return float("inf")
        return self.request.arrival + total_s

    def move(self, to: State) -> None:
        check_move(self.request.id, self.state, to)
        self.state = to

    def update_keys(self, page_tokens: int) -> None:
        extend_keys(self.keys, self.root, self.tokens, page_tokens)


@dataclass(slots=True, eq=False)
class Step:
    """A Work on the device or parked. `progress` is the share of it that was done when last seen, 0 … 1: what remains
    is counted by operators done, so that one which is slower than predicted does not look finished."""

    work: Work
    tickets: list[Ticket]
    price: Price
    predicted_s: float
    decoding: bool
    progress: float = 0.0
    seen_at: float = 0.0
    parked_since: float | None = None
    pace: float = 1.0  # times as long as alone on the whole device, at present …
    mean_pace: float = 1.0  # … and for what remains of it, while others come beside it and go
    num_paces: int = 0  # that it has had
    is_beside: bool = False  # another one, since …
    paced_at: float = 0.0
    beside_s: float = 0.0  # that it has had another beside it, until then; and what that is, by its pace, …
    done_beside_s: float = 0.0  # … in seconds alone on the device
    num_partings: int = 0  # how often it was left alone again, and went on
    candidates: tuple[Candidate, ...] | None = None  # what it is made of for the policy, once it has been looked up …
    starved_at: float = float("inf")  # … and when the first of them has waited too long
    seen_as: tuple[_Seen, Candidate] | None = None
    num_tokens: int = field(init=False)
    scores: bool = field(init=False)  # it tells logprobs of prompts, which its price leaves out

    def __post_init__(self) -> None:
        self.num_tokens = self.work.num_tokens
        self.scores = any(segment.scored_at for segment in self.work.segments)

    def leave(self, ticket: Ticket) -> None:
        """One of its tickets goes, the others go on."""
        self.tickets.remove(ticket)
        ticket.step = None
        self.candidates = self.seen_as = None

    def keep_pace(self, pace: float, mean_pace: float, now: float, *, beside: bool) -> None:
        """It goes on at this pace, beside another or alone."""
        self.mean_pace = mean_pace
        self.num_partings += self.is_beside and not beside
        self.stop(now)
        self.is_beside = beside
        if self.num_paces == 0 or abs(pace / self.pace - 1) > SAME_PACE:
            self.pace = pace
            self.num_paces += 1

    def stop(self, now: float) -> None:
        """It does not go on, or not as it did: until now it was beside another, if it was."""
        if self.is_beside:
            self.beside_s += now - self.paced_at
            self.done_beside_s += (now - self.paced_at) / self.pace
        self.paced_at, self.is_beside = now, False

    @property
    def was_beside(self) -> bool:
        """Whether there was another beside it for any of its time."""
        return self.is_beside or self.beside_s > 0

    @property
    def is_steady(self) -> bool:
        """Whether it has had one pace all the time: what another took says little about either."""
        return self.num_paces <= 1

    @property
    def remaining_s(self) -> float:
        return self.predicted_s * (1.0 - self.progress) * self.mean_pace

    def remaining_at(self, now: float) -> float:
        """What remains at `now`, if it has had the device since it was last seen."""
        since_s = 0.0 if self.parked_since is not None else now - self.seen_at
        return max(0.0, self.remaining_s - since_s)
