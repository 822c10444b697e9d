"""The dashboard in docs/grafana asks only for what /metrics has."""

import json
import re
from pathlib import Path

from desk import Desk, run
from prometheus_client.parser import text_string_to_metric_families

BOARD = json.loads((Path(__file__).parents[2] / "docs" / "grafana" / "headway.json").read_text())
SERIES = re.compile(r"\b(?:vllm|headway):\w+")
LABELS = re.compile(r"by \(([\w, ]+)\)|\{(\w+)=~")


def test_every_query_finds_its_series() -> None:
    """After requests that met, missed and were refused: names, labels, and no panel without a query."""

    async def story() -> None:
        desk = await Desk("ok").start()
        await desk.complete(slo={"ttft_ms": 60_000, "tpot_ms": 60_000})
        await desk.complete(slo={"ttft_ms": 0.0001})
        desk.link.beat = desk.link.beat and desk.link.beat.__class__(
            now=0.0, num_running=1, num_waiting=2, num_parked=3, pages={"free": 4},
            counters={"preemptions": 1, "prefix_queries": 2, "prefix_hits": 1, "page_evictions": 0},
        )  # fmt: skip
        async with desk.client() as client:
            text = (await client.get("/metrics")).text
        known: dict[str, set[str]] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                known.setdefault(sample.name, set()).update(sample.labels)
        for panel in BOARD["panels"]:
            assert panel["targets"], panel["title"]
            for target in panel["targets"]:
                asked = set(SERIES.findall(target["expr"]))
                assert asked, target["expr"]
                for name in asked:
                    assert name in known, f"{panel['title']}: /metrics has no {name}"
                    wanted = {
                        part.strip() for pair in LABELS.findall(target["expr"]) for part in ",".join(pair).split(",")
                    }
                    assert wanted - {""} <= known[name] | {"le"}, f"{name}: {wanted} of {known[name]}"

    run(story)


def test_panels_do_not_overlap() -> None:
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in BOARD["panels"]]
    assert len(set(places)) == len(places)
    assert len({panel["id"] for panel in BOARD["panels"]}) == len(places)
