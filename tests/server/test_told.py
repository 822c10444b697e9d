"""What comes back beside an answer: what was understood, predicted, measured and met; and a refusal that says why."""

import asyncio
import logging
from typing import Any

import httpx
import pytest
from desk import Desk, run, until

from headway.config import SloClass
from headway.placement.link import Fate

COMPLETIONS = "/v1/completions"
HOUR, MOMENT = 3_600_000, 0.001  # milliseconds: always met, always missed
CLASSES = (SloClass("easy", ttft_ms=HOUR, total_ms=HOUR), SloClass("hard", ttft_ms=MOMENT), SloClass("batch"))


def ours(response: httpx.Response) -> dict[str, str]:
    return {k: v for k, v in response.headers.items() if k.startswith(("x-headway-", "x-slo-"))}


async def post(desk: Desk, body: dict[str, Any], **headers: str) -> httpx.Response:
    return await desk.post(COMPLETIONS, {"prompt": "x"} | body, **headers)


def test_a_whole_answer_has_all_of_it_in_its_headers_and_its_usage() -> None:
    async def story() -> None:
        desk = await Desk("one two", slo_classes=CLASSES).start()
        response = await post(desk, {"slo": {"class": "easy"}, "priority": 2}, x_slo_tpot_ms="12.5", x_tenant_id="acme")
        timing = response.json()["usage"]["headway"]
        assert (timing["slo_class"], timing["tenant"], timing["priority"]) == ("easy", "acme", 2)
        assert timing["predicted_ttft_ms"] == 50.0
        told = ours(response)
        assert float(told.pop("x-headway-ttft-ms")) == timing["ttft_ms"]
        assert told == {
            "x-headway-slo-class": "easy",
            "x-slo-ttft-ms": "3600000",
            "x-slo-tpot-ms": "12.5",
            "x-slo-total-ms": "3600000",
            "x-headway-predicted-ttft-ms": "50",
            "x-headway-slo-met": "true",
        }

    run(story)


def test_a_miss_is_a_false_and_no_target_is_no_word() -> None:
    async def story() -> None:
        desk = await Desk("one two", slo_classes=CLASSES).start()
        assert ours(await post(desk, {"slo": {"class": "hard"}}))["x-headway-slo-met"] == "false"
        assert ours(await post(desk, {"slo": {"class": "hard"}, "n": 3}))["x-headway-slo-met"] == "false"
        told = ours(await post(desk, {"slo": {"class": "batch"}}))
        assert set(told) == {"x-headway-slo-class", "x-headway-predicted-ttft-ms", "x-headway-ttft-ms"}
        response = await post(desk, {})
        assert "x-headway-slo-class" not in response.headers
        timing = response.json()["usage"]["headway"]
        assert (timing["slo_class"], timing["tenant"], timing["slo_met"]) == (None, None, None)

    run(story)


def test_a_stream_tells_what_is_known_when_it_begins() -> None:
    """The first token is there by then; whether all targets are met is not known before the end."""

    async def story() -> None:
        desk = await Desk("one two", slo_classes=CLASSES).start()
        told = ours(await post(desk, {"stream": True, "slo": {"class": "easy"}}))
        assert 0 < float(told.pop("x-headway-ttft-ms")) < 20_000
        assert told == {
            "x-headway-slo-class": "easy",
            "x-slo-ttft-ms": "3600000",
            "x-slo-total-ms": "3600000",
            "x-headway-predicted-ttft-ms": "50",
        }

    run(story)


def test_a_stream_that_begins_with_silence_knows_the_prediction_but_no_first_token() -> None:
    async def story() -> None:
        desk = await Desk("ok", slo_classes=CLASSES, sse_keep_alive_interval=0.01).start()
        desk.link.serving = False
        told: dict[str, str] = {}

        async def read() -> None:
            told.update(ours(await post(desk, {"stream": True, "slo": {"class": "hard"}})))

        reading = asyncio.create_task(read())
        await until(lambda: len(desk.link.requests) == 1)
        await asyncio.sleep(0.1)  # ten times the patience
        desk.link.serving = True
        await reading
        assert told == {
            "x-headway-slo-class": "hard",
            "x-slo-ttft-ms": "0.001",
            "x-headway-predicted-ttft-ms": "50",
        }

    run(story)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fate", "status", "dropped", "retry_after"),
    [
        (Fate("refused", "slo_unattainable", "Not in time.", 2.5), 429, "rejected-saturated", "3"),
        (Fate("refused", "slo_unattainable", "Never in time."), 429, "rejected-saturated", None),
        (Fate("refused", "tenant_over_share", "Others wait.", 0.3), 429, "rejected-saturated", "1"),
        (Fate("refused", "deadline_expired", "Too late.", 1.0), 429, "rejected-ttl-expired", "1"),
        (Fate("refused", "queue_full", "Full.", 7.2), 503, "rejected-saturated", "8"),
        (Fate("refused", "draining", "Leaving."), 503, "rejected-saturated", "1"),
    ],
)
def test_a_refusal_says_why_when_to_come_back_and_what_was_understood(
    fate: Fate, status: int, dropped: str, retry_after: str | None, stream: bool
) -> None:
    """A status of its own even for a stream. Where coming back is no use, clients that would are told not to."""

    async def story() -> None:
        desk = await Desk("ok", slo_classes=CLASSES).start()
        desk.link.fate = fate
        response = await post(desk, {"stream": stream, "slo": {"class": "easy"}})
        assert response.status_code == status
        assert response.json()["error"]["code"] == fate.reason
        assert response.headers["x-llm-d-request-dropped-reason"] == dropped
        assert response.headers.get("retry-after") == retry_after
        assert ("retry-after-ms" in response.headers) == (retry_after is not None)
        assert response.headers.get("x-should-retry") == (None if retry_after else "false")
        assert ours(response) == {
            "x-headway-slo-class": "easy",
            "x-slo-ttft-ms": "3600000",
            "x-slo-total-ms": "3600000",
            "x-headway-predicted-ttft-ms": "50",
            "x-headway-slo-met": "false",
        }

    run(story)


def test_the_log_has_a_line_per_call_with_its_class_and_its_verdict(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        desk = await Desk("one two", slo_classes=CLASSES).start()
        await post(desk, {"slo": {"class": "easy"}})
        await post(desk, {"slo": {"class": "hard"}})
        await post(desk, {})
        await post(desk, {"slo": {"ttft_ms": HOUR}})
        desk.link.fate = Fate("refused", "slo_unattainable", "Not in time.", 1.0)
        await post(desk, {"slo": {"class": "hard"}})

    with caplog.at_level(logging.INFO, logger="headway.door"):
        run(story)
    met, missed, nothing, custom, refused = (record.getMessage() for record in caplog.records)
    assert met.endswith("class easy, slo met")
    assert "class hard, slo missed (ttft: " in missed
    assert nothing.endswith("class none, slo none")
    assert custom.endswith("class custom, slo met")
    assert refused.endswith("no answer (slo_unattainable), class hard, slo missed (ttft: refused)")
