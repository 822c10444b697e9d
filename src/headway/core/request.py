"""What a caller asks for, complete and immutable once the door has parsed it.

Owns the request's types and nothing else: what becomes of a request is the scheduler's record (`ticket.Ticket`).
Deadlines are absolute: they count from `Request.arrival`, seconds on the host's monotonic clock.
"""

from dataclasses import dataclass, field
from typing import Literal

Pooling = Literal["", "mean", "last"]
ConstraintKind = Literal["json", "regex", "choice", "lark"]


@dataclass(frozen=True, slots=True)
class SLO:
    """Targets in seconds; None means best effort for that part.

    `ttft_s`: arrival to first token. `tpot_s`: between two tokens. `total_s`: arrival to last token.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    total_s: float | None = None


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer must look like, as its source: a JSON schema, a regular expression, a JSON list of texts to choose
    from, or a grammar in Lark's notation. Whoever draws tokens makes of it what it needs."""

    kind: ConstraintKind
    text: str


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn. Temperature 0 is greedy; `top_k` 0, `top_p` 1 and `min_p` 0 are off.

    The random stream is a function of `seed` and the token's position alone, so what else is in the batch,
    or how often the request was suspended, never changes a token. `num_logprobs` None asks for no logprobs,
    0 for the chosen token's only, k for the k best besides; `num_prompt_logprobs` asks the same of the prompt's own
    tokens, from the second on.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    constraint: Constraint | None = None


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt and what is wanted for it.

    `priority` has vLLM's sign: lower is earlier. `tenant` salts the prefix cache: equal prompts of two tenants share
    no page, and each has its share of the device. `cache_salt` salts it once more, within the tenant. `slo_class` is
    the name under which the ledger counts the request.
    `max_tokens` bounds the answer; 0: the prompt is read, and nothing is drawn. `pooling` asks for a vector of the
    prompt: the mean of its hidden states, or the last of them. `stop_ids` end the answer (the id
    itself is delivered, not shown); they count from `min_tokens` on.
    """

    id: str
    prompt: tuple[int, ...]
    max_tokens: int
    arrival: float
    slo: SLO = SLO()
    sampling: Sampling = field(default_factory=Sampling)
    stop_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    priority: int = 0
    tenant: str = ""
    adapter: str | None = None
    slo_class: str = ""
    cache_salt: str = ""
    pooling: Pooling = ""
