"""`headway simulate`: a load on devices that are prices only."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from headway.bench import simulated, simulated_flags
from headway.bench.load import prompts
from headway.bench.policies import EXAMPLE_FIT, policies, simulate
from headway.bench.simulated import Simulator, blank_prompts
from headway.bench.simulated_flags import UNDIVIDED
from headway.cli import main
from headway.config import EngineSettings
from headway.core.cost import CostFit, Share
from headway.core.settings import SchedulerSettings
from headway.placement import prices
from headway.placement.simulate import Simulation
from headway.stages.tiling import Rates

SHORT = ["qwen", "--length-scale", "1/16", "--max-tokens", "1", "--seed", "1", "--num-requests", "120"]
FIT = '{"step_s": 0.02, "token_s": 0.001, "segment_s": 0.003, "pair_s": 1e-7}'
NO_FIT = '{"step_s": 0.02}'


@pytest.fixture(autouse=True)
def _no_traces_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads are drawn, here as everywhere."""
    monkeypatch.delenv("HEADWAY_DATA", raising=False)


def simulator(*words: str) -> Simulator:
    return Simulator(simulated_flags.parse([*SHORT, *words]))


def engine_file(fit: str, kept_format: int = prices.FORMAT) -> str:
    rates = json.dumps(dict.fromkeys(Rates.__dataclass_fields__, 1e9))
    prices_ = f'{{"rates": {rates}, "fit": {fit}, "error": 0.1}}'
    return f'{{"format": {kept_format}, "measured_at": 1.0, "prices": {prices_}}}'


# Schedulers


def test_every_scheduler_is_a_few_switches_away_from_ours() -> None:
    """All of the table: what a name says differs from ours, and nothing else."""
    base = SchedulerSettings(max_model_len=100)
    unrefused = replace(base, refuse_unattainable=False)
    assert policies(base, (16, 2048)) == {
        "operator": base,
        "layer": replace(base, preempt="layer"),
        "none": replace(base, preempt="none"),
        "deadline, none": replace(base, preempt="none", order="deadline"),
        "fcfs": replace(unrefused, preempt="none", order="fcfs", pack=False),
        "fcfs, packed": replace(unrefused, preempt="none", order="fcfs"),
        "chunk 16": replace(base, preempt="chunk", chunk_tokens=16),
        "chunk 2048": replace(base, preempt="chunk", chunk_tokens=2048),
        "chunk 16, fcfs": replace(unrefused, preempt="chunk", order="fcfs", chunk_tokens=16),
        "chunk 2048, fcfs": replace(unrefused, preempt="chunk", order="fcfs", chunk_tokens=2048),
    }


def test_each_word_of_the_command_is_one_of_them() -> None:
    """Any size of a chunk may be asked for; the same word twice is one."""
    found = simulator("--policies", "ours, layer,none,deadline-none,fcfs,chunk:77,chunk:77:fcfs,ours").plan.schedulers
    known = policies(found["ours"], (77,))
    assert found == {
        "ours": known["operator"],
        "layer": known["layer"],
        "none": known["none"],
        "deadline-none": known["deadline, none"],
        "fcfs": known["fcfs"],
        "chunk:77": known["chunk 77"],
        "chunk:77:fcfs": known["chunk 77, fcfs"],
    }


def test_one_made_of_switches() -> None:
    """Under a name that says them; those that hold whatever the policy go with the policies, too."""
    asked = simulator("--order", "deadline", "--preempt", "chunk", "--chunk-tokens", "48").plan.schedulers
    (settings,) = asked.values()
    assert list(asked) == ["order deadline, preempt chunk, chunk tokens 48"]
    assert (settings.order, settings.preempt, settings.chunk_tokens) == ("deadline", "chunk", 48)
    both = simulator("--no-pack", "--no-refuse-unattainable", "--policies", "ours,layer").plan.schedulers
    assert [(one.pack, one.refuse_unattainable) for one in both.values()] == [(False, False)] * 2
    assert list(simulator("--order", "slack").plan.schedulers) == ["ours"]


def test_tokens_ride_along_unless_told_otherwise() -> None:
    """As in the server; and the switch holds for every policy. It makes another run of answers, not of first tokens."""
    assert [simulator().plan.schedulers["ours"].lanes, EngineSettings().lanes] == ["mixed"] * 2
    turns = simulator("--lanes", "turns", "--policies", "ours,layer").plan.schedulers
    assert [settings.lanes for settings in turns.values()] == ["turns"] * 2
    for num_answer, differ in (("20", True), ("1", False)):
        words = ("--rate", "1", "--max-tokens", num_answer)
        runs = [simulator(*words, "--lanes", lanes).run().tried["ours"].runs[1.0] for lanes in UNDIVIDED]
        assert (runs[0].score != runs[1].score) is differ


# Runs


def test_the_same_seed_gives_the_same_run() -> None:
    """And another seed another one."""
    results = [simulator("--spread", "0.2", "--rate", "2", "--seed", seed).run() for seed in ("3", "3", "4")]
    runs = [result.tried["ours"].runs[2.0] for result in results]
    assert (runs[0].score, runs[0].counters) == (runs[1].score, runs[1].counters)
    assert runs[0].score != runs[2].score


def test_rates_may_be_multiples_of_the_loads_own() -> None:
    """Half and twice as fast as it is; not both ways at once."""
    one = simulator("--rate-scale", "0.5", "2")
    assert one.options.rates == pytest.approx([one.load.rate / 2, 2 * one.load.rate])
    assert one.run().shown_rates == pytest.approx(one.options.rates)
    with pytest.raises(SystemExit):
        simulator("--rate-scale", "2", "--rates", "1")


def test_two_devices_serve_nearly_twice_as_much() -> None:
    """The load goes to whoever has less to do."""
    one, two = (simulator("--devices", number).find("ours").every_class.rate for number in ("1", "2"))
    assert 1.7 * one < two < 3.0 * one  # more than twice: of two one is free sooner


def test_ours_beats_first_come_first_served() -> None:
    """The reason for all this, in prices: several times the goodput when every class counts. All together are easier
    to satisfy than every class."""
    tried = simulator("--policies", "ours,fcfs").run().tried
    assert tried["ours"].every_class.rate > 3 * tried["fcfs"].every_class.rate > 0
    for one in tried.values():
        assert one.every_class.rate <= one.all_in_one.rate < one.all_in_one.failed_at


def test_all_are_shown_at_the_goodput_of_the_first() -> None:
    """Or else, one would see of each only that it passes at its own."""
    result = simulator("--policies", "ours,fcfs").run()
    assert result.shown_rates == [result.tried["ours"].every_class.rate]
    shares = [min(one.runs[result.shown_rates[0]].score.shares().values()) for one in result.tried.values()]
    assert shares[0] >= 0.9 > shares[1]


def test_it_is_asked_only_when_something_happens() -> None:
    """What makes it fast: two decisions a request, about three for one that others suspend; and a step whose tiles
    nobody interrupts is not gone through tile by tile, although a request costs twenty of them."""
    watched: list[Simulation] = []
    one = Simulator(simulated_flags.parse([*SHORT, "--rate", "2"]), lambda what, engines: watched.extend(engines))
    run = one.run().tried["ours"].runs[2.0]
    (engine,) = watched
    assert len(engine.ended) == 120
    assert run.counters["plans"] == engine.scheduler.counters["plans"] <= 2.5 * 120
    num_tiles = sum(EXAMPLE_FIT.seconds([Share(asked.num_prompt, 0)]) for asked in one.load.requests)
    assert engine.driver.num_tiles <= 3 * 120 < 0.25 * num_tiles / one.plan.device.tile_s


def test_tokens_that_nobody_looks_at_need_not_be_made() -> None:
    """Without shared beginnings the scheduler decides the same, whatever the tokens are."""
    one = simulator()
    load = one.load.at_rate(3.0)
    given = [
        simulate(load, texts, one.slos, one.plan.schedulers["ours"], one.plan.device)
        for texts in (blank_prompts(load), prompts(load, 1000, 0))
    ]
    assert [len(text) for text in blank_prompts(load)] == [asked.num_prompt for asked in load.requests]
    assert given[0] == given[1]
    assert len(set(simulator("--prefix-caching").prompts)) > 60


def test_counters_of_several_devices() -> None:
    """Are sums, but for those that are maxima."""
    one, watched = simulator("--devices", "3", "--rate", "9"), []
    run = simulate(
        one.load.at_rate(9.0),
        one.prompts,
        one.slos,
        one.plan.schedulers["ours"],
        one.plan.device,
        3,
        watch=watched.extend,
    )
    each = [engine.scheduler.counters for engine in watched]
    assert run.counters["finished"] + run.counters["refused"] == 120
    assert run.counters["plans"] == sum(counters["plans"] for counters in each)
    assert run.counters["most_parked_tokens"] == max(counters["most_parked_tokens"] for counters in each) > 0


# Prices and targets


def test_targets_are_multiples_of_what_the_prices_say() -> None:
    """Of the text class's p90 prompt alone; the other classes' in proportion. Tokens have none unless asked for."""
    one = simulator("--slo-k", "3")
    alone_s = EXAMPLE_FIT.seconds([Share(one.num_alone, 0)])
    assert one.slos["text"].ttft_s == pytest.approx(3 * alone_s)
    assert one.slos["search"].ttft_s == pytest.approx(16 * 3 * alone_s)
    assert one.slos["text"].tpot_s is None
    paced = simulator("--tpot-k", "4")
    assert paced.slos["file"].tpot_s == pytest.approx(4 * EXAMPLE_FIT.seconds([Share(1, paced.num_alone)]))


def test_a_scheduler_that_believes_other_prices() -> None:
    """What it believes is wrong at first; what steps take, and so the targets, stay."""
    wrong = simulator("--misprediction", "0.5")
    assert wrong.plan.device.fit == EXAMPLE_FIT
    assert wrong.plan.device.believed == CostFit(*(0.5 * price for price in (0.070, 1.93e-3, 1e-3, 6.7e-7)))
    assert wrong.slos == simulator().slos


def test_prices_from_a_file(tmp_path: Path) -> None:
    """The four by themselves, or a file as an engine keeps it, written by the same code."""
    plain, kept = tmp_path / "plain.json", tmp_path / "kept.json"
    plain.write_text('{"step_s": 0.01, "token_s": 0.001}')
    assert simulated_flags.fit_of(str(plain)) == CostFit(0.01, 0.001, 0.0, 0.0)
    fit = CostFit(0.02, 0.001, 0.003, 1e-7)
    of_engine = prices.Kept(prices.FORMAT, time.time(), prices.Prices(Rates(*[1e9] * 7), fit, 0.05))
    assert prices.write(kept, of_engine) == ""
    assert simulated_flags.fit_of(str(kept)) == fit
    assert simulator("--costs", str(kept)).plan.fit == fit
    kept.write_text(engine_file(FIT))
    assert simulated_flags.fit_of(str(kept)) == fit
    assert simulated_flags.fit_of("default") == EXAMPLE_FIT


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no prices"),
        ("step_s: 1", "holds no prices"),
        ("[1, 2]", "holds no prices"),
        (NO_FIT, "missing required field `token_s`"),
        ('{"step_s": "much", "token_s": 1}', "Expected `float`, got `str`"),
        ('{"step_s": 0.01, "token_s": 0.001, "tokens": 3}', "unknown field `tokens`"),
        ('{"step_s": 0.01, "token_s": 0}', "a token costs something"),
        ('{"step_s": -1, "token_s": 0.001}', "between 0 and 1000 seconds"),
        ('{"step_s": 0.01, "token_s": 1e300}', "between 0 and 1000 seconds"),
        ('{"prices": {}}', "missing required field"),
        (engine_file(NO_FIT), "missing required field `token_s`"),
        (engine_file(FIT, kept_format=99), "another version"),
        ("__import__('os').abort()", "holds no prices"),
        (" " * (1 << 21), "larger than any file of prices"),
    ],
)
def test_a_file_without_prices(content: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence and code 1, whatever is in it."""
    path = tmp_path / "costs.json"
    path.write_text(content)
    assert main(["simulate", *SHORT, "--rate", "1", "--costs", str(path)]) == 1
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


# The command


def test_the_whole_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two schedulers at two rates: tables on stdout; a document, a picture and a page in a folder that it makes."""
    pytest.importorskip("matplotlib", reason="the picture needs headway[bench]")
    folder = tmp_path / "some" / "folder"
    words = ["simulate", *SHORT, "--rates", "2", "1", "--policies", "ours,fcfs", "--devices", "2"]
    assert main([*words, "--out", str(folder)]) == 0
    told = capsys.readouterr().out
    assert re.search(r"Highest of the rates, requests/s, with 90% in time\n.*\nours +2 or more +1.00 × ", told)
    assert re.search(
        r"At 1 requests/s, in time\nscheduler +text +image +search +file +all .*\nours .*%\s.*\nfcfs ", told
    )
    assert re.search(r"480 requests simulated in .* s: [\d,]+ a minute.", told)
    document = json.loads((folder / "result.json").read_text())
    assert [run["rate"] for run in document["policies"]["fcfs"]["runs"]] == [1.0, 2.0]
    assert document["policies"]["ours"]["settings"]["preempt"] == "operator"
    assert document["policies"]["ours"]["runs"][1]["score"]["overall"]["num"] == 120
    assert document["provenance"]["command"].startswith("headway simulate qwen --length-scale 1/16")
    assert document["num_devices"] == 2
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 7  # the worst class, all, four classes, scales
    assert "2 devices" in page
    assert not re.search(r'(src|href)="(?!#)', page)


def test_what_is_kept_follows_from_the_flags(tmp_path: Path) -> None:
    """All but when it was made and how long that took, searching included."""
    pytest.importorskip("matplotlib", reason="the picture needs headway[bench]")
    documents: list[dict[str, Any]] = []
    for name in ("a", "b"):
        main(["simulate", "azure-code", *SHORT[1:], "--spread", "0.3", "--seed", "7", "--out", str(tmp_path / name)])
        documents.append(json.loads((tmp_path / name / "result.json").read_text()))
    for document in documents:
        del document["provenance"], document["speed"]
    assert documents[0] == documents[1]
    assert (tmp_path / "a" / "report.html").read_text().count("<svg") == 2  # one class has nothing to be told apart


def test_a_trace_of_ones_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its answers are as long as it says, and so many tokens are drawn."""
    trace = tmp_path / "mine.csv"
    lines = [f"2023-11-16 18:17:{second:02}.0000000,{100 + second},{2 + second % 3}" for second in range(40)]
    trace.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *lines]) + "\n")
    words = [str(trace), "--num-requests", "40", "--rate", "1"]
    run = Simulator(simulated_flags.parse(words)).run().tried["ours"].runs[1.0]
    assert run.score.throughput_tokens * run.score.duration_s == pytest.approx(sum(2 + s % 3 for s in range(40)))
    assert main(["simulate", *words]) == 0
    assert "mine.csv: 40 requests" in capsys.readouterr().out


def test_few_requests_of_a_class_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A tenth of four requests is no measure. Of enough there is nothing to tell."""
    assert main(["simulate", *SHORT, "--rate", "1"]) == 0
    assert "Careful: only" in capsys.readouterr().out
    assert simulator("--num-requests", "1000").load.cautions() == []


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["nothing"], 1, "known are qwen, azure-code, azure-conv, mooncake, or give the path of a trace"),
        ([], 2, "required: LOAD"),
        (["qwen", "--num-requests", "9"], 2, "at least 10"),
        (["qwen", "--length-scale", "1/0"], 2, "positive number"),
        (["qwen", "--seed", "-1"], 2, "whole number from 0 on"),
        (["qwen", "--devices", "1001"], 2, "1000 at most"),
        (["qwen", "--spread", "-1"], 2, "from 0 (exact) to 2"),
        (["qwen", "--misprediction", "1000"], 2, "from 0.01 to 100"),
        (["qwen", "--tile-ms", "nan"], 1, "give 0.1 to 10000"),
        (["qwen", "--num-pages", "4"], 1, "or more, or a smaller --length-scale"),
        (["qwen", "--policies", "magic"], 2, "choose from ours, layer, none, deadline-none, fcfs, chunk:N"),
        (["qwen", "--policies", "chunk:x"], 2, "whole number from 1 on"),
        (["qwen", "--policies", "chunk:8:deadline"], 2, "there is no policy"),
        (["qwen", "--policies", "ours", "--order", "fcfs"], 2, "give that or --policies, not both"),
        (["qwen", "--chunk-tokens", "64"], 2, "give both, or --policies chunk:N"),
        (["qwen", "--out", "/dev/null/folder"], 1, "cannot be written to: Not a directory"),
        (["qwen", "--costs", "/dev/zero"], 1, "larger than any file"),
    ],
)
def test_wrong_flags_are_told_in_one_sentence(
    words: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Code 2 for what cannot be parsed, 1 for what cannot be."""
    if code == 2:
        with pytest.raises(SystemExit, match="2"):
            main(["simulate", *words])
    else:
        assert main(["simulate", *words]) == code
    told = capsys.readouterr().err
    assert says in told
    assert told.count("\n") == 1


def test_help_reads_well(capsys: pytest.CaptureFixture[str]) -> None:
    """It fits a terminal, gives words to every flag, explains every policy, and its examples are commands."""
    with pytest.raises(SystemExit, match="0"):
        main(["simulate", "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 120
    assert all(action.help for action in simulated_flags.parser()._actions)
    for word in simulated_flags.NAMES:
        assert word == "operator" or re.search(rf"^  {word} +\w", text, re.MULTILINE)
    examples = [line.split("   ")[0].split()[2:] for line in text.splitlines() if line.startswith("  headway simulate")]
    assert len(examples) == 5
    for words in examples:
        assert simulated_flags.parse(words).load in ("qwen", "azure-conv", "mooncake")


def test_without_the_extra_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is simulated; and the table alone needs none."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["simulate", *SHORT, "--rate", "1", "--out", str(tmp_path / "out")]) == 1
    told = capsys.readouterr()
    assert "pip install 'headway[bench]'" in told.err
    assert told.out == ""
    assert not (tmp_path / "out").exists()
    code = "import sys; sys.modules['matplotlib'] = sys.modules['aiohttp'] = None; from headway.cli import main; "
    words = ["simulate", *SHORT, "--rate", "1"]
    subprocess.run([sys.executable, "-c", f"{code}sys.exit(main({words}))"], check=True, capture_output=True)


def test_no_tensors_are_needed() -> None:
    """It runs where no torch is, or any server."""
    code = (
        "import sys, headway.bench.simulated as s; sys.exit(bool({'torch', 'aiohttp', 'uvicorn'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert simulated.__doc__
