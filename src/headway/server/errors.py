"""One error object for everything that can go wrong at the door, in OpenAI's shape.

`{"error": {"message", "type", "param", "code"}}`: the message is a sentence for a person, the code a word for a
program. Where trying again can help, Retry-After says when. Never 422; never a traceback.
"""

import math

import msgspec

from headway.core.ledger import Record

MAX_MESSAGE = 1000  # characters, so that a bad request never makes a big answer

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_BY_CODE = {  # reasons of refusals and failures -> status
    "context_length_exceeded": 400,
    "empty_prompt": 400,
    "constraint_failed": 400,
    "out_of_pages": 400,
    "slo_unattainable": 429,
    "tenant_over_share": 429,
    "deadline_expired": 429,
    "queue_full": 503,
    "draining": 503,
    "engine_down": 503,
    "engine_lost": 503,
    "shutdown": 503,
    "cancelled": 503,
    "step_failed": 500,
    "not_finite": 500,
}
_DROPPED = {  # what gateways that route by llm-d's conventions call it
    "slo_unattainable": "rejected-saturated",
    "tenant_over_share": "rejected-saturated",
    "queue_full": "rejected-saturated",
    "draining": "rejected-saturated",
    "deadline_expired": "rejected-ttl-expired",
}


class ApiError(Exception):
    """A request that gets an error instead of an answer."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message if len(message) <= MAX_MESSAGE else message[:MAX_MESSAGE] + "…"
        self.param = param
        self.retry_after_s = retry_after_s
        self._headers = headers or {}

    @property
    def type(self) -> str:
        return _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    @property
    def body(self) -> bytes:
        shown = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": shown})

    @property
    def headers(self) -> dict[str, str]:
        headers = {"content-type": "application/json"} | self._headers
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
            headers["retry-after-ms"] = str(max(1, math.ceil(self.retry_after_s * 1000)))
        elif self.status == 429:
            headers["x-should-retry"] = "false"  # without it OpenAI's clients try every 429 again
        if self.code in _DROPPED:
            headers["x-llm-d-request-dropped-reason"] = _DROPPED[self.code]
        return headers

    def carry(self, headers: dict[str, str]) -> None:
        """More to tell the caller, beside what is wrong."""
        self._headers = self._headers | headers


def bad_request(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    return ApiError(400, code, message, param=param)


def not_ready(code: str, message: str, retry_after_s: float = 1.0) -> ApiError:
    return ApiError(503, code, message, retry_after_s=retry_after_s)


def internal() -> ApiError:
    """Our own mistake; what it was is for the log, not for strangers."""
    return ApiError(500, "internal_error", "The server failed on this request; its log says why.")


def from_record(record: Record) -> ApiError:
    """A request that ended otherwise than finished. A refusal that is not listed above is about its own target: 429."""
    status = _BY_CODE.get(record.reason, 429 if record.kind == "refused" else 500)
    retry_after_s = record.retry_after_s
    if retry_after_s is None and status == 503:
        retry_after_s = 1.0
    # what a stage raised is for the log, not for strangers
    message = "The model failed on this request." if record.reason == "step_failed" else record.message
    return ApiError(status, record.reason, message or f"The request was {record.kind}.", retry_after_s=retry_after_s)
