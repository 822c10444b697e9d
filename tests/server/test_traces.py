"""Spans for a collector: one a call, under the caller's own, with what became of it and no text."""

import asyncio
import gzip
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from desk import Desk, run

from headway.config import ConfigError, DoorSettings
from headway.placement.link import Fate

trace_service = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector(ThreadingHTTPServer):
    """Takes OTLP over HTTP."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.bodies: list[bytes] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/traces"

    def spans(self) -> list[Any]:
        found = []
        for body in self.bodies:
            request = trace_service.ExportTraceServiceRequest.FromString(body)
            found += [s for resource in request.resource_spans for scope in resource.scope_spans for s in scope.spans]
        return found


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        assert isinstance(self.server, Collector)
        self.server.bodies.append(gzip.decompress(body) if self.headers["content-encoding"] == "gzip" else body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.shutdown()
    made.server_close()


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [plain(each) for each in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {each.key: plain(each.value) for each in span.attributes}


def test_a_call_is_one_span_under_its_callers(collector: Collector) -> None:
    """Two answers, a target that was met, moments as events; and nothing that was said."""

    async def story() -> None:
        desk = await Desk("secret words", otlp_traces_endpoint=collector.endpoint).start()
        answer = await desk.post(
            "/v1/completions",
            {"prompt": "hidden question", "max_tokens": 64, "n": 2},
            traceparent=f"00-{TRACE}-{PARENT}-01",
            x_slo_ttft_ms="60000",
            x_request_id="mine",
        )
        assert answer.status_code == 200
        await asyncio.to_thread(desk.door.close)

    run(story)
    (span,) = collector.spans()
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == ("llm_request", TRACE, PARENT)
    assert 0 < span.end_time_unix_nano - span.start_time_unix_nano < 60e9
    told = attributes(span)
    assert told["gen_ai.request.n"] == 2
    assert told["gen_ai.usage.completion_tokens"] > 2
    assert told["gen_ai.response.finish_reasons"] == ["stop", "stop"]
    assert told["headway.slo.ttft_ms"] == 60000
    assert told["headway.slo.ttft_met"] is True
    assert 0 <= told["gen_ai.latency.time_to_first_token"] <= told["gen_ai.latency.e2e"] < 60
    assert {event.name for event in span.events} >= {"arrived", "admitted", "first_token", "finished"}
    everything = b"".join(collector.bodies)
    assert b"secret" not in everything
    assert b"hidden" not in everything


def test_what_was_asked_and_used_is_of_all_prompts(collector: Collector) -> None:
    """Each prompt counts once, whatever is drawn of it; `n` is what was asked, not what came of it."""

    async def story() -> None:
        desk = await Desk("ok", otlp_traces_endpoint=collector.endpoint).start()
        body = {"prompt": [[5, 6, 7], [8]], "max_tokens": 9, "temperature": 0.5, "top_p": 0.25}
        assert (await desk.post("/v1/completions", body | {"n": 2})).status_code == 200
        assert (await desk.post("/v1/completions", body | {"best_of": 3})).status_code == 200
        assert (await desk.post("/v1/embeddings", {"input": [[5, 6], [7]]})).status_code == 200
        await asyncio.to_thread(desk.door.close)

    run(story)
    twice, best, vectors = (attributes(span) for span in collector.spans())
    for told, n, drawn in ((twice, 2, 4), (best, 1, 6)):
        assert told["gen_ai.usage.prompt_tokens"] == told["gen_ai.usage.input_tokens"] == 4
        assert (told["gen_ai.request.n"], told["gen_ai.usage.num_sequences"]) == (n, drawn)
        asked = [told[f"gen_ai.request.{name}"] for name in ("max_tokens", "temperature", "top_p")]
        assert asked == [9, 0.5, 0.25]
    assert vectors["gen_ai.usage.prompt_tokens"] == 3
    assert "gen_ai.request.temperature" not in vectors


def test_a_failure_is_marked_and_a_missed_target_has_a_cause(collector: Collector) -> None:
    async def story() -> None:
        desk = await Desk(otlp_traces_endpoint=collector.endpoint).start()
        desk.link.fate = Fate("failed", "engine_lost", "It is gone.", num_tokens=0)
        answer = await desk.post("/v1/completions", {"prompt": "x"}, x_slo_ttft_ms="60000")
        assert answer.status_code == 503
        await asyncio.to_thread(desk.door.close)

    run(story)
    (span,) = collector.spans()
    assert span.status.code == 2
    told = attributes(span)
    assert told["headway.slo.ttft_met"] is False
    assert told["headway.slo.ttft_missed_by"] == ["engine_lost"]


def test_a_collector_that_is_gone_costs_no_caller_anything() -> None:
    async def story() -> None:
        desk = await Desk("fine", otlp_traces_endpoint="http://127.0.0.1:9/v1/traces").start()
        assert (await desk.complete())["choices"][0]["text"] == "fine"

    run(story)


def test_what_is_no_address_is_said() -> None:
    with pytest.raises(ConfigError, match="otlp-traces-endpoint localhost is no address"):
        DoorSettings(otlp_traces_endpoint="localhost")


def test_a_missing_extra_is_said_when_flags_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a model is loaded for a door that cannot be opened."""
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(ConfigError, match=r"needs OpenTelemetry: install headway\[otel\]"):
        DoorSettings(otlp_traces_endpoint="http://localhost:4318/v1/traces")
    assert DoorSettings().otlp_traces_endpoint is None
