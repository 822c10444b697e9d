"""What Prometheus is told: vLLM's names where the meaning is the same, so that its dashboards fit, ours elsewhere.

Per-request numbers come from each ended record, the engine's state from its last beat at the time of asking.
"""

import math
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate

import msgspec
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from headway.core.ledger import Record
from headway.core.request import Request
from headway.placement.link import EngineLink
from headway.placement.wire import Beat
from headway.server.verdict import class_counted, verdicts

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# The bounds of vLLM's histograms, in seconds and tokens: dashboards compare across servers only with equal ones.
FIRST_TOKEN_S = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80),
    *(160, 640, 2560),
)
BETWEEN_TOKENS_S = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE_S = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(digit * 10**power for power in range(6) for digit in (1, 2, 5))
STEP_POWERS = (0, *range(3, 15))  # of two; the bounds of a step's tokens: 1, 8, 16, … 16,384
COUNTS = (0, 1, 2, 5, 10, 20, 50, 100)
RATIOS = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1, 1.05, 1.1, 1.25, 1.5, 2, 4, 10)

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series per counter that nobody reads

_KNOWN_AS = {"prefix_queries": "vllm:prefix_cache_queries", "prefix_hits": "vllm:prefix_cache_hits"}
_GAUGE = re.compile(r"(num|most)_.*|.*_(now|ratio|s)")  # what in a beat is no running total, by its name
_TOLD_OTHERWISE = frozenset({"finished", "refused", "cancelled", "failed", "step_tokens"})  # headway:requests_ended …
NOT_FINITE = "not_finite"  # a stage's word for it
_LIMITS = {"queue_full": "max_num_queued_reqs"}  # a refusal's reason -> the limit, as vLLM calls it
_LABELS = ("model_name", "engine")


class Judged(msgspec.Struct):
    """Requests of a class that had targets, since the start."""

    met: int = 0
    missed: int = 0


class Metrics:
    """All series of one door. `judged` is the same for the page: by class, who had targets and met all of them."""

    def __init__(self, link: EngineLink, model_name: str) -> None:
        self.judged: dict[str, Judged] = {}
        self.registry = CollectorRegistry()
        self._labels = {"model_name": model_name, "engine": "0"}
        ProcessCollector(registry=self.registry)
        self.registry.register(_EngineState(link, self._labels))

        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens of finished requests.")
        self._cached_tokens = self._counter("vllm:prompt_tokens_cached", "Prompt tokens that the prefix cache held.")
        generated = self._counter("vllm:generation_tokens", "Tokens generated.")
        self.generated = generated.inc  # tokens, as they come
        name = "vllm:prompt_tokens_by_source"
        self._by_source = self._family(name, "Prompt tokens of finished requests, by where they came from.", "source")
        self._recomputes = self._counter("vllm:num_preemptions", "Times that a request lost its pages.")
        self._corrupted = self._counter("vllm:corrupted_requests", "Requests whose logits were not finite.")
        self._successes = self._family("vllm:request_success", "Requests finished.", "finished_reason")
        self._ended = self._family("headway:requests_ended", "Requests, by ending.", "slo_class", "kind", "reason")
        self._rejections = self._family("vllm:admission_rejections", "Requests refused at a limit.", "reason")
        self._attained = self._family("headway:slo_attained", "Targets met.", "slo_class", "target")
        self._missed = self._family("headway:slo_missed", "Targets missed.", "slo_class", "target", "cause")
        self._good = self._family("headway:goodput_requests", "Requests finished, no target missed.", "slo_class")
        self._good_tokens = self._family("headway:goodput_tokens", "Tokens of those requests.", "slo_class")
        more = ("method", "handler", "status")
        self._http = Counter("http_requests", "Calls answered.", more, registry=self.registry)

        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_S)
        name = "headway:request_predicted_ttft_seconds"
        self._predicted = self._histogram(name, "Predicted at arrival: arrival to first token.", FIRST_TOKEN_S)
        name = "headway:ttft_prediction_error_ratio"
        self._error = self._histogram(name, "Predicted time to first token by the measured one.", RATIOS)
        gap = _Tally("vllm:inter_token_latency_seconds", "Between two tokens.", BETWEEN_TOKENS_S, self._labels)
        self.gap = gap.observe  # seconds between two tokens
        self.registry.register(gap)
        name = "vllm:request_time_per_output_token_seconds"
        self._tpot = self._histogram(name, "Mean between tokens of a request.", BETWEEN_TOKENS_S)
        self._whole = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token.", WHOLE_S)
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to first work.", WHOLE_S)
        self._inference = self._histogram("vllm:request_inference_time_seconds", "First work to last token.", WHOLE_S)
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "First work to first token.", WHOLE_S)
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First token to last token.", WHOLE_S)
        self._parked = self._histogram("headway:request_parked_seconds", "Suspended for something urgent.", WHOLE_S)
        self._prompt_size = self._histogram("vllm:request_prompt_tokens", "Tokens of a prompt.", TOKENS)
        self._answer_size = self._histogram("vllm:request_generation_tokens", "Tokens of an answer.", TOKENS)
        self._max_tokens = self._histogram("vllm:request_params_max_tokens", "max_tokens as asked.", TOKENS)
        name = "vllm:request_num_preemptions"
        self._num_recomputed = self._histogram(name, "Times that a request lost its pages.", COUNTS)
        name = "vllm:request_prefill_kv_computed_tokens"
        self._computed = self._histogram(name, "Prompt tokens that were not in the prefix cache.", TOKENS)
        name = "vllm:request_max_num_generation_tokens"
        self._longest = self._histogram(name, "Tokens of the longest answer of a call.", TOKENS)
        self._num_answers = self._histogram("vllm:request_params_n", "n as asked.", COUNTS)
        self._num_preempted = self._histogram("headway:request_preemptions", "Suspensions of a request.", COUNTS)

    def abandoned(self, request: Request, record: Record) -> None:
        """Its caller left, or another answer of the same call failed: this is the door's own account."""
        self._close(record)

    def ended(self, request: Request, record: Record) -> None:
        """Close the account of one request, however it ended."""
        self._close(record)
        self._recomputes.inc(record.num_recomputes)
        self._corrupted.inc(record.reason == NOT_FINITE)
        if record.reason in _LIMITS:
            self._rejections.labels(**self._labels, reason=_LIMITS[record.reason]).inc()
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
        if record.kind != "finished":
            return
        self._successes.labels(**self._labels, finished_reason=record.reason).inc()
        self._prompt_tokens.inc(record.num_prompt_tokens)
        self._cached_tokens.inc(record.num_cached_tokens)
        self._prompt_size.observe(record.num_prompt_tokens)
        self._answer_size.observe(record.num_output_tokens)
        self._max_tokens.observe(request.max_tokens)
        self._num_preempted.observe(record.num_preemptions)
        self._num_recomputed.observe(record.num_recomputes)
        computed = record.num_prompt_tokens - record.num_cached_tokens
        self._computed.observe(computed)
        for source, num_tokens in (("local_compute", computed), ("local_cache_hit", record.num_cached_tokens)):
            self._by_source.labels(**self._labels, source=source).inc(num_tokens)
        self._parked.observe(record.parked_s)
        if record.tpot_s is not None:
            self._tpot.observe(record.tpot_s)
        self._phases(record)

    def call_ended(self, num_answers: int, records: Sequence[Record]) -> None:
        """All answers of a call have ended; so many were asked for to each prompt."""
        if all(record.kind == "finished" for record in records):
            self._num_answers.observe(num_answers)
            self._longest.observe(max(record.num_output_tokens for record in records))

    def _close(self, record: Record) -> None:
        """What is counted of every request, by its class."""
        name = class_counted(record.slo_class, record.slo)
        labels = self._labels | {"slo_class": name}
        self._ended.labels(**labels, kind=record.kind, reason=record.reason).inc()
        found = verdicts(record)
        if found:
            judged = self.judged.setdefault(name, Judged())
            judged.missed += bool(record.missed)
            judged.met += not record.missed
        for verdict in found:
            if verdict.met:
                self._attained.labels(**labels, target=verdict.target).inc()
            else:
                self._missed.labels(**labels, target=verdict.target, cause=verdict.cause).inc()
        if record.kind == "finished" and not record.missed:
            self._good.labels(**labels).inc()
            self._good_tokens.labels(**labels).inc(record.num_output_tokens)
        self._prediction(record)

    def _prediction(self, record: Record) -> None:
        predicted_s = record.predicted_ttft_s
        if predicted_s is None or not math.isfinite(predicted_s):
            return
        self._predicted.observe(predicted_s)
        if record.ttft_s:
            self._error.observe(predicted_s / record.ttft_s)

    def _phases(self, record: Record) -> None:
        if record.first_scheduled is None or record.first_token is None or record.last_token is None:
            return
        self._queue.observe(record.first_scheduled - record.arrival)
        self._prefill.observe(record.first_token - record.first_scheduled)
        self._decode.observe(record.last_token - record.first_token)
        self._inference.observe(record.last_token - record.first_scheduled)
        self._whole.observe(record.last_token - record.arrival)

    def answered(self, method: str, path: str, status: int) -> None:
        self._http.labels(method=method, handler=path, status=f"{status // 100}xx").inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)

    def _family(self, name: str, what: str, *more: str) -> Counter:
        return Counter(name, what, (*_LABELS, *more), registry=self.registry)

    def _counter(self, name: str, what: str) -> Counter:
        return Counter(name, what, _LABELS, registry=self.registry).labels(**self._labels)

    def _histogram(self, name: str, what: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(name, what, _LABELS, buckets=bounds, registry=self.registry).labels(**self._labels)


class _Tally(Collector):
    """A histogram of what happens with every token: the library's takes a lock and walks through its bounds."""

    def __init__(self, name: str, what: str, bounds: Sequence[float], labels: dict[str, str]) -> None:
        self._name, self._what, self._bounds, self._labels = name, what, bounds, labels
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        found = HistogramMetricFamily(self._name, self._what, labels=_LABELS)
        ends = (*map(floatToGoString, self._bounds), "+Inf")
        buckets = [(end, float(count)) for end, count in zip(ends, accumulate(self._counts), strict=True)]
        found.add_metric([self._labels[name] for name in _LABELS], buckets, self._sum)
        yield found


class _EngineState(Collector):
    """The engine's gauges and running totals, read from its last beat."""

    def __init__(self, link: EngineLink, labels: dict[str, str]) -> None:
        self._link = link
        self._labels = labels

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        beat, facts = self._link.beat, self._link.facts
        yield self._counter("headway:engine_restarts", "Engines started after one died.", self._link.num_restarts)
        if facts is not None:
            pages = {"block_size": str(facts.page_tokens), "num_gpu_blocks": str(facts.num_pages)}
            yield self._gauge("vllm:cache_config_info", "Key-value memory.", 1.0, **pages)
            held_out = "How far off predictions were on steps held out at the start, the mean."
            yield self._gauge("headway:fit_error_ratio", held_out, facts.cost_error)
        if beat is None:
            return
        yield self._gauge("vllm:num_requests_running", "Requests that hold pages.", beat.num_running + beat.num_parked)
        yield self._gauge("vllm:num_requests_waiting", "Requests in the queue.", beat.num_waiting)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting_by_reason", "Requests in the queue, by why.", labels=[*_LABELS, "reason"]
        )
        for reason, count in (("capacity", beat.num_waiting), ("deferred", 0)):  # nothing is put off by a transfer
            waiting.add_metric([*self._labels.values(), reason], count)
        yield waiting
        yield self._gauge("headway:num_requests_parked", "Requests suspended.", beat.num_parked)
        total = sum(beat.pages.values())
        unused = beat.pages.get("free", 0) + beat.pages.get("cached", 0)
        used = 1 - unused / total if total else 0.0
        yield self._gauge("vllm:kv_cache_usage_perc", "Share of the pages in use, 0 to 1.", used)
        by_state = GaugeMetricFamily("headway:pages", "Pages, by state.", labels=[*_LABELS, "state"])
        for state, count in beat.pages.items():
            by_state.add_metric([*self._labels.values(), state], count)
        yield by_state
        yield self._step_sizes(beat)
        for name, value in beat.counters.items():
            if name in _TOLD_OTHERWISE:
                continue
            series = _KNOWN_AS.get(name, f"headway:{name}")
            if _GAUGE.fullmatch(name):
                yield self._gauge(series, f"{name} in the engine, just now.", value)
            else:
                yield self._counter(series, f"Running total of {name} in the engine.", value)

    def _step_sizes(self, beat: Beat) -> Metric:
        """What a prefix cache held is no work of a step; one that was suspended counts once, when it is done."""
        found = HistogramMetricFamily("vllm:iteration_tokens_total", "Tokens of a step.", labels=_LABELS)
        sizes = beat.step_sizes
        at_most = [(bound, sum(sizes[n] for n in sizes if n <= bound)) for bound in STEP_POWERS]
        buckets = [(str(float(2**bound)), float(count)) for bound, count in at_most]
        buckets.append(("+Inf", float(sum(sizes.values()))))
        found.add_metric([*self._labels.values()], buckets, beat.counters.get("step_tokens", 0.0))
        return found

    def _gauge(self, name: str, what: str, value: float, **more: str) -> Metric:
        family = GaugeMetricFamily(name, what, labels=[*self._labels, *more])
        family.add_metric([*self._labels.values(), *more.values()], value)
        return family

    def _counter(self, name: str, what: str, value: float) -> Metric:
        family = CounterMetricFamily(name, what, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family
