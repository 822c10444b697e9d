"""/metrics: valid exposition, vLLM's names, and numbers that add up. /v1/models and /state beside it."""

from desk import Desk, run
from prometheus_client.parser import text_string_to_metric_families

from headway.config import SloClass
from headway.placement.link import Fate
from headway.placement.wire import Beat

NO_CLASS = ("slo_class", "none")
CUSTOM = ("slo_class", "custom")
LABELS = {"model_name": "embedded", "engine": "0"}


async def samples(desk: Desk) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """(name, labels besides the usual) -> value."""
    async with desk.client() as client:
        response = await client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            labels = tuple(sorted((k, v) for k, v in sample.labels.items() if k not in LABELS))
            found[sample.name, labels] = sample.value
            if sample.name.startswith(("vllm:", "headway:")):
                assert LABELS.items() <= sample.labels.items()
    return found


def test_the_names_that_dashboards_and_routers_know_are_there() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete()
        names = {name for name, _ in await samples(desk)}
        assert names >= {
            "vllm:num_requests_running",
            "vllm:num_requests_waiting",
            "vllm:kv_cache_usage_perc",
            "vllm:cache_config_info",
            "vllm:prompt_tokens_total",
            "vllm:generation_tokens_total",
            "vllm:request_success_total",
            "vllm:num_preemptions_total",
            "vllm:time_to_first_token_seconds_bucket",
            "vllm:inter_token_latency_seconds_sum",
            "vllm:request_time_per_output_token_seconds_count",
            "vllm:e2e_request_latency_seconds_count",
            "vllm:request_queue_time_seconds_count",
            "vllm:request_prefill_time_seconds_count",
            "vllm:request_decode_time_seconds_count",
            "vllm:request_inference_time_seconds_count",
            "vllm:request_prompt_tokens_count",
            "vllm:request_generation_tokens_count",
            "headway:num_requests_parked",
            "headway:engine_restarts_total",
            "http_requests_total",
        }

    run(story)


def test_requests_add_up() -> None:
    """Two finished, one lost on the way; each token has a gap but the first."""

    async def story() -> None:
        desk = await Desk("one two three").start()
        await desk.complete(max_tokens=2)
        await desk.complete()
        desk.link.fate = Fate("failed", "engine_lost", num_tokens=1)
        await desk.post("/v1/completions", {"prompt": "x"})
        found = await samples(desk)
        num_all = len(desk.ids) + 1
        assert found["vllm:request_success_total", (("finished_reason", "length"),)] == 1
        assert found["vllm:request_success_total", (("finished_reason", "stop"),)] == 1
        assert found["vllm:generation_tokens_total", ()] == 2 + num_all + 1
        assert found["vllm:prompt_tokens_total", ()] == 2 * len(desk.text.tokenizer.encode("x"))
        assert found["vllm:inter_token_latency_seconds_count", ()] == 1 + num_all - 1
        assert found["vllm:time_to_first_token_seconds_count", ()] == 3
        assert found["vllm:e2e_request_latency_seconds_count", ()] == 2
        assert found["vllm:prompt_tokens_by_source_total", (("source", "local_compute"),)] == 2
        assert found["vllm:prompt_tokens_by_source_total", (("source", "local_cache_hit"),)] == 0
        assert found["vllm:request_prefill_kv_computed_tokens_sum", ()] == 2
        assert found["vllm:request_params_n_count", ()] == 2
        assert found["vllm:request_max_num_generation_tokens_sum", ()] == 2 + num_all
        assert found["vllm:request_num_preemptions_count", ()] == 2
        assert found["vllm:corrupted_requests_total", ()] == 0
        assert found["headway:requests_ended_total", (("kind", "failed"), ("reason", "engine_lost"), NO_CLASS)] == 1
        completions = (("handler", "/v1/completions"), ("method", "POST"))
        assert found["http_requests_total", (*completions, ("status", "2xx"))] == 2
        assert found["http_requests_total", (*completions, ("status", "5xx"))] == 1
        desk.link.fate = Fate("failed", "not_finite")
        await desk.post("/v1/completions", {"prompt": "x"})
        assert (await samples(desk))["vllm:corrupted_requests_total", ()] == 1
        desk.link.fate = None
        await desk.complete(n=3, prompt=["x", "y"])
        found = await samples(desk)
        assert found["vllm:request_params_n_sum", ()] == 1 + 1 + 3

    run(story)


def test_a_request_that_nobody_waits_for_is_counted_once() -> None:
    """Two answers of a call: one fails after two tokens, so the other, as far as the first, is abandoned."""

    async def story() -> None:
        desk = await Desk("one two three").start()
        desk.link.fate = Fate("failed", "engine_lost", num_tokens=2)
        await desk.post("/v1/completions", {"prompt": ["x", "y"]})
        found = await samples(desk)
        assert found["headway:requests_ended_total", (("kind", "failed"), ("reason", "engine_lost"), NO_CLASS)] == 1
        assert found["headway:requests_ended_total", (("kind", "cancelled"), ("reason", "abandoned"), NO_CLASS)] == 1
        assert found["vllm:generation_tokens_total", ()] == 2 + 2

    run(story)


def test_targets_are_counted_with_the_causes_of_their_misses() -> None:
    async def story() -> None:
        desk = await Desk("one two three").start()
        await desk.complete(slo={"ttft_ms": 3_600_000, "tpot_ms": 3_600_000})
        await desk.complete(slo={"ttft_ms": 3_600_000})
        desk.link.fate = Fate("refused", "queue_full")
        await desk.post("/v1/completions", {"prompt": "x", "slo": {"ttft_ms": 100}})
        found = await samples(desk)
        assert found["headway:slo_attained_total", (CUSTOM, ("target", "ttft"))] == 2
        assert found["headway:slo_attained_total", (CUSTOM, ("target", "tpot"))] == 1
        assert found["headway:slo_missed_total", (("cause", "refused"), CUSTOM, ("target", "ttft"))] == 1

    run(story)


def test_the_engines_state_is_that_of_its_last_beat() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        pages = {"free": 40, "held": 25, "parked": 5, "cached": 30}
        counters = {"finished": 9.0, "preemptions": 7.0, "prefix_queries": 100.0, "prefix_hits": 60.0}
        desk.link.beat = Beat(1.0, 3, 4, 2, pages, counters)
        desk.link.num_restarts = 1
        found = await samples(desk)
        assert found["vllm:num_requests_running", ()] == 5
        assert found["vllm:num_requests_waiting", ()] == 4
        assert found["headway:num_requests_parked", ()] == 2
        assert abs(found["vllm:kv_cache_usage_perc", ()] - 0.30) < 1e-9
        assert found["headway:pages", (("state", "cached"),)] == 30
        assert found["vllm:prefix_cache_queries_total", ()] == 100
        assert found["vllm:prefix_cache_hits_total", ()] == 60
        assert found["headway:preemptions_total", ()] == 7
        assert ("headway:finished_total", ()) not in found, "the door counts endings itself"
        assert found["headway:engine_restarts_total", ()] == 1
        facts = desk.link.facts
        assert facts is not None
        config = (("block_size", str(facts.page_tokens)), ("num_gpu_blocks", str(facts.num_pages)))
        assert found["vllm:cache_config_info", config] == 1
        assert found["headway:fit_error_ratio", ()] == facts.cost_error

    run(story)


def test_steps_are_told_by_their_tokens_in_vllms_buckets() -> None:
    """One of a single token, two of two to four, one of five to eight, one of more than any bound."""

    async def story() -> None:
        desk = await Desk("ok").start()
        counters = {"step_tokens": 1.0 + 3 + 4 + 7 + 20_000}
        desk.link.beat = Beat(1.0, 0, 0, 0, {"free": 1}, counters, {0: 1, 2: 2, 3: 1, 15: 1})
        found = await samples(desk)
        name = "vllm:iteration_tokens_total"
        buckets = {dict(labels)["le"]: count for (one, labels), count in found.items() if one == f"{name}_bucket"}
        assert [float(bound) for bound in buckets] == [1, *(2**power for power in range(3, 15)), float("inf")]
        assert buckets["1.0"] == 1
        assert buckets["8.0"] == buckets["16384.0"] == 4
        assert buckets["+Inf"] == found[f"{name}_count", ()] == 5
        assert found[f"{name}_sum", ()] == 20_015
        assert ("headway:step_tokens_total", ()) not in found

    run(story)


def test_paths_that_callers_invent_make_no_new_series() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        async with desk.client() as client:
            for number in range(3):
                await client.get(f"/invented/{number}")
        found = await samples(desk)
        assert found["http_requests_total", (("handler", "other"), ("method", "GET"), ("status", "4xx"))] == 3

    run(story)


def test_before_the_engine_is_there_metrics_answer() -> None:
    async def story() -> None:
        found = await samples(Desk("ok"))
        assert found["headway:engine_restarts_total", ()] == 0
        assert ("vllm:num_requests_running", ()) not in found

    run(story)


def test_the_models_that_are_served() -> None:
    async def story() -> None:
        desk = await Desk("ok", served_model_name=("ours", "org/alias")).start()
        async with desk.client() as client:
            listed = (await client.get("/v1/models")).json()
            one = (await client.get("/v1/models/org/alias")).json()
            missing = await client.get("/v1/models/theirs")
            version = (await client.get("/version")).json()
            state = (await client.get("/state")).json()
        assert listed["object"] == "list"
        assert [card["id"] for card in listed["data"]] == ["ours", "org/alias"]
        assert (one["id"], one["root"], one["max_model_len"], one["object"]) == ("org/alias", "ours", 256, "model")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
        assert list(version) == ["version"]
        assert (state["state"], state["models"], state["restarts"]) == ("ready", ["ours", "org/alias"], 0)
        assert sum(state["beat"]["pages"].values()) == state["facts"]["num_pages"]

    run(story)


def test_a_class_is_counted_under_its_name_and_the_others_by_their_targets() -> None:
    """Two in a class, of which one misses; one with targets of its own; one that is best effort; one refused."""

    async def story() -> None:
        desk = await Desk("one two three", slo_classes=(SloClass("chat", ttft_ms=3_600_000),)).start()
        num_all = len(desk.ids) + 1
        await desk.complete(slo={"class": "chat"})
        await desk.complete(slo={"class": "chat", "ttft_ms": 0.001})
        await desk.complete(slo={"tpot_ms": 3_600_000})
        await desk.complete(max_tokens=2)
        desk.link.fate = Fate("refused", "slo_unattainable", "Not in time.", 1.0)
        await desk.post("/v1/completions", {"prompt": "x", "slo": {"class": "chat"}})
        found = await samples(desk)
        chat = ("slo_class", "chat")
        assert found["headway:slo_attained_total", (chat, ("target", "ttft"))] == 1
        missed = {k: v for (name, k), v in found.items() if name == "headway:slo_missed_total" and chat in k}
        assert sum(missed.values()) == 2
        assert missed[("cause", "refused"), chat, ("target", "ttft")] == 1
        assert found["headway:requests_ended_total", (("kind", "finished"), ("reason", "stop"), chat)] == 2
        assert found["headway:requests_ended_total", (("kind", "refused"), ("reason", "slo_unattainable"), chat)] == 1
        good = {k: v for (name, k), v in found.items() if name == "headway:goodput_requests_total"}
        assert good == {(chat,): 1, (CUSTOM,): 1, (NO_CLASS,): 1}
        tokens = {k: v for (name, k), v in found.items() if name == "headway:goodput_tokens_total"}
        assert tokens == {(chat,): num_all, (CUSTOM,): num_all, (NO_CLASS,): 2}
        async with desk.client() as client:
            judged = (await client.get("/state")).json()["classes"]
        assert judged == {"chat": {"met": 1, "missed": 2}, "custom": {"met": 1, "missed": 0}}, "what the page shows"

    run(story)


def test_predictions_are_held_against_what_came() -> None:
    """Two were predicted, of which one got a token, sooner than predicted; what is without bounds is no number."""

    async def story() -> None:
        desk = await Desk("ok").start()
        desk.link.predicted_ttft_s = 3600.0
        await desk.complete()
        desk.link.fate = Fate("refused", "slo_unattainable", "Not in time.", 1.0)
        await desk.post("/v1/completions", {"prompt": "x"})
        desk.link.predicted_ttft_s = float("inf")
        await desk.post("/v1/completions", {"prompt": "x"})
        found = await samples(desk)
        assert found["headway:request_predicted_ttft_seconds_count", ()] == 2
        assert found["headway:request_predicted_ttft_seconds_sum", ()] == 7200
        assert found["headway:ttft_prediction_error_ratio_count", ()] == 1
        assert found["headway:ttft_prediction_error_ratio_sum", ()] > 1

    run(story)


def test_a_full_queue_is_counted_as_vllm_counts_it_and_other_refusals_are_not() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        for reason in ("queue_full", "queue_full", "slo_unattainable"):
            desk.link.fate = Fate("refused", reason)
            await desk.post("/v1/completions", {"prompt": "x"})
        found = await samples(desk)
        rejected = {k: v for (name, k), v in found.items() if name == "vllm:admission_rejections_total"}
        assert rejected == {(("reason", "max_num_queued_reqs"),): 2}

    run(story)


def test_what_an_engine_counts_goes_through_as_a_total_or_as_a_gauge_by_its_name() -> None:
    async def story() -> None:
        desk = await Desk("ok").start()
        pages = {"free": 1, "held": 0, "parked": 0, "cached": 0}
        counters = {"switches": 3.0, "busy_seconds": 4.0, "num_tenants": 2.0, "most_parked_tokens": 6.0}
        counters |= {"backlog_s": 0.5, "price_ratio": 1.5}
        desk.link.beat = Beat(1.0, 0, 0, 0, pages, counters)
        found = await samples(desk)
        assert found["headway:switches_total", ()] == 3
        assert found["headway:busy_seconds_total", ()] == 4
        assert found["headway:num_tenants", ()] == 2
        assert found["headway:most_parked_tokens", ()] == 6
        assert found["headway:backlog_s", ()] == 0.5
        assert found["headway:price_ratio", ()] == 1.5

    run(story)
