"""Who is let in. Refusing early is kinder than failing late: a refusal has a reason, and a hint when to come back."""

from typing import NamedTuple

from headway.core.policy import RESCUE_SHARE
from headway.core.request import Request

TENANT_SHARE = 0.5  # of as many requests as may wait: what a tenant with a name may have open
PROVEN_S = 10.0  # so long a price counts as right after a step of its kind; then a prompt is let in to show it anew


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


class Crowd(NamedTuple):
    """What a newcomer finds: requests in the queue, its tenant's open requests, seconds of work in the queue."""

    num_queued: int
    num_of_tenant: int
    backlog_s: float
    draining: bool = False


class Forecast(NamedTuple):
    """Seconds from arrival to first token: the mean; the same with what goes before it priced so that nine in ten stay
    below (refusing where nobody waits would help nobody); and what it would take alone if nothing slowed the device
    either. `token_s`: so long would another token take, likewise alone; `pace_s`: so long it takes beside those who
    will be answered then; `paced_in_s`: until enough of them have ended, if that is too long."""

    mean_s: float
    upper_s: float
    alone_s: float
    token_s: float = 0.0
    pace_s: float = 0.0
    paced_in_s: float = 0.0


def refusal(request: Request, limits: Limits, crowd: Crowd) -> Refusal | None:
    """None if the request may enter, as far as room goes."""
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
    if crowd.draining:
        return Refusal("draining", "The server is shutting down: send the request to another one.", 1.0)
    wait_s = max(1.0, crowd.backlog_s)
    if crowd.num_queued >= limits.max_num_queued:
        return Refusal("queue_full", f"{crowd.num_queued} requests wait already: try again in {wait_s:.0f} s.", wait_s)
    if request.tenant and crowd.num_of_tenant >= most_of_tenant(limits.max_num_queued):
        return Refusal(
            "tenant_over_share",
            f"{crowd.num_of_tenant} requests of this tenant are open already: try again in {wait_s:.0f} s.",
            wait_s,
        )
    return None


def most_of_tenant(max_num_queued: int) -> float:
    """Requests that a tenant with a name may have open."""
    return max(1, TENANT_SHARE * max_num_queued)


def unattainable(request: Request, forecast: Forecast) -> Refusal | None:
    """None if its tokens can be expected in time, as far as that was asked for: the first behind all that goes before
    it, the others beside those that are made by then."""
    hopeless = _hopeless(request, forecast)
    if hopeless is not None:
        return Refusal("slo_unattainable", hopeless)
    target_s = min([each for each in (request.slo.ttft_s, request.slo.total_s) if each is not None], default=None)
    asked, waits_s = "", [0.05]
    if is_too_slow(request, forecast):
        asked = (
            f"A token was asked for every {(request.slo.tpot_s or 0.0) * 1000:.3g} ms, and beside those who are being "
            f"answered one is expected every {forecast.pace_s * 1000:.3g} ms"
        )
        waits_s.append(forecast.paced_in_s)
    if target_s is not None and forecast.upper_s > target_s * (1 + RESCUE_SHARE):
        asked = f"The first token was asked for within {target_s * 1000:.3g} ms, and "
        if forecast.alone_s > target_s:
            asked += f"this prompt takes {forecast.alone_s * 1000:.3g} ms by itself: give it more time."
            return Refusal("slo_unattainable", asked)
        asked += f"is expected after {forecast.mean_s * 1000:.3g} ms"
        waits_s.append(forecast.upper_s - target_s)
    if not asked:
        return None
    return Refusal("slo_unattainable", f"{asked}: try again in {max(waits_s):.1f} s.", max(waits_s))


def is_too_slow(request: Request, forecast: Forecast) -> bool:
    """Whether its tokens would come too far apart beside others, however soon the first."""
    return request.slo.tpot_s is not None and forecast.pace_s > request.slo.tpot_s


def _hopeless(request: Request, forecast: Forecast) -> str | None:
    """What its tokens after the first cannot do even alone on the device, if there is something."""
    slo, num_more = request.slo, request.min_tokens - 1
    if slo.tpot_s is not None and request.max_tokens > 1 and forecast.token_s > slo.tpot_s:
        return (
            f"A token was asked for every {slo.tpot_s * 1000:.3g} ms, and one takes {forecast.token_s * 1000:.3g} ms "
            "by itself: give it more time."
        )
    least_s = forecast.alone_s + num_more * forecast.token_s
    if slo.total_s is not None and num_more > 0 and least_s > slo.total_s:
        return (
            f"The answer was asked for within {slo.total_s * 1000:.3g} ms, and {request.min_tokens} tokens take "
            f"{least_s * 1000:.3g} ms by themselves: give it more time, or ask for fewer."
        )
    return None
