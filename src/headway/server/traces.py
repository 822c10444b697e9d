"""A span of OpenTelemetry for every call, sent to a collector, where that is asked for and the extra is installed.

Its attributes are the conventions' `gen_ai.` ones as vLLM sends them, and `headway.` for targets and what became of
them; its events are the moments of the timeline. No text of prompts or answers. Spans are made when a call has ended,
and sent in batches by a thread of their own: a collector that is slow or gone costs no caller anything.
"""

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from headway import __version__
from headway.core.ledger import Record
from headway.server.verdict import TARGETS

if TYPE_CHECKING:
    from headway.server.life import Call


class Traces:
    """Sends spans to one collector."""

    def __init__(self, endpoint: str) -> None:
        """`endpoint` takes OTLP over HTTP, such as http://localhost:4318/v1/traces. That the extra is there was seen
        when flags were read."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind, Status, StatusCode
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        resource = Resource.create({"service.name": "headway", "service.version": __version__})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        self._tracer = self._provider.get_tracer("headway", __version__)
        self._context = TraceContextTextMapPropagator()
        self._kind, self._failed = SpanKind.SERVER, Status(StatusCode.ERROR)

    def tell(self, call: "Call", headers: Mapping[str, str]) -> None:
        """A call has ended. `headers` may name the caller's own span (`traceparent`)."""
        since_epoch_s = time.time() - time.monotonic()  # of the instant at which our clock shows zero

        def instant(at: float) -> int:
            return int((since_epoch_s + at) * 1e9)

        context = self._context.extract(
            {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        )
        span = self._tracer.start_span(
            "llm_request",
            context=context,
            kind=self._kind,
            start_time=instant(call.arrival),
            attributes=described(call),
        )
        for record in call.records:
            for moment in record.timeline:
                span.add_event(moment.what, {"request": record.request_id, "detail": moment.detail}, instant(moment.at))
        if any(record.kind == "failed" for record in call.records):
            span.set_status(self._failed)
        ends = [record.ended for record in call.records if record.ended is not None]
        span.end(instant(max(ends, default=time.monotonic())))

    def close(self) -> None:
        """Send what there is. Takes seconds if nobody answers."""
        self._provider.shutdown()


def described(call: "Call") -> dict[str, Any]:
    """The attributes of an ended call."""
    records = call.records
    told: dict[str, Any] = {
        "gen_ai.system": "headway",
        "gen_ai.request.id": call.id,
        "gen_ai.request.model": call.model,
        "gen_ai.response.model": call.model,
        "gen_ai.request.n": call.num_answers,
        "gen_ai.usage.num_sequences": len(records),
        "gen_ai.usage.prompt_tokens": call.num_prompt_tokens,
        "gen_ai.usage.input_tokens": call.num_prompt_tokens,
        "gen_ai.usage.completion_tokens": sum(record.num_output_tokens for record in records),
        "gen_ai.usage.output_tokens": sum(record.num_output_tokens for record in records),
        "gen_ai.response.finish_reasons": [record.reason for record in records],
        "headway.slo_class": call.slo_class,
        "headway.priority": call.priority,
        "headway.ended": [str(record.kind) for record in records],
        "headway.num_preemptions": sum(record.num_preemptions for record in records),
    }
    if call.sampling is not None:
        told["gen_ai.request.max_tokens"] = call.max_tokens
        told["gen_ai.request.temperature"] = call.sampling.temperature
        told["gen_ai.request.top_p"] = call.sampling.top_p
    for name, seconds in _latencies(records).items():
        if seconds is not None:
            told[f"gen_ai.latency.{name}"] = seconds
    for target in TARGETS:
        wanted = getattr(call.slo, f"{target}_s")
        if wanted is not None:
            told[f"headway.slo.{target}_ms"] = 1000 * wanted
            causes = sorted({record.missed[target] for record in records if target in record.missed})
            told[f"headway.slo.{target}_met"] = not causes
            if causes:
                told[f"headway.slo.{target}_missed_by"] = causes
    return told


def _latencies(records: list[Record]) -> dict[str, float | None]:
    """Seconds, of the slowest answer; none where an instant never came."""
    return {
        "time_in_queue": _longest(records, "arrival", "first_scheduled"),
        "time_to_first_token": _longest(records, "arrival", "first_token"),
        "e2e": _longest(records, "arrival", "ended"),
        "time_in_model_prefill": _longest(records, "first_scheduled", "first_token"),
        "time_in_model_decode": _longest(records, "first_token", "last_token"),
        "time_in_model_inference": _longest(records, "first_scheduled", "last_token"),
    }


def _longest(records: list[Record], begin: str, end: str) -> float | None:
    pairs = [(getattr(record, begin), getattr(record, end)) for record in records]
    known = [ended - begun for begun, ended in pairs if begun is not None and ended is not None]
    return max(known, default=None)
