"""`headway bench` against the door, and against servers that do what they should not."""

import argparse
import asyncio
import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from desk import TEXT, Desk, Network
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from headway import cli
from headway.bench.chart import Curve, Mark, Panel, cdf, svg
from headway.bench.client import Server, ServerError, meet, replay
from headway.bench.flags import check_reachable
from headway.bench.load import Load
from headway.bench.measure import Run
from headway.bench.score import Outcome, score
from headway.bench.search import Found, Point
from headway.bench.telling import lines, warnings
from headway.bench.traces import Asked
from headway.core.request import SLO
from headway.placement.link import Fate

Open = Callable[[Desk], Network]
EASY = ["--slo", *(f"{kind}=5000:5000" for kind in ("text", "image", "search", "file"))]
FEW = ["--num-requests", "12", "--max-tokens", "4", "--seed", "1", "--token-seed", "5"]


def ask(
    server: Server, *requests: Asked, targets: dict[str, SLO] | None = None
) -> tuple[list[Outcome], dict[str, str]]:
    prompts = [tuple(range(300, 300 + asked.num_prompt)) for asked in requests]
    got = asyncio.run(replay(server, requests, prompts, targets or {}))
    return list(got.outcomes), got.complaints


def bench(*args: object) -> int:
    return cli.main(["bench", *map(str, args)])


class Wellformed(HTMLParser):
    """Notes what a page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.fetched += [f"{tag} {k}={v}" for k, v in attrs if k in ("src", "href") and not (v or "").startswith("#")]


def test_the_whole_command(network: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two rates, a dozen requests each. The fake answers everything at once, four tokens each, so all are in time."""
    desk = Desk("one two three four five six seven eight", max_model_len=2048)
    net = network(desk)
    out = tmp_path / "out"
    assert bench(net.url + "/v1/", *FEW, *EASY, "--rates", 40, 80, "--out", out) == 0

    result = json.loads((out / "result.json").read_text())
    assert [(point["rate"], point["passed"]) for point in result["points"]] == [(40, True), (80, True)]
    assert result["goodput"] == {"rate": 80, "failed_at": None}
    assert result["server"]["model"] == TEXT.name
    assert result["server"]["context"] == 2048
    assert "qwen" in result["load"]["source"]
    assert "--rates 40 80" in result["provenance"]["command"]
    assert result["targets"]["text"]["ttft_s"] == 5.0
    for point in result["points"]:
        (run,) = point["runs"]
        assert run["score"]["overall"]["num"] == 12
        assert run["score"]["overall"]["joint"] == 1.0
        rows = [dict(zip(run["outcomes"]["columns"], row, strict=True)) for row in run["outcomes"]["rows"]]
        assert all(row["num_output"] == 4 and row["ending"] == "finished" for row in rows)
        assert rows[-1]["at_s"] == pytest.approx(11 / point["rate"])
        assert all(0 < row["ttft_s"] <= row["end_s"] for row in rows)
    assert (out / "chart.png").read_bytes().startswith(b"\x89PNG")

    text = (out / "report.html").read_text()
    page = Wellformed()
    page.feed(text)
    assert page.fetched == []
    assert page.tags.count("svg") == 4
    assert "prefers-color-scheme: dark" in text
    assert "80 or more" in text
    quantiles = "".join(f"<th>{name} p50</th><th>p90</th><th>p99</th>" for name in ("TTFT", "TPOT", "ITL"))
    assert text.count(quantiles) == 2, "by rate and by class"
    assert "Goodput: 80 or more requests/s" in capsys.readouterr().out

    # what the fake got: warm-up and lone requests without targets, then 24 with them; no prompt twice
    kinds = len(result["alone"]["num_prompt"])
    asked = desk.link.requests
    assert len(asked) == 2 + 5 * kinds + 24
    assert sum(request.slo.ttft_s is not None for request in asked) == 24
    assert {request.slo for request in asked} == {SLO(), SLO(ttft_s=5.0, tpot_s=5.0)}
    assert len({request.prompt for request in asked if len(request.prompt) > 3}) == len(
        [request for request in asked if len(request.prompt) > 3]
    )
    lengths = sorted(row[2] for row in result["points"][0]["runs"][0]["outcomes"]["rows"])
    assert sorted(len(request.prompt) for request in asked[-24:]) == sorted(lengths * 2)


def test_a_server_that_refuses_everybody(network: Open, tmp_path: Path) -> None:
    """Whatever comes with a target is refused: no rate is good, and the server's words are kept."""
    desk = Desk("one two three four five")
    net = network(desk)
    submit_as_ever = desk.link.submit

    def submit(request: Any, hear: Any) -> None:
        submit_as_ever(request, hear)
        if request.slo.ttft_s:
            desk.link.end_soon(request.id, Fate("refused", "queue_full", "Too many wait.", 1.0))

    desk.link.submit = submit  # type: ignore[method-assign]
    out = tmp_path / "out"
    assert bench(net.url, *FEW, *EASY, "--rates", 100, "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    (run,) = result["points"][0]["runs"]
    assert result["goodput"] == {"rate": 0.0, "failed_at": 100}
    assert run["score"]["overall"]["num_refused"] == 12
    assert run["score"]["reasons"] == {"503": 12}
    assert "Too many wait" in run["complaints"]["503"]
    assert run["score"]["overall"]["ttft_s"]["p50"] is None


def test_the_search_finds_where_the_server_begins_to_refuse(network: Open, tmp_path: Path) -> None:
    """It refuses while the last ten came at more than 72 requests/s: of 25, 50 and 100 the second is the last good."""
    desk = Desk("one two three four five", max_model_len=2048)
    net = network(desk)
    submit_as_ever = desk.link.submit
    begun: list[float] = []

    def submit(request: Any, hear: Any) -> None:
        submit_as_ever(request, hear)
        begun.append(request.arrival)
        if len(begun) > 10 and begun[-1] - begun[-11] < 10 / 72 and request.slo.ttft_s:
            desk.link.end_soon(request.id, Fate("refused", "queue_full", num_tokens=0))

    desk.link.submit = submit  # type: ignore[method-assign]
    out = tmp_path / "out"
    few = ["--num-requests", 30, "--max-tokens", 1, "--arrivals", "uniform", "--repeats", 1]
    assert bench(net.url, *few, *EASY, "--start", 25, "--tolerance", 1, "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["goodput"] == {"rate": 50, "failed_at": 100}
    assert [point["passed"] for point in result["points"]] == [True, True, False]


def test_two_servers_in_turns(network: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A B B A; both get the same lengths at the same instants."""
    says = "one two three four five"
    one, other = Desk(says, max_model_len=2048), Desk(says, max_model_len=1024)
    a, b = network(one), network(other)
    out = tmp_path / "out"
    code = bench("--compare", f"old={a.url}", f"new={b.url}", *FEW, *EASY, "--rates", 100, "--blocks", 1, "--out", out)
    assert code == 0
    result = json.loads((out / "result.json").read_text())
    assert [run["server"] for run in result["runs"]] == ["old", "new", "new", "old"]
    assert len({run["token_seed"] for run in result["runs"]}) == 4
    assert all(run["score"]["overall"]["num"] == 12 for run in result["runs"])
    ratios = {ratio["name"]: ratio for ratio in result["ratios"]}
    ttft = ratios["TTFT p50, answered (s)"]
    assert ttft["ratio"] == pytest.approx(ttft["b"] / ttft["a"])
    assert ttft["low"] <= ttft["ratio"] <= ttft["high"]
    lengths = [sorted(len(r.prompt) for r in desk.link.requests if r.slo.ttft_s) for desk in (one, other)]
    assert lengths[0] == lengths[1]
    assert len(lengths[0]) == 24
    told = capsys.readouterr().out
    assert "few blocks (1)" in told
    assert "new against old" in (out / "report.html").read_text()


def test_a_comparison_is_judged_by_what_was_asked(
    network: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """First tokens come at once, a pace of a millionth of a second nobody keeps: by first tokens alone all are in time,
    in sum and of each class, and the report says of which targets it speaks."""
    slo = ["--slo", *(f"{kind}=5000:0.001" for kind in ("text", "image", "search", "file"))]
    few = ["--num-requests", 12, "--max-tokens", 9, "--seed", 1, "--rates", 100, "--blocks", 1]
    net, out = network(Desk("one two three four five", max_model_len=2048)), tmp_path / "out"
    assert bench("--compare", f"a={net.url}", f"b={net.url}/", *few, *slo, "--ttft-only", "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    assert "share" not in result, "nothing is judged by it"
    shares = {one["name"]: (one["a"], one["b"]) for one in result["ratios"] if one["name"].startswith("attained")}
    kinds = list(dict.fromkeys(row[0] for row in result["runs"][0]["outcomes"]["rows"]))
    name = "attained, TTFT target"
    assert shares == {name: (1.0, 1.0)} | {f"{name}: {kind}": (1.0, 1.0) for kind in kinds}
    told = capsys.readouterr().out
    assert all(f"\n{one} " in told for one in shares)
    report = (out / "report.html").read_text()
    assert "a: attained, TTFT target" in report
    assert "<th>TTFT target</th>" in report
    assert "all targets" not in report
    assert bench("--compare", f"a={net.url}", f"b={net.url}/", *few, *slo, "--out", out) == 0
    assert "\nattained, all targets " in capsys.readouterr().out


def test_targets_go_along_in_headers_unless_they_are_to_be_kept_secret(network: Open) -> None:
    desk = Desk("one two")
    server = asyncio.run(meet(Server(network(desk).url)))
    targets = {"text": SLO(ttft_s=0.25, tpot_s=0.1)}
    ask(server, Asked(0.0, 5, 2, "text"), Asked(0.01, 5, 2, "file"), targets=targets)
    ask(server._replace(send_slo=False), Asked(0.0, 5, 2, "text"), targets=targets)
    assert [request.slo for request in desk.link.requests] == [targets["text"], SLO(), SLO()]


def test_words_for_a_server_that_takes_no_ids(network: Open) -> None:
    """About as many tokens as were asked for."""
    desk = Desk("one two")
    server = asyncio.run(meet(Server(network(desk).url, as_text=True)))
    (outcome,), _ = ask(server, Asked(0.0, 40, 2, "text"))
    assert outcome.ending == "finished"
    assert 40 <= len(desk.link.requests[0].prompt) <= 80


def test_a_chat(network: Open, tmp_path: Path) -> None:
    """The whole command asks for chats: each prompt is words in one message of the user, in the model's template."""
    desk = Desk("one two three four five six seven eight", max_model_len=2048)
    out = tmp_path / "out"
    assert bench(network(desk).url, *FEW, *EASY, "--length-scale", 0.1, "--rates", 100, "--chat", "--out", out) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["server"]["chat"]
    (run,) = result["points"][0]["runs"]
    rows = [dict(zip(run["outcomes"]["columns"], row, strict=True)) for row in run["outcomes"]["rows"]]
    assert all(row["num_output"] == 4 and row["ending"] == "finished" for row in rows)
    assert all(0 < row["ttft_s"] <= row["end_s"] for row in rows)
    template = TEXT.chat_template
    assert template is not None
    before, _, after = template.render([{"role": "user", "content": "|"}]).partition("|")
    said = [TEXT.tokenizer.decode(request.prompt, skip_special_tokens=False) for request in desk.link.requests]
    assert all(one.startswith(before) and one.endswith(after) for one in said)
    lengths = sorted(len(one.removeprefix(before).removesuffix(after).split()) for one in said[-12:])
    assert lengths == sorted(row["num_prompt"] for row in rows)


def test_an_engine_that_fails_midway(network: Open) -> None:
    """What began and broke off is failed, though it has a time to its first token."""
    desk = Desk("one two three four five")
    desk.link.fate = Fate("failed", "engine_lost", "The engine died.", num_tokens=2)
    (outcome,), _ = ask(Server(network(desk).url), Asked(0.0, 5, 5, "text"))
    assert (outcome.ending, outcome.reason) == ("failed", "error in stream")
    assert outcome.ttft_s is not None


class Odd:
    """A server in a few lines, for what the door does not do."""

    def __init__(self, answer: Callable[[dict[str, Any]], Response]) -> None:
        async def completions(request: Request) -> Response:
            return answer(await request.json())

        async def models(request: Request) -> Response:
            return JSONResponse({"data": [{"id": "odd"}]})

        asked = [Route(f"/v1/{kind}", completions, methods=["POST"]) for kind in ("completions", "chat/completions")]
        self.app = Starlette(routes=[*asked, Route("/v1/models", models)])


def odd(network: Open, answer: Callable[[dict[str, Any]], Response]) -> Server:
    desk = Desk()
    desk.app = Odd(answer).app
    return Server(network(desk).url)


def stream(*events: str, pause_s: float = 0.0) -> StreamingResponse:
    async def sent() -> Any:
        for event in events:
            yield event.encode()
            await asyncio.sleep(pause_s)

    return StreamingResponse(sent(), media_type="text/event-stream")


def test_times_are_those_of_texts_and_lengths_those_of_usage(network: Open) -> None:
    """Spaces in the JSON, a comment, an event with three tokens, an empty last one, a usage: as other servers do it."""
    server = odd(
        network,
        lambda body: stream(
            ": hello\n\n",
            'data: {"choices": [{"text": "a"}]}\r\n\r\n',
            'data: {"choices": [{"text": "bcd"}]}\n\n',
            'data: {"choices": [{"text": "", "finish_reason": "length"}], "usage": null}\n\n',
            'data: {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 4}}\n\ndata: [DONE]\n\n',
            pause_s=0.1,
        ),
    )
    (outcome,), _ = ask(server, Asked(0.0, 5, 4, "text"))
    assert (outcome.ending, outcome.num_output) == ("finished", 4)
    assert len(outcome.gaps_s) == 1
    assert outcome.gaps_s[0] >= 0.09
    assert outcome.tpot_s == pytest.approx(outcome.gaps_s[0] / 3)
    assert outcome.ttft_s is not None
    assert 0.09 <= outcome.ttft_s <= outcome.end_s - 0.25


def test_a_piece_of_a_chat_without_content_is_no_token(network: Open) -> None:
    """The role that opens it, a null and an empty end bring nothing; what does comes in two pieces, of four tokens."""
    bodies: list[dict[str, Any]] = []

    def answer(body: dict[str, Any]) -> Response:
        bodies.append(body)
        return stream(
            'data: {"choices":[{"delta":{"role":"assistant","content":""}}]}\n\n',
            'data: {"choices": [{"delta": {"role": "assistant", "content": null}}]}\n\n',
            'data: {"choices":[{"delta":{"content":"a"}}]}\n\n',
            'data: {"choices": [{"delta": {"content": "\\"content\\":\\"\\""}}]}\n\n',
            'data: {"choices":[{"delta":{},"finish_reason":"length"}]}\n\n',
            'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":4}}\n\ndata: [DONE]\n\n',
            pause_s=0.1,
        )

    (outcome,), _ = ask(odd(network, answer)._replace(chat=True), Asked(0.0, 3, 4, "text"))
    assert (outcome.ending, outcome.num_output, len(outcome.gaps_s)) == ("finished", 4, 1)
    assert outcome.ttft_s is not None
    assert 0.19 <= outcome.ttft_s <= outcome.end_s - 0.25
    assert outcome.tpot_s == pytest.approx(outcome.gaps_s[0] / 3)
    (body,) = bodies
    assert [(one["role"], len(one["content"].split())) for one in body["messages"]] == [("user", 3)]
    assert "prompt" not in body
    assert body["stream_options"] == {"include_usage": True}


@pytest.mark.parametrize(
    ("events", "reason"),
    [
        (["data: [DONE]\n\n"], "broken stream"),  # an answer of nothing
        (['data: {"choices":[{"text":"a"}]}\n\n'], "broken stream"),  # it never said that it was done
        (['data: {"error": {"message": "no"}}\n\n', "data: [DONE]\n\n"], "error in stream"),
    ],
)
def test_a_stream_that_is_no_whole_answer_has_failed(network: Open, events: list[str], reason: str) -> None:
    (outcome,), _ = ask(odd(network, lambda body: stream(*events)), Asked(0.0, 5, 4, "text"))
    assert (outcome.ending, outcome.reason) == ("failed", reason)


def test_errors_are_counted_by_their_code_and_nothing_is_tried_twice(network: Open) -> None:
    """429 and 503 refuse; anything else failed. As many calls as requests."""
    statuses = [429, 503, 500, 418]
    calls: list[int] = []

    def answer(body: dict[str, Any]) -> Response:
        calls.append(statuses[len(calls)])
        return JSONResponse({"error": {"message": f"it is {calls[-1]}"}}, calls[-1], {"retry-after": "0"})

    outcomes, complaints = ask(odd(network, answer), *(Asked(0.1 * n, 5, 4, "text") for n in range(4)))
    assert [(o.ending, o.reason) for o in outcomes] == [
        ("refused", "429"),
        ("refused", "503"),
        ("failed", "500"),
        ("failed", "418"),
    ]
    assert complaints["429"] == "it is 429"
    assert len(calls) == 4


def test_a_slow_server_does_not_slow_the_generator(network: Open) -> None:
    """Open loop: the second is sent at its instant although the first is not answered yet."""
    at: list[float] = []

    def answer(body: dict[str, Any]) -> Response:
        at.append(asyncio.get_running_loop().time())
        return stream('data: {"choices":[{"text":"a"}]}\n\n', "data: [DONE]\n\n", pause_s=0.5)

    (first, second), _ = ask(odd(network, answer), Asked(0.0, 5, 1, "text"), Asked(0.1, 5, 1, "text"))
    assert 0.05 <= at[1] - at[0] <= 0.4
    assert min(first.end_s, second.end_s) >= 0.5


def test_a_server_that_does_not_answer_in_time(network: Open) -> None:
    server = odd(network, lambda body: stream("data: {}\n\n", "data: {}\n\n", pause_s=2.0))
    (outcome,), _ = ask(server._replace(timeout_s=0.3), Asked(0.0, 5, 1, "text"))
    assert (outcome.ending, outcome.reason, outcome.ttft_s) == ("failed", "timeout", None)


def test_a_server_that_ends_meanwhile() -> None:
    """It is told, and not taken for a rate that was too high."""
    from headway.bench.measure import Bench

    load = Load("l", "", (Asked(0.0, 3, 1), Asked(0.1, 3, 1)))
    with pytest.raises(ServerError, match="any more: none of 2 requests"):
        Bench(load, 1000, 1, lambda what, total: lambda: None).at(Server("http://127.0.0.1:9"), 20.0, {})


def test_results_have_a_place_before_they_are_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file stands where the folder would be: said at once, before any server is asked."""
    (tmp_path / "out").write_text("")
    assert bench("http://127.0.0.1:9", "--out", tmp_path / "out" / "deeper") == 1
    assert "cannot be written to" in capsys.readouterr().err


def test_what_is_told_is_what_was_judged(network: Open, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """First tokens come at once, a pace of a millionth of a second nobody keeps: by first tokens alone all are in time,
    and the report says that of them and of no others."""
    slo = ["--slo", *(f"{kind}=5000:0.001" for kind in ("text", "image", "search", "file"))]
    few = ["--num-requests", 12, "--max-tokens", 9, "--seed", 1, "--rates", 40]
    net = network(Desk("one two three four five", max_model_len=2048))
    out = tmp_path / "out"
    assert bench(net.url, *few, *slo, "--ttft-only", "--out", out) == 0
    told = capsys.readouterr().out
    assert "Goodput: 40 or more requests/s with 90% of every class in time for their first token." in told
    assert "100.0%" in told
    report = (out / "report.html").read_text()
    assert "90% of every class in time for their first token" in report
    assert "Requests that attained their TTFT target" in report
    assert bench(net.url, *few, *slo, "--out", out) == 0
    assert "Goodput: under 40 requests/s with 90% of every class in time." in capsys.readouterr().out


def test_the_terminal_tells_quantiles_of_both_within_its_width() -> None:
    """A hundred first tokens up to 15 s, paces up to 100 ms: p50, p90 and p99 of each, in 100 columns."""
    outcomes = tuple(
        Outcome("search", float(n), 3, 9, "finished", 60.0, 0.15 * (n + 1), 0.001 * (n + 1)) for n in range(100)
    )
    run = Run(10.25, 1, score(outcomes, {}), outcomes, {"p99": 0.0}, {})
    header, row, *_ = lines(Found(10.25, math.inf, (Point(10.25, [run], {"search": 1.0}, True),)), 0.9)
    assert " ".join(header.split()) == "requests/s attained worst class TTFT p50 p90 p99 TPOT p50 p90 p99"
    assert "  7500 ms   13.5 s   14.8 s   50.0 ms  90.0 ms  99.0 ms  passed" in row
    assert len(row) <= 100


@pytest.mark.parametrize(("num_output", "num_asked", "warns"), [(5, 100, True), (100, 100, False), (5, 0, False)])
def test_answers_that_are_shorter_than_asked(num_output: int, num_asked: int, warns: bool) -> None:
    """A server that ends them early does less, and is quicker for it; who does not say how long they were is not
    judged."""
    outcomes = tuple(
        Outcome("text", float(n), 3, num_output, "finished", 1.0, 0.5, num_asked=num_asked) for n in range(12)
    )
    run = Run(1.0, 1, score(outcomes, {}), outcomes, {"p99": 0.0}, {})
    told = warnings([run])
    assert told == (["Careful: half of the answers had no more than 5% of their tokens: less work was done."] * warns)


def test_a_target_that_a_lone_request_misses(
    network: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No rate could be found, and looking for one would take hours. Nothing is left behind."""
    monkeypatch.chdir(tmp_path)
    net = network(Desk("one two three four five", max_model_len=2048))
    assert bench(net.url, *FEW, "--slo", "text=0.001") != 0
    assert list(tmp_path.iterdir()) == []
    assert "No rate can keep text's TTFT target of 0.001 ms: a lone request takes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("slo", "alone_s", "share", "num_output", "ttft_only", "refused"),
    [
        (SLO(ttft_s=0.2), (0.4, 0.01), 0.9, 9, False, True),  # the p90 prompt alone takes twice as long
        (SLO(ttft_s=0.2), (0.4, 0.01), 0.5, 9, False, False),  # but half of them may be late
        (SLO(ttft_s=1.0, tpot_s=0.005), (0.4, 0.01), 0.9, 9, False, True),
        (SLO(ttft_s=1.0, tpot_s=0.005), (0.4, 0.01), 0.9, 9, True, False),
        (SLO(ttft_s=1.0, tpot_s=0.005), (0.4, 0.01), 0.9, 1, False, False),  # one token has no pace
    ],
)
def test_what_no_rate_can_keep(
    slo: SLO, alone_s: tuple[float, float], share: float, num_output: int, ttft_only: bool, refused: bool
) -> None:
    options = argparse.Namespace(share=share, ttft_only=ttft_only)
    load = Load("l", "", (Asked(0.0, 3, num_output, "text"),))
    ttft_s, tpot_s = alone_s
    with pytest.raises(ValueError, match="No rate can keep") if refused else nullcontext():
        check_reachable(options, load, {"text": slo}, {"text": ttft_s}, tpot_s)


def test_a_place_that_cannot_be_written_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is there, but no file can be made in it: told before anything is measured."""
    assert bench("http://127.0.0.1:9", *FEW, "--out", "/proc") != 0
    assert "--out /proc cannot be written to" in capsys.readouterr().err


def test_nobody_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("http://127.0.0.1:9", "--rates", 1) == 1
    assert "headway: Nobody answers at http://127.0.0.1:9: start the server first" in capsys.readouterr().err


def test_a_server_that_refuses_ids_is_told_about_text(network: Open, capsys: pytest.CaptureFixture[str]) -> None:
    server = odd(network, lambda body: JSONResponse({"error": {"message": "prompt must be a string."}}, 400))
    assert bench(server.url, "--rates", 1) == 1
    said = capsys.readouterr().err
    assert "ended with 400: prompt must be a string; if it takes no token ids, give --text." in said


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "give the URL of a server"),
        (["localhost:8000"], "a server is given as http://HOST:PORT, not 'localhost:8000'"),
        (["http://a", "--num-requests", "3"], "at least 10"),
        (["http://a", "--rates", "0"], "it must be a positive number, not '0'"),
        (["http://a", "--class-mix", "video=1"], "it must be like text=0.7,search=0.3"),
        (["http://a", "--slo", "text"], "it must be like text=250 or text=250:100"),
        (["http://a", "--arrivals", "trace"], "the load qwen has no arrivals"),
        (["--compare", "http://a", "http://b"], "needs one rate"),
        (["http://c", "--compare", "http://a", "http://b"], "not both"),
        (["--compare", "x=http://a", "x=http://b", "--rates", "1"], "different labels"),
        (["--compare", "http://a", "http://b", "--rates", "1", "--share", "0.9"], "--share has no meaning with --comp"),
        (["--compare", "http://a", "http://b", "--rates", "1", "--repeats", "2"], "--repeats has no meaning with"),
    ],
)
def test_wrong_flags_are_told_in_one_sentence(args: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        bench(*args)
    assert left.value.code == 2
    said = capsys.readouterr().err
    assert says in said
    assert said.count("\n") == 1


def test_without_the_extra_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    assert bench("http://a", "--rates", 1) == 1
    assert capsys.readouterr().err == "headway: `headway bench` needs its extra: pip install 'headway[bench]'.\n"


def test_a_key_is_not_kept(network: Open, tmp_path: Path) -> None:
    """It opens the door and is in no file afterwards."""
    net = network(Desk("one two three four five", max_model_len=2048, api_key=("sesame",)))
    with pytest.raises(ServerError, match="wants an API key"):
        asyncio.run(meet(Server(net.url)))
    out = tmp_path / "out"
    assert bench(net.url, *FEW, "--rates", 100, "--api-key", "sesame", "--out", out) == 0
    assert all(b"sesame" not in path.read_bytes() for path in out.iterdir())


def test_a_chart_takes_the_colours_of_its_page() -> None:
    """No ink of its own, nothing fetched, a name for those who cannot see it."""
    panel = Panel(
        "A & B", "x", "y", [Curve("one", [1, 2], [3, 4]), Curve("two", [1, 2], [4, 3], "dashed")], [Mark("x", 1.5)]
    )
    drawn = svg(panel)
    assert drawn.startswith("<svg")
    assert "currentColor" in drawn
    assert "#010203" not in drawn
    assert 'aria-label="A &amp; B"' in drawn
    assert ">two<" in drawn
    assert svg(panel) == drawn
    ids = set(re.findall(r'id="([^"]*)"', drawn))
    references = set(re.findall(r"url\(#([^)]*)\)", drawn))
    assert references <= ids
    assert not references & set(re.findall(r'id="([^"]*)"', svg(panel, "another")))


def test_those_who_never_got_a_token_keep_the_curve_low() -> None:
    assert cdf([2.0, 1.0], 4) == ([1.0, 1.0, 2.0], [0.0, 0.25, 0.5])
    assert cdf([], 4) == ([], [])
