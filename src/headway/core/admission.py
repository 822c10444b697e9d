"""Who is let in. Refusing early is kinder than failing late: a refusal has a reason, and a hint when to come back."""

from collections.abc import Callable
from typing import NamedTuple

from headway.core.request import Request


class Refusal(NamedTuple):
    """`reason` is machine-readable; `retry_after_s` None means that trying again will not help."""

    reason: str
    message: str
    retry_after_s: float | None = None


class Limits(NamedTuple):
    """What one engine can take."""

    max_model_len: int
    max_num_queued: int
    num_pages: int
    page_tokens: int


def refusal(
    request: Request, limits: Limits, num_queued: int, backlog_s: Callable[[], float], draining: bool
) -> Refusal | None:
    """None if the request may enter. `backlog_s` gives the predicted seconds of work that are queued."""
    num_tokens = len(request.prompt)
    if num_tokens == 0:
        return Refusal("empty_prompt", "The prompt is empty: give at least one token.")
    if num_tokens >= limits.max_model_len:
        return Refusal(
            "context_length_exceeded",
            f"This model's maximum context length is {limits.max_model_len} tokens. However, your prompt contains "
            f"{num_tokens} input tokens: shorten it so that at least one more fits.",
        )
    if num_tokens + 1 > limits.num_pages * limits.page_tokens:
        return Refusal("out_of_pages", f"A prompt of {num_tokens} tokens does not fit the key-value memory.")
    if draining:
        return Refusal("draining", "The server is shutting down: send the request to another one.", 1.0)
    if num_queued >= limits.max_num_queued:
        wait = max(1.0, backlog_s())
        return Refusal("queue_full", f"{num_queued} requests are waiting already: try again in {wait:.0f} s.", wait)
    return None
